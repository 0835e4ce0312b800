//! The app that was there before: each of its statements, word for word as its drivers send it, under the role that
//! sends it, in every state of the row. None fails, and none returns no row.

use anyhow::{Context as _, Result, ensure};
use bytes::BytesMut;
use cyberdesk_testbed::{Caller, Postgres};
use tokio_postgres::Row;
use tokio_postgres::types::{Format, FromSql, IsNull, ToSql, Type, to_sql_checked};
use uuid::Uuid;

use super::Story;
use super::fixture::{Entry, Fixture};

pub(super) const STORIES: &[Story] = &[
    ("the app's inserts are answered as before", |p| Box::pin(inserts(p))),
    ("each statement of the app is answered as before in every state of the row", |p| Box::pin(updates(p))),
    ("each read of the app is answered as before in every state of the row", |p| Box::pin(reads(p))),
    ("a user is deleted as before in every state of the row", |p| Box::pin(user_deleted(p))),
];

/// A parameter as the app's drivers send it: text, its type left to the server.
#[derive(Debug)]
struct Text(String);

impl ToSql for Text {
    fn to_sql(&self, _: &Type, out: &mut BytesMut) -> Result<IsNull, Box<dyn std::error::Error + Sync + Send>> {
        out.extend_from_slice(self.0.as_bytes());
        Ok(IsNull::No)
    }

    fn accepts(_: &Type) -> bool {
        true
    }

    fn encode_format(&self, _: &Type) -> Format {
        Format::Text
    }

    to_sql_checked!();
}

/// A value of an enum, by its label.
struct Label(String);

impl<'a> FromSql<'a> for Label {
    fn from_sql(_: &Type, raw: &'a [u8]) -> Result<Self, Box<dyn std::error::Error + Sync + Send>> {
        Ok(Self(std::str::from_utf8(raw)?.to_owned()))
    }

    fn accepts(_: &Type) -> bool {
        true
    }
}

/// Who sends a statement.
#[derive(Clone, Copy, Debug)]
enum Sender {
    /// The app's API, through its ORM, as the project's administrator.
    Api,
    /// The gateway and the operator of old, through PostgREST with the service key.
    Service,
    /// The web page, through PostgREST with its user's token.
    Page,
}

impl Sender {
    async fn send(self, fixture: &Fixture, statement: &str, parameters: &[String]) -> Result<Vec<Row>> {
        let texts: Vec<Text> = parameters.iter().cloned().map(Text).collect();
        let texts: Vec<&(dyn ToSql + Sync)> = texts.iter().map(|text| text as &(dyn ToSql + Sync)).collect();
        let caller = match self {
            Self::Api => return Ok(fixture.app.query(statement, &texts).await.context(statement.to_owned())?),
            Self::Service => Caller::Service,
            Self::Page => Caller::User(fixture.user),
        };
        fixture.database.request(caller, statement, &texts).await.context(statement.to_owned())
    }
}

/// The states that a row can be in: its status, whether a shutdown was asked for, whether it is over.
const STATES: [(&str, bool, bool); 11] = [
    ("pending", false, false),
    ("running", false, false),
    ("pending", true, false),
    ("running", true, false),
    ("completed", false, false),
    ("error", false, false),
    ("terminated", false, false),
    ("completed", false, true),
    ("error", false, true),
    ("terminated", false, true),
    ("terminated", true, true),
];

/// A row in this state, brought there as it comes there in life.
async fn row_in(fixture: &Fixture, (status, asked, over): (&str, bool, bool)) -> Result<Uuid> {
    let id = fixture.insert().await?;
    if status == "running" || over {
        fixture.operator.report(Entry::running(id)).await?;
    }
    if asked {
        fixture.execute("select public.request_shutdown($1)", id).await?;
    }
    if !matches!((status, asked), ("pending" | "running", _) | (_, true)) {
        let write = format!("update public.cyberdesk_instances set status = '{status}' where id = $1");
        fixture.execute(&write, id).await?;
    }
    if over {
        fixture.operator.report(Entry::ended(id, "terminated", "requested", "")).await?;
    }
    let seen = fixture.row(id).await?;
    ensure!(seen.status == status && seen.ended == over, "{seen:?} is not the state that the story is about");
    Ok(id)
}

