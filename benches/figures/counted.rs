//! What an operator counts of its own calls, read from its `/metrics`.

use std::collections::BTreeMap;

use anyhow::{Context as _, Result, ensure};
use cyberdesk_testbed::supervise::Supervised;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

/// All figures of an operator at one time, or what was added to them between two.
#[derive(Debug)]
pub(crate) struct Counted(BTreeMap<String, f64>);

impl Counted {
    /// Those of a process that has started. It serves them where its log says.
    pub(crate) async fn of(operator: &Supervised) -> Result<Self> {
        let log = std::fs::read_to_string(operator.log())?;
        let address = log.rsplit_once("address=\"").and_then(|(_, rest)| rest.split_once('"'));
        let address = address.context("its log does not say yet where it serves")?.0;
        let mut stream = TcpStream::connect(address).await?;
        let request = format!("GET /metrics HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).await?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await?;
        ensure!(answer.starts_with("HTTP/1.1 200 "), "/metrics answers {}", answer.lines().next().unwrap_or_default());
        let lines = answer.lines().filter_map(|line| line.rsplit_once(' '));
        Ok(Self(lines.filter_map(|(name, value)| Some((name.to_owned(), value.parse().ok()?))).collect()))
    }

    /// What was added since.
    pub(crate) fn since(&self, before: &Self) -> Self {
        let added = self.0.iter().map(|(name, value)| (name.clone(), value - before.0.get(name).unwrap_or(&0.0)));
        Self(added.filter(|(_, added)| *added > 0.0).collect())
    }

    /// The sum of a figure over its labels.
    pub(crate) fn sum(&self, name: &str) -> f64 {
        self.0.iter().filter(|(line, _)| line.split('{').next() == Some(name)).map(|(_, value)| value).sum()
    }

    /// Calls to the API server by verb and resource, whatever was answered: `create secrets`.
    pub(crate) fn api_calls(&self) -> BTreeMap<String, f64> {
        self.by("cyberdesk_api_calls_total", &["verb", "resource"])
    }

    /// SQL statements by function; one that calls none of ours is `other`.
    pub(crate) fn statements(&self) -> BTreeMap<String, f64> {
        self.by("cyberdesk_sql_statements_total", &["statement"])
    }

    fn by(&self, name: &str, labels: &[&str]) -> BTreeMap<String, f64> {
        let mut by = BTreeMap::new();
        for (line, value) in self.0.iter().filter(|(line, _)| line.split('{').next() == Some(name)) {
            let words = labels.iter().filter_map(|label| line.split_once(&format!("{label}=\""))?.1.split('"').next());
            *by.entry(words.collect::<Vec<_>>().join(" ")).or_default() += value;
        }
        by
    }
}
