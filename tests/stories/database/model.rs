//! The simulation's model of the database's rules says the same as the SQL, after every operation.

use anyhow::{Context as _, Result, ensure};
use cyberdesk_operator::lease::Term;
use cyberdesk_operator::model::{Desired, Report, RowStatus};
use cyberdesk_testbed::Postgres;
use jiff::Timestamp;
use uuid::Uuid;

use super::Story;
use super::fixture::{Entry, Fixture};

#[path = "../../simulation/database.rs"]
#[expect(dead_code, reason = "the simulation uses more of it")]
mod rules;

use rules::{Database, Desktop};

pub(super) const STORIES: &[Story] =
    &[("the simulation's model of these rules does as the SQL does", |p| Box::pin(same(p)))];

/// Desktops, each with a life of its own, and the operations on each.
const LIVES: u64 = 150;
const OPERATIONS: usize = 14;

async fn same(postgres: &Postgres) -> Result<()> {
    let fixture = Fixture::new(postgres).await?;
    for seed in 0..LIVES {
        let mut random = fastrand::Rng::with_seed(seed);
        let mut story = vec![];
        live(&fixture, &mut random, &mut story)
            .await
            .with_context(|| format!("after these operations (seed {seed}):\n  {}", story.join("\n  ")))?;
    }
    Ok(())
}

const STATUSES: [RowStatus; 5] =
    [RowStatus::Pending, RowStatus::Running, RowStatus::Completed, RowStatus::Error, RowStatus::Terminated];

async fn live(fixture: &Fixture, random: &mut fastrand::Rng, story: &mut Vec<String>) -> Result<()> {
    let mut model = Database::default();
    let term = Term { epoch: fixture.operator.epoch, token: fixture.operator.token };
    ensure!(model.acquire(term), "the model takes the fence");
    let id = Uuid::new_v4();
    let now: Timestamp = "2026-01-01T00:00:00Z".parse()?;
    let times: [Timestamp; 3] =
        ["1999-01-01T00:00:00Z".parse()?, "2100-01-01T00:00:00Z".parse()?, "2200-01-01T00:00:00Z".parse()?];
    let app = &fixture.app;
    for step in 0..OPERATIONS {
        let status = STATUSES[random.usize(..STATUSES.len())];
        let at = times[random.usize(..times.len())];
        let (modelled, real) = match if step == 0 { 0 } else { random.u32(..10) } {
            0 => {
                story.push(format!("insert {} until {at}", status.as_str()));
                let insert = "insert into cyberdesk_instances (id, user_id, status, timeout_at)
                              values ($1, $2, $3::text::instance_status, $4::timestamptz at time zone 'utc') returning id";
                // An id that is there is the primary key's to refuse; one that was there, ours.
                let inserted = app.query(insert, &[&id, &fixture.user, &status.as_str(), &at]).await;
                (model.insert(id, status, at).to_string(), inserted.is_ok().to_string())
            }
            1 | 2 => {
                story.push(format!("write {}", status.as_str()));
                let update = "update cyberdesk_instances set status = $2::text::instance_status where id = $1";
                let updated = app.execute(update, &[&id, &status.as_str()]).await? == 1;
                (model.write_status(id, status).to_string(), updated.to_string())
            }
            3 => {
                story.push(format!("deadline {at}"));
                let update =
                    "update cyberdesk_instances set timeout_at = $2::timestamptz at time zone 'utc' where id = $1";
                let updated = app.execute(update, &[&id, &at]).await? == 1;
                (model.set_timeout(id, at).to_string(), updated.to_string())
            }
            4 => {
                let words = random.bool().then_some("enough");
                story.push(format!("request_shutdown {words:?}"));
                let rows = app.query("select changed from public.request_shutdown($1, $2)", &[&id, &words]).await?;
                let changed: Option<bool> = rows.first().map(|row| row.get(0));
                (format!("{:?}", model.request_shutdown(id, words)), format!("{changed:?}"))
            }
            5 if random.u32(..4) == 0 => {
                story.push("delete".to_owned());
                let deleted = app.execute("delete from cyberdesk_instances where id = $1", &[&id]).await? == 1;
                (model.delete(id).to_string(), deleted.to_string())
            }
            5 => {
                let paused = random.bool();
                story.push(format!("pause_desktop {paused}"));
                let rows = app.query("select cyberdesk.pause_desktop($1, $2)", &[&id, &paused]).await;
                // One that it has never heard of is an error, and no answer.
                let changed = rows.ok().and_then(|rows| rows.first()?.get(0)).unwrap_or(false);
                (model.pause(id, paused).to_string(), changed.to_string())
            }
            6 => {
                story.push("expire".to_owned());
                let real = fixture.operator.expire(&[id]).await?.remove(0);
                let modelled = model.expire(term, id, now).map_err(|_| anyhow::anyhow!("fenced"))?;
                (modelled.to_owned(), real)
            }
            _ => {
                let report = report(id, random);
                story.push(format!("{report:?}"));
                let real = fixture.operator.report(entry(&report)).await?;
                let modelled = model.report(term, &report).map_err(|_| anyhow::anyhow!("fenced"))?;
                (modelled.to_owned(), real)
            }
        };
        ensure!(modelled == real, "the model answers {modelled}, the SQL {real}");
        let (modelled, real) = (modelled_state(&model, id), real_state(fixture, id).await?);
        ensure!(modelled == real, "the model has\n  {modelled}\nthe SQL\n  {real}");
    }
    Ok(())
}

