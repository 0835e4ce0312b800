//! `doctor`: each fault is planted, found, and mended by the very lines that it prints.

use std::collections::BTreeMap;

use anyhow::{Context, Result, ensure};
use cyberdesk_operator::doctor::{self, Finding, Report, Verdict};
use cyberdesk_testbed::control_plane::install;
use cyberdesk_testbed::pgbouncer::{Mode, PgBouncer};
use cyberdesk_testbed::postgres::{Options, SUPERUSER};
use cyberdesk_testbed::scratch::Scratch;
use cyberdesk_testbed::{ControlPlane, Database, Postgres, Progress};
use k8s_openapi::api::coordination::v1::Lease;
use k8s_openapi::api::core::v1::ConfigMap;
use k8s_openapi::api::rbac::v1::RoleBinding;
use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use kube::Client;
use kube::api::{Api, DeleteParams, DynamicObject, Patch, PatchParams, PostParams};
use kube::core::{ApiResource, GroupVersionKind};
use serde_json::{Value, json};

use crate::tools::Tool;
use crate::world::World;
use crate::{Story, story};

pub(crate) fn stories() -> Vec<Story> {
    vec![
        story("doctor finds nothing on a whole installation, under the daemon's own role", nothing_wrong),
        story("doctor finds each planted fault, and what it says to paste mends it", planted_faults),
        story("doctor finds a transaction pooler", through_a_pooler).needs(Tool::PgBouncer),
        story(
            "doctor finds what the account may not do, a bad template, and that nobody leads",
            planted_in_the_cluster,
        ),
        story("doctor finds what a bare cluster lacks, and an older schema", bare_cluster),
        story("doctor tells programs by JSON and exit code", for_programs),
        story("doctor tells what is wrong before there is a connection", no_connection),
    ]
}

/// With the settings and the account that a daemon of this world would have.
async fn examine(world: &World, url: &str) -> Report {
    let variables = [("DATABASE_URL", url), ("CYBERDESK_NAMESPACE", &world.namespace)];
    examine_with(&variables, world.account().await).await
}

async fn examine_with(variables: &[(&str, &str)], client: Result<Client>) -> Report {
    let variables = variables.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
    doctor::examine(variables, client).await
}

fn finding<'a>(report: &'a Report, check: &str) -> Result<&'a Finding> {
    let found = report.findings.iter().find(|finding| finding.check == check);
    found.with_context(|| format!("{check} is not among the checks:\n{report}"))
}

async fn nothing_wrong(world: &World) -> Result<()> {
    world.start_operator(&[]).await?;
    world.operator_says("leading").await?;
    let url = world.database.url("cyberdesk_daemon");
    // What is KubeVirt's own, a namespaced account may not see in the testbed; on a real cluster it sees virt-api.
    let healthy = async || {
        let report = examine(world, &url).await;
        let at_fault = report.findings.iter().filter(|it| it.verdict != Verdict::Ok && it.check != "kubevirt-health");
        ensure!(at_fault.count() == 0 && report.count(Verdict::Failure) == 0, "{report}");
        Ok(true)
    };
    world.until("nothing is found", healthy).await
}