async fn inserts(postgres: &Postgres) -> Result<()> {
    let fixture = Fixture::new(postgres).await?;
    let user = fixture.user.to_string();
    let pending = "pending".to_owned();
    // The ORM names all columns that it knows; those of later versions of the table are not among them.
    let orm = |deadline: &str| {
        format!(
            r#"insert into "cyberdesk_instances" ("id", "user_id", "created_at", "updated_at", "status", "timeout_at", "stream_url")
               values (default, $1, default, default, $2, {deadline}, default) returning "id", "status""#
        )
    };
    for deadline in [
        "NOW() + interval '24 hours'",
        "NOW() + interval '0 milliseconds'",
        "NOW() + interval '-60000 milliseconds'",
        "NOW() + interval '3600000 milliseconds'",
        "NOW() + interval '9007199254740991 milliseconds'",
        "default",
    ] {
        let rows = Sender::Api.send(&fixture, &orm(deadline), &[user.clone(), pending.clone()]).await?;
        ensure!(rows.len() == 1 && rows[0].get::<_, Label>(1).0 == "pending", "{deadline}");
    }
    let some = r#"insert into "cyberdesk_instances" ("user_id", "status", "timeout_at")
                  values ($1, $2, NOW() + interval '60000 milliseconds') returning "id", "status""#;
    ensure!(Sender::Api.send(&fixture, some, &[user.clone(), pending]).await?.len() == 1);

    // By PostgREST: the body as JSON, the row back as JSON.
    let posted = r#"
        with pgrst_source as (
          insert into "public"."cyberdesk_instances" ("user_id", "status")
          select "user_id", "status" from (select $1::json as json_data) p,
            lateral (select * from json_to_recordset(case when json_typeof(p.json_data) = 'array' then p.json_data else json_build_array(p.json_data) end)
              as _("user_id" uuid, "status" public.instance_status)) b
          returning "public"."cyberdesk_instances".*)
        select coalesce(json_agg(t), '[]')::text from pgrst_source t"#;
    let body = serde_json::json!([{ "user_id": user, "status": "pending" }, { "user_id": user, "status": "pending" }]);
    let rows = Sender::Service.send(&fixture, posted, &[body.to_string()]).await?;
    let answer: serde_json::Value = serde_json::from_str(rows[0].get(0))?;
    ensure!(answer.as_array().is_some_and(|rows| rows.len() == 2), "{answer}");
    Ok(())
}

