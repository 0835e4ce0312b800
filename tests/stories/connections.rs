//! The ways to the database: poolers, TLS, passwords, and how many connections a replica takes.

use std::io::Write as _;
use std::net::Ipv4Addr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use cyberdesk_operator::database::connect::Target;
use cyberdesk_operator::doctor;
use cyberdesk_testbed::control_plane::{Authority, Identity};
use cyberdesk_testbed::pgbouncer::{Mode, PgBouncer};
use cyberdesk_testbed::postgres::{Options, SUPERUSER};
use cyberdesk_testbed::{Database, Postgres, Progress};

use tokio::io::copy_bidirectional;
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::time::timeout;

use crate::tools::Tool;
use crate::wakeups::a_life;
use crate::world::World;
use crate::{Story, story};

pub(crate) fn stories() -> Vec<Story> {
    vec![
        story("a transaction pooler is found out, does no harm, and is forgotten when it is gone", transaction_pooler)
            .needs(Tool::PgBouncer),
        story("a session pooler is as good as a direct connection", session_pooler).needs(Tool::PgBouncer),
        story("through a transaction pooler nothing is migrated", migrate_through_a_pooler).needs(Tool::PgBouncer),
        story("what a pooler refuses is told with what to do", refused_by_a_pooler).needs(Tool::PgBouncer),
        story("a replica takes at most four connections, whatever it does", four_connections),
        story("a URL of two hosts leads past the one that is gone", another_host),
        story("a server that lets the daemon in and stays silent is left for one that answers", silent_at_first),
        story("a password is read again from its file when it has changed", rotated_password),
        story("a server that cannot prove who it is gets no password, and the reason is told", proof_of_identity),
    ]
}

/// Nothing but notifications, and the daemon's own finding that they do not arrive, make it look in time.
const ONLY_WHEN_WOKEN: [(&str, &str); 2] = [("CYBERDESK_POLL_INTERVAL", "1h"), ("CYBERDESK_RESYNC_INTERVAL", "1h")];

async fn pooler(world: &World, mode: Mode) -> Result<PgBouncer> {
    let binary = Tool::PgBouncer.find().context(Tool::PgBouncer.remedy())?;
    let testbed = &world.parts.testbed;
    PgBouncer::start(&binary, &testbed.postgres, mode, testbed.scratch()).await
}

/// The daemon's URL with these hosts in place of the server's.
fn with_hosts(world: &World, hosts: impl FnOnce(&str) -> String) -> Result<(String, u16)> {
    let url = world.database.url("cyberdesk_daemon");
    let rest = url.split_once("127.0.0.1:").and_then(|(_, rest)| rest.split_once('/')).context("a port")?.0.to_owned();
    let host = format!("127.0.0.1:{rest}");
    Ok((url.replace(&host, &hosts(&host)), rest.parse()?))
}

/// The first host is gone, so that nobody answers: what is sent to it vanishes, as at a full queue of connections.
async fn another_host(world: &World) -> Result<()> {
    let socket = TcpSocket::new_v4()?;
    socket.bind((Ipv4Addr::LOCALHOST, 0).into())?;
    let gone = socket.listen(1)?;
    let address = gone.local_addr()?;
    let mut queue = vec![];
    while let Ok(stream) = timeout(Duration::from_millis(500), TcpStream::connect(address)).await {
        queue.push(stream?);
    }
    let (url, _) = with_hosts(world, |host| format!("{address},{host}"))?;
    world.start_operator(&[("DATABASE_URL", &url)]).await?;
    a_life(world).await
}

/// Whoever connects at first is let in and never hears a word, also when others do.
async fn silent_at_first(world: &World) -> Result<()> {
    let wire = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await?;
    let address = wire.local_addr()?;
    let (url, server) = with_hosts(world, |_| address.to_string())?;
    world.start_operator(&[("DATABASE_URL", &url)]).await?;
    let mut held = vec![];
    while held.len() < 8 {
        held.push(wire.accept().await?.0);
    }
    let passing = async {
        loop {
            let (mut client, _) = wire.accept().await?;
            tokio::spawn(async move {
                let mut server = TcpStream::connect((Ipv4Addr::LOCALHOST, server)).await?;
                copy_bidirectional(&mut client, &mut server).await
            });
        }
    };
    tokio::select! { lived = a_life(world) => lived, failed = passing => failed }
}

async fn start_through(world: &World, url: &str) -> Result<()> {
    world.start_operator(&[&ONLY_WHEN_WOKEN[..], &[("DATABASE_URL", url)]].concat()).await
}