/// The check, its verdict, a word that it says, and how to bring the fault about.
const FAULTS: [(&str, Verdict, &str, &str); 25] = [
    (
        "columns",
        Verdict::Failure,
        "message is missing",
        "alter table public.cyberdesk_instances drop column message cascade",
    ),
    // It went with the column.
    ("objects", Verdict::Failure, "cyberdesk.first_state is missing", ""),
    (
        "columns",
        Verdict::Failure,
        "stream_url is text",
        "alter table public.cyberdesk_instances alter column stream_url type text",
    ),
    (
        "triggers",
        Verdict::Failure,
        "zzzz_cyberdesk_guard on public.cyberdesk_instances is missing",
        "drop trigger zzzz_cyberdesk_guard on public.cyberdesk_instances",
    ),
    (
        "triggers",
        Verdict::Failure,
        "zzzz_cyberdesk_project on public.cyberdesk_instances is disabled",
        "alter table public.cyberdesk_instances disable trigger zzzz_cyberdesk_project",
    ),
    (
        "triggers",
        Verdict::Failure,
        "wake_on_new_work on cyberdesk.desktop is missing",
        "drop trigger wake_on_new_work on cyberdesk.desktop",
    ),
    (
        "triggers",
        Verdict::Failure,
        "zzzzz_last runs after",
        "create function public.last() returns trigger language plpgsql as 'begin return new; end';
         create trigger zzzzz_last before update on public.cyberdesk_instances for each row execute function public.last()",
    ),
    (
        "grants",
        Verdict::Failure,
        "may not execute cyberdesk.report",
        "revoke execute on all functions in schema cyberdesk from cyberdesk_daemon",
    ),
    ("grants", Verdict::Failure, "may not use the schema", "revoke usage on schema cyberdesk from cyberdesk_daemon"),
    (
        "grants",
        Verdict::Warning,
        "may also execute cyberdesk.stop",
        "grant execute on function cyberdesk.stop(uuid[], text, text) to cyberdesk_daemon",
    ),
    (
        "grants",
        Verdict::Warning,
        "may also touch public.cyberdesk_instances",
        "grant update on public.cyberdesk_instances to cyberdesk_daemon",
    ),
    ("grants", Verdict::Warning, "more than an ordinary role", "alter role cyberdesk_daemon bypassrls"),
    ("grants", Verdict::Warning, "belongs to service_role", "grant service_role to cyberdesk_daemon"),
    ("access", Verdict::Failure, "is off", "alter table public.cyberdesk_instances disable row level security"),
    (
        "access",
        Verdict::Failure,
        "policy",
        "drop policy cyberdesk_owners_read on public.cyberdesk_instances",
    ),
    ("access", Verdict::Failure, "anon may select cyberdesk_instances", "grant select on public.cyberdesk_instances to anon"),
    (
        "access",
        Verdict::Failure,
        "authenticated may delete cyberdesk_instances",
        "grant delete on public.cyberdesk_instances to authenticated",
    ),
    (
        "access",
        Verdict::Failure,
        "authenticated may not call public.request_shutdown",
        "revoke execute on all functions in schema public from authenticated",
    ),
    (
        "indexes",
        Verdict::Warning,
        "cyberdesk_instances_not_over_idx is missing",
        "drop index public.cyberdesk_instances_not_over_idx",
    ),
    (
        "realtime",
        Verdict::Warning,
        "is not in supabase_realtime",
        "alter publication supabase_realtime drop table public.cyberdesk_instances",
    ),
    (
        "realtime",
        Verdict::Warning,
        "cyberdesk.desktop is in supabase_realtime",
        "alter publication supabase_realtime add table cyberdesk.desktop",
    ),
    ("role-settings", Verdict::Warning, "lock_timeout is 5s", "alter role cyberdesk_daemon set lock_timeout = '5s'"),
    (
        "role-settings",
        Verdict::Warning,
        "TimeZone is Europe/Berlin",
        "alter role cyberdesk_daemon set timezone = 'Europe/Berlin'; alter role cyberdesk_daemon reset search_path",
    ),
    ("connections", Verdict::Warning, "of 4", "alter role cyberdesk_daemon connection limit 4"),
    (
        "migrations",
        Verdict::Failure,
        "_triggers is not applied",
        "delete from cyberdesk.refinery_schema_history where name = 'triggers'",
    ),
];

/// Roles are the whole server's, so it is one of this story's own.
async fn server(world: &World) -> Result<(Postgres, Database)> {
    let part = Progress::quiet().part("postgres");
    let postgres = Postgres::start(&Options::default(), world.parts.testbed.scratch(), &part).await?;
    let database = postgres.database().await?;
    Ok((postgres, database))
}

