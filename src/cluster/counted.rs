//! Counts the calls to the API server, by verb, resource and answer.

use std::pin::Pin;
use std::task::{Context, Poll};

use http::{Method, Request, Response};
use tower::Service;

use crate::metrics::{ApiCall, called};

/// A client's innermost part, each of whose calls is counted. One that is given up on has no answer.
#[derive(Clone, Debug)]
pub(super) struct Counted<S>(pub(super) S);

impl<S, A, B> Service<Request<A>> for Counted<S>
where
    S: Service<Request<A>, Response = Response<B>>,
    S::Future: Send + 'static,
{
    type Response = S::Response;
    type Error = S::Error;
    type Future = Pin<Box<dyn Future<Output = Result<S::Response, S::Error>> + Send>>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.0.poll_ready(context)
    }

    fn call(&mut self, request: Request<A>) -> Self::Future {
        let count = Count(call(request.method(), request.uri()));
        let answer = self.0.call(request);
        Box::pin(async move {
            let mut count = count;
            let answer = answer.await;
            if let Ok(answer) = &answer {
                count.0.code = answer.status().as_str().to_owned();
            }
            answer
        })
    }
}

/// Counted when it is over, however it ends.
struct Count(ApiCall);

impl Drop for Count {
    fn drop(&mut self) {
        called(&self.0);
    }
}

/// `/apis/GROUP/VERSION/namespaces/NAMESPACE/RESOURCE/NAME/SUBRESOURCE`, or `/api/VERSION/…`, as kubectl would say it.
fn call(method: &Method, uri: &http::Uri) -> ApiCall {
    let parts: Vec<&str> = uri.path().split('/').filter(|part| !part.is_empty()).collect();
    let below = match parts.as_slice() {
        ["api", _, below @ ..] | ["apis", _, _, below @ ..] => below,
        _ => &[],
    };
    let below = match below {
        ["namespaces", _, below @ ..] if !below.is_empty() => below,
        below => below,
    };
    let (resource, named) = match below {
        [] => (uri.path().trim_start_matches('/').to_owned(), true),
        [resource] => ((*resource).to_owned(), false),
        [resource, _] => ((*resource).to_owned(), true),
        [resource, _, sub @ ..] => (format!("{resource}/{}", sub.join("/")), true),
    };
    let watches = uri.query().is_some_and(|query| query.split('&').any(|part| part == "watch=true"));
    let verb = match (method, named) {
        (&Method::GET, true) => "get",
        (&Method::GET, false) if watches => "watch",
        (&Method::GET, false) => "list",
        (&Method::POST, _) => "create",
        (&Method::PUT, _) => "update",
        (&Method::PATCH, _) => "patch",
        (&Method::DELETE, true) => "delete",
        (&Method::DELETE, false) => "deletecollection",
        _ => "other",
    };
    ApiCall { verb, resource, code: "none".to_owned() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_call_is_known_by_its_verb_and_resource_and_by_no_name() {
        for (method, uri, verb, resource) in [
            (Method::GET, "/version", "get", "version"),
            (
                Method::GET,
                "/apis/kubevirt.io/v1/namespaces/desks/virtualmachines?&limit=500",
                "list",
                "virtualmachines",
            ),
            (
                Method::GET,
                "/apis/kubevirt.io/v1/namespaces/desks/virtualmachines?&watch=true&x=1",
                "watch",
                "virtualmachines",
            ),
            (Method::GET, "/api/v1/namespaces/desks/configmaps/mine", "get", "configmaps"),
            (Method::GET, "/api/v1/namespaces/desks", "get", "namespaces"),
            (
                Method::PATCH,
                "/apis/cyberdesk.io/v1alpha1/namespaces/n/cyberdesks/one/status?x=y",
                "patch",
                "cyberdesks/status",
            ),
            (Method::POST, "/api/v1/namespaces/desks/secrets?&fieldValidation=Strict", "create", "secrets"),
            (Method::DELETE, "/api/v1/namespaces/desks/secrets?&labelSelector=a", "deletecollection", "secrets"),
            (Method::PUT, "/apis/coordination.k8s.io/v1/namespaces/n/leases/l?", "update", "leases"),
            (
                Method::POST,
                "/apis/authorization.k8s.io/v1/selfsubjectaccessreviews",
                "create",
                "selfsubjectaccessreviews",
            ),
        ] {
            let call = call(&method, &uri.parse().expect("a URI"));
            assert_eq!((call.verb, call.resource.as_str()), (verb, resource), "{uri}");
        }
    }
}