async fn transaction_pooler(world: &World) -> Result<()> {
    let pooler = pooler(world, Mode::Transaction).await?;
    let url = pooler.url("cyberdesk_daemon", world.database.name());
    start_through(world, &url).await?;
    world.operator_says("DATABASE_URL leads through a transaction pooler").await?;
    a_life(world).await?;
    ensure!(!world.operator_said("notifications of the database arrive")?, "a pooler passes no notification on");
    role_settings_hold(&url).await?;

    pooler.switch(Mode::Session).await?;
    world.operator_says("notifications of the database arrive").await?;
    a_life(world).await
}

async fn session_pooler(world: &World) -> Result<()> {
    let pooler = pooler(world, Mode::Session).await?;
    let url = pooler.url("cyberdesk_daemon", world.database.name());
    start_through(world, &url).await?;
    world.operator_says("notifications of the database arrive").await?;
    a_life(world).await?;
    role_settings_hold(&url).await
}

/// They are the role's, and a pooler logs in as the role.
async fn role_settings_hold(url: &str) -> Result<()> {
    let (client, connection) = Target::from_url(url, None)?.connect().await?;
    tokio::spawn(connection);
    let settings = "select concat_ws(' ', current_setting('statement_timeout'), current_setting('lock_timeout'),
                           current_setting('idle_in_transaction_session_timeout'), current_setting('timezone'),
                           current_setting('search_path'))";
    let settings: String = client.query_typed(settings, &[]).await?.first().context("one row")?.get(0);
    ensure!(settings == "10s 400ms 15s UTC \"\"", "{settings}");
    Ok(())
}

async fn migrate_through_a_pooler(world: &World) -> Result<()> {
    for (mode, said) in [(Mode::Transaction, "nothing can be migrated"), (Mode::Session, "the database is up to date")]
    {
        let pooler = pooler(world, mode).await?;
        let url = pooler.url("postgres", world.database.name());
        let output = tokio::process::Command::new(env!("CARGO_BIN_EXE_cyberdesk-operator"))
            .arg("migrate")
            .env("DATABASE_URL", url)
            .current_dir(world.parts.testbed.directory())
            .output()
            .await?;
        let text = format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        ensure!(output.status.success() == (mode == Mode::Session) && text.contains(said), "{mode:?}: {text}");
    }
    Ok(())
}

async fn refused_by_a_pooler(world: &World) -> Result<()> {
    let pooler = pooler(world, Mode::Session).await?;
    let url = pooler.url("cyberdesk_daemon", world.database.name());
    told(&format!("{url}&options=-c%20statement_timeout%3D1s"), "take `options` out").await?;
    // It speaks no TLS, and is asked for it.
    told(&url.replace("sslmode=disable", "sslmode=require"), "the server speaks no TLS").await
}

async fn four_connections(world: &World) -> Result<()> {
    world.start_operator(&[]).await?;
    let observer = world.database.connect_as(SUPERUSER).await?;
    let open =
        "select count(*) from pg_stat_activity where datname = current_database() and usename = 'cyberdesk_daemon'";
    let most = std::cell::Cell::new(0_i64);
    let count = async |statement: &str| {
        let open = async || anyhow::Ok(observer.query_one(open, &[]).await?.get::<_, i64>(0));
        let mut now = open().await?;
        // The server takes a moment to let one go that was closed.
        let few = async || Ok(open().await? <= 4);
        if now > 4 && world.until_within(Duration::from_secs(1), "no more than four are open", few).await.is_ok() {
            now = 4;
        }
        most.set(most.get().max(now));
        world.count(statement).await
    };
    world.insert_many(60).await?;
    let running = "select count(*) from cyberdesk_instances where status = 'running'";
    world.until("all run", async || Ok(count(running).await? == 60)).await?;
    world.sql("update cyberdesk_instances set status = 'terminated'").await?;
    let over = "select count(*) from cyberdesk_instances where ended_at is not null";
    world.until("all are over", async || Ok(count(over).await? == 60)).await?;
    ensure!((2..=4).contains(&most.get()), "{} connections at once", most.get());
    Ok(())
}

/// A server that lets the daemon in only with its password and by TLS, and the authority of its certificate.
async fn guarded(world: &World, options: Options) -> Result<(Postgres, Authority, PathBuf)> {
    let testbed = &world.parts.testbed;
    let options = Options { guarded: true, ..options };
    let part = Progress::quiet().part("a guarded postgres");
    let postgres = Postgres::start(&options, testbed.scratch(), &part).await?;
    let authority = Authority::new("the database's own")?;
    let file = testbed.directory().join(format!("authority-{}.pem", postgres.port()));
    std::fs::write(&file, authority.certificate())?;
    Ok((postgres, authority, file))
}

async fn set_password(database: &Database, password: &str) -> Result<()> {
    let admin = database.connect_as(SUPERUSER).await?;
    Ok(admin.batch_execute(&format!("alter role cyberdesk_daemon password '{password}'")).await?)
}

