//! One request to the API server, as a story thinks of it.

use axum::body::Bytes;
use axum::http::{Method, Uri};
use serde_json::Value;

/// What is asked of the API server.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Call {
    /// The verb, as a Role names it.
    pub verb: &'static str,
    /// The resource, as a Role names it: `cyberdesks/status`. The whole path, where it is about none.
    pub resource: String,
    /// The object's name: in a create, that in its body. Empty where the call is about many.
    pub name: String,
    /// What follows the path: which of many, and how.
    pub query: String,
    /// Whether nothing is to come of it (`dryRun`).
    pub dry_run: bool,
    /// What is sent.
    pub body: Bytes,
}

impl Call {
    pub(super) fn read(method: &Method, uri: &Uri, body: Bytes) -> Self {
        let query = uri.query().unwrap_or_default();
        let asks = |word: &str| query.split('&').any(|pair| pair == word);
        let (resource, mut name) = split(uri.path());
        let verb = match *method {
            Method::GET if asks("watch=true") || asks("watch=1") => "watch",
            Method::GET if name.is_empty() => "list",
            Method::GET => "get",
            Method::POST => "create",
            Method::PUT => "update",
            Method::PATCH => "patch",
            Method::DELETE if name.is_empty() => "deletecollection",
            Method::DELETE => "delete",
            _ => "other",
        };
        let (dry_run, query) = (asks("dryRun=All"), query.to_owned());
        let mut call = Self { verb, resource, name: String::new(), query, dry_run, body };
        if verb == "create" && name.is_empty() {
            name = call.json()["metadata"]["name"].as_str().unwrap_or_default().to_owned();
        }
        call.name = name;
        call
    }

    /// Whether it is this verb on this resource, and not for trial only.
    pub fn is(&self, verb: &str, resource: &str) -> bool {
        self.verb == verb && self.resource == resource && !self.dry_run
    }

    /// What is sent, where that is JSON.
    pub fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap_or_default()
    }

    /// Whether it may change something.
    pub fn writes(&self) -> bool {
        !self.dry_run && !matches!(self.verb, "get" | "list" | "watch")
    }
}

/// Resource, with its subresource, and name in a path such as `/apis/GROUP/VERSION/namespaces/NAME/RESOURCE/NAME`.
fn split(path: &str) -> (String, String) {
    let parts: Vec<&str> = path.split('/').filter(|part| !part.is_empty()).collect();
    let rest = match parts[..] {
        ["api", _, "namespaces", _, ref rest @ ..] if !rest.is_empty() => rest,
        ["apis", _, _, "namespaces", _, ref rest @ ..] if !rest.is_empty() => rest,
        ["api", _, ref rest @ ..] | ["apis", _, _, ref rest @ ..] => rest,
        _ => &[],
    };
    match rest {
        [resource] => ((*resource).to_owned(), String::new()),
        [resource, name] => ((*resource).to_owned(), (*name).to_owned()),
        [resource, name, sub @ ..] => (format!("{resource}/{}", sub.join("/")), (*name).to_owned()),
        [] => (path.to_owned(), String::new()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_is_read_as_a_role_names_it() {
        let cases = [
            (Method::GET, "/apis/kubevirt.io/v1/namespaces/n/virtualmachines?watch=true", "watch virtualmachines "),
            (Method::GET, "/apis/kubevirt.io/v1/namespaces/n/virtualmachines?limit=5", "list virtualmachines "),
            (Method::GET, "/apis/kubevirt.io/v1/namespaces/n/virtualmachines/a", "get virtualmachines a"),
            (Method::POST, "/api/v1/namespaces/n/secrets?", "create secrets made"),
            (
                Method::PATCH,
                "/apis/cyberdesk.io/v1alpha1/namespaces/n/cyberdesks/a/status",
                "patch cyberdesks/status a",
            ),
            (Method::PUT, "/apis/coordination.k8s.io/v1/namespaces/n/leases/l", "update leases l"),
            (Method::DELETE, "/api/v1/namespaces/n/secrets?labelSelector=a", "deletecollection secrets "),
            (Method::DELETE, "/api/v1/namespaces/n", "delete namespaces n"),
            (Method::GET, "/api/v1/namespaces", "list namespaces "),
            (Method::GET, "/version", "list /version "),
        ];
        for (method, uri, told) in cases {
            let body = Bytes::from_static(br#"{"metadata":{"name":"made"}}"#);
            let call = Call::read(&method, &uri.parse().expect("a path is a URI"), body);
            assert_eq!(format!("{} {} {}", call.verb, call.resource, call.name), told);
        }
    }

    #[test]
    fn a_trial_is_no_write() {
        let uri = "/api/v1/namespaces/n/secrets?fieldValidation=Strict&dryRun=All".parse().expect("a path is a URI");
        let call = Call::read(&Method::POST, &uri, Bytes::new());
        assert!(call.dry_run && !call.writes() && !call.is("create", "secrets"));
    }
}