async fn planted_faults(world: &World) -> Result<()> {
    let (_postgres, database) = server(world).await?;
    let (admin, url) = (database.connect_as(SUPERUSER).await?, database.url("cyberdesk_daemon"));
    for (check, verdict, words, plant) in FAULTS {
        admin.batch_execute(plant).await.with_context(|| plant.to_owned())?;
        let report = examine(world, &url).await;
        let found = finding(&report, check)?;
        ensure!(found.verdict == verdict && found.found.contains(words), "{plant}\n{report}");
        // A row of history that is gone is brought back by nobody; `migrate` would apply it again, and fail.
        if check == "migrations" {
            ensure!(found.mend.concat().contains("migrate"), "{report}");
            continue;
        }
        for line in &found.mend {
            admin.batch_execute(line).await.with_context(|| format!("{plant}\nmended by {line}"))?;
        }
        let report = examine(world, &url).await;
        ensure!(finding(&report, check)?.verdict == Verdict::Ok, "{plant}\nis not mended:\n{report}");
    }
    admin.batch_execute("alter role cyberdesk_daemon set default_transaction_read_only = on").await?;
    let report = examine(world, &url).await;
    let found = finding(&report, "connection")?;
    ensure!(found.verdict == Verdict::Failure && found.found.contains("takes no writes"), "{report}");
    admin.batch_execute("alter role cyberdesk_daemon reset default_transaction_read_only").await?;

    // No line brings these back: what is said names where their text is.
    admin.batch_execute("drop function cyberdesk.reconcile_projection").await?;
    let report = examine(world, &url).await;
    let found = finding(&report, "objects")?;
    ensure!(found.verdict == Verdict::Failure && found.mend.concat().contains("sql/2026"), "{report}");
    Ok(())
}

async fn through_a_pooler(world: &World) -> Result<()> {
    let binary = Tool::PgBouncer.find().context(Tool::PgBouncer.remedy())?;
    let testbed = &world.parts.testbed;
    for (mode, verdict, words) in [
        (Mode::Transaction, Verdict::Warning, "leads through a transaction pooler"),
        (Mode::Session, Verdict::Ok, "a heartbeat arrived"),
    ] {
        let pooler = PgBouncer::start(&binary, &testbed.postgres, mode, testbed.scratch()).await?;
        let report = examine(world, &pooler.url("cyberdesk_daemon", world.database.name())).await;
        let found = finding(&report, "notifications")?;
        ensure!(found.verdict == verdict && found.found.contains(words), "{report}");
        ensure!(report.count(Verdict::Failure) == 0, "{report}");
    }
    Ok(())
}

async fn no_connection(world: &World) -> Result<()> {
    let (url, empty) =
        (world.database.url("cyberdesk_daemon"), world.parts.testbed.postgres.supabase_database().await?);
    let nobody = world.database.url("nobody");
    for (url, check, verdict, words) in [
        ("postgres://u:[YOUR-PASSWORD]@h/d", "settings", Verdict::Failure, "placeholder"),
        ("postgres://u:p@127.0.0.1:1/d", "connection", Verdict::Failure, "nobody listens there"),
        (nobody.as_str(), "connection", Verdict::Failure, "nobody"),
        (&url.replace("sslmode=disable", "pgbouncer=true"), "database-url", Verdict::Warning, "transaction pooler"),
        (&url.replace("127.0.0.1", "db.testbed").replace('?', "?hostaddr=127.0.0.1&"), "tls", Verdict::Warning, "none"),
        ("postgres://u:p@db.abc.supabase.co:1/d?hostaddr=127.0.0.1", "database-url", Verdict::Warning, "IPv6"),
        (&empty.url("cyberdesk_daemon"), "migrations", Verdict::Failure, "the schema is missing"),
        (&empty.url("cyberdesk_daemon"), "columns", Verdict::Failure, "there is no table"),
        (&world.database.url("postgres"), "database-url", Verdict::Warning, "no more than the role"),
    ] {
        let report = examine(world, url).await;
        let found = finding(&report, check)?;
        ensure!(found.verdict == verdict && found.found.contains(words), "{url}\n{report}");
    }
    Ok(())
}

