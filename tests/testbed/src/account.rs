//! Whom servers run as, and what that user can reach.
//!
//! Postgres refuses to run as root, and dies with a puzzling message if its libraries lie under a home directory of
//! mode 0700. So as root we look for an unprivileged account and for places that it can reach; as an ordinary user
//! there is nothing to do.

use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;

use anyhow::{Context as _, Result};
use serde::{Deserialize, Serialize};

/// A user and a group, by number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Account {
    /// The user's number.
    pub uid: u32,
    /// The number of the user's own group.
    pub gid: u32,
}

impl Account {
    /// The account to drop to: `postgres`, else `nobody`, if we are root; `None` if we are an ordinary user.
    pub fn to_drop_to() -> Result<Option<Self>> {
        if !rustix::process::geteuid().is_root() {
            return Ok(None);
        }
        let passwd = std::fs::read_to_string("/etc/passwd").context("read the accounts in /etc/passwd")?;
        let found = ["postgres", "nobody"].iter().find_map(|name| find(&passwd, name));
        found.map(Some).context(
            "Postgres does not run as root, and there is neither a user postgres nor nobody to run it as; \
             start this as an ordinary user",
        )
    }
}

fn find(passwd: &str, name: &str) -> Option<Account> {
    passwd.lines().find_map(|line| {
        let mut fields = line.split(':');
        (fields.next()? == name).then_some(())?;
        // macOS writes nobody as -2.
        let number = |field: &str| field.parse::<i64>().ok().map(|number| number as u32);
        let account = Account { uid: number(fields.nth(1)?)?, gid: number(fields.next()?)? };
        (account.uid != 0).then_some(account)
    })
}

/// Can any user of this machine read this path, and walk to it?
pub fn reachable_by_all(path: &Path) -> bool {
    let Ok(path) = path.canonicalize() else {
        return false;
    };
    let allows = |path: &Path, bits: u32| path.metadata().is_ok_and(|found| found.permissions().mode() & bits == bits);
    allows(&path, 0o005) && path.ancestors().skip(1).all(|above| allows(above, 0o001))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn accounts_are_found_by_name() {
        let passwd = "root:x:0:0:root:/root:/bin/sh\nnobody:*:-2:-2:Unprivileged:/var/empty:/usr/bin/false\n\
                      postgres:x:101:104:,,,:/var/lib/postgresql:/bin/bash\ntoor:x:0:0::/root:/bin/sh\n";
        assert_eq!(find(passwd, "postgres"), Some(Account { uid: 101, gid: 104 }));
        assert_eq!(find(passwd, "nobody"), Some(Account { uid: u32::MAX - 1, gid: u32::MAX - 1 }));
        assert_eq!(find(passwd, "toor"), None, "another name of root is no unprivileged account");
        assert_eq!(find(passwd, "missing"), None);
    }
}
