//! Bad input says why where its owner looks, and good rows beside it are served meanwhile.

use anyhow::{Result, ensure};
use serde_json::json;
use uuid::Uuid;

use crate::health;
use crate::world::{World, vm_name};
use crate::{Story, story};

pub(crate) fn stories() -> Vec<Story> {
    vec![
        story("bad rows and templates say why, and 100 good rows are served", bad_beside_good),
        story("a CR by hand with a bad spec is refused in words", a_bad_cr),
        story("a row that cannot be read is told of once for each reason, and holds up no other", an_unreadable_row),
        story("a row that the database refuses to end holds up no other", a_poisoned_row),
        story(
            "a row that the app does not let end at its deadline ends in the cluster, and holds up no other",
            a_poisoned_deadline,
        ),
        story("a broken ConfigMap breaks no desktop that runs", a_broken_config_map),
        story("wrong settings are told all at once", wrong_settings),
    ]
}

const GOOD: &str = "
apiVersion: kubevirt.io/v1
kind: VirtualMachine
metadata: {}
spec: {runStrategy: Once, template: {spec: {domain: {memory: {guest: 64Mi}, devices: {}}}}}
";

/// A good template in which a row can ask for what KubeVirt does not take.
const REFUSED: &str = "
params: {properties: {strategy: {type: string, default: Once}, cpu: {type: integer, maximum: 8, default: 1}}}
---
apiVersion: kubevirt.io/v1
kind: VirtualMachine
metadata: {}
spec: {runStrategy: '${strategy}', template: {spec: {domain: {memory: {guest: 64Mi}, devices: {}}}}}
";

const MISSPELT: &str = "
apiVersion: kubevirt.io/v1
kind: VirtualMachine
metadata: {}
spec: {runStrategy: Once, template: {spec: {hostname: '${vm_nam}', domain: {devices: {}}}}}
";

async fn bad_beside_good(world: &World) -> Result<()> {
    world
        .templates(&[
            ("default.yaml", GOOD),
            ("refused.yaml", REFUSED),
            ("misspelt.yaml", MISSPELT),
            ("garbage.yaml", "{{{"),
        ])
        .await?;
    world.start_operator(&[]).await?;
    let cases = [
        (json!({ "gpus": 8 }), "bad-params", "gpus"),
        (json!([1, 2]), "bad-params", "must be an object"),
        (json!({ "template": "nowhere" }), "bad-params", "there is no template \"nowhere\""),
        (json!({ "template": "misspelt" }), "bad-template", "did you mean ${vm_name}?"),
        (json!({ "template": "garbage" }), "bad-template", "garbage.yaml:1:3: "),
        (json!({ "template": "refused", "strategy": "Twice" }), "refused", "virtualmachine-validator.kubevirt.io"),
        (json!({ "template": "refused", "cpu": 64 }), "bad-params", "params.cpu must be at most 8, not 64"),
    ];
    let mut bad = vec![];
    for (params, reason, words) in cases {
        bad.push((world.insert_with("1 hour", Some(params)).await?, reason, words));
    }
    // Postgres takes a number that few programs can.
    let huge = world.insert_sql("'{\"gpus\": 1e400}'").await?;
    bad.push((huge, "bad-params", "unreadable"));
    world.insert_many(100).await?;
    let running = "select count(*) from cyberdesk_instances where status = 'running'";
    world.until("the good ones all run", async || Ok(world.count(running).await? == 100)).await?;
    for (id, reason, words) in bad {
        let row = world.until_over(&id).await?;
        ensure!((row.status.as_str(), row.reason.as_deref()) == ("error", Some(reason)), "{row:?}");
        ensure!(row.message.as_deref().is_some_and(|message| message.contains(words)), "{words:?} is missing: {row:?}");
    }
    Ok(())
}

async fn a_bad_cr(world: &World) -> Result<()> {
    world.start_operator(&[]).await?;
    let long = "d".repeat(50);
    let cases = [
        ("short", json!({ "timeoutMs": 5 }), "should be greater than or equal to 1000"),
        ("no-spec", json!(null), "spec: Required value"),
        ("not-a-number", json!({ "timeoutMs": "soon" }), "timeoutMs"),
        (long.as_str(), json!({}), "at most 49 characters"),
    ];
    for (name, spec, words) in cases {
        let refused = world.apply_cr(name, spec).await.expect_err(name).to_string();
        ensure!(refused.contains(words), "{words:?} is missing: {refused}");
    }
    world.templates(&[("default.yaml", GOOD)]).await?;
    world.apply_cr("bad-params", json!({ "params": { "gpus": 8 } })).await?;
    let over = async || Ok(world.cr_status("bad-params", "phase").await?.as_deref() == Some("Error"));
    world.until("the CR says Error", over).await?;
    let cr = world.crs().get("bad-params").await?;
    let ready = cr.data["status"]["conditions"]
        .as_array()
        .into_iter()
        .flatten()
        .find(|condition| condition["type"] == "Ready")
        .cloned();
    let told =
        ready.as_ref().and_then(|ready| ready["message"].as_str()).is_some_and(|message| message.contains("gpus"));
    ensure!(told && cr.data["status"]["reason"] == "bad-params", "{}", cr.data);
    Ok(())
}

