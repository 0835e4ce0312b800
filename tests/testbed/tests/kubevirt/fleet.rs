//! The simulator at scale, with the chatter left out.

use anyhow::{Context, Result};
use cyberdesk_testbed::kubevirt::{vmis, vms};
use cyberdesk_testbed::node::Speed;
use cyberdesk_testbed::simulator::Detail;
use futures::{StreamExt, TryStreamExt};
use kube::api::{DeleteParams, ListParams, PostParams};
use kube::runtime::{WatchStreamExt, watcher};
use serde_json::json;
use std::time::{Duration, Instant};

use crate::Parts;

const FLEET: usize = 1000;
const PATIENCE: Duration = Duration::from_secs(300);

/// A thousand VMs are made at once, all run, all are deleted, nothing is left.
pub(crate) async fn a_thousand_vms() -> Result<()> {
    let parts = Parts::start(Speed::FAST, Detail::Essential).await?;
    let api = vms(&parts.client, "default");
    let start = Instant::now();
    let creations = (0..FLEET).map(|number| {
        let api = api.clone();
        async move {
            let vm = json!({
                "apiVersion": "kubevirt.io/v1", "kind": "VirtualMachine", "metadata": { "name": format!("vm-{number}") },
                "spec": { "runStrategy": "RerunOnFailure", "template": { "spec": {
                    "domain": { "memory": { "guest": "64Mi" }, "devices": { "disks": [{ "name": "root", "disk": {} }] } },
                    "volumes": [{ "name": "root", "containerDisk": { "image": "example.com/disk:1" } }],
                } } },
            });
            api.create(&PostParams::default(), &serde_json::from_value(vm)?).await?;
            anyhow::Ok(())
        }
    });
    futures::stream::iter(creations).buffer_unordered(32).try_collect::<()>().await?;
    println!("created in {:?}", start.elapsed());

    let ready = async {
        let mut ready = std::collections::HashSet::new();
        let mut stream = watcher(api.clone(), watcher::Config::default()).applied_objects().boxed();
        while ready.len() < FLEET {
            let vm = stream.try_next().await?.context("the watch ended")?;
            if vm.data["status"]["ready"] == true {
                ready.insert(vm.metadata.name);
            }
        }
        anyhow::Ok(())
    };
    tokio::time::timeout(PATIENCE, ready).await.context("waited in vain for all to be ready")??;
    println!("all ready after {:?}", start.elapsed());

    let start = Instant::now();
    api.delete_collection(&DeleteParams::default(), &ListParams::default()).await?;
    let gone = async {
        while !api.list_metadata(&ListParams::default().limit(1)).await?.items.is_empty() {
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
        anyhow::Ok(())
    };
    tokio::time::timeout(PATIENCE, gone).await.context("waited in vain for all to be gone")??;
    println!("all gone after {:?}", start.elapsed());
    let left = vmis(&parts.client, "default").list_metadata(&ListParams::default()).await?.items.len();
    anyhow::ensure!(left == 0, "{left} VMIs are left");
    Ok(())
}
