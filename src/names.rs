//! Names: how a desktop's key becomes the names of its objects, both ways, and the marks we put on them.
//!
//! The key of a desktop is the name of its `Cyberdesk` object: the row's id, or what a person chose for
//! one applied by hand. VM and VMI are `cyberdesk-<key>`, but for those that another operator made and
//! that were adopted: they keep their names, and carry the key. Whether an object is ours is told by its
//! labels alone, never by its name: see [`Owner`].

use std::cmp::Ordering;
use std::collections::BTreeMap;
use std::fmt;
use std::hash::{Hash, Hasher};
use std::sync::Arc;

use kube::api::ObjectMeta;
use uuid::Uuid;

/// API group of the CRD, and prefix of all our labels and annotations.
pub const GROUP: &str = "cyberdesk.io";
/// Field manager of our server-side applies, value of the `managed-by` label and of `${managed_by}`.
pub const MANAGER: &str = "cyberdesk-operator";

const VM_PREFIX: &str = "cyberdesk-";

const MANAGED_BY: &str = "app.kubernetes.io/managed-by";
/// Label with the key: `kubectl get all -l cyberdesk.io/desktop=ID` finds all of one desktop.
pub const LABEL_DESKTOP: &str = "cyberdesk.io/desktop";
/// Label with the row's user: `kubectl get vm -l cyberdesk.io/user=ID` finds all of one user.
pub const LABEL_USER: &str = "cyberdesk.io/user";
const LABEL_ORIGIN: &str = "cyberdesk.io/origin";
const LABEL_OWNER: &str = "cyberdesk.io/owner";
/// Annotation with the identity of the database that a row-born object came from.
pub const ANNOTATION_DATABASE: &str = "cyberdesk.io/database";
/// Annotation with the hash of the template that a VM was made from.
pub const ANNOTATION_TEMPLATE: &str = "cyberdesk.io/template-hash";
/// Annotation with what "running" means for a VM: `vmi` or `agent`.
pub const ANNOTATION_READY: &str = "cyberdesk.io/ready";
/// Annotation with the time that a VM may take until it is running, in whole seconds.
pub const ANNOTATION_START_DEADLINE: &str = "cyberdesk.io/start-deadline";
/// Annotation with the URL that is written to the row when the VM is running.
pub const ANNOTATION_STREAM_URL: &str = "cyberdesk.io/stream-url";

/// Annotation with which a person has a desktop left as it is, on its CR: `true`, and nothing else.
pub const ANNOTATION_PAUSED: &str = "cyberdesk.io/paused";

/// Annotation of a VM and a VMI that another operator made and that were adopted: the name that they have kept.
pub const ANNOTATION_ADOPTED: &str = "cyberdesk.io/adopted";
/// The finalizer that Kopf, the framework of the operator before this one, holds its objects by.
pub const KOPF_FINALIZER: &str = "kopf.zalando.org/KopfFinalizerMarker";

/// The key of a desktop: the name of its CR.
#[derive(Clone, PartialEq, Eq)]
pub struct Key(Name);

/// There are several keys of each desktop in memory: a row's needs no room of its own beside them.
#[derive(Clone, PartialEq, Eq)]
enum Name {
    /// The row's id, spelled canonically: that spelling alone leads back to the same key.
    Row(Uuid),
    Given(Arc<str>),
}

impl Key {
    /// The key of the desktop whose CR has this name.
    pub fn new(name: &str) -> Self {
        let id = Uuid::try_parse(name).ok().map(Name::Row).filter(|id| id.with(|spelled| spelled == name));
        Self(id.unwrap_or_else(|| Name::Given(name.into())))
    }

    /// The key of the desktop of this row.
    pub fn of_row(id: Uuid) -> Self {
        Self(Name::Row(id))
    }

    /// The row that this key may belong to. `None`: it cannot be a row's, so a person made it.
    pub fn row_id(&self) -> Option<Uuid> {
        match &self.0 {
            Name::Row(id) => Some(*id),
            Name::Given(_) => None,
        }
    }

    /// The name of its VM, and of the VMI, which KubeVirt names as the VM.
    pub fn vm_name(&self) -> String {
        format!("{VM_PREFIX}{self}")
    }

