//! A database with its two parties: the app, and an operator that leads.

use std::time::Duration;

use anyhow::{Context as _, Result};
use cyberdesk_testbed::{Database, Postgres};
use tokio_postgres::{Client, NoTls, Row};
use uuid::Uuid;

/// A migrated database, the app's connection, an operator that has taken the fence, and a user.
pub(crate) struct Fixture {
    pub(crate) database: Database,
    /// The app's server connects as the project's administrator, as its ORM does.
    pub(crate) app: Client,
    pub(crate) operator: Operator,
    pub(crate) user: Uuid,
}

impl Fixture {
    pub(crate) async fn new(postgres: &Postgres) -> Result<Self> {
        Self::on(postgres.database().await?).await
    }

    pub(crate) async fn on(database: Database) -> Result<Self> {
        let app = database.connect_as("postgres").await?;
        let operator = Operator::lead(&database, 1).await?;
        let user = database.sign_up().await?;
        Ok(Self { database, app, operator, user })
    }

    /// Inserts a desktop as the app's ORM does.
    pub(crate) async fn insert(&self) -> Result<Uuid> {
        let row = self
            .app
            .query_one(
                r#"insert into "cyberdesk_instances" ("user_id", "status", "timeout_at")
                   values ($1, 'pending', NOW() + interval '86400000 milliseconds') returning "id", "status"::text"#,
                &[&self.user],
            )
            .await
            .context("insert a desktop")?;
        assert_eq!(row.get::<_, &str>(1), "pending");
        Ok(row.get(0))
    }

    /// Inserts a desktop and has the operator see that it runs.
    pub(crate) async fn insert_running(&self) -> Result<Uuid> {
        let id = self.insert().await?;
        assert_eq!(self.operator.report(Entry::running(id)).await?, "written");
        Ok(id)
    }

    pub(crate) async fn execute(&self, statement: &str, id: Uuid) -> Result<u64> {
        self.app.execute(statement, &[&id]).await.with_context(|| statement.to_owned())
    }

    /// What the app sees of a row.
    pub(crate) async fn row(&self, id: Uuid) -> Result<Seen> {
        let mut rows = self.rows(&[id]).await?;
        rows.pop().with_context(|| format!("there is a row {id}"))
    }

    pub(crate) async fn rows(&self, ids: &[Uuid]) -> Result<Vec<Seen>> {
        let rows = self
            .app
            .query(
                "select status::text, reason, message, shutdown_requested_at is not null, ended_at is not null, stream_url
                   from public.cyberdesk_instances where id = any($1)",
                &[&ids],
            )
            .await?;
        Ok(rows.iter().map(Seen::from).collect())
    }

    /// Bounded, and on a connection of its own: within a transaction this view stands still.
    pub(crate) async fn until_somebody_waits_for_a_lock(&self) -> Result<()> {
        let watcher = self.database.connect_as("postgres").await?;
        let waiting = "select count(*) from pg_stat_activity
                        where datname = current_database() and wait_event_type = 'Lock'";
        let watching = async {
            while watcher.query_one(waiting, &[]).await?.get::<_, i64>(0) == 0 {
                tokio::task::yield_now().await;
            }
            anyhow::Ok(())
        };
        tokio::time::timeout(Duration::from_secs(60), watching)
            .await
            .context("wait until a session of this database waits for a lock")?
    }

    /// One value of the private row.
    pub(crate) async fn private<T>(&self, expression: &str, id: Uuid) -> Result<T>
    where
        T: for<'a> tokio_postgres::types::FromSql<'a>,
    {
        let row = self
            .app
            .query_one(&format!("select {expression} from cyberdesk.desktop where id = $1"), &[&id])
            .await
            .context(expression.to_owned())?;
        Ok(row.try_get(0)?)
    }
}

/// The visible half of a desktop.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Seen {
    pub(crate) status: String,
    pub(crate) reason: Option<String>,
    pub(crate) message: Option<String>,
    pub(crate) requested: bool,
    pub(crate) ended: bool,
    pub(crate) stream_url: Option<String>,
}

impl Seen {
    /// Status and the word why, e.g. `terminated requested`; with a full stop once it is over.
    pub(crate) fn brief(&self) -> String {
        let mut brief = self.status.clone();
        if let Some(reason) = &self.reason {
            brief.push(' ');
            brief.push_str(reason);
        }
        if self.ended {
            brief.push('.');
        }
        brief
    }
}

impl From<&Row> for Seen {
    fn from(row: &Row) -> Self {
        Self {
            status: row.get(0),
            reason: row.get(1),
            message: row.get(2),
            requested: row.get(3),
            ended: row.get(4),
            stream_url: row.get(5),
        }
    }
}

/// One line of a report.
#[derive(Clone, Debug, Default)]
pub(crate) struct Entry {
    pub(crate) id: Uuid,
    pub(crate) generation: i64,
    pub(crate) vm_uid: Option<&'static str>,
    pub(crate) status: Option<&'static str>,
    pub(crate) reason: Option<&'static str>,
    pub(crate) message: Option<&'static str>,
    pub(crate) stream_url: Option<&'static str>,
    pub(crate) ended: bool,
}

impl Entry {
    pub(crate) fn of(id: Uuid) -> Self {
        Self { id, generation: 1, ..Self::default() }
    }

