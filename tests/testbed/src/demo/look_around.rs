//! What to type in another terminal while the demo stays up: lines that can be pasted as they are.

use cyberdesk_testbed::operator::NAMESPACE;
use cyberdesk_testbed::running::Running;
use uuid::Uuid;

/// The tools for looking, as this machine has them.
pub(crate) struct Tools {
    psql: bool,
    kubectl: bool,
}

impl Tools {
    pub(crate) fn of_this_machine() -> Self {
        let path = std::env::var_os("PATH").unwrap_or_default();
        let has = |name: &str| std::env::split_paths(&path).any(|place| place.join(name).is_file());
        Self { psql: has("psql"), kubectl: has("kubectl") }
    }
}

/// All that is worth a try.
pub(crate) fn text(running: &Running, log: &str, user: Uuid, tools: &Tools) -> String {
    let Running { database_url, kubeconfig } = running;
    let sql = |statement: &str| {
        if tools.psql {
            format!("psql \"$DATABASE_URL\" -c \"{statement}\"")
        } else {
            format!("cargo testbed sql \"{statement}\"")
        }
    };
    let kubectl = if tools.kubectl { "kubectl" } else { "cargo testbed kubectl" };
    let missing = match (tools.psql, tools.kubectl) {
        (true, true) => "",
        (false, true) => "\n(There is no psql on this machine: cargo testbed sql does.)",
        (true, false) => "\n(There is no kubectl on this machine: cargo testbed kubectl does.)",
        (false, false) => "\n(There is no psql and no kubectl on this machine: cargo testbed sql and kubectl do.)",
    };
    let look = sql("select id, status, reason, message, ended_at from cyberdesk_instances");
    let insert = sql(&format!(
        "insert into cyberdesk_instances (user_id, status, timeout_at) values ('{user}', 'pending', now() at time zone 'utc' + interval '10 minutes') returning id, status"
    ));
    let end = sql(
        "select (desktop).id, (desktop).status, changed from cyberdesk_instances i, request_shutdown(i.id) where i.ended_at is null",
    );
    format!(
        "Everything stays up until Ctrl-C. In another terminal:{missing}

export DATABASE_URL='{database_url}' KUBECONFIG='{kubeconfig}'

# what the app sees, and what the cluster has
{look}
{kubectl} -n {NAMESPACE} get cd,vm,vmi -o wide

# a desktop as the app makes it, watched, and ended
{insert}
{kubectl} -n {NAMESPACE} get cd -w
{end}

# a desktop by hand, for a minute; and the one from before
{kubectl} -n {NAMESPACE} apply -f - <<'YAML'
apiVersion: cyberdesk.io/v1alpha1
kind: Cyberdesk
metadata: {{name: mine}}
spec: {{timeoutMs: 60000}}
YAML
{kubectl} -n {NAMESPACE} get cd by-hand -o yaml

# what the operator says
tail -f {log}
",
        kubeconfig = kubeconfig.display(),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_missing_is_replaced() {
        let running = Running {
            database_url: "postgres://postgres@127.0.0.1:1/cyberdesk".to_owned(),
            kubeconfig: "/tmp/kubeconfig".into(),
        };
        let text = |psql, kubectl| text(&running, "/tmp/log", Uuid::nil(), &Tools { psql, kubectl });
        assert!(text(true, true).contains("\npsql \"$DATABASE_URL\" -c \"insert"));
        assert!(text(true, true).contains("\nkubectl -n cyberdesk-system"));
        assert!(!text(false, false).contains("\npsql"));
        assert!(text(false, false).contains("\ncargo testbed sql \"insert"));
        assert!(text(false, false).contains("\ncargo testbed kubectl -n cyberdesk-system get"));
    }
}
