//! The testbed's own promises: nothing survives it, nothing unchecked is unpacked, its Postgres is Supabase's.
//!
//! The harness's `main` is not ours, so supervisors are started from the testbed's binary.

use std::io::{BufRead as _, BufReader, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use cyberdesk_testbed::assets::envtest;
use cyberdesk_testbed::postgres::{self, ADMINISTRATOR, SUPERUSER};
use cyberdesk_testbed::scratch::Scratch;
use cyberdesk_testbed::supervise::{Program, Signal, Spec, Supervised, set_executable};
use cyberdesk_testbed::{Caller, ControlPlane, Postgres, Progress};
use futures::FutureExt as _;
use kube::api::{Api, ApiResource, DynamicObject, GroupVersionKind, PostParams};

const TESTBED: &str = env!("CARGO_BIN_EXE_testbed");

/// A server of a test: says its process id, then waits for ever.
fn sleeper(directory: &Path) -> Spec {
    let script = format!("echo $$ > {0}/pid.new; mv {0}/pid.new {0}/pid; exec sleep 1000", directory.display());
    Spec::new("sleeper", Program::new("/bin/sh", ["-c", &script]), directory, directory.join("log"))
}

async fn until(what: &str, mut holds: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(30);
    while !holds() {
        assert!(Instant::now() < deadline, "waited in vain until {what}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

fn runs(pid: u32) -> bool {
    let pid = rustix::process::Pid::from_raw(pid.cast_signed()).expect("a process id is not zero");
    rustix::process::test_kill_process(pid).is_ok()
}

#[tokio::test]
async fn a_dropped_server_is_gone_with_its_data() -> Result<()> {
    set_executable(TESTBED);
    let directory = tempfile::tempdir()?.keep();
    let mut spec = sleeper(&directory);
    spec.remove.push(directory.clone());
    let server = Supervised::spawn(&spec)?;
    let pid = server.running().await?;
    assert!(runs(pid));
    drop(server);
    assert!(!runs(pid), "dropping waits for the end");
    assert!(!directory.exists());
    Ok(())
}

#[tokio::test]
async fn a_server_that_ignores_its_stop_signal_or_is_frozen_is_killed() -> Result<()> {
    set_executable(TESTBED);
    let directory = tempfile::tempdir()?;
    let mut spec = sleeper(directory.path());
    let deaf = "trap '' TERM; while :; do sleep 1000; done";
    spec.server = Program::new("/bin/sh", ["-c", deaf]);
    spec.stop_signal = Signal::TERM.as_raw();
    spec.grace = Duration::from_millis(100);
    let server = Supervised::spawn(&spec)?;
    let pid = server.running().await?;
    server.signal(Signal::STOP)?;
    drop(server);
    assert!(!runs(pid));
    Ok(())
}

#[tokio::test]
async fn a_server_can_be_killed_and_started_again_on_its_data() -> Result<()> {
    set_executable(TESTBED);
    let directory = tempfile::tempdir()?;
    let server = Supervised::spawn(&sleeper(directory.path()))?;
    let first = server.running().await?;
    server.kill9().await?;
    assert!(!runs(first));
    let second = server.start().await?;
    assert!(runs(second));
    assert!(directory.path().join("log").exists(), "the data stays");
    Ok(())
}

#[tokio::test]
async fn a_server_that_dies_early_leaves_its_last_words() -> Result<()> {
    set_executable(TESTBED);
    let directory = tempfile::tempdir()?;
    let mut spec = sleeper(directory.path());
    spec.server = Program::new("/bin/sh", ["-c", "echo no room left; exit 3"]);
    let server = Supervised::spawn(&spec)?;
    let story = server.ended().await.expect_err("it failed").to_string();
    assert!(story.contains("sleeper") && story.contains("exit status: 3") && story.contains("no room left"), "{story}");
    spec.server = Program::new("/nonexistent/server", [""; 0]);
    let server = Supervised::spawn(&spec)?;
    let story = server.running().await.expect_err("it cannot start").to_string();
    assert!(story.contains("cannot start /nonexistent/server"), "{story}");
    Ok(())
}

#[tokio::test]
async fn a_failed_preparation_keeps_the_server_from_starting() -> Result<()> {
    set_executable(TESTBED);
    let directory = tempfile::tempdir()?;
    let mut spec = sleeper(directory.path());
    spec.before = vec![Program::new("/bin/sh", ["-c", "echo prepared once >&2"]), Program::new("/bin/false", [""; 0])];
    let server = Supervised::spawn(&spec)?;
    let story = server.running().await.expect_err("it does not start").to_string();
    assert!(story.contains("false ended") && story.contains("prepared once"), "{story}");
    assert!(!directory.path().join("pid").exists());
    Ok(())
}

/// The test program starts itself once more as the parent that is killed; see [`plays_the_killed_parent`].
#[tokio::test]
async fn nothing_survives_a_parent_killed_with_sigkill() -> Result<()> {
    let directory = tempfile::tempdir()?;
    let data = directory.path().join("data");
    std::fs::create_dir(&data)?;
    let mut parent = Command::new(std::env::current_exe()?)
        .args(["--exact", "plays_the_killed_parent", "--ignored", "--nocapture"])
        .env("PARENT_DIRECTORY", &data)
        .stdout(Stdio::piped())
        .spawn()?;
    until("the server runs", || data.join("pid").exists()).await;
    let pid = std::fs::read_to_string(data.join("pid"))?.trim().parse()?;
    assert!(runs(pid));
    parent.kill()?;
    parent.wait()?;
    until("the server is gone", || !runs(pid)).await;
    until("its data is gone", || !data.exists()).await;
    Ok(())
}

#[tokio::test]
#[ignore = "plays the killed parent"]
async fn plays_the_killed_parent() -> Result<()> {
    let Some(data) = std::env::var_os("PARENT_DIRECTORY").map(PathBuf::from) else {
        return Ok(());
    };
    set_executable(TESTBED);
    let mut spec = sleeper(&data);
    spec.remove.push(data);
    let server = Supervised::spawn(&spec)?;
    server.ended().await
}

/// Serves an index and an archive over HTTP on a port of its own, and says whether the archive was asked for.
struct Releases {
    index_url: String,
    asked: std::sync::Arc<AtomicBool>,
    _server: tokio::task::JoinHandle<()>,
}

async fn releases(archive: Vec<u8>, hash: &str) -> Result<Releases> {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await?;
    let address = listener.local_addr()?;
    let platforms = ["linux-amd64", "linux-arm64", "darwin-amd64", "darwin-arm64"];
    let entries = platforms.map(|platform| {
        format!(
            "    envtest-v1.36.9-{platform}.tar.gz:\n      hash: {hash}\n      selfLink: http://{address}/archive\n"
        )
    });
    let index = format!("releases:\n  v1.36.9:\n{}", entries.concat());
    let asked = std::sync::Arc::new(AtomicBool::new(false));
    let served = std::sync::Arc::clone(&asked);
    let routes = axum::Router::new().route("/index.yaml", axum::routing::get(move || async { index })).route(
        "/archive",
        axum::routing::get(move || async move {
            served.store(true, Ordering::SeqCst);
            archive
        }),
    );
    let server = tokio::spawn(async move { axum::serve(listener, routes).await.expect("it serves until dropped") });
    Ok(Releases { index_url: format!("http://{address}/index.yaml"), asked, _server: server })
}

fn archive() -> Result<Vec<u8>> {
    let mut tar = tar::Builder::new(flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast()));
    for name in ["etcd", "kube-apiserver", "kubectl", "README"] {
        let text = format!("#!/bin/sh\necho {name}\n");
        let mut header = tar::Header::new_gnu();
        header.set_size(text.len() as u64);
        header.set_mode(0o755);
        tar.append_data(&mut header, format!("controller-tools/envtest/{name}"), text.as_bytes())?;
    }
    Ok(tar.into_inner()?.finish()?)
}

fn sha512(bytes: &[u8]) -> String {
    use sha2::Digest as _;
    sha2::Sha512::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect()
}

#[tokio::test]
async fn the_release_archive_is_unpacked_if_its_hash_is_right() -> Result<()> {
    let archive = archive()?;
    let releases = releases(archive.clone(), &sha512(&archive)).await?;
    let into = tempfile::tempdir()?;
    envtest::fetch(&releases.index_url, "v1.36.3", into.path(), &Progress::quiet().part("archive")).await?;
    for name in ["etcd", "kube-apiserver", "kubectl"] {
        let said = Command::new(into.path().join(name)).output()?.stdout;
        assert_eq!(String::from_utf8(said)?.trim(), name);
    }
    assert!(!into.path().join("README").exists(), "only what is known is unpacked");
    Ok(())
}

#[tokio::test]
async fn an_archive_with_another_hash_is_refused() -> Result<()> {
    let archive = archive()?;
    let releases = releases(archive, &sha512(b"something else")).await?;
    let into = tempfile::tempdir()?;
    let part = Progress::quiet().part("archive");
    let error = envtest::fetch(&releases.index_url, "v1.36.3", into.path(), &part).await.expect_err("it is refused");
    assert!(releases.asked.load(Ordering::SeqCst), "the archive was fetched");
    assert!(error.to_string().contains("hash"), "{error:#}");
    assert_eq!(std::fs::read_dir(into.path())?.count(), 0, "nothing is unpacked");
    Ok(())
}

/// The whole binary, told to end while it runs, with the plain output of a pipe.
#[tokio::test]
async fn the_testbed_comes_up_and_leaves_nothing_behind() -> Result<()> {
    let place = tempfile::tempdir_in("/tmp")?;
    std::fs::set_permissions(place.path(), std::os::unix::fs::PermissionsExt::from_mode(0o755))?;
    let words = tempfile::NamedTempFile::new()?;
    let mut testbed = Command::new(TESTBED)
        .args(["--no-operator", "--kubevirt", "none"])
        .env("TMPDIR", place.path())
        .stdout(Stdio::piped())
        .stderr(words.reopen()?)
        .spawn()?;
    let mut lines = BufReader::new(testbed.stdout.take().context("it is a pipe")?).lines();
    let Some(database_url) = lines.next() else { bail!("{}", std::fs::read_to_string(words.path())?) };
    let database_url = database_url?;
    let kubeconfig = lines.next().context("it says where the API is")??;
    let database_url = database_url.strip_prefix("export DATABASE_URL='").context("a variable")?.trim_end_matches('\'');
    let kubeconfig =
        PathBuf::from(kubeconfig.strip_prefix("export KUBECONFIG='").context("a variable")?.trim_end_matches('\''));
    assert!(kubeconfig.is_file());

    let mut sql = Command::new(TESTBED)
        .arg("sql")
        .env("DATABASE_URL", database_url)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()?;
    sql.stdin.take().context("it is a pipe")?.write_all(b"select current_user as me; select 1 as one")?;
    let said = String::from_utf8(sql.wait_with_output()?.stdout)?;
    assert_eq!(said, "me\npostgres\none\n1\n");

    let pid = rustix::process::Pid::from_child(&testbed);
    rustix::process::kill_process(pid, Signal::INT)?;
    ensure!(testbed.wait()?.success(), "Ctrl-C is a good end");
    assert_eq!(std::fs::read_dir(place.path())?.count(), 0, "no data is left");
    Ok(())
}

#[tokio::test]
async fn the_database_is_as_supabase_sets_it_up() -> Result<()> {
    set_executable(TESTBED);
    let scratch = Scratch::new()?;
    let options = postgres::Options { migrate: Some(|url| marked(url).boxed()), ..Default::default() };
    let server = Postgres::start(&options, &scratch, &Progress::quiet().part("postgres")).await?;

    // Migrated and not.
    let database = server.database().await?;
    assert!(database.connect_as(ADMINISTRATOR).await?.query("select * from public.mark", &[]).await.is_ok());
    let bare = server.supabase_database().await?;
    assert!(bare.connect_as(ADMINISTRATOR).await?.query("select * from public.mark", &[]).await.is_err());
    let plain = server.plain_database().await?;
    let schemas = "select 1 from pg_namespace where nspname = 'auth'";
    assert!(plain.connect_as(SUPERUSER).await?.query(schemas, &[]).await?.is_empty());

    // Who is who.
    let user = database.sign_up().await?;
    let me = "select current_user::text, auth.uid()::text, auth.role()";
    for (caller, want) in [
        (Caller::Anon, ("anon", None, "anon")),
        (Caller::User(user), ("authenticated", Some(user.to_string()), "authenticated")),
        (Caller::Service, ("service_role", None, "service_role")),
    ] {
        let row = database.request(caller, me, &[]).await?.pop().context("a row")?;
        let said: (String, Option<String>, String) = (row.get(0), row.get(1), row.get(2));
        assert_eq!((said.0.as_str(), said.1, said.2.as_str()), want);
    }
    let administrator = database.connect_as(ADMINISTRATOR).await?;
    let refused = administrator.batch_execute("create table auth.mine ()").await.expect_err("auth is GoTrue's");
    assert_eq!(refused.code().map(|code| code.code()), Some("42501"));
    let refused = administrator.batch_execute("alter system set jit = on").await.expect_err("it is no superuser");
    assert_eq!(refused.code().map(|code| code.code()), Some("42501"));
    administrator
        .batch_execute("create table public.t (owner uuid references auth.users (id) on delete cascade)")
        .await?;
    administrator.execute("insert into public.t values ($1)", &[&user]).await?;
    let seen = database.request(Caller::Anon, "select * from public.t", &[]).await?;
    assert_eq!(seen.len(), 1, "old projects grant everything to everyone by default");
    assert_eq!(database.delete_user(user).await?, 1);
    assert!(administrator.query("select * from public.t", &[]).await?.is_empty());

    // A crash loses nothing that was committed, and the server comes back on the same port.
    administrator.execute("insert into public.t values (null)", &[]).await?;
    server.server().kill9().await?;
    server.restart().await?;
    let again = database.connect_as(ADMINISTRATOR).await?;
    assert_eq!(again.query("select * from public.t", &[]).await?.len(), 1);

    // A database goes with its value, whoever is still connected.
    let superuser = plain.connect_as(SUPERUSER).await?;
    let name = database.name().to_owned();
    drop(database);
    let deadline = Instant::now() + Duration::from_secs(30);
    while !superuser.query("select 1 from pg_database where datname = $1", &[&name]).await?.is_empty() {
        ensure!(Instant::now() < deadline, "waited in vain until the database is dropped");
    }
    Ok(())
}

async fn marked(url: String) -> Result<()> {
    let (client, connection) = tokio_postgres::connect(&url, tokio_postgres::NoTls).await?;
    tokio::spawn(connection);
    Ok(client.batch_execute("create table public.mark ()").await?)
}

#[tokio::test]
async fn the_api_server_knows_service_accounts_and_survives_a_crash() -> Result<()> {
    use k8s_openapi::api::core::v1::{ConfigMap, ServiceAccount};
    set_executable(TESTBED);
    let scratch = Scratch::new()?;
    let cluster = ControlPlane::start(Default::default(), &scratch, &Progress::quiet().part("kubernetes")).await?;
    let client = cluster.client().await?;

    let kind = ApiResource::from_gvk(&GroupVersionKind::gvk("cyberdesk.io", "v1alpha1", "Cyberdesk"));
    let objects: Api<DynamicObject> = Api::namespaced_with(client.clone(), "default", &kind);
    assert!(objects.list(&Default::default()).await?.items.is_empty(), "the operator's kind is served");

    let accounts: Api<ServiceAccount> = Api::namespaced(client.clone(), "default");
    let mut account = ServiceAccount::default();
    account.metadata.name = Some("nobody-special".to_owned());
    accounts.create(&PostParams::default(), &account).await?;
    let theirs = cluster.client_for_service_account("default", "nobody-special").await?;
    let refused =
        Api::<ConfigMap>::namespaced(theirs, "default").list(&Default::default()).await.expect_err("no rights");
    let said = refused.to_string();
    assert!(said.contains("system:serviceaccount:default:nobody-special"), "{said}");

    cluster.api_server().kill9().await?;
    cluster.api_server().start().await?;
    cluster.ready().await?;
    assert!(accounts.get("nobody-special").await.is_ok(), "what was written is still there");
    Ok(())
}
