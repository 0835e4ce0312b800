//! The real KubeVirt: virt-api and virt-controller of a release, as two processes beside the API server.
//!
//! What virt-operator would install is installed here: CRDs, roles, webhooks, the subresource API. The two run under
//! the accounts and with the rights that they have in a cluster. The API server reaches virt-api through a Service that
//! is another name for this machine. The node under them is played ([`crate::node`]); neither virt-handler nor
//! virt-operator runs.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use k8s_openapi::ByteString;
use k8s_openapi::api::coordination::v1::Lease;
use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use kube::api::{Api, ApiResource, DynamicObject, Patch, PatchParams};
use kube::{Client, ResourceExt as _};
use serde_json::json;

use crate::aggregation::{self, API_HOST, NAMESPACE, install_service, resource, subresources_are_served};
use crate::assets::kubevirt::{Pair, Release};
use crate::control_plane::{Authority, ControlPlane, install};
use crate::kubevirt::{CONTROLLER_USER, admission_is_heeded};
use crate::progress::Part;
use crate::scratch::{Scratch, free_port};
use crate::supervise::{Program, Spec, Supervised};

/// Under whose name the objects are applied.
const MANAGER: &str = "virt-operator";
/// virt-api's account.
const API_USER: &str = "system:serviceaccount:kubevirt:kubevirt-apiserver";
/// Installed by virt-operator only when asked, or its own: nobody here would answer them.
const LEFT_OUT: [&str; 2] = ["virt-launcher-pod-mutator", "virt-operator-validator"];
/// How long the two may take to be ready: generous, for a machine that compiles beside them.
const PATIENCE: Duration = Duration::from_secs(120);

/// The running pair. Dropping it ends both; its objects stay in the cluster, and with virt-api gone, VM and VMI writes
/// are refused, as in any cluster.
#[derive(Debug)]
pub struct Real {
    virt_controller: Supervised,
    virt_api: Supervised,
    release: Release,
}

impl Real {
    /// Finds or builds the release, installs it, starts the two and waits until they are at work.
    pub async fn start(control_plane: &ControlPlane, scratch: &Scratch, release: Release, part: &Part) -> Result<Self> {
        let pair = Pair::find(release, part).await?;
        part.step(format!("installing KubeVirt {}", release.version));
        let client = control_plane.client().await?;
        let manifests = pair.manifests()?;
        let authority = Authority::new("kubevirt")?;
        install_kinds(&client, &manifests).await?;
        install_objects(&client, &manifests, &authority).await?;

        part.step("starting virt-api and virt-controller");
        let files = Files::write(control_plane, scratch, &authority)?;
        let port = free_port()?;
        let virt_api = files.spawn("virt-api", Program::new(&pair.virt_api, files.api(port)), scratch)?;
        let controller = Program::new(&pair.virt_controller, files.controller(free_port()?));
        let virt_controller = files.spawn("virt-controller", controller, scratch)?;
        let real = Self { virt_controller, virt_api, release };
        real.until(&real.virt_api, "virt-api listens", async || {
            tokio::net::TcpStream::connect(("127.0.0.1", port)).await.is_ok()
        })
        .await?;

        part.step("registering webhooks and subresources");
        register(&client, &manifests, &authority, port).await?;
        let leases = Api::<Lease>::namespaced(client.clone(), NAMESPACE);
        let leads = async || {
            let lease = leases.get_opt("virt-controller").await.ok().flatten();
            lease.and_then(|lease| lease.spec?.holder_identity).is_some_and(|holder| !holder.is_empty())
        };
        real.until(&real.virt_controller, "virt-controller leads", leads).await?;
        admission_is_heeded(&client).await?;
        subresources_are_served(&client).await?;
        Ok(real)
    }

    /// What runs.
    pub fn release(&self) -> Release {
        self.release
    }

    /// The process of virt-api: to kill, freeze or start again.
    pub fn virt_api(&self) -> &Supervised {
        &self.virt_api
    }

    /// The process of virt-controller.
    pub fn virt_controller(&self) -> &Supervised {
        &self.virt_controller
    }

