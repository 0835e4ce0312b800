//! What to do when the database cannot be reached: one table from what went wrong to what mends it.

use std::error::Error;
use std::io;

use rustls::CertificateError;
use tokio_postgres::error::SqlState;

/// The error, preceded by what to do about it where that is known.
pub(super) fn with_advice(error: tokio_postgres::Error) -> anyhow::Error {
    match advice(&error) {
        Some(advice) => anyhow::Error::new(error).context(advice),
        None => error.into(),
    }
}

fn advice(error: &tokio_postgres::Error) -> Option<&'static str> {
    if let Some(said) = error.as_db_error() {
        return of_the_server(said.code(), said.message());
    }
    let source = error.source()?;
    match source.downcast_ref::<io::Error>() {
        Some(error) => match error.get_ref().and_then(|inner| inner.downcast_ref::<rustls::Error>()) {
            Some(rustls::Error::InvalidCertificate(fault)) => of_the_certificate(fault),
            Some(_) => Some("TLS could not be agreed on: the server must speak TLS 1.2 or 1.3"),
            None => of_the_network(error),
        },
        // The driver's own words: it has no type for these.
        None => match source.to_string().as_str() {
            "server does not support TLS" => Some(
                "the server speaks no TLS, and the password would go in plain text: switch TLS on there, or say \
                 sslmode=disable in DATABASE_URL if the way is safe",
            ),
            "password missing" => Some("DATABASE_URL holds no password, and DATABASE_PASSWORD_FILE is not set"),
            words if words.contains("channel binding") => Some(
                "the other end offers no channel binding, as poolers do not: take channel_binding=require out of \
                 DATABASE_URL, or connect directly",
            ),
            _ => None,
        },
    }
}

fn of_the_server(code: &SqlState, message: &str) -> Option<&'static str> {
    let is = |known: &SqlState| code == known;
    if message.contains("Tenant or user not found") {
        Some("Supabase's pooler knows no such user: it is ROLE.REF, as in cyberdesk_daemon.abcdefghijklmnopqrst")
    } else if message.contains("unsupported startup parameter") {
        Some("the pooler refuses a setting of the connection: take `options` out of DATABASE_URL")
    } else if is(&SqlState::INVALID_PASSWORD) {
        Some(
            "the password is not that of the role: `cyberdesk-operator migrate --daemon-password-file FILE` sets it; in \
             a URL it is percent-escaped",
        )
    } else if is(&SqlState::INVALID_AUTHORIZATION_SPECIFICATION) && message.contains("no encryption") {
        Some("the server lets nobody in without TLS: take sslmode=disable out of DATABASE_URL")
    } else if is(&SqlState::TOO_MANY_CONNECTIONS) {
        Some("no connection is left for this role or on this server; each replica takes up to 4")
    } else {
        None
    }
}

fn of_the_certificate(fault: &CertificateError) -> Option<&'static str> {
    match fault {
        CertificateError::UnknownIssuer | CertificateError::BadSignature => Some(
            "the server's certificate is of an authority that is not trusted here: name its file with sslrootcert=FILE \
             in DATABASE_URL (Supabase: prod-ca-2021.crt, in the dashboard under Database, Settings, SSL)",
        ),
        CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. } => Some(
            "the server's certificate is for another name: put that name into DATABASE_URL, and if the name does not \
             lead there, the address beside it as hostaddr=IP",
        ),
        CertificateError::Expired | CertificateError::ExpiredContext { .. } => {
            Some("the server's certificate has expired: renew it, or set this machine's clock")
        }
        CertificateError::NotValidYet | CertificateError::NotValidYetContext { .. } => {
            Some("the server's certificate is not valid yet: set this machine's clock")
        }
        // These have no case of their own.
        CertificateError::Other(other) => match other.to_string() {
            words if words.contains("UnsupportedCertVersion") => Some(
                "the server's certificate is X.509 v1, which names no host: make one of version 3 with subjectAltName",
            ),
            words if words.contains("CaUsedAsEndEntity") => Some(
                "the server shows the certificate of an authority as its own: make an authority, have it sign one for \
                 the server, and name the authority's with sslrootcert=FILE",
            ),
            _ => None,
        },
        _ => None,
    }
}

fn of_the_network(error: &io::Error) -> Option<&'static str> {
    match error.kind() {
        io::ErrorKind::NetworkUnreachable | io::ErrorKind::AddrNotAvailable | io::ErrorKind::HostUnreachable => Some(
            "no way leads there from here: if the host has an IPv6 address only, as Supabase's direct one without the \
             IPv4 add-on, use the session pooler (port 5432)",
        ),
        io::ErrorKind::ConnectionRefused => Some("nobody listens there: look at host and port in DATABASE_URL"),
        io::ErrorKind::PermissionDenied => Some("the database takes no writes: it is a standby, or was made read-only"),
        _ => None,
    }
}
