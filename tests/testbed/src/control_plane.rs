//! A real kube-apiserver with its etcd.
//!
//! Nothing else runs: no controller, no garbage collector, no kubelet, and no token appears by itself (ask for one
//! with [`ControlPlane::service_account`]). Certificates are made here, for this run.
//!
//! Clients are made per call: a client's connections belong to the runtime that they were opened on.

use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use k8s_openapi::api::authentication::v1::{TokenRequest, TokenRequestSpec};
use k8s_openapi::api::core::v1::ServiceAccount;
use kube::api::{Api, PostParams};
use kube::config::{KubeConfigOptions, Kubeconfig};
use uuid::Uuid;

use crate::assets::Assets;
use crate::progress::Part;
use crate::scratch::{Scratch, free_port};
use crate::supervise::{Program, Spec, Supervised};

mod certificates;
mod crds;

pub use certificates::{Authority, Identity};
pub use crds::install;

/// How long servers may take to be ready: generous, for a machine that compiles beside them.
const PATIENCE: Duration = Duration::from_secs(120);

/// What kind of control plane to start.
#[derive(Clone, Copy, Debug, Default)]
pub struct Options {
    /// Writes down what every ServiceAccount asks for ([`ControlPlane::audit_log`]).
    pub audited: bool,
}

/// Who asked for what, in one line for each answer; not what was sent.
const AUDIT_POLICY: &str = r#"{
    "apiVersion": "audit.k8s.io/v1",
    "kind": "Policy",
    "omitStages": ["RequestReceived"],
    "rules": [{ "level": "Metadata", "userGroups": ["system:serviceaccounts"] }, { "level": "None" }]
}"#;

/// A running control plane. Dropping it ends both servers and removes their data.
#[derive(Debug)]
pub struct ControlPlane {
    // Dropped, and so ended, in this order.
    api_server: Supervised,
    etcd: Supervised,
    port: u16,
    kubeconfig: PathBuf,
    identities: certificates::Identities,
}

impl ControlPlane {
    /// Finds, fetches or builds the binaries, starts both servers and waits until the API is ready and the operator's
    /// CRD is established. KubeVirt's kinds come with whoever plays it.
    pub async fn start(options: Options, scratch: &Scratch, part: &Part) -> Result<Self> {
        let assets = Assets::find(part).await?;
        let identities = certificates::Identities::generate().context("make certificates")?;
        part.step("starting etcd");
        let (etcd, etcd_port) = retry_ports(|| start_etcd(&assets, scratch)).await?;
        part.step("starting kube-apiserver");
        let started = retry_ports(|| start_api_server(options, &assets, &identities, etcd_port, scratch));
        let (api_server, port) = started.await?;
        let kubeconfig = scratch.path().join(KUBE_APISERVER).join("kubeconfig");
        let control_plane = Self { api_server, etcd, port, kubeconfig, identities };
        part.step("waiting for the API to be ready");
        control_plane.ready().await?;
        part.step("applying the operator's CRD");
        install(&control_plane.client().await?, &[cyberdesk_operator::crd::definition()]).await?;
        part.done(&format!("kube-apiserver on port {port}"));
        Ok(control_plane)
    }

    /// Waits until the API server says that it is ready, after a restart for instance.
    pub async fn ready(&self) -> Result<()> {
        let deadline = Instant::now() + PATIENCE;
        let client = self.client().await?;
        loop {
            let request = http::Request::get("/readyz").body(Vec::new())?;
            let answer = tokio::time::timeout(Duration::from_secs(5), client.request_text(request)).await;
            match answer {
                Ok(Ok(_)) => return Ok(()),
                _ if self.api_server.has_ended() => return Err(self.api_server.last_words()),
                _ if self.etcd.has_ended() => return Err(self.etcd.last_words()),
                _ if Instant::now() > deadline => {
                    return Err(self.api_server.last_words().context("the API server does not become ready"));
                }
                _ => tokio::time::sleep(Duration::from_millis(50)).await,
            }
        }
    }

    /// Where an audited API server writes events of `audit.k8s.io/v1`, as JSON, one a line.
    pub fn audit_log(&self) -> PathBuf {
        self.kubeconfig.with_file_name(AUDIT_LOG)
    }

    /// The administrator's kubeconfig file, certificates inside.
    pub fn kubeconfig(&self) -> &Path {
        &self.kubeconfig
    }

