//! What virt-api refuses: a table of small rules over the spec of a VMI (or a VM's template), in KubeVirt's words.
//!
//! A rule looks at one matter and adds a cause for each fault, with the field that KubeVirt names (including the
//! fields that it names wrongly). The order of the table is the order of the causes. To add a rule, write it here or in
//! `devices` and put it into [`TABLE`] where KubeVirt has it.

use serde_json::{Value, json};

use super::devices;
use super::quantity::{milli, written};

/// The faults found, each as a cause of the refusal.
#[derive(Debug, Default)]
pub(super) struct Causes(Vec<Value>);

impl Causes {
    /// Adds a fault. KubeVirt leaves some causes without a field.
    pub(super) fn add(&mut self, reason: &str, field: &str, message: &str) {
        let mut cause = json!({ "reason": reason, "message": message });
        if !field.is_empty() {
            cause["field"] = json!(field);
        }
        self.0.push(cause);
    }

    /// Adds a fault of the object's shape, which KubeVirt names in words alone.
    pub(super) fn shape(&mut self, message: &str) {
        self.0.push(json!({ "message": message }));
    }

    /// Adds a fault of the commonest kind.
    pub(super) fn invalid(&mut self, field: &str, message: &str) {
        self.add("FieldValueInvalid", field, message);
    }

    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub(super) fn len(&self) -> usize {
        self.0.len()
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = &Value> {
        self.0.iter()
    }
}

/// A rule: the path of the spec in the object, the spec, where to put faults.
type Rule = fn(&str, &Value, &mut Causes);

/// All rules over a spec, in KubeVirt's order.
const TABLE: &[Rule] = &[
    host_name,
    subdomain,
    memory_request,
    memory_limit,
    hugepages,
    machine_type,
    cpu_not_negative,
    cpu_request_within_limit,
    start_strategy,
    devices::networks,
    devices::boot_order,
    devices::inputs,
    devices::disks,
    secure_boot,
    devices::volumes,
    devices::cloud_init,
    dns_policy,
    eviction_strategy,
    sockets_within_maximum,
];

/// Runs the table.
pub(super) fn check(at: &str, spec: &Value, causes: &mut Causes) {
    for rule in TABLE {
        rule(at, spec, causes);
    }
}

fn text(value: &Value) -> Option<&str> {
    value.as_str().filter(|text| !text.is_empty())
}

/// Kubernetes' rule for a DNS label, and its words.
pub(super) fn dns_label_faults(name: &str) -> Vec<&'static str> {
    let mut faults = Vec::new();
    if name.len() > 63 {
        faults.push("must be no more than 63 characters");
    }
    if !is_dns_label(name) {
        faults.push(
            "a lowercase RFC 1123 label must consist of lower case alphanumeric characters or '-', and must start and end \
             with an alphanumeric character (e.g. 'my-name',  or '123-abc', regex used for validation is \
             '[a-z0-9]([-a-z0-9]*[a-z0-9])?')",
        );
    }
    faults
}

fn is_dns_label(name: &str) -> bool {
    let plain = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit();
    name.starts_with(plain) && name.ends_with(plain) && name.chars().all(|c| plain(c) || c == '-')
}

fn host_name(at: &str, spec: &Value, causes: &mut Causes) {
    let Some(name) = text(&spec["hostname"]) else {
        return;
    };
    let faults = dns_label_faults(name);
    if !faults.is_empty() {
        let field = format!("{at}.hostname");
        causes.invalid(
            &field,
            &format!("{field} does not conform to the kubernetes DNS_LABEL rules : {}", faults.join(", ")),
        );
    }
}

fn subdomain(at: &str, spec: &Value, causes: &mut Causes) {
    let Some(name) = text(&spec["subdomain"]) else {
        return;
    };
    if name.len() <= 253 && name.split('.').all(is_dns_label) {
        return;
    }
    let field = format!("{at}.subdomain");
    let rule = "a lowercase RFC 1123 subdomain must consist of lower case alphanumeric characters, '-' or '.', and must start \
                and end with an alphanumeric character (e.g. 'example.com', regex used for validation is \
                '[a-z0-9]([-a-z0-9]*[a-z0-9])?(\\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*')";
    causes.invalid(&field, &format!("{field} does not conform to the kubernetes DNS_SUBDOMAIN rules : {rule}"));
}

