//! Servers that die with us, however we end.
//!
//! Every server (postgres, etcd, kube-apiserver, the operator) runs under a supervising child: this same
//! executable, started again with a hidden first argument. Its standard input is a pipe from us. When the pipe
//! closes, be it that we asked, returned, panicked or were killed with SIGKILL, the supervisor stops the server
//! and removes its data. A pipe is the one signal that no way of dying can forget to send, on Linux and on macOS.
//!
//! What must stay true:
//! * [`become_supervisor_if_asked`] is the first line of every `main` that starts servers;
//! * supervisor and server are process groups of their own, so that Ctrl-C in a terminal reaches us alone and we
//!   decide in which order things end;
//! * the supervisor holds no state that we need: orders go in and events come out as one JSON value a line.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs::File;
use std::io::{self, BufRead as _, BufReader};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use rustix::process::{Pid, kill_process_group};
use serde::{Deserialize, Serialize};
use tokio::io::AsyncBufReadExt as _;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;

use crate::account::Account;

pub use rustix::process::Signal;

/// The hidden first argument that turns an executable of ours into a supervisor.
const ARGUMENT: &str = "__supervise";

/// How many lines of a server's log are shown when it ends on its own.
const LAST_WORDS: usize = 15;

static EXECUTABLE: OnceLock<PathBuf> = OnceLock::new();

/// Names the executable to start supervisors from, instead of the current one.
///
/// For test harnesses whose `main` is not ours. The first caller wins.
pub fn set_executable(path: impl Into<PathBuf>) {
    let _ = EXECUTABLE.set(path.into());
}

/// The executable that plays every hidden part: the named one, else our own.
pub(crate) fn executable() -> Result<PathBuf> {
    match EXECUTABLE.get() {
        Some(path) => Ok(path.clone()),
        None => std::env::current_exe().context("find our own executable"),
    }
}

/// A program and its arguments.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Program {
    /// The executable.
    pub path: PathBuf,
    /// What follows it on the command line.
    pub args: Vec<OsString>,
}

impl Program {
    /// A program with its arguments.
    pub fn new<A: Into<OsString>>(path: impl Into<PathBuf>, args: impl IntoIterator<Item = A>) -> Self {
        Self { path: path.into(), args: args.into_iter().map(Into::into).collect() }
    }

    fn name(&self) -> String {
        self.path.file_name().unwrap_or(self.path.as_os_str()).to_string_lossy().into_owned()
    }
}

/// What a supervisor is told about its server.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Spec {
    /// What people call it.
    pub name: String,
    /// The server.
    pub server: Program,
    /// Run once, one after the other, before the server starts for the first time.
    pub before: Vec<Program>,
    /// Added to our own environment.
    pub env: BTreeMap<String, String>,
    /// Where the server runs.
    pub directory: PathBuf,
    /// Whom it runs as; `None` is whoever we are.
    pub account: Option<Account>,
    /// Where its output goes, standard and error alike.
    pub log: PathBuf,
    /// Asks it to end (a raw signal number). SIGKILL follows after `grace`.
    pub stop_signal: i32,
    /// How long it may take to end when asked.
    pub grace: Duration,
    /// Files and directories removed once it has ended for good.
    pub remove: Vec<PathBuf>,
    /// Directories removed after that if nothing is left in them: the last of several servers tidies up.
    pub remove_if_empty: Vec<PathBuf>,
}

impl Spec {
    /// A server that is killed at the end and leaves its log.
    pub fn new(name: &str, server: Program, directory: impl Into<PathBuf>, log: impl Into<PathBuf>) -> Self {
        Self {
            name: name.to_owned(),
            server,
            before: Vec::new(),
            env: BTreeMap::new(),
            directory: directory.into(),
            account: None,
            log: log.into(),
            stop_signal: Signal::KILL.as_raw(),
            grace: Duration::from_secs(5),
            remove: Vec::new(),
            remove_if_empty: Vec::new(),
        }
    }
}

/// We tell the supervisor. Closing the pipe is the third order: end.
#[derive(Serialize, Deserialize)]
enum Order {
    Signal(i32),
    Start,
}

/// The supervisor tells us, and we tell those who wait.
#[derive(Clone, Debug, Serialize, Deserialize)]
enum State {
    Preparing,
    Running { pid: u32 },
    Ended { how: String, success: bool },
}

/// A server under its supervisor. Dropping it ends both, and waits for that.
#[derive(Debug)]
pub struct Supervised {
    name: String,
    log: PathBuf,
    supervisor: Mutex<Child>,
    orders: Mutex<Option<ChildStdin>>,
    state: Arc<watch::Sender<State>>,
}