async fn rotated_password(world: &World) -> Result<()> {
    let (postgres, authority, trusted) = guarded(world, Options::default()).await?;
    postgres.show(Some(&authority.server_named(&["db.testbed"])?)).await?;
    let world = World::on(Arc::clone(&world.parts), postgres.database().await?).await?;
    let mut file = tempfile::NamedTempFile::new()?;
    writeln!(file, "geheim-1")?;
    set_password(&world.database, "geheim-1").await?;
    let url = format!(
        "postgres://cyberdesk_daemon:[YOUR-PASSWORD]@db.testbed:{}/{}?hostaddr=127.0.0.1&sslrootcert={}",
        postgres.port(),
        world.database.name(),
        trusted.display()
    );
    let password_file = file.path().display().to_string();
    let settings = [("DATABASE_URL", url.as_str()), ("DATABASE_PASSWORD_FILE", &password_file)];
    world.start_operator(&[&ONLY_WHEN_WOKEN[..], &settings].concat()).await?;
    a_life(&world).await?;
    let variables = settings.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned()));
    let report = doctor::examine_database(variables.collect()).await;
    ensure!(report.to_string().contains("certificate and host name are verified: TLSv1.3"), "{report}");

    set_password(&world.database, "geheim-2").await?;
    let admin = world.database.connect_as(SUPERUSER).await?;
    let cut = "select count(pg_terminate_backend(pid)) from pg_stat_activity where usename = 'cyberdesk_daemon'";
    admin.query_one(cut, &[]).await?;
    world.operator_says("the password is not that of the role").await?;
    std::fs::write(file.path(), "geheim-2\n")?;
    let told = a_life(&world).await;
    let shown = std::fs::read_to_string(world.log("operator"))?;
    ensure!(!shown.contains("geheim-2") && !shown.contains("geheim-1"), "no password is logged");
    if let Err(error) = told {
        anyhow::bail!("{error:#}\n{}", world.autopsy().await);
    }
    Ok(())
}

/// The error of connecting says this.
async fn told(url: &str, words: &str) -> Result<()> {
    let error = Target::from_url(url, None)?.connect().await.err().with_context(|| format!("{url} is let in"))?;
    let error = format!("{error:#}");
    ensure!(error.contains(words) && !error.contains("geheim"), "{words:?} is missing in: {error}");
    Ok(())
}

async fn proof_of_identity(world: &World) -> Result<()> {
    let (postgres, authority, trusted) = guarded(world, Options { migrate: None, ..Options::default() }).await?;
    let database = postgres.supabase_database().await?;
    database.connect_as(SUPERUSER).await?.batch_execute("create role cyberdesk_daemon login").await?;
    set_password(&database, "geheim").await?;
    let url = |host: &str, rest: &str| {
        format!("postgres://cyberdesk_daemon:geheim@{host}:{}/{}?{rest}", postgres.port(), database.name())
    };
    let trusting = format!("hostaddr=127.0.0.1&sslmode=verify-full&sslrootcert={}", trusted.display());

    told(&url("db.testbed", &trusting), "the server speaks no TLS").await?;
    told(&url("127.0.0.1", "sslmode=disable"), "reject").await?;

    postgres.show(Some(&authority.server_named(&["db.testbed"])?)).await?;
    let channel_bound = format!("{trusting}&channel_binding=require");
    for rest in [&trusting, &channel_bound] {
        let (client, connection) = Target::from_url(&url("db.testbed", rest), None)?.connect().await?;
        tokio::spawn(connection);
        let encrypted = "select ssl from pg_stat_ssl where pid = pg_backend_pid()";
        let encrypted: bool = client.query_typed(encrypted, &[]).await?.first().context("one row")?.get(0);
        ensure!(encrypted, "{rest}");
    }
    told(&url("other.testbed", &trusting), "is for another name").await?;
    told(&url("127.0.0.1", &trusting), "is for another name").await?;
    told(&url("db.testbed", "hostaddr=127.0.0.1"), "authority that is not trusted here").await?;
    told(&url("db.testbed", &trusting).replace("geheim", "wrong"), "the password is not that of the role").await?;
    told(&url("db.testbed", &trusting).replace(":geheim", ""), "holds no password").await?;

    let impostor = Authority::new("the database's own")?.server_named(&["db.testbed"])?;
    postgres.show(Some(&impostor)).await?;
    told(&url("db.testbed", &trusting), "authority that is not trusted here").await?;

    postgres.show(Some(&of_version_1()?)).await?;
    told(&url("db.testbed", &trusting), "X.509 v1").await
}

fn of_version_1() -> Result<Identity> {
    let both = include_str!("x509-v1.pem");
    let key = both.find("-----BEGIN PRIVATE KEY").context("there is a key")?;
    Ok(Identity { certificate: both[..key].to_owned(), key: both[key..].to_owned() })
}