fn memory_request(at: &str, spec: &Value, causes: &mut Causes) {
    let request = &spec["domain"]["resources"]["requests"]["memory"];
    let field = format!("{at}.domain.resources.requests.memory");
    match milli(request) {
        Some(amount) if amount < 0 => {
            causes.invalid(&field, &format!("{field} '{}': must be greater than or equal to 0.", written(request)));
        }
        Some(amount) if amount > 0 && amount < 1_000_000_000 => {
            causes.invalid(&field, &format!("{field} '{}': must be greater than or equal to 1M.", written(request)));
        }
        _ => {}
    }
}

fn memory_limit(at: &str, spec: &Value, causes: &mut Causes) {
    let resources = &spec["domain"]["resources"];
    let (request, limit) = (&resources["requests"]["memory"], &resources["limits"]["memory"]);
    let (request_field, limit_field) =
        (format!("{at}.domain.resources.requests.memory"), format!("{at}.domain.resources.limits.memory"));
    let most = milli(limit).unwrap_or(0);
    if most < 0 {
        causes
            .invalid(&limit_field, &format!("{limit_field} '{}': must be greater than or equal to 0.", written(limit)));
    }
    exceeds(request, limit, &request_field, &limit_field, causes);
}

/// A request above a limit that is set.
fn exceeds(request: &Value, limit: &Value, request_field: &str, limit_field: &str, causes: &mut Causes) {
    let (asked, most) = (milli(request).unwrap_or(0), milli(limit).unwrap_or(0));
    if most > 0 && asked > most {
        let (asked, most) = (written(request), written(limit));
        causes.invalid(request_field, &format!("{request_field} '{asked}' is greater than {limit_field} '{most}'"));
    }
}

fn hugepages(at: &str, spec: &Value, causes: &mut Causes) {
    let Some(size_text) = spec["domain"]["memory"]["hugepages"]["pageSize"].as_str() else {
        return;
    };
    let size_field = format!("{at}.domain.memory.hugepages.pageSize");
    let size = match milli(&json!(size_text)) {
        Some(size) if size > 0 => size,
        _ => {
            let words = "quantities must match the regular expression \
                         '^([+-]?[0-9.]+)([eEinumkKMGTP]*[-+]?[0-9]*)$'";
            return causes.invalid(&size_field, &format!("{size_field} '{size_text}': {words}"));
        }
    };
    let resources = &spec["domain"]["resources"];
    let request = &resources["requests"]["memory"];
    let amounts = [request, &spec["domain"]["memory"]["guest"], &resources["limits"]["memory"]];
    let memory = amounts.into_iter().filter_map(milli).find(|amount| *amount != 0).unwrap_or(0);
    let field = format!("{at}.domain.resources.requests.memory");
    let asked = written(request);
    if memory != 0 && memory < size {
        let words = format!("{field} '{asked}' must be equal to or larger than page size {size_field} '{size_text}'");
        causes.invalid(&field, &words);
    } else if memory % size != 0 {
        let words = format!("{field} '{asked}' is not a multiple of the page size {size_field} '{size_text}'");
        causes.invalid(&field, &words);
    }
}

fn machine_type(at: &str, spec: &Value, causes: &mut Causes) {
    let Some(machine) = text(&spec["domain"]["machine"]["type"]) else {
        return;
    };
    if !machine.starts_with("q35") && !machine.starts_with("pc-q35") {
        let field = format!("{at}.domain.machine.type");
        causes.invalid(&field, &format!("{field} is not supported: {machine} (allowed values: [q35* pc-q35*])"));
    }
}

fn cpu_not_negative(at: &str, spec: &Value, causes: &mut Causes) {
    for part in ["requests", "limits"] {
        let amount = &spec["domain"]["resources"][part]["cpu"];
        if milli(amount).unwrap_or(0) < 0 {
            let field = format!("{at}.domain.resources.{part}.cpu");
            causes.invalid(&field, &format!("{field} '{}': must be greater than or equal to 0.", written(amount)));
        }
    }
}