async fn a_poisoned_deadline(world: &World) -> Result<()> {
    world.start_operator(&[]).await?;
    let (poisoned, other) = (world.running_desktop("1 hour").await?, world.running_desktop("1 hour").await?);
    // A trigger of the app's, which no end of this desktop passes; by a code that PostgREST makes a status of.
    let rule = format!(
        "create function no_end() returns trigger language plpgsql as
           $$ begin if new.shutdown_requested_at is not null or new.ended_at is not null then raise sqlstate 'PT409' using message = 'not this one'; end if; return new; end $$;
         create trigger zzz_no_end after update on cyberdesk_instances for each row when (new.id = '{poisoned}') execute function no_end();
         update cyberdesk_instances set timeout_at = now() + interval '2 seconds'"
    );
    world.sql(&rule).await?;
    let row = world.until_over(&other).await?;
    ensure!(row.reason.as_deref() == Some("timeout"), "{row:?}");
    let gone = async || Ok(world.vms().get_opt(&vm_name(&poisoned)).await?.is_none());
    world.until("the other's VM is gone all the same", gone).await?;
    ensure!(world.crs().get(&poisoned).await?.data["status"]["end"]["reason"] == "timeout", "and its CR says why");
    let id = world.running_desktop("1 hour").await?;
    world.request_shutdown(&id).await?;
    world.until_over(&id).await.map(drop)
}

async fn a_broken_config_map(world: &World) -> Result<()> {
    world.start_operator(&[]).await?;
    let id = world.running_desktop("1 hour").await?;
    world.templates(&[("default.yaml", MISSPELT)]).await?;
    world.operator_says("There is no good version of it to use").await?;
    let another = world.insert("1 hour").await?;
    let row = world.until_over(&another).await?;
    ensure!(row.reason.as_deref() == Some("bad-template"), "{row:?}");
    ensure!(world.row(&id).await?.status == "running", "the one that runs is not touched");
    Ok(())
}

async fn wrong_settings(_: &World) -> Result<()> {
    let output = std::process::Command::new(env!("CARGO_BIN_EXE_cyberdesk-operator"))
        .arg("run")
        .env_clear()
        .envs([("CYBERDESK_NAMESPACE", "No Label"), ("CYBERDESK_POLL_INTERVAL", "soon")])
        .output()?;
    let words = String::from_utf8(output.stderr)?;
    ensure!(!output.status.success());
    for wanted in ["DATABASE_URL is not set", "CYBERDESK_NAMESPACE is", "CYBERDESK_POLL_INTERVAL is"] {
        ensure!(words.contains(wanted), "{wanted:?} is missing: {words}");
    }
    Ok(())
}

async fn an_unreadable_row(world: &World) -> Result<()> {
    let bad = Uuid::new_v4();
    // As if the schema were a later one, which has words that the operator has never heard.
    let later = format!(
        "create schema later;
         create table later.words (id uuid primary key, status text not null);
         insert into later.words values ('{bad}', 'dreaming');
         alter view cyberdesk.desktop_state set schema later;
         create view cyberdesk.desktop_state as
           select (jsonb_populate_record(d, jsonb_build_object('status', coalesce(w.status, d.status)))).*
             from later.desktop_state d left join later.words w using (id)"
    );
    world.sql(&later).await?;
    let insert = "insert into cyberdesk_instances (id, user_id) select $1, id from auth.users";
    world.app(insert, &bad.to_string()).await?;
    world.start_operator(&[("CYBERDESK_RESYNC_INTERVAL", "100ms")]).await?;
    let good = world.running_desktop("1 hour").await?;
    let lines = || anyhow::Ok(world.operator_log()?.lines().filter(|line| line.contains(&bad.to_string())).count());
    let read_many_times = async || {
        let from = reads(world).await?;
        world.until("all rows are read many times", async || Ok(reads(world).await? > from + 10)).await
    };
    for (times, word) in [(1, "asleep"), (2, "waking")] {
        read_many_times().await?;
        ensure!(lines()? == times, "{} lines of its log for {times} reasons", lines()?);
        world.sql(&format!("update later.words set status = '{word}'")).await?;
        world.operator_says(word).await?;
    }
    ensure!(world.row(&good).await?.status == "running");
    world.sql("delete from later.words").await?;
    world.until_status(&bad.to_string(), "running").await
}

/// How often all rows were read.
async fn reads(world: &World) -> Result<u64> {
    let (_, figures) = health::get(world, "operator", "/metrics").await?;
    let name = "cyberdesk_sql_statements_total{statement=\"live_desktops\",result=\"ok\"} ";
    Ok(figures.lines().find_map(|line| line.strip_prefix(name)?.parse().ok()).unwrap_or_default())
}

async fn a_poisoned_row(world: &World) -> Result<()> {
    // The app has a rule of its own, which our report breaks.
    world.sql("alter table cyberdesk_instances add check (status <> 'error')").await?;
    world.start_operator(&[]).await?;
    let poisoned = world.insert_with("1 hour", Some(json!({ "gpus": 8 }))).await?;
    world.operator_says("the database refuses what became of a desktop").await?;
    let id = world.running_desktop("1 hour").await?;
    world.request_shutdown(&id).await?;
    world.until_over(&id).await?;
    ensure!(world.row(&poisoned).await?.status == "pending", "it could not be told");
    Ok(())
}
