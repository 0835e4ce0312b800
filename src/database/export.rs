//! The migrations as files that Supabase's tools apply.
//!
//! Each is one statement that applies its migration unless that is applied already, and records it the way
//! [`migrate`](super::migrate) does. So both ways may follow each other in any order: what one has applied, the other
//! leaves alone. What they cannot do is go in steps: over a large table, `migrate` is the gentler way.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use refinery::Migration;

use super::migrate::{HISTORY, migrations};

/// Quotes of which nothing in `sql/` makes use.
const OUTER: &str = "$cyberdesk_export$";
const INNER: &str = "$cyberdesk_migration$";

/// Writes the files, named as Supabase names them, into a folder that is made if there is none.
///
/// # Errors
///
/// If a file cannot be written, or is there already with another text: it may have been applied.
pub fn export(folder: &Path) -> anyhow::Result<Vec<PathBuf>> {
    fs::create_dir_all(folder).with_context(|| format!("make the folder {}", folder.display()))?;
    migrations()?.iter().map(|migration| write(folder, migration)).collect()
}

fn write(folder: &Path, migration: &Migration) -> anyhow::Result<PathBuf> {
    let path = folder.join(format!("{}_{}.sql", migration.version(), migration.name()));
    let text = text(migration);
    match fs::read_to_string(&path) {
        Ok(found) if found == text => (),
        Ok(_) => bail!(
            "{} is there already, and is not what this version writes: move it away if it has never been applied",
            path.display()
        ),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            fs::write(&path, text).with_context(|| format!("write {}", path.display()))?;
        }
        Err(error) => return Err(error).with_context(|| format!("read {}", path.display())),
    }
    Ok(path)
}

fn text(migration: &Migration) -> String {
    let (version, name, checksum) = (migration.version(), migration.name(), migration.checksum());
    let sql = migration.sql().expect("a migration that is not applied has its text").trim_end();
    format!(
        "-- Written by `cyberdesk-operator migrate --export`, for `supabase db push` and `supabase db reset`.
-- Does nothing where it is applied already, and records itself for `cyberdesk-operator migrate`. Do not change it.
do {OUTER}
begin
  perform set_config('search_path', '', true);
  perform set_config('client_min_messages', 'warning', true);
  if to_regclass('{HISTORY}') is not null then
    if exists (select from {HISTORY} where version = {version}) then
      return;
    end if;
  end if;
  execute {INNER}
{sql}
{INNER};
  create schema if not exists cyberdesk;
  create table if not exists {HISTORY} (version int8 primary key, name varchar(255), applied_on varchar(255), checksum varchar(255));
  insert into {HISTORY} (version, name, applied_on, checksum)
  values ({version}, '{name}', to_char(now() at time zone 'utc', 'YYYY-MM-DD\"T\"HH24:MI:SS\"Z\"'), '{checksum}');
end
{OUTER};
"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_migration_ends_the_quotes_around_it() {
        for migration in migrations().expect("they are well formed") {
            let sql = migration.sql().expect("it has its text");
            assert!(!sql.contains(OUTER) && !sql.contains(INNER), "{migration}");
        }
    }

    #[test]
    fn a_file_that_is_there_is_left_alone_and_one_that_differs_is_refused() {
        let folder = std::env::temp_dir().join(format!("cyberdesk-export-{}", uuid::Uuid::new_v4().simple()));
        let written = export(&folder).expect("an empty folder takes them");
        assert_eq!(export(&folder).expect("they are there"), written);
        fs::write(&written[1], "select 1").expect("change one");
        let refused = format!("{:#}", export(&folder).expect_err("a changed one is refused"));
        assert!(refused.contains("tables.sql is there already"), "{refused}");
        fs::remove_dir_all(folder).expect("remove the folder");
    }
}
