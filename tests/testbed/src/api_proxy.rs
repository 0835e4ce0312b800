//! A proxy in front of the real API server, in which things go wrong as told.
//!
//! ```text
//!   daemon ── TLS, its own token ──▶ ApiProxy ── TLS, the same token ──▶ kube-apiserver
//!                                      │ rules: what goes wrong with which request, how often
//!                                      └ log: what was asked, and what the API server answered
//! ```
//!
//! Whoever calls through it comes with a token: a client certificate would stay behind. What was passed on is done,
//! whether or not the caller lives to hear of it.

mod call;
mod rules;
mod watched;

use std::io;
use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use anyhow::{Context as _, Result};
use axum::body::{Body, Bytes, to_bytes};
use axum::extract::{Request, State};
use axum::http::{HeaderMap, StatusCode, header, request};
use axum::response::{IntoResponse as _, Response};
use axum_server::Handle;
use axum_server::tls_rustls::RustlsConfig;
use futures::{StreamExt as _, stream};
use kube::config::Kubeconfig;
use serde_json::json;
use tokio::net::TcpSocket;
use tokio::task::JoinSet;

pub use call::Call;
pub use rules::{Answer, Fault};

use crate::control_plane::ControlPlane;
use crate::gate::Verdict;
use rules::Rules;
use watched::Watched;

/// A request that the API server has answered.
#[derive(Clone, Debug)]
pub struct Passed {
    /// What was asked.
    pub call: Call,
    /// The status of the API server's answer, whoever heard of it.
    pub status: u16,
}

/// A running proxy. Dropping it cuts everybody off.
#[derive(Debug)]
pub struct ApiProxy {
    middle: Arc<Middle>,
    /// Keeps the port ours while nobody listens on it.
    _place: TcpSocket,
    address: SocketAddr,
    tls: RustlsConfig,
    listening: Mutex<Option<(Handle<SocketAddr>, JoinSet<()>)>>,
    url: String,
}

/// What all of its connections share.
#[derive(Debug)]
struct Middle {
    upstream: reqwest::Client,
    target: String,
    rules: Rules,
    log: Mutex<Vec<Passed>>,
}

impl ApiProxy {
    /// Starts one that passes everything on.
    pub async fn start(control_plane: &ControlPlane) -> Result<Self> {
        let (authority, identity) = control_plane.vouched("api proxy")?;
        // The first to install a provider wins; any is good.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let authority = reqwest::Certificate::from_pem(authority.as_bytes())?;
        let upstream = reqwest::Client::builder().tls_certs_only([authority]).build()?;
        let tls = RustlsConfig::from_pem(identity.certificate.into_bytes(), identity.key.into_bytes()).await?;
        let place = TcpSocket::new_v4()?;
        place.set_reuseaddr(true)?;
        place.bind(SocketAddrV4::new(Ipv4Addr::LOCALHOST, 0).into())?;
        let address = place.local_addr()?;
        let target = format!("https://{}:{}", Ipv4Addr::LOCALHOST, control_plane.port());
        let middle = Middle { upstream, target, rules: Rules::default(), log: Mutex::default() };
        let url = format!("https://{address}");
        let proxy = Self { middle: Arc::new(middle), _place: place, address, tls, listening: Mutex::default(), url };
        proxy.listen()?;
        Ok(proxy)
    }

    /// Someone's kubeconfig, led through the proxy.
    pub fn kubeconfig(&self, mut of: Kubeconfig) -> Result<String> {
        for cluster in &mut of.clusters {
            cluster.cluster.get_or_insert_default().server = Some(self.url.clone());
        }
        // JSON is YAML.
        serde_json::to_string(&of).context("write a kubeconfig")
    }

    /// From now on this goes wrong with all requests that it applies to. Answers what to lift again.
    pub fn always(&self, fault: Fault, applies: impl Fn(&Call) -> bool + Send + Sync + 'static) -> usize {
        self.middle.rules.add(None, fault, Box::new(applies))
    }

    /// This goes wrong with the next so many requests that it applies to.
    pub fn next(&self, times: usize, fault: Fault, applies: impl Fn(&Call) -> bool + Send + Sync + 'static) -> usize {
        self.middle.rules.add(Some(times), fault, Box::new(applies))
    }

    /// How often this went wrong so far, if it was not lifted.
    pub fn struck(&self, rule: usize) -> usize {
        self.middle.rules.struck(rule)
    }

    /// Nothing of this goes wrong any more. A watch that went silent stays so.
    pub fn lift(&self, rule: usize) {
        self.middle.rules.remove(rule);
    }

    /// Nothing goes wrong any more.
    pub fn lift_all(&self) {
        self.middle.rules.clear();
    }

    /// What the API server has answered so far.
    pub fn log(&self) -> Vec<Passed> {
        self.middle.log().clone()
    }

    /// How many of these the API server has answered with success.
    pub fn done(&self, verb: &str, resource: &str, name: &str) -> usize {
        let log = self.middle.log();
        let done = |passed: &&Passed| passed.call.is(verb, resource) && passed.call.name == name && passed.status < 300;
        log.iter().filter(done).count()
    }

    /// Cuts everybody off, and refuses connections.
    pub async fn stop(&self) {
        let listening = self.listening().take();
        if let Some((handle, mut tasks)) = listening {
            handle.shutdown();
            while tasks.join_next().await.is_some() {}
        }
    }