impl Supervised {
    /// Starts the supervisor, which starts the server; [`Supervised::running`] says when it did.
    pub fn spawn(spec: &Spec) -> Result<Self> {
        let log = File::options().create(true).append(true).open(&spec.log);
        let log = log.with_context(|| format!("open {}, the log of {}", spec.log.display(), spec.name))?;
        let mut supervisor = Command::new(executable()?)
            .arg(ARGUMENT)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(log)
            .process_group(0)
            .spawn()
            .with_context(|| format!("start the supervisor of {}", spec.name))?;
        let mut orders = supervisor.stdin.take().expect("its standard input is a pipe");
        let events = supervisor.stdout.take().expect("its standard output is a pipe");
        send(&mut orders, spec).with_context(|| format!("tell the supervisor about {}", spec.name))?;

        let state = Arc::new(watch::Sender::new(State::Preparing));
        let told = Arc::clone(&state);
        std::thread::spawn(move || {
            for line in BufReader::new(events).lines().map_while(Result::ok) {
                if let Ok(event) = serde_json::from_str(&line) {
                    told.send_replace(event);
                }
            }
            told.send_if_modified(|state| {
                let gone = !matches!(state, State::Ended { .. });
                if gone {
                    *state = State::Ended { how: "its supervisor ended".to_owned(), success: false };
                }
                gone
            });
        });
        Ok(Self {
            name: spec.name.clone(),
            log: spec.log.clone(),
            supervisor: Mutex::new(supervisor),
            orders: Mutex::new(Some(orders)),
            state,
        })
    }

    /// Waits until the server's process is there, and answers its process id.
    pub async fn running(&self) -> Result<u32> {
        match &*self.state_when(|state| !matches!(state, State::Preparing)).await {
            State::Running { pid } => Ok(*pid),
            _ => Err(self.last_words()),
        }
    }

    /// Waits until the server has ended, and answers with how, if that was not a success.
    pub async fn ended(&self) -> Result<()> {
        match &*self.state_when(|state| matches!(state, State::Ended { .. })).await {
            State::Ended { success: true, .. } => Ok(()),
            _ => Err(self.last_words()),
        }
    }

    /// Has the server ended, by itself or by a signal of ours?
    pub fn has_ended(&self) -> bool {
        matches!(*self.state.borrow(), State::Ended { .. })
    }

    /// Sends a signal to the server (and to what it started, if that stayed in its process group).
    pub fn signal(&self, signal: Signal) -> Result<()> {
        self.order(&Order::Signal(signal.as_raw()))
    }

    /// Kills the server as a crash would, and waits until it is gone. Its data stays; [`Supervised::start`] follows.
    pub async fn kill9(&self) -> Result<()> {
        self.signal(Signal::KILL)?;
        self.state_when(|state| matches!(state, State::Ended { .. })).await;
        Ok(())
    }

    /// Starts the ended server again, on its data and with its arguments.
    pub async fn start(&self) -> Result<u32> {
        if !self.has_ended() {
            bail!("{} runs already", self.name);
        }
        self.state.send_replace(State::Preparing);
        self.order(&Order::Start)?;
        self.running().await
    }

    /// Tells server and supervisor to end, without waiting: several can so end side by side before they are dropped.
    pub fn begin_end(&self) {
        lock(&self.orders).take();
    }

    /// The story of an unexpected end: who, how, and the last lines of the log.
    pub fn last_words(&self) -> anyhow::Error {
        let how = match &*self.state.borrow() {
            State::Ended { how, .. } => how.clone(),
            _ => "does not answer".to_owned(),
        };
        let log = std::fs::read(&self.log).unwrap_or_default();
        let log = String::from_utf8_lossy(&log);
        let lines: Vec<&str> = log.lines().collect();
        let last = lines[lines.len().saturating_sub(LAST_WORDS)..].join("\n  ");
        anyhow::anyhow!("{}: {how}; its log ends so:\n  {last}", self.name)
    }

    /// Where the server's output goes.
    pub fn log(&self) -> &Path {
        &self.log
    }

    async fn state_when(&self, wanted: impl Fn(&State) -> bool) -> watch::Ref<'_, State> {
        let mut seen = self.state.subscribe();
        // The sender lives as long as `self`, so the wait cannot fail.
        let _ = seen.wait_for(|state| wanted(state)).await;
        self.state.borrow()
    }

    fn order(&self, order: &Order) -> Result<()> {
        let mut orders = lock(&self.orders);
        let pipe = orders.as_mut().with_context(|| format!("{} was told to end", self.name))?;
        send(pipe, order).map_err(|_| self.last_words())
    }
}

impl Drop for Supervised {
    fn drop(&mut self) {
        self.begin_end();
        // Bounded by the supervisor, which kills after the grace.
        let _ = lock(&self.supervisor).wait();
    }
}

/// A panic elsewhere does not spoil a pipe or a child handle.
fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

fn send(pipe: &mut impl io::Write, value: &impl Serialize) -> Result<()> {
    let mut line = serde_json::to_vec(value)?;
    line.push(b'\n');
    pipe.write_all(&line)?;
    Ok(pipe.flush()?)
}

/// Returns at once in an ordinary process; in a supervisor it never returns.
///
/// Call it first in `main`, before threads, runtimes and arguments.
pub fn become_supervisor_if_asked() {
    if std::env::args_os().nth(1).is_none_or(|argument| argument != ARGUMENT) {
        return;
    }
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let done = runtime.context("start a runtime").and_then(|runtime| runtime.block_on(supervise()));
    if let Err(error) = &done {
        eprintln!("supervisor: {error:#}");
    }
    // Not a return: a thread of the runtime still sits in a read of standard input.
    std::process::exit(i32::from(done.is_err()));
}