    /// The way back from the name of a VM or VMI. `None` means that it is not one of ours.
    pub fn from_vm_name(name: &str) -> Option<Self> {
        name.strip_prefix(VM_PREFIX).filter(|key| !key.is_empty()).map(Self::new)
    }

    /// The desktop that a VM or VMI belongs to. `None` means that it is not one of ours.
    pub fn of_vm(meta: &ObjectMeta) -> Option<Self> {
        match (adopted_name(meta), Owner::of(meta)) {
            (None, _) => Self::from_vm_name(meta.name.as_deref()?),
            (Some(_), Some(Owner::Row(id))) => Some(Self::of_row(id)),
            (Some(_), Some(Owner::Hand(_))) => meta.labels.as_ref()?.get(LABEL_DESKTOP).map(|key| Self::new(key)),
            (Some(_), None) => None,
        }
    }
}

impl Name {
    fn with<R>(&self, read: impl FnOnce(&str) -> R) -> R {
        match self {
            Self::Row(id) => read(id.hyphenated().encode_lower(&mut Uuid::encode_buffer())),
            Self::Given(name) => read(name),
        }
    }
}

/// By name, as all who see it know it.
impl Ord for Key {
    fn cmp(&self, other: &Self) -> Ordering {
        self.0.with(|name| other.0.with(|other| name.cmp(other)))
    }
}

impl PartialOrd for Key {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl Hash for Key {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.0.with(|name| name.hash(state));
    }
}

/// The name of its CR.
impl fmt::Display for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.with(|name| f.write_str(name))
    }
}

impl fmt::Debug for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.with(|name| fmt::Debug::fmt(name, f))
    }
}

/// Whom an object of ours was made for: its provenance mark.
///
/// A VM is found again by its name, but belongs to a desktop only if the owner is the same: a CR by hand
/// that was deleted and applied anew is another desktop, and has another UID.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Owner {
    /// The row with this id.
    Row(Uuid),
    /// The CR with this UID, applied by a person.
    Hand(String),
}

impl Owner {
    /// Reads the mark of an object. `None`: the object is not ours, whatever its name.
    pub fn of(meta: &ObjectMeta) -> Option<Self> {
        let labels = meta.labels.as_ref()?;
        if labels.get(MANAGED_BY).map(String::as_str) != Some(MANAGER) {
            return None;
        }
        let owner = labels.get(LABEL_OWNER)?;
        match labels.get(LABEL_ORIGIN)?.as_str() {
            "row" => Uuid::try_parse(owner).ok().map(Self::Row),
            "hand" => Some(Self::Hand(owner.clone())),
            _ => None,
        }
    }

    fn origin(&self) -> &'static str {
        match self {
            Self::Row(_) => "row",
            Self::Hand(_) => "hand",
        }
    }

    /// The value of the owner label: the row's id or the CR's UID.
    pub fn id(&self) -> String {
        match self {
            Self::Row(id) => id.hyphenated().to_string(),
            Self::Hand(uid) => uid.clone(),
        }
    }

    /// The name of the Secret with the cloud-init user data. It is the owner's, not the key's: a CR by hand
    /// that was deleted and applied anew must not get its predecessor's.
    pub fn secret_name(&self) -> String {
        format!("{VM_PREFIX}{}-user-data", self.id())
    }

    /// Selects the Secrets of a desktop. Of one by hand, those of its predecessors too.
    pub fn secret_selector(&self, key: &Key) -> String {
        match self {
            Self::Row(id) => format!("{MANAGED_BY}={MANAGER},{LABEL_OWNER}={}", id.hyphenated()),
            Self::Hand(_) => secrets_by_hand(key),
        }
    }

    /// The labels of an object made for this owner.
    pub fn labels(&self, key: &Key, user: Option<Uuid>) -> BTreeMap<String, String> {
        let mut labels = BTreeMap::from([
            (MANAGED_BY.to_owned(), MANAGER.to_owned()),
            (LABEL_DESKTOP.to_owned(), key.to_string()),
            (LABEL_ORIGIN.to_owned(), self.origin().to_owned()),
            (LABEL_OWNER.to_owned(), self.id()),
        ]);
        if let Some(user) = user {
            labels.insert(LABEL_USER.to_owned(), user.hyphenated().to_string());
        }
        labels
    }
}