    /// Listens again.
    ///
    /// # Errors
    ///
    /// If the port cannot be listened on, or already is.
    pub fn listen(&self) -> Result<()> {
        let socket = TcpSocket::new_v4()?;
        socket.set_reuseaddr(true)?;
        socket.bind(self.address)?;
        let listener = socket.listen(1024).context("listen on the proxy's port")?.into_std()?;
        let handle = Handle::new();
        let app = axum::Router::new().fallback(answer).with_state(self.middle.clone());
        let server = axum_server::from_tcp_rustls(listener, self.tls.clone())?.handle(handle.clone());
        let mut tasks = JoinSet::new();
        tasks.spawn(async move {
            if let Err(error) = server.serve(app.into_make_service()).await {
                tracing::error!(%error, "the proxy of the API server has ended");
            }
        });
        *self.listening() = Some((handle, tasks));
        Ok(())
    }

    fn listening(&self) -> MutexGuard<'_, Option<(Handle<SocketAddr>, JoinSet<()>)>> {
        self.listening.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for ApiProxy {
    fn drop(&mut self) {
        if let Some((handle, _)) = self.listening().take() {
            handle.shutdown();
        }
    }
}

async fn answer(State(middle): State<Arc<Middle>>, request: Request) -> Response {
    let (head, body) = request.into_parts();
    let Ok(body) = to_bytes(body, usize::MAX).await else {
        return StatusCode::BAD_REQUEST.into_response();
    };
    let call = Call::read(&head.method, &head.uri, body);
    // A task of its own: the caller's death ends the answer, and not what was asked.
    let answered = tokio::spawn(async move { middle.serve(head, call).await }).await;
    answered.unwrap_or_else(|_| StatusCode::BAD_GATEWAY.into_response())
}

impl Middle {
    fn log(&self) -> MutexGuard<'_, Vec<Passed>> {
        self.log.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn serve(self: &Arc<Self>, head: request::Parts, call: Call) -> Response {
        let name = format!("{} {} {}", call.verb, call.resource, call.name);
        match self.rules.strike(&call, false) {
            Some(Fault::Answer(made_up)) => made_up.into_response(),
            Some(Fault::Late(by)) => {
                tokio::time::sleep(by).await;
                self.pass(head, call).await
            }
            Some(Fault::HeldBefore(gate)) => match gate.pass(&name).await {
                Verdict::Lands => {
                    let answer = self.pass(head, call).await;
                    gate.land();
                    answer
                }
                Verdict::Lost => broken(vec![]),
            },
            Some(Fault::HeldAfter(gate)) => {
                let _unheard = self.pass(head, call).await;
                gate.pass(&name).await;
                broken(vec![])
            }
            Some(Fault::Unanswered) => {
                let _unheard = self.pass(head, call).await;
                std::future::pending().await
            }
            Some(Fault::CutAnswer) => {
                let (_, body) = self.pass(head, call).await.into_parts();
                let bytes = to_bytes(body, usize::MAX).await.unwrap_or_default();
                broken(vec![Ok(bytes.slice(..bytes.len() / 2))])
            }
            _ => self.pass(head, call).await,
        }
    }

    async fn pass(self: &Arc<Self>, head: request::Parts, call: Call) -> Response {
        let uri = format!("{}{}", self.target, head.uri);
        let asked = self.upstream.request(head.method, uri).headers(end_to_end(head.headers)).body(call.body.clone());
        let answered = match asked.send().await {
            Ok(answered) => answered,
            Err(error) => return (StatusCode::BAD_GATEWAY, error.to_string()).into_response(),
        };
        self.log().push(Passed { call: call.clone(), status: answered.status().as_u16() });
        let (status, headers) = (answered.status(), end_to_end(answered.headers().clone()));
        let watches = call.verb == "watch" && status.is_success();
        let bytes = answered.bytes_stream().map(|bytes| bytes.map_err(io::Error::other)).boxed();
        let body = if watches { Watched::new(self.clone(), call, bytes).into_body() } else { Body::from_stream(bytes) };
        (status, headers, body).into_response()
    }
}

/// A success that breaks off after these bytes.
fn broken(mut parts: Vec<io::Result<Bytes>>) -> Response {
    parts.push(Err(io::ErrorKind::ConnectionReset.into()));
    let headers = [(header::CONTENT_TYPE, "application/json")];
    (headers, Body::from_stream(stream::iter(parts))).into_response()
}

/// Without what is between two neighbours only.
fn end_to_end(mut headers: HeaderMap) -> HeaderMap {
    for hop in [
        header::HOST,
        header::CONNECTION,
        header::CONTENT_LENGTH,
        header::TRANSFER_ENCODING,
        // The proxy reads what it passes on.
        header::ACCEPT_ENCODING,
    ] {
        headers.remove(hop);
    }
    headers
}

impl Answer {
    fn into_response(self) -> Response {
        let code = StatusCode::from_u16(self.code).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        let mut response = match self.text {
            Some(text) => (code, text).into_response(),
            None => {
                let status = json!({
                    "kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure",
                    "message": format!("the proxy was told to answer {}", self.code),
                    "reason": self.reason, "code": self.code,
                    "details": self.retry_after.map(|seconds| json!({ "retryAfterSeconds": seconds })),
                });
                (code, axum::Json(status)).into_response()
            }
        };
        if let Some(seconds) = self.retry_after {
            response.headers_mut().insert(header::RETRY_AFTER, seconds.into());
        }
        response
    }
}