    async fn until(&self, server: &Supervised, what: &str, holds: impl AsyncFn() -> bool) -> Result<()> {
        let deadline = Instant::now() + PATIENCE;
        while !holds().await {
            if server.has_ended() || Instant::now() > deadline {
                return Err(server.last_words().context(format!("waited in vain until {what}")));
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        Ok(())
    }
}

impl Drop for Real {
    fn drop(&mut self) {
        // Side by side; each field's own drop then waits.
        self.virt_controller.begin_end();
        self.virt_api.begin_end();
    }
}

/// The CRDs: all of them, for both wait for the kinds that they watch.
async fn install_kinds(client: &Client, manifests: &[DynamicObject]) -> Result<()> {
    let kind = |object: &&DynamicObject| kind_of(object) == "CustomResourceDefinition";
    let crds: Vec<CustomResourceDefinition> = manifests
        .iter()
        .filter(kind)
        .map(|crd| Ok(serde_json::from_value(serde_json::to_value(crd)?)?))
        .collect::<Result<_>>()?;
    install(client, &crds).await.context("install KubeVirt's kinds")
}

/// The Service, accounts, roles, certificates' places and the configuration.
async fn install_objects(client: &Client, manifests: &[DynamicObject], authority: &Authority) -> Result<()> {
    install_service(client, MANAGER).await?;
    // Not limited by their own clients: many desktops at once are what is tested here.
    let limit =
        json!({ "restClient": { "rateLimiter": { "tokenBucketRateLimiter": { "qps": 2000, "burst": 4000 } } } });
    let configuration = json!({
        "apiVersion": "kubevirt.io/v1", "kind": "KubeVirt",
        "metadata": { "name": "kubevirt", "namespace": NAMESPACE },
        "spec": { "configuration": {
            "developerConfiguration": { "useEmulation": true },
            "apiConfiguration": limit, "controllerConfiguration": limit, "webhookConfiguration": limit,
        } },
    });
    let mut objects: Vec<DynamicObject> = manifests
        .iter()
        .filter(|object| {
            ["ServiceAccount", "ClusterRole", "ClusterRoleBinding", "Role", "RoleBinding", "ConfigMap"]
                .contains(&kind_of(object))
        })
        .cloned()
        .collect();
    for map in objects.iter_mut().filter(|object| kind_of(object) == "ConfigMap") {
        map.data["data"] = json!({ "ca-bundle": authority.certificate() });
    }
    objects.push(serde_json::from_value(configuration)?);
    // A name that the release lists twice is one object.
    let distinct: BTreeMap<_, _> =
        objects.iter().map(|object| ((kind_of(object), object.namespace(), object.name_any()), object)).collect();
    futures::future::try_join_all(distinct.values().map(|object| apply(client, object))).await?;
    let status = json!({ "status": { "phase": "Deployed", "defaultArchitecture": "amd64" } });
    let kubevirts =
        ApiResource { plural: "kubevirts".to_owned(), ..resource(objects.last().context("it was pushed")?)? };
    Api::<DynamicObject>::namespaced_with(client.clone(), NAMESPACE, &kubevirts)
        .patch_status("kubevirt", &PatchParams::default(), &Patch::Merge(status))
        .await
        .context("say that KubeVirt is deployed")?;
    Ok(())
}

/// Webhooks and aggregated API, by the Service that they name.
async fn register(client: &Client, manifests: &[DynamicObject], authority: &Authority, port: u16) -> Result<()> {
    let bundle = json!(ByteString(authority.certificate().as_bytes().to_vec()));
    let ours = manifests.iter().filter(|object| !LEFT_OUT.contains(&object.name_any().as_str()));
    for object in ours {
        let mut object = object.clone();
        match kind_of(&object) {
            "MutatingWebhookConfiguration" | "ValidatingWebhookConfiguration" => {
                for hook in object.data["webhooks"].as_array_mut().into_iter().flatten() {
                    hook["clientConfig"]["service"]["port"] = json!(port);
                    hook["clientConfig"]["caBundle"] = bundle.clone();
                }
            }
            "APIService" => {
                object.data["spec"]["service"]["port"] = json!(port);
                object.data["spec"]["caBundle"] = bundle.clone();
            }
            _ => continue,
        }
        apply(client, &object).await?;
    }
    Ok(())
}

/// What the two read from disk.
struct Files {
    directory: std::path::PathBuf,
}

impl Files {
    fn write(control_plane: &ControlPlane, scratch: &Scratch, authority: &Authority) -> Result<Self> {
        let directory = scratch.directory("kubevirt", None)?;
        // Apart from the logs: at each change beside their certificates, the two read them anew, and say so in the log.
        let read = directory.join("read");
        std::fs::create_dir_all(&read)?;
        let server = authority.server("virt-api", &[API_HOST])?;
        let client = authority.client("kubevirt.io:system:client:virt-handler", None)?;
        for (name, text) in [
            ("server.crt", server.certificate),
            ("server.key", server.key),
            ("client.crt", client.certificate),
            ("client.key", client.key),
            ("virt-api.kubeconfig", control_plane.kubeconfig_of(API_USER)?),
            ("virt-controller.kubeconfig", control_plane.kubeconfig_of(CONTROLLER_USER)?),
        ] {
            std::fs::write(read.join(name), text).with_context(|| format!("write {name}"))?;
        }
        Ok(Self { directory })
    }

    fn api(&self, port: u16) -> Vec<String> {
        self.args(
            &[
                ("kubeconfig", "virt-api.kubeconfig"),
                ("tls-cert-file", "server.crt"),
                ("tls-key-file", "server.key"),
                ("handler-cert-file", "client.crt"),
                ("handler-key-file", "client.key"),
            ],
            port,
        )
    }

    fn controller(&self, port: u16) -> Vec<String> {
        let mut args = self.args(
            &[
                ("kubeconfig", "virt-controller.kubeconfig"),
                ("prom-cert-file", "server.crt"),
                ("prom-key-file", "server.key"),
            ],
            port,
        );
        args.extend(["launcher", "exporter"].map(|image| format!("--{image}-image={image}.invalid/played:1")));
        args
    }

    fn args(&self, files: &[(&str, &str)], port: u16) -> Vec<String> {
        let file =
            |(flag, name): &(&str, &str)| format!("--{flag}={}", self.directory.join("read").join(name).display());
        let listen = ["--listen=127.0.0.1".to_owned(), format!("--port={port}")];
        files.iter().map(file).chain(listen).collect()
    }

    fn spawn(&self, name: &str, program: Program, scratch: &Scratch) -> Result<Supervised> {
        let mut spec = Spec::new(name, program, &self.directory, self.directory.join(format!("{name}.log")));
        spec.env.insert("POD_NAMESPACE".to_owned(), NAMESPACE.to_owned());
        scratch.removed_with(&mut spec);
        Supervised::spawn(&spec)
    }
}

fn kind_of(object: &DynamicObject) -> &str {
    object.types.as_ref().map_or("", |types| types.kind.as_str())
}

async fn apply(client: &Client, object: &DynamicObject) -> Result<()> {
    aggregation::apply(client, object, MANAGER).await
}