/// The database that an object was made for, as it is marked.
pub fn database_of(meta: &ObjectMeta) -> Option<Uuid> {
    meta.annotations.as_ref()?.get(ANNOTATION_DATABASE)?.parse().ok()
}

/// The name of a VM or VMI that was adopted. A copy of one, which has another name, was not.
pub fn adopted_name(meta: &ObjectMeta) -> Option<&str> {
    let kept = meta.annotations.as_ref()?.get(ANNOTATION_ADOPTED)?;
    meta.name.as_deref().filter(|name| name == kept)
}

/// Whether a person has it left as it is.
pub fn is_paused(meta: &ObjectMeta) -> bool {
    meta.annotations.as_ref().and_then(|all| all.get(ANNOTATION_PAUSED)).is_some_and(|value| value == "true")
}

/// Selects the Secrets of all these rows.
pub fn secrets_of_rows(ids: &[Uuid]) -> String {
    let ids: Vec<String> = ids.iter().map(|id| id.hyphenated().to_string()).collect();
    format!("{MANAGED_BY}={MANAGER},{LABEL_ORIGIN}=row,{LABEL_OWNER} in ({})", ids.join(","))
}

/// Selects the Secrets that desktops by hand of this key have left.
pub fn secrets_by_hand(key: &Key) -> String {
    format!("{MANAGED_BY}={MANAGER},{LABEL_ORIGIN}=hand,{LABEL_DESKTOP}={key}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_vm_name_leads_back_to_its_key_and_a_key_to_its_row() {
        let id = Uuid::from_u128(0x1234_5678_9abc_def0_1234_5678_9abc_def0);
        let key = Key::of_row(id);
        assert_eq!(Key::from_vm_name(&key.vm_name()), Some(key.clone()));
        assert_eq!(key.row_id(), Some(id));
        assert!(key.vm_name().len() <= 49, "{}", key.vm_name());
    }

    #[test]
    fn names_of_others_are_not_ours() {
        assert_eq!(Key::from_vm_name("win11"), None);
        assert_eq!(Key::from_vm_name("cyberdesk-"), None);
        assert_eq!(Key::new("my-desk").row_id(), None);
        let shouted = Uuid::from_u128(0xabc).hyphenated().to_string().to_uppercase();
        assert_eq!(Key::new(&shouted).row_id(), None, "another spelling would lead to another key");
    }

    #[test]
    fn a_vm_that_was_adopted_leads_to_its_key_by_its_mark_and_a_copy_of_it_does_not() {
        let row = Uuid::from_u128(7);
        for (key, owner) in [(Key::of_row(row), Owner::Row(row)), (Key::new("my-desk"), Owner::Hand("uid".into()))] {
            let adopted = ObjectMeta {
                name: Some("cyberdesk-warm-pool-0".into()),
                labels: Some(owner.labels(&key, None)),
                annotations: Some(BTreeMap::from([(ANNOTATION_ADOPTED.into(), "cyberdesk-warm-pool-0".into())])),
                ..Default::default()
            };
            assert_eq!(Key::of_vm(&adopted), Some(key));
            let copied = ObjectMeta { name: Some("a-copy".into()), ..adopted.clone() };
            assert_eq!(Key::of_vm(&copied), None);
            assert_eq!(Key::of_vm(&ObjectMeta { labels: None, ..adopted }), None, "the mark alone makes nothing ours");
        }
    }

    #[test]
    fn an_owner_is_read_back_from_its_labels() {
        for owner in [Owner::Row(Uuid::from_u128(7)), Owner::Hand("some-uid".into())] {
            let labels = owner.labels(&Key::new("k"), Some(Uuid::from_u128(9)));
            let meta = ObjectMeta { labels: Some(labels), ..Default::default() };
            assert_eq!(Owner::of(&meta), Some(owner));
        }
        assert_eq!(Owner::of(&ObjectMeta::default()), None);
    }
}
