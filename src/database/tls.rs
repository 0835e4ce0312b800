//! TLS to the database: whom it trusts.
//!
//! Once TLS is used, certificate and host name are verified: there is no setting for less.

use std::sync::Arc;

use anyhow::{Context, ensure};
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;
use rustls::{ClientConfig, RootCertStore};

/// What `sslrootcert` says for "those that the system trusts", as in libpq.
const SYSTEM: &str = "system";

/// TLS that trusts the authorities in this file alone, or without one those that the system trusts.
pub(super) fn client_config(authority: Option<&str>) -> anyhow::Result<ClientConfig> {
    let mut roots = RootCertStore::empty();
    match authority.filter(|authority| *authority != SYSTEM) {
        None => {
            roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
        }
        Some(file) => {
            let certificates = CertificateDer::pem_file_iter(file)
                .with_context(|| format!("its sslrootcert {file} cannot be read"))?;
            for certificate in certificates {
                roots
                    .add(certificate.with_context(|| format!("its sslrootcert {file} is not PEM"))?)
                    .with_context(|| format!("its sslrootcert {file} holds what is no certificate of an authority"))?;
            }
            ensure!(!roots.is_empty(), "its sslrootcert {file} holds no certificate in PEM");
        }
    }
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    Ok(ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()?
        .with_root_certificates(roots)
        .with_no_client_auth())
}
