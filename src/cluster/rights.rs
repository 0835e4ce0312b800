//! What the operator does in the cluster, by the verbs of RBAC: each is used, and all are in `deploy/rbac.yaml`.

use k8s_openapi::api::authorization::v1::{ResourceAttributes, SelfSubjectAccessReview, SelfSubjectAccessReviewSpec};
use kube::Client;
use kube::api::{Api, PostParams};

/// In which namespace.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Place {
    /// That of the CRs.
    Own,
    /// That of the VMs, which may be another.
    Vms,
}

/// Some verbs on one resource.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Right {
    pub(crate) place: Place,
    pub(crate) group: &'static str,
    /// With its subresource.
    pub(crate) resource: &'static str,
    /// On the object of this name only.
    pub(crate) name: Option<&'static str>,
    pub(crate) verbs: &'static [&'static str],
}

const fn right(place: Place, group: &'static str, resource: &'static str, verbs: &'static [&'static str]) -> Right {
    Right { place, group, resource, name: None, verbs }
}

impl Right {
    const fn named(self, name: &'static str) -> Self {
        Self { name: Some(name), ..self }
    }
}

/// All of them. The Secret with user data is missing: only templates that name it need it, and are told if not.
pub(crate) const RIGHTS: [Right; 11] = [
    right(Place::Own, "cyberdesk.io", "cyberdesks", &["get", "list", "watch", "create", "patch", "delete"]),
    right(Place::Own, "cyberdesk.io", "cyberdesks/status", &["patch"]),
    right(Place::Own, "", "configmaps", &["list", "watch"]).named("cyberdesk-vm-template"),
    right(Place::Own, "", "configmaps", &["get", "patch"]).named("cyberdesk-vm-template-accepted"),
    right(Place::Own, "", "namespaces", &["get"]),
    right(Place::Own, "events.k8s.io", "events", &["create", "list"]),
    right(Place::Own, "coordination.k8s.io", "leases", &["create"]),
    right(Place::Own, "coordination.k8s.io", "leases", &["get", "list", "watch", "update"]).named("cyberdesk-operator"),
    right(Place::Vms, "kubevirt.io", "virtualmachines", &["get", "list", "watch", "create", "delete"]),
    right(Place::Vms, "kubevirt.io", "virtualmachineinstances", &["get", "list", "watch", "delete"]),
    right(Place::Vms, "", "secrets", &["create", "deletecollection"]),
];

/// Asks whether this account may do one of them.
///
/// # Errors
///
/// If that cannot be asked.
pub(crate) async fn may(client: &Client, namespace: &str, right: &Right, verb: &str) -> kube::Result<bool> {
    let (resource, subresource) = right.resource.split_once('/').map_or((right.resource, None), |(a, b)| (a, Some(b)));
    let attributes = ResourceAttributes {
        namespace: Some(namespace.to_owned()),
        group: Some(right.group.to_owned()),
        resource: Some(resource.to_owned()),
        subresource: subresource.map(str::to_owned),
        name: right.name.map(str::to_owned),
        verb: Some(verb.to_owned()),
        ..ResourceAttributes::default()
    };
    let spec = SelfSubjectAccessReviewSpec { resource_attributes: Some(attributes), non_resource_attributes: None };
    let review = SelfSubjectAccessReview { spec, ..SelfSubjectAccessReview::default() };
    let answer = Api::<SelfSubjectAccessReview>::all(client.clone()).create(&PostParams::default(), &review).await?;
    Ok(answer.status.is_some_and(|status| status.allowed))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use k8s_openapi::api::rbac::v1::Role;

    use super::*;

    /// The rules of the one Role of this name in such a file.
    fn rules_of(file: &str, name: &str) -> Option<Vec<k8s_openapi::api::rbac::v1::PolicyRule>> {
        let roles = file.split("\n---\n").filter(|text| text.contains("\nkind: Role\n"));
        let roles = roles.map(|text| serde_saphyr::from_str::<Role>(text).expect("a Role"));
        roles.into_iter().find(|role| role.metadata.name.as_deref() == Some(name)).and_then(|role| role.rules)
    }

    #[test]
    fn where_kopfs_vms_are_the_daemon_may_do_what_it_may_where_ours_are() {
        let name = "cyberdesk-operator-vms";
        let base = rules_of(include_str!("../../deploy/rbac.yaml"), name);
        assert!(base.is_some() && rules_of(include_str!("../../deploy/adopt/vms.yaml"), name) == base);
    }

    type Grant = (Place, String, String, Option<String>, String);

    #[test]
    fn the_roles_of_deploy_grant_what_is_used_and_nothing_else() {
        let roles =
            include_str!("../../deploy/rbac.yaml").split("\n---\n").filter(|text| text.contains("\nkind: Role\n"));
        let mut granted: BTreeSet<Grant> = BTreeSet::new();
        for text in roles {
            let role: Role = serde_saphyr::from_str(text).expect("a Role");
            let own = role.metadata.name.as_deref() == Some("cyberdesk-operator");
            let place = if own { Place::Own } else { Place::Vms };
            for rule in role.rules.unwrap_or_default() {
                let names = rule.resource_names.unwrap_or_default();
                let name = names.first().cloned();
                for verb in rule.verbs {
                    let (group, resource) =
                        (rule.api_groups.iter().flatten().next(), rule.resources.iter().flatten().next());
                    let (group, resource) = (group.expect("a group").clone(), resource.expect("a resource").clone());
                    granted.insert((place, group, resource, name.clone(), verb));
                }
            }
        }
        let user_data = |grant: &Grant| grant.3.as_deref() == Some("cyberdesk-vm-user-data");
        granted.retain(|grant| !user_data(grant));
        let used: BTreeSet<Grant> = RIGHTS
            .iter()
            .flat_map(|right| right.verbs.iter().map(move |verb| (right, verb)))
            .map(|(right, verb)| {
                let name = right.name.map(str::to_owned);
                (right.place, right.group.to_owned(), right.resource.to_owned(), name, (*verb).to_owned())
            })
            .collect();
        assert_eq!(granted, used);
    }
}
