//! A proxy in front of Postgres that reads which statements pass, and holds those it is told to.
//!
//! It reads the extended protocol, in which a client sends a statement's text (Parse), its parameters (Bind) and the
//! order to run it as one group that ends with Sync. Connections are without TLS, as the testbed's are.

use std::fmt;
use std::net::Ipv4Addr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use anyhow::{Context as _, Result};
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinSet;

use crate::gate::{Gate, Verdict};
use crate::postgres::Postgres;

/// A statement on its way.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Statement {
    /// Its text.
    pub text: String,
    /// Its parameters, as they are sent; `None` is null.
    pub params: Vec<Option<Vec<u8>>>,
}

impl Statement {
    /// The elements of a parameter that is an array in the binary format; `None` is null.
    pub fn array(&self, param: usize) -> Vec<Option<Vec<u8>>> {
        let Some(Some(bytes)) = self.params.get(param) else { return vec![] };
        // Dimensions, flags, type; then length and lower bound of the one dimension.
        let mut rest = bytes.get(20..).unwrap_or_default();
        std::iter::from_fn(|| take_value(&mut rest)).collect()
    }
}

/// Where a statement is held.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum When {
    /// Before the database has it.
    Before,
    /// When the database has run it, and its answer is on its way.
    After,
}

type Applies = Box<dyn Fn(&Statement) -> bool + Send + Sync>;

/// A running proxy. Dropping it cuts everybody off.
#[derive(Debug)]
pub struct StatementProxy {
    port: u16,
    middle: Arc<Middle>,
    _connections: JoinSet<()>,
}

#[derive(Default)]
struct Middle {
    hold: Mutex<Option<(When, Gate, Applies)>>,
    log: Mutex<Vec<Statement>>,
}

impl fmt::Debug for Middle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Middle").finish_non_exhaustive()
    }
}

impl StatementProxy {
    /// Starts one that passes everything on.
    pub async fn start(postgres: &Postgres) -> Result<Self> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.context("a port for the proxy")?;
        let (port, upstream) = (listener.local_addr()?.port(), postgres.port());
        let middle = Arc::new(Middle::default());
        let mut connections = JoinSet::new();
        let shared = middle.clone();
        connections.spawn(async move {
            let mut open = JoinSet::new();
            while let Ok((client, _)) = listener.accept().await {
                let middle = shared.clone();
                open.spawn(async move {
                    if let Ok(server) = TcpStream::connect((Ipv4Addr::LOCALHOST, upstream)).await {
                        // However it ends, both sides find their connection closed.
                        let _ = middle.between(client, server).await;
                    }
                });
            }
        });
        Ok(Self { port, middle, _connections: connections })
    }

    /// A testbed's URL led through the proxy.
    pub fn url(&self, postgres: &Postgres, url: &str) -> String {
        url.replace(&format!(":{}/", postgres.port()), &format!(":{}/", self.port))
    }

    /// Holds at a gate each statement that this applies to, from now on.
    pub fn hold(&self, when: When, gate: &Gate, applies: impl Fn(&Statement) -> bool + Send + Sync + 'static) {
        *self.middle.held() = Some((when, gate.clone(), Box::new(applies)));
    }

    /// Holds nothing more. What is at the gate stays there.
    pub fn lift(&self) {
        *self.middle.held() = None;
    }

    /// All statements that were passed on so far.
    pub fn log(&self) -> Vec<Statement> {
        self.middle.log().clone()
    }
}

impl Middle {
    fn held(&self) -> MutexGuard<'_, Option<(When, Gate, Applies)>> {
        self.hold.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn log(&self) -> MutexGuard<'_, Vec<Statement>> {
        self.log.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn between(&self, client: TcpStream, server: TcpStream) -> std::io::Result<()> {
        for side in [&client, &server] {
            side.set_nodelay(true)?;
        }
        let ((mut from_client, to_client), (from_server, mut to_server)) = (client.into_split(), server.into_split());
        // The first message has no type.
        let length = from_client.read_u32().await?;
        let mut startup = vec![0; (length as usize).saturating_sub(4)];
        from_client.read_exact(&mut startup).await?;
        to_server.write_all(&[&length.to_be_bytes()[..], &startup].concat()).await?;
        let (answers, done) = (watch::Sender::new(true), watch::Sender::new(0_u64));
        tokio::select! {
            ended = self.ask(from_client, to_server, &answers, &done) => ended,
            ended = answer(from_server, to_client, &answers, &done) => ended,
        }
    }