    pub(crate) fn running(id: Uuid) -> Self {
        Self { vm_uid: Some("vm-1"), status: Some("running"), ..Self::of(id) }
    }

    pub(crate) fn ended(id: Uuid, status: &'static str, reason: &'static str, message: &'static str) -> Self {
        Self { status: Some(status), reason: Some(reason), message: Some(message), ended: true, ..Self::of(id) }
    }
}

/// An operator that holds the fence.
pub(crate) struct Operator {
    pub(crate) client: Client,
    pub(crate) epoch: i64,
    pub(crate) token: Uuid,
}

impl Operator {
    pub(crate) async fn lead(database: &Database, epoch: i64) -> Result<Self> {
        let client = database.connect_as("cyberdesk_daemon").await?;
        let token = Uuid::new_v4();
        let taken: bool = client
            .query_one("select cyberdesk.acquire($1, $2, 'story')", &[&epoch, &token])
            .await
            .context("take the fence")?
            .get(0);
        assert!(taken, "epoch {epoch} is the greatest so far");
        Ok(Self { client, epoch, token })
    }

    /// The one answer to a report of one entry.
    pub(crate) async fn report(&self, entry: Entry) -> Result<String> {
        let mut answers = self.report_all(std::slice::from_ref(&entry)).await?;
        assert_eq!(answers.len(), 1);
        Ok(answers.remove(0))
    }

    /// The answers in the entries' order.
    pub(crate) async fn report_all(&self, entries: &[Entry]) -> Result<Vec<String>, tokio_postgres::Error> {
        let ids: Vec<Uuid> = entries.iter().map(|entry| entry.id).collect();
        let rows = self
            .client
            .query(
                "select r.id, r.answer from cyberdesk.report($1, $2, $3, $4, $5, $6, $7, $8, $9, $10) r",
                &[
                    &self.epoch,
                    &self.token,
                    &ids,
                    &column(entries, |entry| entry.generation),
                    &column(entries, |entry| entry.vm_uid),
                    &column(entries, |entry| entry.status),
                    &column(entries, |entry| entry.reason),
                    &column(entries, |entry| entry.message),
                    &column(entries, |entry| entry.stream_url),
                    &column(entries, |entry| entry.ended),
                ],
            )
            .await?;
        Ok(in_order(&ids, &rows))
    }

    pub(crate) async fn expire(&self, ids: &[Uuid]) -> Result<Vec<String>, tokio_postgres::Error> {
        let rows = self
            .client
            .query("select e.id, e.answer from cyberdesk.expire($1, $2, $3) e", &[&self.epoch, &self.token, &ids])
            .await?;
        Ok(in_order(ids, &rows))
    }

    pub(crate) async fn reconcile(&self) -> Result<i64, tokio_postgres::Error> {
        let row =
            self.client.query_one("select cyberdesk.reconcile_projection($1, $2)", &[&self.epoch, &self.token]).await?;
        Ok(row.get(0))
    }

    pub(crate) async fn trim(&self) -> Result<i64, tokio_postgres::Error> {
        let row = self.client.query_one("select cyberdesk.trim($1, $2)", &[&self.epoch, &self.token]).await?;
        Ok(row.get(0))
    }

    pub(crate) async fn dirty(&self) -> Result<Vec<Uuid>> {
        self.ids("select id from cyberdesk.dirty_desktops(1000)").await
    }

    pub(crate) async fn live(&self) -> Result<Vec<Uuid>> {
        self.ids("select id from cyberdesk.live_desktops()").await
    }

    async fn ids(&self, query: &str) -> Result<Vec<Uuid>> {
        Ok(self.client.query(query, &[]).await?.iter().map(|row| row.get(0)).collect())
    }

    /// Columns of [`desktops_by_id`](../../../sql/README.md) as text, null as `-`, joined by blanks.
    pub(crate) async fn look(&self, id: Uuid, columns: &[&str]) -> Result<String> {
        let columns: Vec<String> = columns.iter().map(|column| format!("coalesce(s.{column}::text, '-')")).collect();
        let row = self
            .client
            .query_one(
                &format!(
                    "select concat_ws(' ', {}) from cyberdesk.desktops_by_id(array[$1::uuid]) s",
                    columns.join(", ")
                ),
                &[&id],
            )
            .await?;
        Ok(row.get(0))
    }
}

fn column<T>(entries: &[Entry], of: impl Fn(&Entry) -> T) -> Vec<T> {
    entries.iter().map(of).collect()
}

fn in_order(ids: &[Uuid], rows: &[Row]) -> Vec<String> {
    assert_eq!(rows.len(), ids.len(), "one answer an entry");
    ids.iter()
        .map(|id| {
            let row = rows.iter().find(|row| row.get::<_, Uuid>(0) == *id);
            row.expect("each entry is answered").get(1)
        })
        .collect()
}

/// The SQLSTATE of a failure that the story is about.
#[track_caller]
pub(crate) fn code<T>(result: Result<T, tokio_postgres::Error>) -> String {
    match result {
        Ok(_) => "none".to_owned(),
        Err(error) => error.code().expect("the database itself refuses").code().to_owned(),
    }
}

/// A client for a URL, on the current runtime.
pub(crate) async fn connect(url: &str) -> Result<Client> {
    let (client, connection) = tokio_postgres::connect(url, NoTls).await?;
    tokio::spawn(connection);
    Ok(client)
}
