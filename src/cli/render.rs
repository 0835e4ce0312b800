//! `render`: the manifests that a row would get, without a cluster or a database.

use std::fs;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use clap::Args;
use k8s_openapi::api::core::v1::ConfigMap;
use serde_json::{Map, Value, json};
use uuid::Uuid;

use crate::names::{Key, Owner};
use crate::operator::templates_of;
use crate::template::{self, Manifests, SecretKey, Sources, Templates};

const EXAMPLES: &str = "\
Examples:
  cyberdesk-operator render
  cyberdesk-operator render --template small --params '{\"grace_seconds\": 0}'
  cyberdesk-operator render --templates templates/ --check
  kubectl get configmap cyberdesk-vm-template -n cyberdesk-system -o yaml | cyberdesk-operator render --templates -

Faults go to standard error as FILE:LINE:COLUMN: what is wrong. The exit code is 0 if all templates can be used and
the manifests are printed, 1 if not, 2 if the command line is wrong. What only the API server knows, such as a
misspelt field of the VM, is not found here: the operator asks it before it takes a template into use.";

/// What to render.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(super) struct Render {
    /// The row's params.
    #[arg(long, value_name = "JSON", value_parser = object)]
    params: Option<Map<String, Value>>,
    /// The template: short for params.template.
    #[arg(long, value_name = "NAME")]
    template: Option<String>,
    /// A folder with templates, or a file with their ConfigMap; - is standard input. Without it, those built in.
    #[arg(long, value_name = "PATH")]
    templates: Option<PathBuf>,
    /// Name of the desktop: a row's id, or what a Cyberdesk applied by hand is called.
    #[arg(long, value_name = "NAME", default_value_t = Uuid::nil().to_string())]
    name: String,
    /// Where VMs are made.
    #[arg(long, default_value = "cyberdesk-system")]
    namespace: String,
    /// Only check the templates; print nothing.
    #[arg(long)]
    check: bool,
}

fn object(text: &str) -> Result<Map<String, Value>, String> {
    serde_json::from_str(text).map_err(|error| format!("params are a JSON object: {error}"))
}

impl Render {
    /// Prints the manifests, and the faults of all templates.
    pub(super) fn run(self) -> anyhow::Result<()> {
        let sources = match &self.templates {
            None => template::built_in(),
            Some(path) => read(path)?,
        };
        let templates = Templates::read(&self.namespace, &sources, stand_in);
        let faults: Vec<&str> = templates.faults().collect();
        faults.iter().for_each(|fault| eprintln!("{fault}"));
        if !self.check {
            let mut params = self.params.unwrap_or_default();
            params.extend(self.template.map(|name| ("template".to_owned(), name.into())));
            let key = Key::new(&self.name);
            let owner = key.row_id().map_or_else(|| Owner::Hand(Uuid::nil().to_string()), Owner::Row);
            let made = templates.render(&key, &owner, None, Some(&params.into()));
            // What is wrong with the template has been told already.
            match made {
                Ok(made) => print(&made, &self.namespace)?,
                Err(refusal) if faults.contains(&refusal.message.as_str()) => (),
                Err(refusal) => bail!("{}: {}", refusal.reason, refusal.message),
            }
        }
        match faults.len() {
            0 => Ok(()),
            number => bail!("{number} of {} templates cannot be used", sources.len()),
        }
    }
}

fn read(path: &Path) -> anyhow::Result<Sources> {
    if path.is_dir() {
        return templates_of(path);
    }
    let text = if path == Path::new("-") {
        let mut text = String::new();
        std::io::stdin().read_to_string(&mut text).context("read the ConfigMap on standard input")?;
        text
    } else {
        fs::read_to_string(path).with_context(|| format!("read {}", path.display()))?
    };
    let map: ConfigMap =
        serde_saphyr::from_str(&text).with_context(|| format!("read {} as a ConfigMap", path.display()))?;
    Ok(template::sources(map.data.unwrap_or_default()))
}

/// User data that is in a Secret of the cluster cannot be seen from here.
#[expect(clippy::unnecessary_wraps, reason = "the operator's own look-up can fail")]
fn stand_in(key: &SecretKey) -> Result<String, String> {
    Ok(format!("#cloud-config\n# {} of the Secret {} stands here.\n", key.key, key.secret))
}

fn print(made: &Manifests, namespace: &str) -> anyhow::Result<()> {
    let mut out = std::io::stdout().lock();
    if let Some(data) = &made.user_data {
        let as_text = |bytes: &Vec<u8>| String::from_utf8_lossy(bytes).into_owned();
        let data: Map<String, Value> = data.iter().map(|(key, bytes)| (key.clone(), as_text(bytes).into())).collect();
        let secret = json!({
            "apiVersion": "v1", "kind": "Secret",
            "metadata": { "name": made.secret_name, "namespace": namespace, "labels": made.labels },
            "stringData": data,
        });
        writeln!(out, "{}---", serde_saphyr::to_string(&secret)?)?;
    }
    write!(out, "{}", serde_saphyr::to_string(&made.vm)?)?;
    Ok(())
}
