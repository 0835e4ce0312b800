//! One test's database, and the ways in which an app reaches it.

use std::net::Ipv4Addr;

use anyhow::{Context as _, Result};
use tokio_postgres::types::ToSql;
use tokio_postgres::{Client, Row};
use uuid::Uuid;

use super::{SUPERUSER, connect};

/// The template with the parts of Supabase.
pub(super) const SUPABASE: &str = "testbed_supabase";
/// The same, migrated.
pub(super) const MIGRATED: &str = "testbed_migrated";

/// A database, owned by the hosted-like role `postgres`. Dropped with this value, whoever is still connected.
#[derive(Debug)]
pub struct Database {
    port: u16,
    name: String,
    keep: bool,
}

/// Who sends a request through PostgREST.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Caller {
    /// Somebody with nothing but the public key.
    Anon,
    /// A browser user with a token.
    User(Uuid),
    /// A server of the app, with the service key.
    Service,
}

impl Database {
    pub(super) async fn create(port: u16, name: &str, template: &str, owner: &str) -> Result<Self> {
        let client = connect(port, SUPERUSER, "template1").await?;
        // The server takes names here, not parameters; ours need no quoting.
        client
            .batch_execute(&format!("create database {name} template {template} owner {owner}"))
            .await
            .with_context(|| format!("create the database {name} from {template}"))?;
        Ok(Self { port, name: name.to_owned(), keep: false })
    }

    pub(super) fn existing(port: u16, name: &str) -> Self {
        Self { port, name: name.to_owned(), keep: true }
    }

    /// The same database, which now lives as long as its server.
    pub fn kept(mut self) -> Self {
        self.keep = true;
        self
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// A connection string for a role: `postgres` is the hosted-like administrator, `cyberdesk_daemon` the daemon,
    /// [`SUPERUSER`] whoever may do anything.
    pub fn url(&self, role: &str) -> String {
        format!("postgres://{role}@{}:{}/{}?sslmode=disable", Ipv4Addr::LOCALHOST, self.port, self.name)
    }

    /// A connection as a role; it lives on the current runtime.
    pub async fn connect_as(&self, role: &str) -> Result<Client> {
        connect(self.port, role, &self.name).await
    }

    /// Makes a user as GoTrue does, and answers the id.
    pub async fn sign_up(&self) -> Result<Uuid> {
        let id = Uuid::new_v4();
        let gotrue = self.connect_as("supabase_auth_admin").await?;
        let email = format!("{}@example.com", id.simple());
        gotrue
            .execute("insert into auth.users (id, email) values ($1, $2)", &[&id, &email])
            .await
            .context("sign up")?;
        Ok(id)
    }

    /// Deletes a user as GoTrue does.
    pub async fn delete_user(&self, id: Uuid) -> Result<u64> {
        let gotrue = self.connect_as("supabase_auth_admin").await?;
        gotrue.execute("delete from auth.users where id = $1", &[&id]).await.context("delete the user")
    }

    /// Years of use in seconds: users whose desktops are over and have their private rows and history still, one of them
    /// (`heavy@example.com`) with a thousand; and some that live, each just inserted by the app. It must be migrated.
    pub async fn fill_with_old_rows(&self, old: i64, live: i64) -> Result<()> {
        let client = self.connect_as(SUPERUSER).await?;
        // Round the triggers: what they would make is made here at once.
        let fill = format!(
            "set session_replication_role = replica;
             create temporary table owner as select n, gen_random_uuid() as id from generate_series(0, 999) n;
             insert into auth.users (id, email) select id, case n when 0 then 'heavy@example.com' else n || '@example.com' end from owner;
             create temporary table over as
               select gen_random_uuid() as id, n, case when n <= 1000 then 0 else 1 + n % 999 end as owner,
                      now() - n * interval '3 years' / greatest({old}, 1) as ended_at
                 from generate_series(1, {old}) n;
             insert into public.cyberdesk_instances
               (id, user_id, created_at, updated_at, status, timeout_at, reason, shutdown_requested_at, ended_at)
             select v.id, o.id, v.ended_at - interval '1 hour', v.ended_at, 'terminated', v.ended_at, 'timeout', v.ended_at, v.ended_at
               from over v join owner o on o.n = v.owner order by v.id;
             insert into cyberdesk.desktop
               (id, user_id, desired, status, reason, shutdown_requested_at, ended_at, expires_at, observed_generation, created_at, changed_at)
             select c.id, c.user_id, 'absent', c.status, c.reason, c.shutdown_requested_at, c.ended_at, c.ended_at, 1, c.ended_at, c.ended_at
               from public.cyberdesk_instances c where c.ended_at is not null order by c.id;
             insert into cyberdesk.history (desktop_id, user_id, at, event, from_status, to_status, reason)
             select c.id, c.user_id, c.ended_at, 'ended', 'running', 'terminated', 'timeout'
               from public.cyberdesk_instances c where c.ended_at is not null order by c.ended_at;
             insert into cyberdesk.used_id select gen_random_uuid() from generate_series(1, {old} / 2);
             set session_replication_role = origin;
             insert into public.cyberdesk_instances (user_id) select o.id from generate_series(1, {live}) as live (n) join owner o on o.n = 1 + live.n % 999"
        );
        client.batch_execute(&fill).await.context("fill with old rows")?;
        client.batch_execute("vacuum analyze").await.context("vacuum")
    }

    /// Runs a statement as PostgREST does: one transaction of the role `authenticator`, which takes the caller's
    /// role and claims for its duration. The database's own error comes back as it is.
    pub async fn request(
        &self,
        caller: Caller,
        statement: &str,
        parameters: &[&(dyn ToSql + Sync)],
    ) -> Result<Vec<Row>, tokio_postgres::Error> {
        let mut client = self.connect_as("authenticator").await.expect("the authenticator is let in");
        let (role, claims) = match caller {
            Caller::Anon => ("anon", serde_json::json!({"role": "anon"})),
            Caller::User(id) => ("authenticated", serde_json::json!({"role": "authenticated", "sub": id})),
            Caller::Service => ("service_role", serde_json::json!({"role": "service_role"})),
        };
        let transaction = client.transaction().await?;
        transaction.batch_execute(&format!("set local role {role}")).await?;
        let claims = claims.to_string();
        transaction.execute("select set_config('request.jwt.claims', $1, true)", &[&claims]).await?;
        let rows = transaction.query(statement, parameters).await?;
        transaction.commit().await?;
        Ok(rows)
    }
}

impl Drop for Database {
    fn drop(&mut self) {
        if self.keep {
            return;
        }
        let (port, name) = (self.port, std::mem::take(&mut self.name));
        // On a thread of its own: a test's runtime may end before this is done. If the server is gone, so is the
        // database.
        std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
            let _ = runtime.map(|runtime| {
                runtime.block_on(async {
                    let client = connect(port, SUPERUSER, "template1").await?;
                    anyhow::Ok(client.batch_execute(&format!("drop database {name} with (force)")).await?)
                })
            });
        });
    }
}