    /// The text of a kubeconfig for a user of this name, who is in no group that gives rights.
    pub fn kubeconfig_of(&self, user: &str) -> Result<String> {
        self.identities.kubeconfig_of(user, self.port)
    }

    /// The administrator's configuration, with kube's own retries off.
    pub async fn config(&self) -> Result<kube::Config> {
        let kubeconfig = Kubeconfig::from_yaml(&self.identities.kubeconfig(&self.identities.administrator, self.port))?;
        let mut config = kube::Config::from_custom_kubeconfig(kubeconfig, &KubeConfigOptions::default()).await?;
        config.default_retry = false;
        Ok(config)
    }

    /// An administrator's client on the current runtime.
    pub async fn client(&self) -> Result<kube::Client> {
        Ok(kube::Client::try_from(self.config().await?)?)
    }

    /// The configuration of a ServiceAccount that exists, with a token as a pod would have one.
    pub async fn service_account(&self, namespace: &str, name: &str) -> Result<kube::Config> {
        let accounts: Api<ServiceAccount> = Api::namespaced(self.client().await?, namespace);
        let request = TokenRequest {
            spec: TokenRequestSpec { audiences: vec![ISSUER.to_owned()], ..TokenRequestSpec::default() },
            ..TokenRequest::default()
        };
        let answer = accounts.create_token_request(name, &PostParams::default(), &request).await;
        let answer = answer.with_context(|| format!("have a token made for the ServiceAccount {namespace}/{name}"))?;
        let token = answer.status.context("the token request has no answer")?.token;
        let mut config = self.config().await?;
        config.auth_info = kube::config::AuthInfo { token: Some(token.into()), ..Default::default() };
        Ok(config)
    }

    /// A client of a ServiceAccount that exists, on the current runtime.
    pub async fn client_for_service_account(&self, namespace: &str, name: &str) -> Result<kube::Client> {
        Ok(kube::Client::try_from(self.service_account(namespace, name).await?)?)
    }

    /// The API server's process: to kill, freeze or start again ([`ControlPlane::ready`] waits for that).
    pub fn api_server(&self) -> &Supervised {
        &self.api_server
    }

    /// The store's process.
    pub fn etcd(&self) -> &Supervised {
        &self.etcd
    }

    /// Where the API server listens on 127.0.0.1.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// Tells both servers to end, without waiting.
    pub fn begin_end(&self) {
        self.api_server.begin_end();
        self.etcd.begin_end();
    }
}

const ETCD: &str = "etcd";
const KUBE_APISERVER: &str = "kube-apiserver";
const AUDIT_LOG: &str = "audit.log";
const ISSUER: &str = "https://kubernetes.default.svc";

/// Starts a server on a free port, again if someone else was quicker to take it.
async fn retry_ports<F: Future<Output = Result<(Supervised, u16)>>>(
    start: impl Fn() -> F,
) -> Result<(Supervised, u16)> {
    let mut attempts = 0;
    loop {
        attempts += 1;
        match start().await {
            Err(error) if attempts < 3 && format!("{error:#}").contains("address already in use") => drop(error),
            done => return done,
        }
    }
}

async fn start_etcd(assets: &Assets, scratch: &Scratch) -> Result<(Supervised, u16)> {
    let directory = scratch.directory(ETCD, None)?;
    let port = free_port()?;
    let url = format!("http://{}:{port}", Ipv4Addr::LOCALHOST);
    let name = Uuid::new_v4().to_string();
    let args = [
        format!("--name={name}"),
        format!("--initial-cluster={name}=http://127.0.0.1:0"),
        "--initial-advertise-peer-urls=http://127.0.0.1:0".to_owned(),
        format!("--data-dir={}", directory.join("data").display()),
        format!("--listen-client-urls={url}"),
        format!("--advertise-client-urls={url}"),
        "--listen-peer-urls=http://127.0.0.1:0".to_owned(),
        // The data lives as long as the testbed, and a test may write much and fast.
        "--unsafe-no-fsync".to_owned(),
        "--quota-backend-bytes=4294967296".to_owned(),
        "--log-level=warn".to_owned(),
    ];
    let mut spec = Spec::new(ETCD, Program::new(&assets.etcd, args), &directory, directory.join("log"));
    scratch.removed_with(&mut spec);
    let etcd = Supervised::spawn(&spec)?;
    listens(&etcd, port).await?;
    // Two API servers on one store would be two testbeds in one world.
    let members = crate::assets::http_client()?.post(format!("{url}/v3/cluster/member/list")).body("{}").send();
    let members = members.await.context("ask etcd for its name")?.text().await?;
    ensure!(members.contains(&name), "address already in use: another etcd listens on port {port}");
    Ok((etcd, port))
}