fn cpu_request_within_limit(at: &str, spec: &Value, causes: &mut Causes) {
    let resources = &spec["domain"]["resources"];
    let fields = (format!("{at}.domain.resources.requests.cpu"), format!("{at}.domain.resources.limits.cpu"));
    exceeds(&resources["requests"]["cpu"], &resources["limits"]["cpu"], &fields.0, &fields.1, causes);
}

fn start_strategy(at: &str, spec: &Value, causes: &mut Causes) {
    let field = format!("{at}.startStrategy");
    match spec["startStrategy"].as_str() {
        None => {}
        Some("Paused") if spec["livenessProbe"].is_object() => causes.invalid(
            &field,
            &format!("either {field} or {at}.livenessProbe should be provided.Pausing VMI with LivenessProbe is not supported"),
        ),
        Some("Paused") => {}
        Some(other) => causes.invalid(&field, &format!("{field} is set with an unrecognized option: {other}")),
    }
}

fn secure_boot(at: &str, spec: &Value, causes: &mut Causes) {
    let domain = &spec["domain"];
    let efi = &domain["firmware"]["bootloader"]["efi"];
    let smm = &domain["features"]["smm"];
    let smm_on = smm.is_object() && smm["enabled"] != false;
    if efi.is_object() && efi["secureBoot"] != false && !smm_on {
        let field = format!("{at}.domain");
        let words =
            format!("{field} has EFI SecureBoot enabled. SecureBoot requires SMM, which is currently disabled.");
        causes.invalid(&field, &words);
    }
}

fn dns_policy(at: &str, spec: &Value, causes: &mut Causes) {
    if spec["dnsPolicy"] != "None" {
        return;
    }
    let config = &spec["dnsConfig"];
    if config.is_null() {
        let words = "must provide `dnsConfig` when `dnsPolicy` is None";
        causes.add("FieldValueRequired", &format!("{at}.dnsConfig"), words);
    } else if config["nameservers"].as_array().is_none_or(Vec::is_empty) {
        let words = "must provide at least one DNS nameserver when `dnsPolicy` is None";
        causes.add("FieldValueRequired", "nameservers", words);
    }
}

fn eviction_strategy(at: &str, spec: &Value, causes: &mut Causes) {
    let known = ["LiveMigrate", "LiveMigrateIfPossible", "None", "External"];
    if let Some(strategy) = spec["evictionStrategy"].as_str().filter(|strategy| !known.contains(strategy)) {
        let field = format!("{at}.evictionStrategy");
        causes.invalid(&field, &format!("{field} is set with an unrecognized option: {strategy}"));
    }
}

pub(super) fn sockets_within_maximum(at: &str, spec: &Value, causes: &mut Causes) {
    let cpu = &spec["domain"]["cpu"];
    let (sockets, most) = (cpu["sockets"].as_i64().unwrap_or(0), cpu["maxSockets"].as_i64().unwrap_or(0));
    if most != 0 && sockets > most {
        let words = "Number of sockets in CPU topology is greater than the maximum sockets allowed";
        causes.invalid(&format!("{at}.domain.cpu.sockets"), words);
    }
}

/// Only of a VM.
pub(super) fn run_strategy(spec: &Value, causes: &mut Causes) {
    let (running, strategy) = (&spec["running"], spec["runStrategy"].as_str());
    if running.is_boolean() && strategy.is_some() {
        let words = "Running and RunStrategy are mutually exclusive. Note that Running is deprecated, please use RunStrategy instead";
        causes.invalid("spec.running", words);
    }
    if running.is_null() && strategy.is_none() {
        causes.invalid("spec.running", "RunStrategy must be specified");
    }
    let known = ["Halted", "Manual", "Always", "RerunOnFailure", "Once", "WaitAsReceiver"];
    if let Some(strategy) = strategy.filter(|strategy| !known.contains(strategy)) {
        causes.invalid("spec.runStrategy", &format!("Invalid RunStrategy ({strategy})"));
    }
}

