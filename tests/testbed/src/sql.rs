//! A small SQL client, for machines without psql.

use std::io::Read as _;

use anyhow::{Context as _, Result};
use clap::Args;
use cyberdesk_testbed::running::Running;
use tokio_postgres::{NoTls, SimpleQueryMessage};

#[derive(Args)]
pub(crate) struct Sql {
    /// The role to be; the database's administrator unless given.
    #[arg(long = "as", value_name = "ROLE")]
    role: Option<String>,
    /// Statements to run, one after the other; none reads them from standard input.
    statements: Vec<String>,
}

impl Sql {
    pub(crate) async fn run(self) -> Result<()> {
        let url = match std::env::var("DATABASE_URL") {
            Ok(url) if !url.is_empty() => url,
            _ => Running::find()?.database_url,
        };
        let mut config: tokio_postgres::Config = url.parse().context("read DATABASE_URL")?;
        if let Some(role) = self.role {
            config.user(role);
        }
        let (client, connection) = config.connect(NoTls).await.context("connect to the database")?;
        tokio::spawn(connection);
        let mut statements = self.statements;
        if statements.is_empty() {
            let mut text = String::new();
            std::io::stdin().read_to_string(&mut text).context("read statements")?;
            statements.push(text);
        }
        for statement in statements {
            print(&client.simple_query(&statement).await.map_err(explain)?);
        }
        Ok(())
    }
}

/// The server's own words, which the driver's error hides in its source.
fn explain(error: tokio_postgres::Error) -> anyhow::Error {
    match error.as_db_error() {
        Some(said) => {
            let hint = said.hint().map_or_else(String::new, |hint| format!(" ({hint})"));
            anyhow::anyhow!("{}: {}{hint}", said.code().code(), said.message())
        }
        None => error.into(),
    }
}

/// Each result as a table with columns as wide as what they hold.
fn print(messages: &[SimpleQueryMessage]) {
    let mut table: Vec<Vec<String>> = Vec::new();
    for message in messages {
        match message {
            SimpleQueryMessage::RowDescription(columns) => {
                table = vec![columns.iter().map(|column| column.name().to_owned()).collect()];
            }
            SimpleQueryMessage::Row(row) => {
                table.push((0..row.len()).map(|column| row.get(column).unwrap_or("∅").to_owned()).collect());
            }
            SimpleQueryMessage::CommandComplete(count) => {
                if table.is_empty() {
                    println!("done, {count} rows");
                } else {
                    println!("{}", lay_out(&table));
                }
                table.clear();
            }
            _ => (),
        }
    }
}

fn lay_out(table: &[Vec<String>]) -> String {
    let columns = table.first().map_or(0, Vec::len);
    let width = |column: usize| table.iter().map(|row| row[column].chars().count()).max().unwrap_or(0);
    let widths: Vec<usize> = (0..columns).map(width).collect();
    let line = |row: &Vec<String>| {
        let cells = row.iter().zip(&widths).map(|(cell, &width)| format!("{cell:<width$}"));
        cells.collect::<Vec<_>>().join("  ").trim_end().to_owned()
    };
    table.iter().map(line).collect::<Vec<_>>().join("\n")
}

#[cfg(test)]
mod tests {
    #[test]
    fn columns_are_as_wide_as_what_they_hold() {
        let table = [["id", "status"], ["7", "running"], ["1234", "∅"]].map(|row| row.map(str::to_owned).to_vec());
        assert_eq!(super::lay_out(&table), "id    status\n7     running\n1234  ∅");
    }
}
