//! What the app, its users and a person with kubectl do in the story, each the way they really do it.

use std::collections::HashMap;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use cyberdesk_operator::names::Key;
use cyberdesk_testbed::kubevirt::vmis;
use cyberdesk_testbed::operator::NAMESPACE;
use cyberdesk_testbed::postgres::ADMINISTRATOR;
use cyberdesk_testbed::{Caller, World};
use jiff::{SignedDuration, Timestamp};
use kube::api::{Api, DynamicObject, Patch, PatchParams};
use serde_json::json;
use tokio::sync::watch;
use tokio::time::{Instant, sleep_until};
use uuid::Uuid;

use super::board::News;
use super::fate::Fate;
use super::observe::{Teller, cyberdesks};

/// How long those desktops may live that end otherwise.
const LONG: Duration = Duration::from_secs(3600);

/// When the app's and the users' deeds come, from the first insert on; each waits for its desktop to run.
const USED: Duration = Duration::from_millis(2000);
const SHUT_DOWN: Duration = Duration::from_millis(3000);
const CRASH: Duration = Duration::from_millis(4000);
const UPDATE: Duration = Duration::from_millis(5000);
const USER_GONE: Duration = Duration::from_millis(6000);

/// Least time between two deeds, for those who watch.
const BREATH: Duration = Duration::from_millis(600);

/// The app's users: of one who stays, and of one who is deleted.
pub(crate) struct Users {
    pub(crate) stays: Uuid,
    leaves: Uuid,
}

impl Users {
    pub(crate) async fn sign_up(world: &World) -> Result<Self> {
        Ok(Self { stays: world.database.sign_up().await?, leaves: world.database.sign_up().await? })
    }

    fn of(&self, fate: Fate) -> Uuid {
        if fate == Fate::UserGone { self.leaves } else { self.stays }
    }
}

/// The desktops that run, as the board knows them.
pub(crate) type Running = watch::Receiver<Vec<Fate>>;

/// Makes six desktops, and ends four of them: the other two end by their own deadlines.
pub(crate) async fn play(world: &World, users: &Users, began: Instant, running: &Running, tell: &Teller) -> Result<()> {
    let made = make(world, users, tell).await?;
    let mut pace = Pace { running: running.clone(), began, last: began };
    let told = |fate| send(tell, News::Told(fate));

    pace.due(USED, Fate::ShutDown).await?;
    write_stream_url(world, made[&Fate::ShutDown]).await?;
    let what = "its gateway writes the stream_url: it is used";
    let fate = Fate::ShutDown;
    send(tell, News::Done { fate, what });

    pace.due(SHUT_DOWN, Fate::ShutDown).await?;
    request_shutdown(world, users.stays, made[&Fate::ShutDown]).await?;
    told(Fate::ShutDown);

    pace.due(CRASH, Fate::Crash).await?;
    crash(world, made[&Fate::Crash]).await?;
    told(Fate::Crash);

    pace.due(UPDATE, Fate::Update).await?;
    write_terminated(world, users.stays, made[&Fate::Update]).await?;
    told(Fate::Update);

    pace.due(USER_GONE, Fate::UserGone).await?;
    world.database.delete_user(users.leaves).await?;
    told(Fate::UserGone);
    Ok(())
}

/// The gateway of the app says through PostgREST that the desktop can be looked at.
async fn write_stream_url(world: &World, id: Uuid) -> Result<()> {
    let statement = "update cyberdesk_instances set status = 'running', stream_url = $1 where id = $2";
    let url = format!("https://stream.example.com/{id}");
    let written = world.database.request(Caller::Service, statement, &[&url, &id]).await;
    written.map(drop).context("write the stream_url")
}

/// The owner's browser calls `supabase.rpc("request_shutdown", …)`.
async fn request_shutdown(world: &World, owner: Uuid, id: Uuid) -> Result<()> {
    let statement = "select * from request_shutdown($1, 'done for today')";
    let asked = world.database.request(Caller::User(owner), statement, &[&id]).await;
    let rows = asked.context("call request_shutdown")?;
    ensure!(rows.len() == 1, "request_shutdown does not know the row");
    Ok(())
}

/// Has the guest crash: the played node obeys an annotation.
async fn crash(world: &World, id: Uuid) -> Result<()> {
    let client = world.testbed.control_plane.client().await?;
    let crash = json!({ "metadata": { "annotations": { "guest.testbed/do": "crash" } } });
    let name = Key::of_row(id).vm_name();
    let told = vmis(&client, NAMESPACE).patch(&name, &PatchParams::default(), &Patch::Merge(crash)).await;
    told.map(drop).context("crash the guest")
}

