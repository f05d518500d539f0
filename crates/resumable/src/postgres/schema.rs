//! The tables: created once, in a schema of their own, and identified by a version.
//!
//! Invariant: nothing is created in a schema that holds anything foreign, nothing is created twice however many workers
//! start at once, and tables of a newer version are not touched.

use std::sync::Arc;

use sqlx::{AssertSqlSafe, PgPool, Row};
use xxhash_rust::xxh3::xxh3_64;

use crate::{
    error::TaskError,
    postgres::session::{Bounds, Tx, statement},
};

/// The version of the tables that this code creates and understands.
pub(crate) const VERSION: i32 = 1;

/// What was found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Found {
    Nothing,
    Version(i32),
    /// The schema exists, is not empty, and does not have our version.
    Foreign,
}

/// Why the tables cannot be used.
#[derive(Debug)]
pub(crate) enum Unusable {
    Database(sqlx::Error),
    Refused(TaskError),
}

impl From<sqlx::Error> for Unusable {
    fn from(error: sqlx::Error) -> Self {
        Self::Database(error)
    }
}

/// The name of a schema as an identifier in SQL.
pub(crate) fn quoted(schema: &str) -> String {
    format!("\"{}\"", schema.replace('"', "\"\""))
}

/// Ensures that the tables exist, in this version.
///
/// It creates them only if they are missing, so that an ordinary worker needs no right to create tables.
pub(crate) async fn ensure(pool: &PgPool, bounds: &Bounds, schema: &str) -> Result<(), Unusable> {
    let mut tx = Tx::begin(pool, bounds).await?;
    let found = look(&mut tx, schema).await?;
    tx.commit().await?;
    if found != Found::Nothing {
        return judge(found, schema);
    }
    let mut tx = Tx::begin(pool, bounds).await?;
    // If several workers start at once, one creates the tables, and the others wait and find them.
    let lock = statement(&Arc::from("SELECT pg_advisory_xact_lock($1)"));
    lock.bind(xxh3_64(format!("cancel-safe-resumable {schema}").as_bytes()).cast_signed())
        .execute(tx.connection()?)
        .await?;
    let found = look(&mut tx, schema).await?;
    if found == Found::Nothing {
        sqlx::raw_sql(AssertSqlSafe(definition(schema))).execute(tx.connection()?).await?;
    }
    tx.commit().await?;
    if found == Found::Nothing { Ok(()) } else { judge(found, schema) }
}

/// Whether the tables exist. Creates none.
pub(crate) async fn exists(pool: &PgPool, bounds: &Bounds, schema: &str) -> Result<bool, Unusable> {
    let mut tx = Tx::begin(pool, bounds).await?;
    let found = look(&mut tx, schema).await?;
    tx.commit().await?;
    judge(found, schema)?;
    Ok(found != Found::Nothing)
}

fn judge(found: Found, schema: &str) -> Result<(), Unusable> {
    match found {
        Found::Nothing | Found::Version(VERSION) => Ok(()),
        Found::Version(version) => {
            let needs = u16::try_from(version).unwrap_or(u16::MAX);
            Err(Unusable::Refused(TaskError::NewerFormat { path: super::place(schema, ""), needs }))
        }
        Found::Foreign => Err(Unusable::Refused(TaskError::Config(
            "the schema holds something that this crate has not made; nothing was touched: name another with `PgStore::schema`",
        ))),
    }
}

async fn look(tx: &mut Tx, schema: &str) -> Result<Found, sqlx::Error> {
    let name = quoted(schema);
    let sql = "SELECT to_regclass($1) IS NOT NULL, EXISTS (SELECT FROM pg_catalog.pg_class c \
               JOIN pg_catalog.pg_namespace s ON s.oid = c.relnamespace WHERE s.nspname = $2)";
    let row = statement(&Arc::from(sql))
        .bind(format!("{name}.schema_version"))
        .bind(schema)
        .fetch_one(tx.connection()?)
        .await?;
    let (is_ours, holds_something): (bool, bool) = (row.try_get(0)?, row.try_get(1)?);
    if !is_ours {
        return Ok(if holds_something { Found::Foreign } else { Found::Nothing });
    }
    let sql = format!("SELECT max(version) FROM {name}.schema_version");
    let row = statement(&sql.into()).fetch_one(tx.connection()?).await?;
    let version: Option<i32> = row.try_get(0)?;
    Ok(version.map_or(Found::Foreign, Found::Version))
}

/// The SQL that creates the tables of [`VERSION`].
///
/// Each append changes a row of `range`: a page that is not full has room for the new row beside the old one. The
/// blocks refer to their range, not to their job, because otherwise every append of every worker would contend for a
/// lock on the job's row.
fn definition(schema: &str) -> String {
    let s = quoted(schema);
    format!(
        r#"
        CREATE SCHEMA IF NOT EXISTS {s};
        CREATE TABLE {s}.schema_version (version int NOT NULL, made_at timestamptz NOT NULL DEFAULT clock_timestamp());
        CREATE TABLE {s}.job (
            id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
            name text NOT NULL UNIQUE,
            header bytea NOT NULL,
            total bigint NOT NULL,
            range_items int NOT NULL,
            chain bigint NOT NULL,
            created_at timestamptz NOT NULL DEFAULT clock_timestamp()
        );
        CREATE TABLE {s}.range (
            job bigint NOT NULL REFERENCES {s}.job ON DELETE CASCADE,
            n bigint NOT NULL,
            first bigint NOT NULL,
            count int NOT NULL,
            chain bigint NOT NULL,
            epoch bigint NOT NULL DEFAULT 0,
            owner text,
            lease_until timestamptz,
            seq int NOT NULL DEFAULT 0,
            done int NOT NULL DEFAULT 0,
            quarantined int NOT NULL DEFAULT 0,
            taken_over int NOT NULL DEFAULT 0,
            finished boolean NOT NULL DEFAULT false,
            PRIMARY KEY (job, n)
        ) WITH (fillfactor = 70);
        CREATE INDEX range_open ON {s}.range (job, n) WHERE NOT finished;
        CREATE TABLE {s}.block (
            job bigint NOT NULL,
            n bigint NOT NULL,
            seq int NOT NULL,
            epoch bigint NOT NULL,
            body bytea NOT NULL,
            PRIMARY KEY (job, n, seq),
            FOREIGN KEY (job, n) REFERENCES {s}.range ON DELETE CASCADE
        );
        CREATE VIEW {s}.progress AS
            SELECT j.name AS job, j.total, coalesce(sum(r.done), 0) AS done, coalesce(sum(r.quarantined), 0) AS quarantined,
                count(r.n) AS ranges, count(*) FILTER (WHERE r.finished) AS finished,
                count(*) FILTER (WHERE r.lease_until >= clock_timestamp()) AS leased,
                count(*) FILTER (WHERE r.lease_until < clock_timestamp()) AS lapsed,
                coalesce(sum(r.taken_over), 0) AS taken_over, j.created_at
            FROM {s}.job j LEFT JOIN {s}.range r ON r.job = j.id GROUP BY j.id;
        INSERT INTO {s}.schema_version (version) VALUES ({VERSION});
        "#
    )
}