/// What a status written by an update leads to, in the order of [`STATES`].
type LeadsTo = [&'static str; STATES.len()];

const TO_TERMINATED: LeadsTo = ["terminated"; STATES.len()];
const TO_ERROR: LeadsTo = [
    "error",
    "error",
    "error",
    "error",
    "completed",
    "error",
    "terminated",
    "completed",
    "error",
    "terminated",
    "terminated",
];
const TO_RUNNING: LeadsTo = [
    "running",
    "running",
    "pending",
    "running",
    "completed",
    "error",
    "terminated",
    "completed",
    "error",
    "terminated",
    "terminated",
];
const TO_PENDING: LeadsTo = [
    "pending",
    "running",
    "pending",
    "running",
    "completed",
    "error",
    "terminated",
    "completed",
    "error",
    "terminated",
    "terminated",
];

async fn updates(postgres: &Postgres) -> Result<()> {
    let fixture = Fixture::new(postgres).await?;
    let stop = r#"update "cyberdesk_instances" set "status" = $1, "updated_at" = $2 where "id" = $3 and "user_id" = $4 returning "id", "status""#;
    // PostgREST takes the values from the body, and gives the row back if it is asked to.
    let patch = |columns: &str| {
        let (set, types): (Vec<_>, Vec<_>) = columns
            .split(' ')
            .map(|column| {
                let kind = if column == "status" { "public.instance_status" } else { "character varying" };
                (format!(r#""{column}" = b."{column}""#), format!(r#""{column}" {kind}"#))
            })
            .unzip();
        format!(
            r#"with pgrst_source as (
                 update "public"."cyberdesk_instances" set {}
                   from (select $1::json as json_data) p, lateral (select * from json_to_record(p.json_data) as _({})) b
                  where "public"."cyberdesk_instances"."id" = $2
                 returning "public"."cyberdesk_instances".*)
               select "id", "status" from pgrst_source"#,
            set.join(", "),
            types.join(", ")
        )
    };
    let ready = r#"{"status": "running", "stream_url": "https://gateway.example/vnc/1"}"#;
    let status = |status: &str| format!(r#"{{"status": "{status}"}}"#);
    let cases: [(Sender, String, Vec<String>, LeadsTo); 7] = [
        (Sender::Api, stop.to_owned(), vec!["terminated".to_owned()], TO_TERMINATED),
        (Sender::Api, stop.to_owned(), vec!["error".to_owned()], TO_ERROR),
        (Sender::Service, patch("status stream_url"), vec![ready.to_owned()], TO_RUNNING),
        (Sender::Service, patch("status"), vec![status("pending")], TO_PENDING),
        (Sender::Service, patch("status"), vec![status("running")], TO_RUNNING),
        (Sender::Service, patch("status"), vec![status("error")], TO_ERROR),
        (Sender::Service, patch("status"), vec![status("terminated")], TO_TERMINATED),
    ];
    for (sender, statement, given, leads_to) in &cases {
        for (state, expected) in STATES.into_iter().zip(leads_to) {
            let case = format!("{sender:?} writes {given:?} in {state:?}");
            let id = row_in(&fixture, state).await?;
            let mut parameters = given.clone();
            if matches!(sender, Sender::Api) {
                parameters.push("2026-11-24T12:00:00.000Z".to_owned());
            }
            parameters.push(id.to_string());
            if matches!(sender, Sender::Api) {
                parameters.push(fixture.user.to_string());
            }
            let rows = sender.send(&fixture, statement, &parameters).await.context(case.clone())?;
            ensure!(rows.len() == 1 && rows[0].get::<_, Uuid>(0) == id, "{case}: {} rows", rows.len());
            ensure!(rows[0].get::<_, Label>(1).0 == *expected, "{case}: {}", rows[0].get::<_, Label>(1).0);
            ensure!(fixture.row(id).await?.ended == state.2, "{case}: what is over stays over, and nothing else is");
        }
    }
    Ok(())
}

async fn reads(postgres: &Postgres) -> Result<()> {
    let fixture = Fixture::new(postgres).await?;
    let page = r#"
        with pgrst_source as (
          select "public"."cyberdesk_instances".* from "public"."cyberdesk_instances"
           where "public"."cyberdesk_instances"."user_id" = $1 order by "public"."cyberdesk_instances"."created_at" desc)
        select coalesce(json_agg(t), '[]')::text from pgrst_source t"#;
    for (number, state) in STATES.into_iter().enumerate() {
        let id = row_in(&fixture, state).await?;
        let get = r#"select "id", "status", "created_at", "timeout_at", "stream_url" from "cyberdesk_instances" where "id" = $1 and "user_id" = $2 limit 1"#;
        let rows = Sender::Api.send(&fixture, get, &[id.to_string(), fixture.user.to_string()]).await?;
        ensure!(rows.len() == 1 && rows[0].get::<_, Label>(1).0 == state.0, "the API reads {state:?}");
        let status = r#"select "status" from "public"."cyberdesk_instances" where "id" = $1 limit 1"#;
        let rows = Sender::Service.send(&fixture, status, &[id.to_string()]).await?;
        ensure!(rows.len() == 1 && rows[0].get::<_, Label>(0).0 == state.0, "the operator of old reads {state:?}");

        let rows = Sender::Page.send(&fixture, page, &[fixture.user.to_string()]).await?;
        let listed: Vec<serde_json::Value> = serde_json::from_str(rows[0].get(0))?;
        ensure!(listed.len() == number + 1, "the page lists all: {}", listed.len());
        ensure!(listed[0]["id"] == id.to_string() && listed[0]["status"] == state.0, "newest first: {}", listed[0]);
        // It parses the times as UTC without a zone.
        let created = listed[0]["created_at"].as_str().context("created_at is a text")?;
        ensure!(!created.contains('+') && !created.ends_with('Z'), "{created}");
    }
    Ok(())
}

async fn user_deleted(postgres: &Postgres) -> Result<()> {
    for unadopted in [false, true] {
        let fixture = Fixture::new(postgres).await?;
        for state in STATES {
            row_in(&fixture, state).await?;
        }
        if unadopted {
            fixture.app.batch_execute("delete from cyberdesk.desktop").await?;
        }
        ensure!(fixture.database.delete_user(fixture.user).await? == 1, "GoTrue's delete goes through");
        let wanted = "select count(*) from cyberdesk.desktop where desired = 'present'";
        ensure!(
            fixture.app.query_one(wanted, &[]).await?.get::<_, i64>(0) == 0,
            "nothing of theirs is wanted any more"
        );
        let left = "select count(*) from cyberdesk.history";
        ensure!(fixture.app.query_one(left, &[]).await?.get::<_, i64>(0) == 0, "their history goes with them");
    }
    Ok(())
}
