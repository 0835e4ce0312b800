//! Cloud-init: user and network data, which always go into a Secret of the desktop's own.
//!
//! Inline, KubeVirt refuses more than 2,048 bytes (its `vmi-create-admitter.go`), and whoever reads VMs would
//! read it. The Secret's keys are KubeVirt's: `userdata` and `networkdata` (`pkg/cloud-init/cloud-init.go`).

use std::collections::BTreeMap;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use serde_json::{Map, Value, json};

use super::settings::yaml;
use super::syntax::{self, Variables};

/// Where KubeVirt takes cloud-init from.
const SOURCES: [&str; 2] = ["cloudInitNoCloud", "cloudInitConfigDrive"];
/// Fields of a source, the reference that takes their place, and the key in the Secret.
const FIELDS: [(&str, &str, &str); 2] =
    [("userData", "secretRef", "userdata"), ("networkData", "networkDataSecretRef", "networkdata")];
/// What stands, as all of a `userDataBase64`, for the template's user data.
const USER_DATA: &str = "${user_data_base64}";
/// The first line by which cloud-init knows its YAML (`cloud-init`, user data formats).
const CLOUD_CONFIG: &str = "#cloud-config";

/// Data for cloud-init, read once.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Data {
    /// Handed on byte by byte.
    Fixed(Vec<u8>),
    /// YAML: values are put into its parsed strings. The first line goes before it.
    Yaml(&'static str, Value),
    /// Any other text. What may be put into it must match a pattern: see [`Params`](super::params::Params).
    Text(String),
}

impl Data {
    fn user(text: &str) -> Result<Self, String> {
        if text.lines().next().is_some_and(|line| line.trim_end() == CLOUD_CONFIG) {
            return Self::yaml("#cloud-config\n", text);
        }
        Ok(if text.contains("${") { Self::Text(text.to_owned()) } else { Self::Fixed(text.into()) })
    }

    fn network(text: &str) -> Result<Self, String> {
        Self::yaml("", text)
    }

    fn yaml(head: &'static str, text: &str) -> Result<Self, String> {
        let value = yaml(text)?;
        // Comments and layout would not survive being written anew.
        Ok(if text.contains("${") { Self::Yaml(head, value) } else { Self::Fixed(text.into()) })
    }

    /// Shows every string that values are put into, or every text, and whether it is a key.
    pub(super) fn visit<'d>(&'d self, see: &mut dyn FnMut(&'d str, bool)) {
        match self {
            Self::Fixed(_) => (),
            Self::Yaml(_, value) => syntax::visit(value, see),
            Self::Text(text) => see(text, false),
        }
    }

    pub(super) fn render(&self, variables: &Variables) -> Result<Vec<u8>, String> {
        Ok(match self {
            Self::Fixed(bytes) => bytes.clone(),
            Self::Text(text) => syntax::render(text, variables)?.into_bytes(),
            Self::Yaml(head, value) => {
                let filled = syntax::fill(value, variables)?;
                // No folded scalars: readers differ in how they fold, and agree on what is quoted or literal.
                let options = serde_saphyr::ser_options! { folded_wrap_chars: usize::MAX };
                let text = serde_saphyr::to_string_with_options(&filled, options).map_err(|error| error.to_string())?;
                format!("{head}{text}").into_bytes()
            }
        })
    }
}

/// What goes into one key of the Secret, and where the VM refers to it.
#[derive(Clone, Debug)]
pub(super) struct Part {
    /// JSON pointer to the cloud-init source in the VM.
    source: String,
    reference: &'static str,
    pub(super) key: &'static str,
    pub(super) data: Data,
    /// Whether it is the template's user data, and not written in the VM itself.
    pub(super) is_user_data: bool,
}

impl Part {
    /// Puts a reference to the Secret into the VM.
    pub(super) fn refer(&self, vm: &mut Value, secret: &str) {
        if let Some(source) = vm.pointer_mut(&self.source).and_then(Value::as_object_mut) {
            source.insert(self.reference.into(), json!({ "name": secret }));
        }
    }
}

/// Why a template's cloud-init cannot be used.
pub(super) enum Fault {
    /// In the user data: a text that begins with its `LINE:COLUMN`.
    UserData(String),
    /// In the VM.
    Vm(String),
}

/// Takes all cloud-init data out of a VM. `user_data` is what the template has beside it.
pub(super) fn take(vm: &mut Value, user_data: Option<&str>) -> Result<Vec<Part>, Fault> {
    let mut parts: BTreeMap<&str, Part> = BTreeMap::new();
    let volumes = vm.pointer_mut("/spec/template/spec/volumes").and_then(Value::as_array_mut);
    for (number, volume) in volumes.into_iter().flatten().enumerate() {
        let Some((name, source)) = source_of(volume) else { continue };
        for (field, reference, key) in FIELDS {
            let (data, is_user_data) = match data_of(source, field, user_data)? {
                Some(found) => found,
                None => continue,
            };
            let source = format!("/spec/template/spec/volumes/{number}/{name}");
            if parts.insert(key, Part { source, reference, key, data, is_user_data }).is_some() {
                return Err(Fault::Vm(format!("only one volume may carry {field}")));
            }
        }
    }
    if user_data.is_some() && !parts.values().any(|part| part.is_user_data) {
        return Err(Fault::Vm(format!(
            "no volume takes the user data: give a cloudInitNoCloud volume the line userDataBase64: {USER_DATA}"
        )));
    }
    Ok(parts.into_values().collect())
}

fn source_of(volume: &mut Value) -> Option<(&'static str, &mut Map<String, Value>)> {
    let fields = volume.as_object_mut()?;
    let name = SOURCES.into_iter().find(|source| fields.contains_key(*source))?;
    Some((name, fields.get_mut(name)?.as_object_mut()?))
}

/// Takes one field out of its source, and tells whether it stands for the template's user data.
fn data_of(
    source: &mut Map<String, Value>,
    field: &str,
    user_data: Option<&str>,
) -> Result<Option<(Data, bool)>, Fault> {
    let encoded = source.remove(&format!("{field}Base64"));
    let (data, is_user_data) = match (source.remove(field), encoded) {
        (None, None) => return Ok(None),
        (None, Some(Value::String(text))) if field == "userData" && text.trim() == USER_DATA => {
            let Some(text) = user_data else {
                return Err(Fault::Vm(format!(
                    "there is no user data for {USER_DATA}: add NAME.user-data beside the template, or drop the volume"
                )));
            };
            (Data::user(text).map_err(Fault::UserData)?, true)
        }
        (Some(Value::String(text)), None) => {
            let data = if field == "userData" { Data::user(&text) } else { Data::network(&text) };
            // Its lines are not those of the file.
            (data.map_err(|fault| Fault::Vm(format!("cloud-init {field}, {fault}")))?, false)
        }
        (None, Some(Value::String(text))) => {
            let bytes = BASE64.decode(text.trim());
            (Data::Fixed(bytes.map_err(|error| Fault::Vm(format!("{field}Base64 is not base64: {error}")))?), false)
        }
        _ => return Err(Fault::Vm(format!("cloud-init takes either {field} or {field}Base64, as a string"))),
    };
    if matches!(&data, Data::Fixed(bytes) if bytes.is_empty()) {
        return Err(Fault::Vm(format!("cloud-init {field} is empty: drop the volume, or give it some")));
    }
    Ok(Some((data, is_user_data)))
}