fn report(id: Uuid, random: &mut fastrand::Rng) -> Report {
    let statuses = [None, None, Some(RowStatus::Running), Some(RowStatus::Error), Some(RowStatus::Terminated)];
    Report {
        id,
        generation: random.i64(1..4),
        vm_uid: [None, Some("vm-1"), Some("vm-2")][random.usize(..3)].map(str::to_owned),
        status: statuses[random.usize(..statuses.len())],
        reason: [None, Some("guest-crashed")][random.usize(..2)].map(str::to_owned),
        message: [None, Some(""), Some("words")][random.usize(..3)].map(str::to_owned),
        stream_url: None,
        ended: random.u32(..4) == 0,
    }
}

fn entry(report: &Report) -> Entry {
    let known = |text: &Option<String>, words: &[&'static str]| {
        text.as_ref().and_then(|text| words.iter().copied().find(|word| word == text))
    };
    Entry {
        generation: report.generation,
        vm_uid: known(&report.vm_uid, &["vm-1", "vm-2"]),
        status: report.status.map(RowStatus::as_str),
        reason: known(&report.reason, &["guest-crashed"]),
        message: known(&report.message, &["", "words"]),
        ended: report.ended,
        ..Entry::of(report.id)
    }
}

fn modelled_state(model: &Database, id: Uuid) -> String {
    let row = model.rows.get(&id).map_or("-", |status| status.as_str());
    let Some(desktop) = model.desktops.get(&id) else { return format!("{row} -") };
    let Desktop {
        desired,
        status,
        reason,
        message,
        ended,
        expires_at,
        generation,
        observed_generation,
        vm_uid,
        paused,
    } = desktop;
    let desired = if *desired == Desired::Present { "present" } else { "absent" };
    let text = |text: &Option<String>| text.clone().unwrap_or_else(|| "-".to_owned());
    let status = status.map_or("-", RowStatus::as_str);
    format!(
        "{row} {desired} {status} {} {} {ended} {} {generation} {observed_generation} {} {paused}",
        text(reason),
        text(message),
        expires_at.as_second(),
        text(vm_uid)
    )
}

async fn real_state(fixture: &Fixture, id: Uuid) -> Result<String> {
    let state = "select concat_ws(' ',
        coalesce((select c.status::text from cyberdesk_instances c where c.id = $1), '-'),
        coalesce((select concat_ws(' ', d.desired, coalesce(d.status::text, '-'), coalesce(d.reason, '-'), coalesce(d.message, '-'),
            case when d.ended_at is null then 'false' else 'true' end, extract(epoch from d.expires_at)::bigint,
            d.generation, d.observed_generation, coalesce(d.vm_uid, '-'), case when d.paused then 'true' else 'false' end)
          from cyberdesk.desktop d where d.id = $1), '-'))";
    Ok(fixture.app.query_one(state, &[&id]).await?.get(0))
}