/// Only of a VMI: a VM may be stored without memory, and its VMI is refused then.
pub(super) fn memory_is_named(at: &str, spec: &Value, causes: &mut Causes) {
    let memory = &spec["domain"]["memory"];
    let asked = milli(&spec["domain"]["resources"]["requests"]["memory"]).unwrap_or(0);
    if asked == 0 && memory["guest"].is_null() && memory["hugepages"].is_null() {
        let words = format!(
            "no memory requested, at least one of '{at}.domain.memory.guest', '{at}.domain.memory.hugepages.pageSize' or \
             '{at}.domain.resources.requests.memory' must be set"
        );
        causes.add("FieldValueRequired", "", &words);
    }
}

/// Only of a VMI.
pub(super) fn architecture(at: &str, spec: &Value, causes: &mut Causes) {
    let known = ["amd64", "arm64", "s390x"];
    let named = spec["architecture"].as_str().unwrap_or_default();
    if !known.contains(&named) {
        causes.invalid(&format!("{at}.architecture"), &format!("unsupported architecture: {named}"));
    }
}

/// What KubeVirt can and the simulator cannot. The list is in the documentation of [`crate::simulator`].
pub(super) fn not_played(vm_spec: &Value, spec: &Value, causes: &mut Causes) {
    let mut refuse =
        |what: &str| causes.add("FieldValueNotSupported", "", &format!("the simulator does not play {what}"));
    let used = |value: &Value| !value.is_null() && *value != json!([]) && *value != json!({});
    for field in ["dataVolumeTemplates", "instancetype", "preference"] {
        if used(&vm_spec[field]) {
            refuse(field);
        }
    }
    if vm_spec["runStrategy"] == "WaitAsReceiver" {
        refuse("runStrategy WaitAsReceiver");
    }
    for volume in spec["volumes"].as_array().into_iter().flatten() {
        for source in ["persistentVolumeClaim", "dataVolume", "ephemeral", "memoryDump"] {
            if used(&volume[source]) {
                refuse(&format!("volumes of type {source}"));
            }
        }
    }
    let domain = &spec["domain"];
    let unplayed = [
        (&spec["startStrategy"], "startStrategy"),
        (&spec["utilityVolumes"], "utilityVolumes"),
        (&spec["resourceClaims"], "resourceClaims"),
        (&domain["launchSecurity"], "launchSecurity"),
        (&domain["cpu"]["numa"], "cpu.numa"),
        (&domain["cpu"]["realtime"], "cpu.realtime"),
        (&domain["devices"]["gpus"], "GPUs"),
        (&domain["devices"]["hostDevices"], "host devices"),
        (&domain["devices"]["filesystems"], "filesystems"),
    ];
    for (value, name) in unplayed {
        if used(value) {
            refuse(name);
        }
    }
    if domain["cpu"]["dedicatedCpuPlacement"] == true {
        refuse("dedicated CPUs");
    }
}

/// Edits of a running VM's template that KubeVirt passes on to the VMI; all others wait for a restart.
pub(super) fn not_played_on_update(vm: &Value, old: &Value, causes: &mut Causes) {
    const LIVE: [&str; 9] = [
        "/domain/cpu/sockets",
        "/domain/memory/guest",
        "/domain/devices/disks",
        "/domain/devices/interfaces",
        "/networks",
        "/volumes",
        "/nodeSelector",
        "/affinity",
        "/tolerations",
    ];
    let (new_spec, old_spec) = (&vm["spec"]["template"]["spec"], &old["spec"]["template"]["spec"]);
    let edited = |path: &&str| new_spec.pointer(path) != old_spec.pointer(path);
    if old["status"]["created"] == true
        && let Some(path) = LIVE.into_iter().find(edited)
    {
        let field = path.replace('/', ".");
        let words = "the simulator does not play live updates of a running VM";
        causes.add("FieldValueNotSupported", &format!("spec.template.spec{field}"), words);
    }
}
