//! What a template says of itself: the first of two YAML documents in `NAME.yaml`, before the VM.

use jiff::SignedDuration;
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

/// Least and greatest start deadline, in seconds.
const START_DEADLINE: std::ops::RangeInclusive<i64> = 10..=86_400;
/// What a template gets that does not say, in seconds.
pub(super) const DEFAULT_START_DEADLINE: i64 = 600;

/// What a template says of itself.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub(super) struct Settings {
    /// A JSON Schema of the params that a row may give.
    pub(super) params: Option<Value>,
    /// When the desktop counts as running.
    pub(super) ready: Option<Ready>,
    /// How long it may take until then, such as `10m`.
    pub(super) start_deadline: Option<String>,
    /// Where its user finds it, with variables; written to the row when it runs.
    pub(super) stream_url: Option<String>,
    /// Cloud-init user data, with variables.
    pub(super) user_data: Option<String>,
    /// The same from a Secret beside the ConfigMap.
    pub(super) user_data_from: Option<SecretKey>,
}

/// When a desktop counts as running.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq)]
#[serde(rename_all = "lowercase")]
pub(super) enum Ready {
    /// When the VMI's condition `Ready` holds, of which a readiness probe of the VM is a part.
    Vmi,
    /// When the guest agent is connected as well.
    Agent,
}

impl Ready {
    /// The value of the annotation.
    pub(super) fn as_str(self) -> &'static str {
        match self {
            Self::Vmi => "vmi",
            Self::Agent => "agent",
        }
    }
}

/// One key of a Secret.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq, PartialOrd, Ord)]
#[serde(deny_unknown_fields)]
pub struct SecretKey {
    /// The Secret's name.
    pub secret: String,
    /// The key in it.
    #[serde(default = "user_data_key")]
    pub key: String,
}

fn user_data_key() -> String {
    "userdata".to_owned()
}

impl Settings {
    /// Names of the params that are described, well or not.
    pub(super) fn param_names(&self) -> impl Iterator<Item = &String> {
        self.params.iter().filter_map(|schema| schema.get("properties")?.as_object()).flat_map(|fields| fields.keys())
    }

    /// The start deadline in whole seconds, if the template says it.
    pub(super) fn start_deadline(&self) -> Result<Option<i64>, String> {
        let Some(text) = &self.start_deadline else { return Ok(None) };
        let seconds = text.parse::<SignedDuration>().ok().map(|span| span.as_secs());
        match seconds.filter(|seconds| START_DEADLINE.contains(seconds)) {
            Some(seconds) => Ok(Some(seconds)),
            None => Err(format!("startDeadline is {text:?}; it must be a time from 10s to 24h, such as 10m")),
        }
    }
}

/// Parts the settings from the VM, and reads both. Faults begin with their `LINE:COLUMN`.
pub(super) fn read(text: &str) -> Result<(Settings, Value), String> {
    match documents(text).as_slice() {
        [vm] => Ok((Settings::default(), yaml(vm)?)),
        [settings, vm] => Ok((yaml(settings)?, yaml(vm)?)),
        [] => Err("1:1: there is nothing in it; it must be a VirtualMachine of kubevirt.io/v1".to_owned()),
        more => Err(format!("1:1: there are {} YAML documents in it; it takes the settings and the VM", more.len())),
    }
}

/// The documents that hold more than comments, each on the lines that it has in the text.
///
/// A line that begins with `---` is always a marker: within a document, YAML has no place for one.
fn documents(text: &str) -> Vec<String> {
    let (mut documents, mut current) = (vec![], String::new());
    for (number, line) in text.lines().enumerate() {
        let marker = line.strip_prefix("---").filter(|rest| rest.is_empty() || rest.starts_with([' ', '\t']));
        if marker.is_some() {
            documents.push(std::mem::replace(&mut current, "\n".repeat(number)));
        }
        current.push_str(marker.unwrap_or(line));
        current.push('\n');
    }
    documents.push(current);
    let says_something = |line: &str| !line.trim().is_empty() && !line.trim_start().starts_with('#');
    documents.retain(|document| document.lines().any(says_something));
    documents
}

/// Reads YAML as Kubernetes and cloud-init do, which is as YAML 1.1: `yes` is true and `0644` is octal.
pub(super) fn yaml<T: DeserializeOwned>(text: &str) -> Result<T, String> {
    let options = serde_saphyr::options! { legacy_octal_numbers: true, with_snippet: false };
    serde_saphyr::from_str_with_options(text, options).map_err(|error| {
        let place = error.location().map_or((1, 1), |place| (place.line(), place.column()));
        // The library tells the place too, in its own words.
        let words = error.to_string();
        let words = words.lines().next().unwrap_or_default();
        let words = words.split(" at line ").next().unwrap_or(words);
        format!("{}:{}: {}", place.0, place.1, words.trim_start_matches("error: "))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn settings_and_vm_are_two_documents_with_the_lines_of_the_file() {
        let cases = [
            ("kind: VM", Some("VM"), None),
            ("# a comment\n---\nkind: VM\n", Some("VM"), None),
            ("ready: agent\n---\nkind: VM", Some("VM"), Some(Ready::Agent)),
            ("---\nready: agent\n--- # the VM\nkind: VM", Some("VM"), Some(Ready::Agent)),
        ];
        for (text, kind, ready) in cases {
            let (settings, vm) = read(text).expect(text);
            assert_eq!((vm["kind"].as_str(), settings.ready), (kind, ready), "{text}");
        }
        let cases = [
            ("", "1:1: there is nothing in it"),
            ("a: 1\n---\nb: 1\n---\nc: 1", "1:1: there are 3 YAML documents"),
            ("reedy: agent\n---\nkind: VM", "1:1: unknown field"),
            ("ready: agent\n---\nkind: VM\nb: [", "4:4: "),
            ("ready: maybe\n---\nkind: VM", "1:8: unknown variant"),
        ];
        for (text, words) in cases {
            let fault = read(text).map(drop).expect_err(text);
            assert!(fault.contains(words), "{words:?} is not in {fault:?}");
        }
    }

    #[test]
    fn yaml_is_read_as_cloud_init_reads_it() {
        let value: Value = yaml("{a: yes, b: 0644, c: '0644', d: off}").expect("YAML");
        assert_eq!(value, serde_json::json!({ "a": true, "b": 420, "c": "0644", "d": false }));
    }

    #[test]
    fn a_start_deadline_is_a_time_within_bounds() {
        let of =
            |text: &str| Settings { start_deadline: Some(text.to_owned()), ..Settings::default() }.start_deadline();
        assert_eq!(of("20m"), Ok(Some(1200)));
        assert_eq!(of("1h 30m"), Ok(Some(5400)));
        for text in ["soon", "1s", "48h", "-5m", "600"] {
            assert!(of(text).is_err_and(|fault| fault.contains(text)), "{text}");
        }
    }
}
