//! `database.types.ts` from the catalogue, in the shape in which `supabase gen types` writes it.

use std::fmt::Write as _;

use anyhow::Result;
use tokio_postgres::{Client, Row};

const HEAD: &str = "\
// The types of schema public as this project's migrations make it: a test compares them with the database.

export type Json = string | number | boolean | null | { [key: string]: Json | undefined } | Json[]

export type Database = {
  public: {
";

const TAIL: &str = "    CompositeTypes: { [_ in never]: never }
  }
}

export type Tables<Name extends keyof Database['public']['Tables']> = Database['public']['Tables'][Name]['Row']
export type Enums<Name extends keyof Database['public']['Enums']> = Database['public']['Enums'][Name]
";

/// The whole file.
pub(super) async fn generate(client: &Client) -> Result<String> {
    let mut text = HEAD.to_owned();
    for (title, kind) in [("Tables", "r"), ("Views", "v")] {
        writeln!(text, "    {title}: {{")?;
        let names = "select relname::text from pg_class where relnamespace = 'public'::regnamespace and relkind::text = $1 order by 1";
        for row in client.query(names, &[&kind]).await? {
            relation(&mut text, client, row.get(0), kind == "r").await?;
        }
        writeln!(text, "    }}")?;
    }
    functions(&mut text, client).await?;
    enums(&mut text, client).await?;
    text.push_str(TAIL);
    Ok(text)
}

async fn relation(text: &mut String, client: &Client, name: &str, is_table: bool) -> Result<()> {
    let columns = client
        .query(
            "select a.attname::text, a.atttypid::regtype::text, not a.attnotnull, a.atthasdef or not a.attnotnull
               from pg_attribute a
              where a.attrelid = ('public.' || $1)::regclass and a.attnum > 0 and not a.attisdropped order by 1",
            &[&name],
        )
        .await?;
    writeln!(text, "      {name}: {{")?;
    let parts: &[&str] = if is_table { &["Row", "Insert", "Update"] } else { &["Row"] };
    for part in parts {
        writeln!(text, "        {part}: {{")?;
        for column in &columns {
            let optional = *part == "Update" || (*part == "Insert" && column.get(3));
            let (mark, null) = (if optional { "?" } else { "" }, if column.get(2) { " | null" } else { "" });
            writeln!(text, "          {}{mark}: {}{null}", column.get::<_, &str>(0), typescript(column.get(1)))?;
        }
        writeln!(text, "        }}")?;
    }
    writeln!(text, "        Relationships: []\n      }}")?;
    Ok(())
}

async fn functions(text: &mut String, client: &Client) -> Result<()> {
    let functions = client
        .query(
            "select p.proname::text, p.proretset, p.prorettype::regtype::text, p.pronargs::int, p.pronargdefaults::int,
                    coalesce(p.proargnames, '{}'),
                    array(select t::regtype::text from unnest(coalesce(p.proallargtypes, p.proargtypes::oid[])) with ordinality u (t, n) order by n)
               from pg_proc p
              where p.pronamespace = 'public'::regnamespace and p.prorettype <> 'trigger'::regtype
              order by 1",
            &[],
        )
        .await?;
    writeln!(text, "    Functions: {{")?;
    for function in &functions {
        write_function(text, function)?;
    }
    writeln!(text, "    }}")?;
    Ok(())
}

fn write_function(text: &mut String, function: &Row) -> Result<()> {
    let (given, defaults): (i32, i32) = (function.get(3), function.get(4));
    let (names, types): (Vec<String>, Vec<String>) = (function.get(5), function.get(6));
    let (given, required) = (usize::try_from(given)?, usize::try_from(given - defaults)?);
    let field = |n: usize, mark: &str| format!("{}{mark}: {}", names[n], typescript(&types[n]));
    let sorted = |mut fields: Vec<String>| {
        fields.sort();
        fields.join("; ")
    };
    let arguments = (0..given).map(|n| field(n, if n < required { "" } else { "?" })).collect();
    let columns: Vec<String> = (given..names.len()).map(|n| field(n, "")).collect();
    let returns =
        if columns.is_empty() { typescript(function.get(2)).to_owned() } else { format!("{{ {} }}", sorted(columns)) };
    let many = if function.get(1) { "[]" } else { "" };
    writeln!(text, "      {}: {{", function.get::<_, &str>(0))?;
    match given {
        0 => writeln!(text, "        Args: never")?,
        _ => writeln!(text, "        Args: {{ {} }}", sorted(arguments))?,
    }
    writeln!(text, "        Returns: {returns}{many}\n      }}")?;
    Ok(())
}

async fn enums(text: &mut String, client: &Client) -> Result<()> {
    let enums = client
        .query(
            "select t.typname::text, string_agg(quote_literal(e.enumlabel), ' | ' order by e.enumsortorder)
               from pg_type t join pg_enum e on e.enumtypid = t.oid
              where t.typnamespace = 'public'::regnamespace group by 1 order by 1",
            &[],
        )
        .await?;
    writeln!(text, "    Enums: {{")?;
    for each in &enums {
        writeln!(text, "      {}: {}", each.get::<_, &str>(0), each.get::<_, &str>(1))?;
    }
    writeln!(text, "    }}")?;
    Ok(())
}

/// How Supabase's generator maps types; what it does not know is `unknown`.
fn typescript(postgres: &str) -> String {
    match postgres {
        "boolean" => "boolean".to_owned(),
        "smallint" | "integer" | "bigint" | "real" | "double precision" | "numeric" => "number".to_owned(),
        "text" | "character varying" | "uuid" | "date" | "timestamp without time zone" | "timestamp with time zone" => {
            "string".to_owned()
        }
        "json" | "jsonb" => "Json".to_owned(),
        "instance_status" => "Database['public']['Enums']['instance_status']".to_owned(),
        "cyberdesk_instances" => "Database['public']['Tables']['cyberdesk_instances']['Row']".to_owned(),
        _ => "unknown".to_owned(),
    }
}