async fn for_programs(world: &World) -> Result<()> {
    let doctor = async |url: String, arguments: &[&str]| {
        tokio::process::Command::new(env!("CARGO_BIN_EXE_cyberdesk-operator"))
            .arg("doctor")
            .args(arguments)
            .env("DATABASE_URL", url)
            .env("KUBECONFIG", world.kubeconfig())
            .env("CYBERDESK_NAMESPACE", &world.namespace)
            .current_dir(world.parts.testbed.directory())
            .output()
            .await
            .context("run doctor")
    };
    let whole = doctor(world.database.url("cyberdesk_daemon"), &["--json"]).await?;
    ensure!(whole.status.code() == Some(0), "{whole:?}");
    let told: BTreeMap<String, Value> = serde_json::from_slice(&whole.stdout)?;
    let findings = told["findings"].as_array().context("a list")?;
    ensure!(findings.iter().all(|finding| finding["verdict"] != "failure" && finding["why"].is_string()), "{told:?}");

    let empty = world.parts.testbed.postgres.supabase_database().await?;
    let broken = doctor(empty.url("cyberdesk_daemon"), &[]).await?;
    let text = String::from_utf8_lossy(&broken.stdout);
    ensure!(broken.status.code() == Some(1) && text.contains("mend: cyberdesk-operator migrate"), "{broken:?}");
    ensure!(doctor(String::new(), &["--colour"]).await?.status.code() == Some(2), "a usage error is another code");
    Ok(())
}

async fn planted_in_the_cluster(world: &World) -> Result<()> {
    let (admin, url) = (world.parts.client.clone(), world.database.url("cyberdesk_daemon"));
    let found = async |check: &str, verdict: Verdict, words: &str| {
        let holds = async || {
            let report = examine(world, &url).await;
            let found = finding(&report, check)?;
            ensure!(found.verdict == verdict && found.found.contains(words), "{report}");
            Ok(found.mend.concat())
        };
        // The API server learns of a Role a moment after it was made.
        world.until(&format!("doctor finds {words:?}"), async || holds().await.map(|_| true)).await?;
        holds().await
    };
    found("leader", Verdict::Warning, "no daemon has ever led here").await?;
    let leases: Api<Lease> = Api::namespaced(admin.clone(), &world.namespace);
    let stale = json!({ "metadata": { "name": "cyberdesk-operator" }, "spec": {
        "holderIdentity": "gone", "leaseDurationSeconds": 12, "renewTime": "2026-01-01T00:00:00.000000Z" } });
    leases.create(&PostParams::default(), &serde_json::from_value(stale)?).await?;
    found("leader", Verdict::Warning, "nobody leads: gone last renewed").await?;
    leases.delete("cyberdesk-operator", &DeleteParams::default()).await?;

    world
        .templates(&[(
            "default.yaml",
            "apiVersion: kubevirt.io/v1\nkind: VirtualMachine\nmetadata: {name: \"${nonsense}\"}\n",
        )])
        .await?;
    let mend = found("templates", Verdict::Failure, "nonsense").await?;
    ensure!(mend.contains("kubectl edit configmap cyberdesk-vm-template"), "{mend}");
    Api::<ConfigMap>::namespaced(admin.clone(), &world.namespace)
        .delete("cyberdesk-vm-template", &DeleteParams::default())
        .await?;
    found("templates", Verdict::Ok, "default").await?;

    let bindings: Api<RoleBinding> = Api::namespaced(admin, &world.namespace);
    bindings.delete("cyberdesk-operator-vms", &DeleteParams::default()).await?;
    let mend = found("rights", Verdict::Failure, "may not create virtualmachines in").await?;
    ensure!(mend.contains("kubectl apply -f deploy/rbac.yaml"), "{mend}");
    crate::account::in_namespace(&world.parts.testbed.control_plane, &world.namespace).await?;
    found("rights", Verdict::Ok, "may do all").await?;

    let nowhere = kube::Config::new("https://127.0.0.1:1".parse()?);
    let report = examine_with(&[("DATABASE_URL", &url)], Ok(Client::try_from(nowhere)?)).await;
    let found = finding(&report, "api-server")?;
    ensure!(found.verdict == Verdict::Failure && found.found.contains("it cannot be reached"), "{report}");
    ensure!(finding(&report, "connection")?.verdict == Verdict::Ok, "the database is looked at all the same");
    Ok(())
}

