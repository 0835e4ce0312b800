//! Figures for Prometheus, served as `/metrics`.

use std::sync::Arc;

use anyhow::Context;
use axum::Router;
use axum::http::header::CONTENT_TYPE;
use axum::response::IntoResponse;
use axum::routing::get;
use prometheus_client::encoding::{EncodeLabelSet, text};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;
use tokio::net::TcpListener;

use crate::reason::Reason;

/// Most templates that have a figure of their own. Whoever edits the ConfigMap chooses their names.
const MOST_TEMPLATES: usize = 100;

/// All figures. Cheap to set from anywhere.
#[derive(Debug)]
pub struct Metrics {
    registry: Registry,
    templates: Family<OfTemplate, Gauge>,
    ends: Family<ForReason, Counter>,
    /// Edits of templates that were refused.
    pub template_refusals: Counter,
    /// Whether a person must confirm that database and cluster belong together.
    pub braked: Gauge,
    /// Desktops in the cluster whose row and tombstone are gone.
    pub orphans: Gauge,
    /// Desktops in the cluster that are of another database.
    pub strangers: Gauge,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct OfTemplate {
    template: String,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct ForReason {
    reason: &'static str,
}

impl Default for Metrics {
    fn default() -> Self {
        let mut registry = Registry::with_prefix("cyberdesk");
        let templates = Family::default();
        let help =
            "Whether the VM template is in use as the ConfigMap has it (1), or was refused or not checked yet (0)";
        registry.register("template_accepted", help, Family::clone(&templates));
        let template_refusals = Counter::default();
        registry.register("template_refusals", "Edits of VM templates that were refused", template_refusals.clone());
        let ends = Family::default();
        registry.register("desktop_ends", "Desktops whose end was decided, by reason", Family::clone(&ends));
        let gauge = |registry: &mut Registry, name, help| {
            let gauge = Gauge::default();
            registry.register(name, help, gauge.clone());
            gauge
        };
        let help = "Whether nothing is made or ended until a person confirms that database and cluster belong together";
        let braked = gauge(&mut registry, "braked", help);
        let help = "Desktops in the cluster whose row and tombstone are gone: collected after a grace period";
        let orphans = gauge(&mut registry, "orphans", help);
        let strangers = gauge(&mut registry, "strangers", "Desktops in the cluster of another database: never touched");
        Self { registry, templates, ends, template_refusals, braked, orphans, strangers }
    }
}

impl Metrics {
    /// Says of all templates there are whether they are in use as the ConfigMap has them.
    pub fn templates<'t>(&self, accepted: impl IntoIterator<Item = (&'t String, bool)>) {
        self.templates.clear();
        for (template, accepted) in accepted.into_iter().take(MOST_TEMPLATES) {
            self.templates.get_or_create(&OfTemplate { template: template.clone() }).set(accepted.into());
        }
    }

    /// Counts a desktop whose end was decided. Words that are not in the table of reasons are counted as one.
    pub fn ended(&self, reason: &str) {
        let reason = Reason::parse(reason).map_or("other", Reason::as_str);
        self.ends.get_or_create(&ForReason { reason }).inc();
    }

    fn show(&self) -> String {
        let mut shown = String::new();
        text::encode(&mut shown, &self.registry).expect("a String takes all that is written to it");
        shown
    }
}

/// Serves the figures, for as long as nothing is wrong.
///
/// # Errors
///
/// If the server ends.
pub async fn serve(listener: TcpListener, metrics: Arc<Metrics>) -> anyhow::Result<()> {
    let show = move || async move {
        let kind = "application/openmetrics-text; version=1.0.0; charset=utf-8";
        ([(CONTENT_TYPE, kind)], metrics.show()).into_response()
    };
    axum::serve(listener, Router::new().route("/metrics", get(show))).await.context("serve /metrics")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_template_that_is_gone_has_no_figure_and_many_have_a_bounded_number() {
        let metrics = Metrics::default();
        let names: Vec<String> = (0..500).map(|number| format!("t{number}")).collect();
        metrics.templates(names.iter().map(|name| (name, true)));
        assert_eq!(metrics.show().matches("cyberdesk_template_accepted{").count(), MOST_TEMPLATES);
        let default = "default".to_owned();
        metrics.templates([(&default, false)]);
        let shown = metrics.show();
        assert!(shown.contains("cyberdesk_template_accepted{template=\"default\"} 0"), "{shown}");
        assert_eq!(shown.matches("cyberdesk_template_accepted{").count(), 1, "{shown}");
    }
}