/// What reaches a supervisor: orders from the pipe, and signals, which mean the same as the pipe's end.
struct Inbox {
    pipe: tokio::io::Lines<tokio::io::BufReader<tokio::io::Stdin>>,
    signals: [tokio::signal::unix::Signal; 3],
}

impl Inbox {
    /// The next order; `None` is the order to end.
    async fn next(&mut self) -> Option<Order> {
        let [term, interrupt, hangup] = &mut self.signals;
        tokio::select! {
            line = self.pipe.next_line() => serde_json::from_str(&line.ok()??).ok(),
            _ = term.recv() => None,
            _ = interrupt.recv() => None,
            _ = hangup.recv() => None,
        }
    }
}

async fn supervise() -> Result<()> {
    let mut inbox = Inbox {
        pipe: tokio::io::BufReader::new(tokio::io::stdin()).lines(),
        signals: [signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?, signal(SignalKind::hangup())?],
    };
    let Some(line) = inbox.pipe.next_line().await? else {
        return Ok(());
    };
    let spec: Spec = serde_json::from_str(&line).context("read what to supervise")?;
    let lived = live(&spec, &mut inbox).await;
    for path in &spec.remove {
        remove(path).await;
    }
    for directory in &spec.remove_if_empty {
        let _ = std::fs::remove_dir(directory);
    }
    lived
}

/// Prepares, then runs the server as often as asked, until told to end.
async fn live(spec: &Spec, inbox: &mut Inbox) -> Result<()> {
    let last = spec.before.len();
    let mut step = 0;
    loop {
        let program = spec.before.get(step).unwrap_or(&spec.server);
        let Some(ended) = attend(spec, program, step == last, inbox).await else {
            return Ok(());
        };
        let success = matches!(&ended, Ok(status) if status.success());
        if success && step < last {
            step += 1;
            continue;
        }
        let how = match ended {
            Ok(status) => format!("{} ended ({status})", program.name()),
            Err(error) => format!("cannot start {}: {error}", program.path.display()),
        };
        tell(&State::Ended { how, success })?;
        loop {
            match inbox.next().await {
                None => return Ok(()),
                Some(Order::Start) => break,
                Some(Order::Signal(_)) => (),
            }
        }
    }
}

/// Runs one program to its end; `None` means that we were told to end it.
async fn attend(spec: &Spec, program: &Program, is_server: bool, inbox: &mut Inbox) -> Option<io::Result<ExitStatus>> {
    let mut child = match start(spec, program) {
        Ok(child) => child,
        Err(error) => return Some(Err(error)),
    };
    let group = child.id().and_then(|pid| Pid::from_raw(pid.cast_signed())).expect("it was not waited for yet");
    if is_server {
        // If nobody listens any more, the pipe's end says the same in a moment.
        let pid = group.as_raw_nonzero().get().cast_unsigned();
        let _ = tell(&State::Running { pid });
    }
    loop {
        tokio::select! {
            status = child.wait() => {
                // Whatever it started and left in its group goes with it.
                let _ = kill_process_group(group, Signal::KILL);
                return Some(status);
            }
            order = inbox.next() => match order {
                Some(Order::Signal(number)) => {
                    if let Some(signal) = Signal::from_named_raw(number) {
                        let _ = kill_process_group(group, signal);
                    }
                }
                Some(Order::Start) => (),
                None => break,
            },
        }
    }
    if let Some(signal) = Signal::from_named_raw(spec.stop_signal) {
        let _ = kill_process_group(group, signal);
        // A stopped process acts on nothing but SIGKILL until it continues.
        let _ = kill_process_group(group, Signal::CONT);
    }
    let _ = tokio::time::timeout(spec.grace, child.wait()).await;
    let _ = kill_process_group(group, Signal::KILL);
    let _ = child.wait().await;
    None
}

fn start(spec: &Spec, program: &Program) -> io::Result<tokio::process::Child> {
    let log = File::options().create(true).append(true).open(&spec.log)?;
    let mut command = tokio::process::Command::new(&program.path);
    command
        .args(&program.args)
        .envs(&spec.env)
        .current_dir(&spec.directory)
        .stdin(Stdio::null())
        .stdout(log.try_clone()?)
        .stderr(log)
        .process_group(0);
    if let Some(account) = spec.account {
        command.uid(account.uid).gid(account.gid);
    }
    command.spawn()
}

fn tell(state: &State) -> Result<()> {
    send(&mut io::stdout().lock(), state)
}

/// Removes a file or a directory; helpers of a killed server may write to it for another moment.
async fn remove(path: &Path) {
    for _ in 0..100 {
        let gone = match std::fs::symlink_metadata(path) {
            Ok(found) if found.is_dir() => std::fs::remove_dir_all(path),
            Ok(_) => std::fs::remove_file(path),
            Err(_) => return,
        };
        if gone.is_ok() {
            return;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    eprintln!("supervisor: cannot remove {}", path.display());
}
