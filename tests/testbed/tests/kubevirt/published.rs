//! What we publish is admitted by the real virt-api, without a warning: templates, samples, examples in documents.

use anyhow::{Context, Result, bail, ensure};
use cyberdesk_operator::names::{Key, Owner};
use cyberdesk_operator::template::Templates;
use kube::Client;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use uuid::Uuid;

use crate::faults::judged;

/// The repository.
const ROOT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../..");

/// Each template of `templates/` makes a VM that is admitted.
pub(crate) async fn templates(client: &Client) -> Result<()> {
    let mut files = Vec::new();
    for path in entries(&Path::new(ROOT).join("templates"))? {
        let name = path.file_name().and_then(|name| name.to_str()).context("templates have names")?.to_owned();
        files.push((name, std::fs::read_to_string(&path)?));
    }
    let names: Vec<String> =
        files.iter().filter_map(|(name, _)| name.strip_suffix(".yaml")).map(str::to_owned).collect();
    ensure!(names.len() > 1, "there are templates: {names:?}");
    let templates = Templates::new("default", files);
    for name in names {
        admits_a_desktop(client, &templates, &name, json!({})).await?;
    }
    Ok(())
}

/// Each YAML example of the documents, and each sample of `deploy/`, is admitted.
pub(crate) async fn examples(client: &Client) -> Result<()> {
    let mut examples = Vec::new();
    for path in documents(Path::new(ROOT))? {
        let text = std::fs::read_to_string(&path)?;
        let blocks = text.split("```yaml\n").skip(1).filter_map(|rest| rest.split("\n```").next());
        examples.extend(blocks.map(|block| (path.clone(), block.to_owned())));
    }
    for file in ["deploy/sample-cyberdesk.yaml", "deploy/example-templates.yaml"] {
        let path = Path::new(ROOT).join(file);
        examples.push((path.clone(), std::fs::read_to_string(path)?));
    }
    for (path, text) in examples {
        let place = path.display();
        for document in text.split("\n---\n") {
            let Ok(object) = serde_saphyr::from_str::<Value>(document) else { continue };
            match object["kind"].as_str() {
                // An excerpt, for a reader to put the rest in.
                Some("VirtualMachine") if object["spec"].is_null() => {}
                Some("ConfigMap") => {
                    let files: BTreeMap<String, String> = serde_json::from_value(object["data"].clone())?;
                    let templates = Templates::new("default", files.clone());
                    for name in files.keys().filter_map(|file| file.strip_suffix(".yaml")) {
                        let chosen =
                            if name == "kiosk" { json!({ "page": "https://example.com/" }) } else { json!({}) };
                        admits_a_desktop(client, &templates, name, chosen).await.with_context(|| format!("{place}"))?;
                    }
                }
                Some("VirtualMachine") => {
                    let templates = Templates::new("default", [("example.yaml", document)]);
                    admits_a_desktop(client, &templates, "example", json!({}))
                        .await
                        .with_context(|| format!("{place}"))?;
                }
                Some("Cyberdesk") => admits(client, "cyberdesk.io/v1alpha1", "cyberdesks", &object)
                    .await
                    .with_context(|| format!("{place}"))?,
                // Not for KubeVirt or us to judge.
                _ => {}
            }
        }
    }
    Ok(())
}

/// The VM of a desktop with these params is admitted.
async fn admits_a_desktop(client: &Client, templates: &Templates, name: &str, mut params: Value) -> Result<()> {
    let id = Uuid::from_u128(1);
    params["template"] = name.into();
    let made = templates.render(&Key::of_row(id), &Owner::Row(id), None, Some(&params));
    let made = made.map_err(|refusal| anyhow::anyhow!("template {name}: {}", refusal.message))?;
    admits(client, "kubevirt.io/v1", "virtualmachines", &made.vm).await.with_context(|| format!("template {name}"))
}

async fn admits(client: &Client, api: &str, plural: &str, object: &Value) -> Result<()> {
    let mut object = object.clone();
    object["metadata"]["namespace"] = json!("default");
    let path = format!("/apis/{api}/namespaces/default/{plural}?fieldValidation=Strict");
    match judged(client, &path, &object).await? {
        answer if answer == json!({ "admitted": true, "warnings": [] }) => Ok(()),
        answer => bail!("not admitted in silence: {answer}"),
    }
}

/// All Markdown files, but for those that are built or hidden.
fn documents(directory: &Path) -> Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    for path in entries(directory)? {
        let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        if path.is_dir() && name != "target" && !name.starts_with('.') {
            found.extend(documents(&path)?);
        } else if name.ends_with(".md") {
            found.push(path);
        }
    }
    Ok(found)
}

fn entries(directory: &Path) -> Result<Vec<PathBuf>> {
    let entries = std::fs::read_dir(directory).with_context(|| format!("read {}", directory.display()))?;
    let mut paths: Vec<PathBuf> = entries.map(|entry| Ok(entry?.path())).collect::<Result<_>>()?;
    paths.sort();
    Ok(paths)
}
