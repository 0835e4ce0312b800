//! The answer to a watch, line by line, for as long as nothing goes wrong with it.

use std::io;
use std::sync::Arc;

use axum::body::{Body, Bytes};
use futures::StreamExt as _;
use futures::stream::{self, BoxStream};
use tokio::sync::watch;

use super::{Call, Fault, Middle};

/// What the API server says in the stream of a watch that it can no longer serve.
const EXPIRED: &[u8] = b"{\"type\":\"ERROR\",\"object\":{\"kind\":\"Status\",\"apiVersion\":\"v1\",\"metadata\":{},\
\"status\":\"Failure\",\"message\":\"too old resource version\",\"reason\":\"Expired\",\"code\":410}}\n";

pub(super) struct Watched {
    middle: Arc<Middle>,
    call: Call,
    upstream: BoxStream<'static, io::Result<Bytes>>,
    rules_change: watch::Receiver<()>,
    /// What came and is not a whole line yet.
    rest: Vec<u8>,
    bookmarks_only: bool,
    over: bool,
}

impl Watched {
    pub(super) fn new(middle: Arc<Middle>, call: Call, upstream: BoxStream<'static, io::Result<Bytes>>) -> Self {
        let rules_change = middle.rules.changes();
        Self { middle, call, upstream, rules_change, rest: vec![], bookmarks_only: false, over: false }
    }

    pub(super) fn into_body(self) -> Body {
        Body::from_stream(stream::unfold(self, async |mut watched| {
            let next = watched.next().await?;
            Some((next, watched))
        }))
    }

    async fn next(&mut self) -> Option<io::Result<Bytes>> {
        while !self.over {
            match self.middle.rules.strike(&self.call, true) {
                Some(Fault::Silent) => std::future::pending().await,
                Some(Fault::Expired) => {
                    self.over = true;
                    return Some(Ok(Bytes::from_static(EXPIRED)));
                }
                Some(Fault::CutWatch) => {
                    self.over = true;
                    return Some(Err(io::ErrorKind::ConnectionReset.into()));
                }
                Some(Fault::BookmarksOnly) => self.bookmarks_only = true,
                _ => (),
            }
            if let Some(end) = self.rest.iter().position(|byte| *byte == b'\n') {
                let line: Vec<u8> = self.rest.drain(..=end).collect();
                if self.bookmarks_only && !line.starts_with(br#"{"type":"BOOKMARK""#) {
                    continue;
                }
                return Some(Ok(line.into()));
            }
            tokio::select! {
                chunk = self.upstream.next() => match chunk {
                    Some(Ok(bytes)) => self.rest.extend_from_slice(&bytes),
                    Some(Err(error)) => {
                        self.over = true;
                        return Some(Err(error));
                    }
                    None => self.over = true,
                },
                _ = self.rules_change.changed() => (),
            }
        }
        None
    }
}