    /// Passes on what the client asks, a group at a time.
    async fn ask(
        &self,
        mut client: OwnedReadHalf,
        mut server: OwnedWriteHalf,
        answers: &watch::Sender<bool>,
        done: &watch::Sender<u64>,
    ) -> std::io::Result<()> {
        let mut group = vec![];
        let mut statement: Option<Statement> = None;
        loop {
            let (kind, body) = message(&mut client).await?;
            match kind {
                b'P' => statement = parse(&body),
                b'B' => {
                    if let Some(statement) = &mut statement {
                        statement.params = bind(&body);
                    }
                }
                _ => (),
            }
            group.extend(framed(kind, &body));
            if matches!(kind, b'P' | b'B' | b'D' | b'E' | b'C') {
                continue;
            }
            let group = std::mem::take(&mut group);
            let Some(statement) = statement.take() else {
                server.write_all(&group).await?;
                continue;
            };
            let gate = match &*self.held() {
                Some((when, gate, applies)) if applies(&statement) => Some((*when, gate.clone())),
                _ => None,
            };
            let Some((when, gate)) = gate else {
                self.log().push(statement);
                server.write_all(&group).await?;
                continue;
            };
            // Nothing of it is heard, though the client may live on for a while.
            answers.send_replace(false);
            let ran = async |server: &mut OwnedWriteHalf| {
                let before = *done.borrow();
                server.write_all(&group).await?;
                // The sender is in the caller's hands.
                let _ = done.subscribe().wait_for(|now| *now > before).await;
                std::io::Result::Ok(())
            };
            if when == When::After {
                ran(&mut server).await?;
            }
            let verdict = gate.pass(&statement.text).await;
            if when == When::Before && verdict == Verdict::Lands {
                ran(&mut server).await?;
                gate.land();
            }
            return Ok(());
        }
    }
}

/// Passes on what the server answers, for as long as it shall be heard, and counts what it is done with.
async fn answer(
    mut server: OwnedReadHalf,
    mut client: OwnedWriteHalf,
    answers: &watch::Sender<bool>,
    done: &watch::Sender<u64>,
) -> std::io::Result<()> {
    loop {
        let (kind, body) = message(&mut server).await?;
        if *answers.borrow() {
            client.write_all(&framed(kind, &body)).await?;
        }
        if kind == b'Z' {
            done.send_modify(|done| *done += 1);
        }
    }
}

async fn message(from: &mut (impl AsyncRead + Unpin)) -> std::io::Result<(u8, Vec<u8>)> {
    let kind = from.read_u8().await?;
    let length = from.read_u32().await?;
    let mut body = vec![0; (length as usize).saturating_sub(4)];
    from.read_exact(&mut body).await?;
    Ok((kind, body))
}

fn framed(kind: u8, body: &[u8]) -> Vec<u8> {
    let length = u32::try_from(body.len() + 4).unwrap_or(u32::MAX);
    [&[kind][..], &length.to_be_bytes(), body].concat()
}

/// The text in a Parse: after the statement's name.
fn parse(body: &[u8]) -> Option<Statement> {
    let text = body.split(|byte| *byte == 0).nth(1)?;
    Some(Statement { text: String::from_utf8_lossy(text).into_owned(), params: vec![] })
}

/// The parameters in a Bind: after two names and the formats.
fn bind(body: &[u8]) -> Vec<Option<Vec<u8>>> {
    let mut names = body.splitn(3, |byte| *byte == 0);
    let mut rest = names.nth(2).unwrap_or_default();
    let formats = take_u16(&mut rest);
    rest = rest.get(usize::from(formats) * 2..).unwrap_or_default();
    let count = take_u16(&mut rest);
    (0..count).map_while(|_| take_value(&mut rest)).collect()
}

fn take_u16(rest: &mut &[u8]) -> u16 {
    let Some((number, after)) = rest.split_first_chunk() else { return 0 };
    *rest = after;
    u16::from_be_bytes(*number)
}

/// A value after its length, of which -1 is null.
fn take_value(rest: &mut &[u8]) -> Option<Option<Vec<u8>>> {
    let (length, after) = rest.split_first_chunk()?;
    *rest = after;
    let Ok(length) = usize::try_from(i32::from_be_bytes(*length)) else { return Some(None) };
    let (value, after) = rest.split_at_checked(length)?;
    *rest = after;
    Some(Some(value.to_vec()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_statement_is_read_with_its_parameters() {
        let statement = parse(b"\0select f($1, $2)\0\0\x02\0\0\0\x17\0\0\0\x19").expect("it has a text");
        assert_eq!(statement.text, "select f($1, $2)");
        let array = [
            &[0, 0, 0, 1, 0, 0, 0, 1, 0, 0, 0, 25, 0, 0, 0, 2, 0, 0, 0, 1][..],
            &[0, 0, 0, 2, b'o', b'k'],
            &[255, 255, 255, 255],
        ]
        .concat();
        let length = u32::try_from(array.len()).expect("it is short").to_be_bytes();
        let body =
            [&b"\0\0"[..], &[0, 1, 0, 1], &[0, 2], &[255, 255, 255, 255], &length, &array, &[0, 1, 0, 1]].concat();
        let params = bind(&body);
        assert_eq!(params, [None, Some(array)]);
        let statement = Statement { params, ..statement };
        assert_eq!(statement.array(1), [Some(b"ok".to_vec()), None]);
        assert_eq!(statement.array(0), [] as [Option<Vec<u8>>; 0]);
    }
}
