//! A wire between two programs that can be cut: a TCP proxy that passes, refuses, swallows, delays or resets.
//!
//! What a real network does to a connection, a server that is stopped cannot play: packets that vanish without a word
//! while both ends believe in the connection, answers that come late, a reset in the middle.

use std::io;
use std::net::Ipv4Addr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use anyhow::{Context as _, Result};
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::{JoinHandle, JoinSet};

/// What the wire does to what is sent on it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Condition {
    /// It arrives.
    Passes,
    /// Whoever connects is reset, and so is who was connected.
    Refuses,
    /// Nothing arrives, and nobody is told: connections are accepted and stay silent.
    Swallows,
    /// What the server sends arrives this much later.
    Delays(Duration),
}

/// The wire. Dropping it cuts everything.
#[derive(Debug)]
pub struct Wire {
    port: u16,
    condition: watch::Sender<Condition>,
    traffic: Arc<Traffic>,
    listener: JoinHandle<std::convert::Infallible>,
}

#[derive(Debug, Default)]
struct Traffic {
    open: AtomicUsize,
    total: AtomicUsize,
}

/// One connection, counted for as long as it is there.
struct Counted(Arc<Traffic>);

impl Counted {
    fn new(traffic: &Arc<Traffic>) -> Self {
        traffic.open.fetch_add(1, Ordering::Relaxed);
        traffic.total.fetch_add(1, Ordering::Relaxed);
        Self(Arc::clone(traffic))
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.open.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Wire {
    /// A wire to a port of this machine. It lives on the current runtime.
    pub async fn to(server: u16) -> Result<Self> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.context("listen for the wire's clients")?;
        let port = listener.local_addr()?.port();
        let condition = watch::Sender::new(Condition::Passes);
        let traffic = Arc::<Traffic>::default();
        let listener = tokio::spawn(accept(listener, server, condition.subscribe(), Arc::clone(&traffic)));
        Ok(Self { port, condition, traffic, listener })
    }

    /// Where it begins, on 127.0.0.1.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// From now on it is so, for connections that there are and for new ones.
    pub fn set(&self, condition: Condition) {
        self.condition.send_replace(condition);
    }

    /// How many connections are open. One that the client has just closed may still be among them.
    pub fn open(&self) -> usize {
        self.traffic.open.load(Ordering::Relaxed)
    }

    /// How many connections were made.
    pub fn made(&self) -> usize {
        self.traffic.total.load(Ordering::Relaxed)
    }
}

impl Drop for Wire {
    fn drop(&mut self) {
        self.listener.abort();
    }
}

async fn accept(
    listener: TcpListener,
    server: u16,
    condition: watch::Receiver<Condition>,
    traffic: Arc<Traffic>,
) -> std::convert::Infallible {
    let mut connections = JoinSet::new();
    loop {
        let Ok((client, _)) = listener.accept().await else { continue };
        let (condition, counted) = (condition.clone(), Counted::new(&traffic));
        connections.spawn(async move {
            // What goes wrong is what its two ends see of it.
            let _ = carry(client, server, condition).await;
            drop(counted);
        });
        while connections.try_join_next().is_some() {}
    }
}

async fn carry(mut client: TcpStream, server: u16, condition: watch::Receiver<Condition>) -> io::Result<()> {
    client.set_nodelay(true)?;
    // Whatever is not closed in order is reset.
    client.set_zero_linger()?;
    let mut refused = condition.clone();
    let carried = async {
        if *condition.borrow() == Condition::Swallows {
            return swallow(&mut client, condition).await;
        }
        let mut server = TcpStream::connect((Ipv4Addr::LOCALHOST, server)).await?;
        server.set_nodelay(true)?;
        let (mut from_client, mut to_client) = client.split();
        let (mut from_server, mut to_server) = server.split();
        let up = pump(&mut from_client, &mut to_server, condition.clone(), false);
        let down = pump(&mut from_server, &mut to_client, condition, true);
        tokio::select! { done = up => done, done = down => done }
    };
    tokio::select! {
        biased;
        _ = refused.wait_for(|now| *now == Condition::Refuses) => Ok(()),
        done = carried => done,
    }
}

async fn pump(
    from: &mut (impl AsyncRead + Unpin),
    to: &mut (impl AsyncWrite + Unpin),
    condition: watch::Receiver<Condition>,
    answers: bool,
) -> io::Result<()> {
    let mut buffer = vec![0; 16 * 1024];
    loop {
        let read = from.read(&mut buffer).await?;
        if read == 0 {
            return to.shutdown().await;
        }
        let now = *condition.borrow();
        match now {
            Condition::Swallows => return swallow(from, condition).await,
            Condition::Delays(by) if answers => tokio::time::sleep(by).await,
            Condition::Passes | Condition::Refuses | Condition::Delays(_) => (),
        }
        to.write_all(&buffer[..read]).await?;
    }
}

/// A connection of which something was swallowed is lost, though neither end knows: until one gives up, or the wire is
/// mended and the next packet is answered by a reset.
async fn swallow(from: &mut (impl AsyncRead + Unpin), mut condition: watch::Receiver<Condition>) -> io::Result<()> {
    let mut buffer = vec![0; 16 * 1024];
    loop {
        tokio::select! {
            read = from.read(&mut buffer) => if read? == 0 { return Ok(()) },
            _ = condition.wait_for(|now| *now != Condition::Swallows) => return Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn echo() -> u16 {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.expect("a port");
        let port = listener.local_addr().expect("it has one").port();
        tokio::spawn(async move {
            while let Ok((mut peer, _)) = listener.accept().await {
                tokio::spawn(async move {
                    let (mut read, mut write) = peer.split();
                    tokio::io::copy(&mut read, &mut write).await
                });
            }
        });
        port
    }

    /// Says a word, and hears it within a moment, or not.
    async fn says(stream: &mut TcpStream) -> Option<io::Result<usize>> {
        let mut buffer = [0; 8];
        stream.write_all(b"word").await.ok()?;
        tokio::time::timeout(Duration::from_millis(200), stream.read(&mut buffer)).await.ok()
    }

    #[tokio::test]
    async fn a_wire_does_what_it_is_told_to_who_is_connected_and_to_who_connects() {
        let wire = Wire::to(echo().await).await.expect("a wire");
        let connect = || async { TcpStream::connect((Ipv4Addr::LOCALHOST, wire.port())).await.expect("it listens") };
        let mut first = connect().await;
        assert!(matches!(says(&mut first).await, Some(Ok(4))));
        wire.set(Condition::Swallows);
        let mut second = connect().await;
        assert!(says(&mut first).await.is_none() && says(&mut second).await.is_none(), "silence, and no error");
        wire.set(Condition::Passes);
        assert!(!matches!(says(&mut first).await, Some(Ok(1..))), "what was swallowed does not come back");
        let mut third = connect().await;
        assert!(matches!(says(&mut third).await, Some(Ok(4))));
        wire.set(Condition::Refuses);
        assert!(!matches!(says(&mut third).await, Some(Ok(1..))), "who is connected is reset");
        wire.set(Condition::Delays(Duration::from_millis(400)));
        let mut fourth = connect().await;
        assert!(says(&mut fourth).await.is_none(), "later");
        assert_eq!(wire.made(), 4);
        drop((first, second, third, fourth));
        while wire.open() > 0 {
            tokio::task::yield_now().await;
        }
    }
}
