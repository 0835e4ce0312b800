//! Who is who in one run: an authority, the API server, its administrator, the front proxy, the key of tokens.

use std::fs::Permissions;
use std::net::Ipv4Addr;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;

use anyhow::{Context as _, Result};
use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose,
};

/// A certificate with its key, both as PEM.
#[derive(Clone, Debug)]
pub struct Identity {
    /// The certificate.
    pub certificate: String,
    /// Its private key.
    pub key: String,
}

/// A certificate authority of our own, for servers of the testbed on 127.0.0.1 and for their clients.
#[derive(Debug)]
pub struct Authority {
    issuer: Issuer<'static, KeyPair>,
    certificate: String,
}

impl Authority {
    /// A new authority of this name.
    pub fn new(name: &str) -> Result<Self> {
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.distinguished_name.push(DnType::CommonName, name);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        let key = KeyPair::generate()?;
        let certificate = params.self_signed(&key)?.pem();
        Ok(Self { issuer: Issuer::new(params, key), certificate })
    }

    /// Its certificate as PEM, for those who are to trust it.
    pub fn certificate(&self) -> &str {
        &self.certificate
    }

    /// An identity for a server that listens on 127.0.0.1, with further host names.
    pub fn server(&self, name: &str, hosts: &[&str]) -> Result<Identity> {
        let mut names = vec![Ipv4Addr::LOCALHOST.to_string(), "localhost".to_owned()];
        names.extend(hosts.iter().map(|&host| host.to_owned()));
        self.sign(CertificateParams::new(names)?, name, None, ExtendedKeyUsagePurpose::ServerAuth)
    }

    /// An identity for a server that is known by these names only.
    pub fn server_named(&self, hosts: &[&str]) -> Result<Identity> {
        let names: Vec<String> = hosts.iter().map(|&host| host.to_owned()).collect();
        self.sign(CertificateParams::new(names)?, "server", None, ExtendedKeyUsagePurpose::ServerAuth)
    }

    /// An identity for a client: its user name and, if given, its group.
    pub fn client(&self, user: &str, group: Option<&str>) -> Result<Identity> {
        self.sign(CertificateParams::default(), user, group, ExtendedKeyUsagePurpose::ClientAuth)
    }

    fn sign(
        &self,
        mut params: CertificateParams,
        name: &str,
        group: Option<&str>,
        usage: ExtendedKeyUsagePurpose,
    ) -> Result<Identity> {
        params.distinguished_name.push(DnType::CommonName, name);
        if let Some(group) = group {
            params.distinguished_name.push(DnType::OrganizationName, group);
        }
        params.use_authority_key_identifier_extension = true;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![usage];
        let key = KeyPair::generate()?;
        let certificate = params.signed_by(&key, &self.issuer)?.pem();
        Ok(Identity { certificate, key: key.serialize_pem() })
    }
}

/// Everyone in one control plane.
#[derive(Debug)]
pub(super) struct Identities {
    authority: Authority,
    server: Identity,
    pub(super) administrator: Identity,
    front_proxy_authority: Authority,
    front_proxy: Identity,
    tokens: KeyPair,
}

impl Identities {
    pub(super) fn generate() -> Result<Self> {
        let authority = Authority::new("testbed")?;
        // Another authority than the clients', or any client could speak for anyone.
        let front_proxy_authority = Authority::new("testbed front proxy")?;
        Ok(Self {
            server: authority.server("kube-apiserver", &["kubernetes", "kubernetes.default.svc", "10.0.0.1"])?,
            administrator: authority.client("testbed-admin", Some("system:masters"))?,
            front_proxy: front_proxy_authority.client("front-proxy", None)?,
            tokens: KeyPair::generate()?,
            authority,
            front_proxy_authority,
        })
    }

    /// Writes what the API server reads, and the administrator's kubeconfig.
    pub(super) fn write(&self, directory: &Path, port: u16) -> Result<()> {
        let kubeconfig = self.kubeconfig(&self.administrator, port);
        let (token_key, token_public_key) = (self.tokens.serialize_pem(), self.tokens.public_key_pem());
        for (name, text) in [
            ("ca.crt", self.authority.certificate()),
            ("server.crt", &self.server.certificate),
            ("server.key", &self.server.key),
            ("front-proxy-ca.crt", self.front_proxy_authority.certificate()),
            ("front-proxy.crt", &self.front_proxy.certificate),
            ("front-proxy.key", &self.front_proxy.key),
            ("service-account.key", &token_key),
            ("service-account.pub", &token_public_key),
            ("kubeconfig", &kubeconfig),
        ] {
            let path = directory.join(name);
            std::fs::write(&path, text).with_context(|| format!("write {}", path.display()))?;
            std::fs::set_permissions(&path, Permissions::from_mode(0o600))?;
        }
        Ok(())
    }

    /// The authority's certificate, and an identity for a further server.
    pub(super) fn vouched(&self, name: &str) -> Result<(&str, Identity)> {
        Ok((self.authority.certificate(), self.authority.server(name, &[])?))
    }

    /// A kubeconfig for a user whom the authority vouches for.
    pub(super) fn kubeconfig_of(&self, user: &str, port: u16) -> Result<String> {
        Ok(self.kubeconfig(&self.authority.client(user, None)?, port))
    }

    /// Someone's kubeconfig, with everything inside, as JSON, which YAML includes.
    pub(super) fn kubeconfig(&self, user: &Identity, port: u16) -> String {
        let data = |pem: &str| k8s_openapi::ByteString(pem.as_bytes().to_vec());
        serde_json::json!({
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": "testbed",
            "contexts": [{"name": "testbed", "context": {"cluster": "testbed", "user": "user"}}],
            "clusters": [{"name": "testbed", "cluster": {
                "server": format!("https://{}:{port}", Ipv4Addr::LOCALHOST),
                "certificate-authority-data": data(self.authority.certificate()),
            }}],
            "users": [{"name": "user", "user": {
                "client-certificate-data": data(&user.certificate),
                "client-key-data": data(&user.key),
            }}],
        })
        .to_string()
    }
}
