//! A job in the database: created by the first worker, and the same for all.
//!
//! Invariant: no worker claims anything before its name, version, codec and whole input match the job.

use std::{path::Path, sync::Arc};

use sqlx::{PgPool, Row};

use crate::{
    codec::Codec,
    error::TaskError,
    log::Header,
    postgres::{
        place,
        schema::{Unusable, quoted},
        session::{Bounds, Tx, statement},
    },
};

/// What a worker brings to a job.
#[derive(Debug)]
pub(crate) struct Offer {
    pub(crate) header: Header,
    /// Versions whose results are accepted although they differ from this worker's version.
    pub(crate) accepted: Vec<String>,
    /// The fingerprint of the input after each item, seeded with the fingerprint before it.
    pub(crate) chain: Vec<u64>,
    /// How many items a range has, if this worker is the first.
    pub(crate) range_items: usize,
}

/// A job as it is in the database.
#[derive(Clone, Debug)]
pub(crate) struct Job {
    pub(crate) id: i64,
    pub(crate) header: Header,
    pub(crate) total: usize,
}

/// Finds or creates the job, and checks that it matches this worker's.
pub(crate) async fn open(pool: &PgPool, bounds: &Bounds, schema: &str, offer: &Offer) -> Result<Job, Unusable> {
    let mut tx = Tx::begin(pool, bounds).await?;
    let job = match create(&mut tx, schema, offer).await? {
        Some(job) => job,
        None => join(&mut tx, schema, offer).await?,
    };
    tx.commit().await?;
    Ok(job)
}

/// Creates the job with its ranges; `None` if it exists. A worker that comes meanwhile waits for the creation.
async fn create(tx: &mut Tx, schema: &str, offer: &Offer) -> Result<Option<Job>, Unusable> {
    let s = quoted(schema);
    let (total, range_items) = (offer.chain.len(), offer.range_items.max(1));
    let insert = format!(
        "INSERT INTO {s}.job (name, header, total, range_items, chain) VALUES ($1, $2, $3, $4, $5)
        ON CONFLICT (name) DO NOTHING RETURNING id"
    );
    let row = statement(&insert.into())
        .bind(&offer.header.job)
        .bind(offer.header.encode())
        .bind(as_i64(total))
        .bind(i32::try_from(range_items).unwrap_or(i32::MAX))
        .bind(whole(&offer.chain))
        .fetch_optional(tx.connection()?)
        .await?;
    let Some(row) = row else { return Ok(None) };
    let id: i64 = row.try_get(0)?;
    let insert = format!(
        "INSERT INTO {s}.range (job, n, first, count, chain)
        SELECT $1, n - 1, (n - 1) * $2, least($2, $3 - (n - 1) * $2), chain
        FROM unnest($4::bigint[]) WITH ORDINALITY AS ends(chain, n)"
    );
    statement(&insert.into())
        .bind(id)
        .bind(as_i64(range_items))
        .bind(as_i64(total))
        .bind(ends(&offer.chain, range_items))
        .execute(tx.connection()?)
        .await?;
    Ok(Some(Job { id, header: offer.header.clone(), total }))
}

/// Reads the existing job and compares it.
async fn join(tx: &mut Tx, schema: &str, offer: &Offer) -> Result<Job, Unusable> {
    let s = quoted(schema);
    let Some(found) = read(tx, schema, &offer.header.job).await? else {
        // The job was deleted after our insert had found it.
        return Err(Unusable::Database(sqlx::Error::RowNotFound));
    };
    let path = place(schema, &offer.header.job);
    check(&found.job.header, offer, &path).map_err(Unusable::Refused)?;
    if (found.job.total, found.chain) == (offer.chain.len(), whole(&offer.chain)) {
        return Ok(found.job);
    }
    let select = format!("SELECT chain FROM {s}.range WHERE job = $1 ORDER BY n");
    let rows = statement(&select.into()).bind(found.job.id).fetch_all(tx.connection()?).await?;
    let stored = rows.iter().map(|row| row.try_get(0)).collect::<Result<Vec<i64>, _>>()?;
    let given = ends(&offer.chain, found.range_items);
    // A partial last range ends elsewhere once the input is longer, so it does not count as a range that differs.
    let whole_ranges = found.job.total.min(offer.chain.len()) / found.range_items;
    let same = stored.iter().zip(&given).take(whole_ranges).take_while(|(stored, given)| stored == given).count();
    let index = same * found.range_items;
    let detail = if same < whole_ranges || found.job.total == offer.chain.len() {
        "an item of the range that begins here is not the one that was there when the job was made"
    } else if found.job.total > offer.chain.len() {
        "the input ends within the range that begins here and had more items when the job was made"
    } else {
        "the job ends within the range that begins here, and the input has more items"
    };
    Err(Unusable::Refused(TaskError::InputMismatch { path, index, detail }))
}

/// A row of the table of jobs.
#[derive(Debug)]
pub(crate) struct Found {
    pub(crate) job: Job,
    range_items: usize,
    chain: i64,
}

/// Reads the job with this name.
pub(crate) async fn read(tx: &mut Tx, schema: &str, name: &str) -> Result<Option<Found>, Unusable> {
    let s = quoted(schema);
    let select: Arc<str> = format!("SELECT id, header, total, range_items, chain FROM {s}.job WHERE name = $1").into();
    let Some(row) = statement(&select).bind(name).fetch_optional(tx.connection()?).await? else { return Ok(None) };
    let header: &[u8] = row.try_get(1)?;
    let path = place(schema, name);
    let (header, _) =
        Header::decode(header).map_err(|damage| Unusable::Refused(TaskError::unreadable(&path, damage.into())))?;
    let total: i64 = row.try_get(2)?;
    let range_items: i32 = row.try_get(3)?;
    let job = Job { id: row.try_get(0)?, header, total: usize::try_from(total).unwrap_or_default() };
    let range_items = usize::try_from(range_items).unwrap_or_default().max(1);
    Ok(Some(Found { job, range_items, chain: row.try_get(4)? }))
}

fn check(stored: &Header, offer: &Offer, path: &Path) -> Result<(), TaskError> {
    let given = &offer.header;
    let mismatch = |field, stored: &str, given: &str| {
        let (stored, given) = (stored.to_owned(), given.to_owned());
        Err(TaskError::VersionMismatch { path: path.to_owned(), field, stored, given })
    };
    if stored.codec != given.codec {
        return mismatch("codec", &Codec::name_of(stored.codec), &Codec::name_of(given.codec));
    }
    if stored.identity != given.identity {
        return mismatch("identity", &format!("{:?}", stored.identity), &format!("{:?}", given.identity));
    }
    if stored.version != given.version && !offer.accepted.contains(&stored.version) {
        return mismatch("version", &stored.version, &given.version);
    }
    Ok(())
}

/// The fingerprint at the end of each range.
fn ends(chain: &[u64], range_items: usize) -> Vec<i64> {
    chain.chunks(range_items).filter_map(|range| range.last().map(|end| end.cast_signed())).collect()
}

/// The fingerprint of the whole input.
fn whole(chain: &[u64]) -> i64 {
    chain.last().copied().unwrap_or_default().cast_signed()
}

fn as_i64(count: usize) -> i64 {
    i64::try_from(count).unwrap_or(i64::MAX)
}