async fn bare_cluster(world: &World) -> Result<()> {
    let scratch = Scratch::new()?;
    let part = Progress::quiet().part("control plane");
    let control_plane = ControlPlane::start(Default::default(), &scratch, &part).await?;
    let admin = control_plane.client().await?;
    let url = world.database.url("cyberdesk_daemon");
    let variables = [("DATABASE_URL", url.as_str())];
    let expect = async |wanted: &[(&str, Verdict, &str)]| {
        let holds = async || {
            let report = examine_with(&variables, control_plane.client().await).await;
            for (check, verdict, words) in wanted {
                let found = finding(&report, check)?;
                ensure!(found.verdict == *verdict && found.found.contains(words), "{check}\n{report}");
                ensure!(*verdict == Verdict::Ok || !found.mend.is_empty(), "{check} says nothing to paste\n{report}");
            }
            Ok(true)
        };
        world.until(&format!("doctor finds {wanted:?}"), holds).await
    };
    expect(&[
        ("crd", Verdict::Ok, "with the schema of this program"),
        ("kubevirt", Verdict::Failure, "serves no kubevirt.io/v1"),
        ("namespaces", Verdict::Failure, "there is no namespace cyberdesk-system"),
        ("leader", Verdict::Warning, "no daemon has ever led here"),
    ])
    .await?;
    let crds: Api<CustomResourceDefinition> = Api::all(admin.clone());
    let older = json!([{ "op": "remove", "path": "/spec/versions/0/schema/openAPIV3Schema/properties/spec/properties/params" }]);
    let patch = Patch::<()>::Json(serde_json::from_value(older)?);
    crds.patch("cyberdesks.cyberdesk.io", &PatchParams::default(), &patch).await?;
    expect(&[("crd", Verdict::Failure, "spec.params is missing in the cluster's schema")]).await?;
    crds.delete("cyberdesks.cyberdesk.io", &DeleteParams::default()).await?;
    expect(&[("crd", Verdict::Failure, "the cluster knows no Cyberdesk")]).await?;

    // A KubeVirt that is on its way.
    install(&admin, &[kubevirt_kind()?]).await?;
    let kind = ApiResource::from_gvk(&GroupVersionKind::gvk("kubevirt.io", "v1", "KubeVirt"));
    let object = json!({ "apiVersion": "kubevirt.io/v1", "kind": "KubeVirt", "metadata": { "name": "kubevirt" },
        "status": { "phase": "Deploying" } });
    Api::<DynamicObject>::namespaced_with(admin, "default", &kind)
        .create(&PostParams::default(), &serde_json::from_value(object)?)
        .await?;
    expect(&[
        ("kubevirt", Verdict::Failure, "has no virtualmachines"),
        ("kubevirt-health", Verdict::Failure, "its phase is Deploying"),
    ])
    .await
}

fn kubevirt_kind() -> Result<CustomResourceDefinition> {
    let schema = json!({ "type": "object", "x-kubernetes-preserve-unknown-fields": true });
    Ok(serde_json::from_value(json!({
        "metadata": { "name": "kubevirts.kubevirt.io" },
        "spec": {
            "group": "kubevirt.io", "scope": "Namespaced",
            "names": { "kind": "KubeVirt", "plural": "kubevirts", "singular": "kubevirt" },
            "versions": [{ "name": "v1", "served": true, "storage": true, "schema": { "openAPIV3Schema": schema } }],
        },
    }))?)
}