async fn start_api_server(
    options: Options,
    assets: &Assets,
    identities: &certificates::Identities,
    etcd_port: u16,
    scratch: &Scratch,
) -> Result<(Supervised, u16)> {
    let directory = scratch.directory(KUBE_APISERVER, None)?;
    let port = free_port()?;
    identities.write(&directory, port).context("write certificates")?;
    let file = |name: &str| directory.join(name).display().to_string();
    let mut args = vec![
        format!("--etcd-servers=http://{}:{etcd_port}", Ipv4Addr::LOCALHOST),
        format!("--secure-port={port}"),
        format!("--cert-dir={}", directory.display()),
        format!("--client-ca-file={}", file("ca.crt")),
        format!("--tls-cert-file={}", file("server.crt")),
        format!("--tls-private-key-file={}", file("server.key")),
        format!("--service-account-key-file={}", file("service-account.pub")),
        format!("--service-account-signing-key-file={}", file("service-account.key")),
        format!("--service-account-issuer={ISSUER}"),
        format!("--requestheader-client-ca-file={}", file("front-proxy-ca.crt")),
        format!("--proxy-client-cert-file={}", file("front-proxy.crt")),
        format!("--proxy-client-key-file={}", file("front-proxy.key")),
    ];
    if options.audited {
        std::fs::write(directory.join("audit-policy.json"), AUDIT_POLICY)?;
        args.push(format!("--audit-policy-file={}", file("audit-policy.json")));
        args.push(format!("--audit-log-path={}", file(AUDIT_LOG)));
        // In megabytes: one file, however long it gets.
        args.push("--audit-log-maxsize=10000".to_owned());
    }
    args.extend(API_SERVER.iter().map(|&flag| flag.to_owned()));
    let program = Program::new(&assets.kube_apiserver, args);
    let mut spec = Spec::new(KUBE_APISERVER, program, &directory, directory.join("log"));
    // A tenth of its time went to collecting garbage; memory is cheaper here.
    spec.env.insert("GOGC".to_owned(), "300".to_owned());
    scratch.removed_with(&mut spec);
    // Fresh for each attempt, so that an earlier one's words are not taken for this one's.
    std::fs::write(&spec.log, "")?;
    let api_server = Supervised::spawn(&spec)?;
    listens(&api_server, port).await?;
    Ok((api_server, port))
}

/// Flags that are the same for every run.
const API_SERVER: [&str; 12] = [
    "--bind-address=127.0.0.1",
    "--advertise-address=127.0.0.1",
    "--authorization-mode=RBAC",
    // No controller makes the account `default` that this plugin demands of every pod.
    "--disable-admission-plugins=ServiceAccount",
    "--service-cluster-ip-range=10.0.0.0/24",
    // Virtual machines' pods are privileged.
    "--allow-privileged=true",
    // KubeVirt's own API is reached through the front proxy.
    "--requestheader-allowed-names=front-proxy",
    "--requestheader-username-headers=X-Remote-User",
    "--requestheader-group-headers=X-Remote-Group",
    "--requestheader-extra-headers-prefix=X-Remote-Extra-",
    // A thousand desktops at once are a test here, not an attack.
    "--max-requests-inflight=2000",
    "--max-mutating-requests-inflight=1000",
];

/// Waits until someone listens, who is the server if it still runs then.
async fn listens(server: &Supervised, port: u16) -> Result<()> {
    server.running().await?;
    let deadline = Instant::now() + PATIENCE;
    loop {
        if server.has_ended() {
            return Err(server.last_words());
        }
        match tokio::net::TcpStream::connect((Ipv4Addr::LOCALHOST, port)).await {
            Ok(_) => return Ok(()),
            Err(_) if Instant::now() > deadline => {
                return Err(server.last_words().context("it does not listen"));
            }
            Err(_) => tokio::time::sleep(Duration::from_millis(20)).await,
        }
    }
}

/// A name that no other test uses, valid for namespaces and for most objects.
pub fn fresh_name(prefix: &str) -> String {
    format!("{prefix}-{}", &Uuid::new_v4().simple().to_string()[..12])
}