/// The app's own way to end a desktop, which must return the row.
async fn write_terminated(world: &World, owner: Uuid, id: Uuid) -> Result<()> {
    let app = world.database.connect_as(ADMINISTRATOR).await?;
    let statement = r#"update "cyberdesk_instances" set "status" = 'terminated', "updated_at" = (now() at time zone 'utc')
        where ("id" = $1 and "user_id" = $2) returning "id", "status""#;
    let updated = app.query_one(statement, &[&id, &owner]).await;
    updated.map(drop).context("update the row to terminated")
}

/// Five rows as the app inserts them, and one `kubectl apply`.
async fn make(world: &World, users: &Users, tell: &Teller) -> Result<HashMap<Fate, Uuid>> {
    let app = world.database.connect_as(ADMINISTRATOR).await?;
    let client = world.testbed.control_plane.client().await?;
    let mut made = HashMap::new();
    for fate in Fate::ALL {
        if fate == Fate::ByHand {
            let crs = Api::namespaced_with(client.clone(), NAMESPACE, &cyberdesks());
            apply_by_hand(&crs, tell).await?;
            continue;
        }
        let lifetime = if fate == Fate::Deadline { Fate::DEADLINE } else { LONG };
        let statement = format!(
            r#"insert into "cyberdesk_instances" ("user_id", "status", "timeout_at")
               values ($1, 'pending', NOW() + interval '{} milliseconds') returning "id", "status""#,
            lifetime.as_millis()
        );
        let statement = app.prepare(&statement).await?;
        // The database's now is a moment later: what is measured from this deadline is at most that much too long.
        let deadline = Instant::now() + lifetime;
        let row = app.query_one(&statement, &[&users.of(fate)]).await;
        let id: Uuid = row.context("insert a row")?.get(0);
        let key = Key::of_row(id).to_string();
        send(tell, News::Made { fate, key });
        made.insert(fate, id);
        if fate == Fate::Deadline {
            tell_at(deadline, fate, tell);
        }
    }
    Ok(made)
}

async fn apply_by_hand(crs: &Api<DynamicObject>, tell: &Teller) -> Result<()> {
    let manifest: serde_json::Value = serde_saphyr::from_str(include_str!("by-hand.yaml"))?;
    let key = manifest["metadata"]["name"].as_str();
    let key = key.context("the sample has no name")?.to_owned();
    let lifetime = manifest["spec"]["timeoutMs"].as_i64();
    let lifetime = SignedDuration::from_millis(lifetime.context("the sample has no timeoutMs")?);
    let apply = PatchParams::apply("kubectl");
    let applied = crs.patch(&key, &apply, &Patch::Apply(&manifest)).await;
    let applied = applied.context("apply the Cyberdesk")?;
    let fate = Fate::ByHand;
    send(tell, News::Made { fate, key });
    // Its time runs from the object's creation, which the API server notes in whole seconds.
    let created = applied.metadata.creation_timestamp;
    let created = created.context("the API server notes no creation time")?.0;
    let left = (created + lifetime).duration_since(Timestamp::now());
    let left = Duration::try_from(left).unwrap_or_default();
    tell_at(Instant::now() + left, fate, tell);
    Ok(())
}

/// A deadline is nobody's deed: it is told when it comes.
fn tell_at(deadline: Instant, fate: Fate, tell: &Teller) {
    let tell = tell.clone();
    tokio::spawn(async move {
        sleep_until(deadline).await;
        let _ = tell.send((deadline, News::Told(fate)));
    });
}

/// When deeds are due: by the script, on a slow machine later, but never two at once.
struct Pace {
    running: Running,
    began: Instant,
    last: Instant,
}

impl Pace {
    /// Waits until this time of the story has come, and the desktop runs.
    async fn due(&mut self, at: Duration, fate: Fate) -> Result<()> {
        let runs = self.running.wait_for(|running| running.contains(&fate));
        runs.await.map(drop).context("the board is gone")?;
        sleep_until((self.began + at).max(self.last + BREATH)).await;
        self.last = Instant::now();
        Ok(())
    }
}

/// If nobody listens any more, the story is over.
fn send(tell: &Teller, news: News) {
    let _ = tell.send((Instant::now(), news));
}
