//! The statements by which workers share a job: claim, append, heartbeat, give back, look.
//!
//! Invariant: each is one statement that tests and changes under the lock of its rows, so no moment passes between a
//! check and the change it allows. All times are the server's.

use std::{sync::Arc, time::Duration};

use sqlx::{PgConnection, PgPool, Row, postgres::PgRow};

use crate::postgres::{
    schema::quoted,
    session::{Bounds, Tx, statement},
};

/// The statements, with the schema's name filled in.
#[derive(Debug)]
struct Texts {
    claim: Arc<str>,
    blocks: Arc<str>,
    append: Arc<str>,
    heartbeat: Arc<str>,
    give_back: Arc<str>,
    lock: Arc<str>,
    look: Arc<str>,
    status: Arc<str>,
}

impl Texts {
    fn of(schema: &str) -> Self {
        let s = quoted(schema);
        // Materialised, so that a rescan by the join cannot claim more than the limit. A range that this worker owns
        // without knowing it is a claim whose answer was lost.
        let claim = format!(
            "WITH free AS MATERIALIZED (SELECT job, n, lease_until < clock_timestamp() AS lapsed FROM {s}.range
                WHERE job = $1 AND NOT finished AND n <> ALL($5)
                    AND (lease_until IS NULL OR lease_until < clock_timestamp() OR owner = $2)
                ORDER BY n LIMIT $4 FOR UPDATE SKIP LOCKED)
            UPDATE {s}.range r SET epoch = r.epoch + 1, owner = $2,
                taken_over = r.taken_over + coalesce(free.lapsed, false)::int,
                lease_until = clock_timestamp() + make_interval(secs => $3)
            FROM free WHERE r.job = free.job AND r.n = free.n
            RETURNING r.n, r.first, r.count, r.epoch, r.seq"
        );
        let blocks = format!("SELECT n, body FROM {s}.block WHERE job = $1 AND n = ANY($2) ORDER BY n, seq");
        // The UPDATE locks the row and tests its holder; the INSERT sees only what the UPDATE let through. The sequence
        // makes a repeated append harmless.
        let append = format!(
            "WITH given AS MATERIALIZED (SELECT * FROM unnest($2::bigint[], $3::bigint[], $4::int[], $5::int[], $6::int[],
                $7::bytea[]) AS g(n, epoch, seq, done, quarantined, body)),
            held AS (UPDATE {s}.range r SET seq = r.seq + 1, done = g.done, quarantined = g.quarantined,
                finished = g.done >= r.count, lease_until = CASE WHEN g.done < r.count
                    THEN clock_timestamp() + make_interval(secs => $8) END
                FROM given g WHERE r.job = $1 AND r.n = g.n AND r.epoch = g.epoch AND r.seq = g.seq AND NOT r.finished
                RETURNING r.job, r.n, r.seq, r.epoch, g.body)
            INSERT INTO {s}.block (job, n, seq, epoch, body) SELECT job, n, seq, epoch, body FROM held RETURNING n"
        );
        // A range whose last item has just finished is not lost, although the keeper does not know of the end yet.
        let heartbeat = format!(
            "UPDATE {s}.range r SET lease_until = CASE WHEN NOT r.finished
                THEN clock_timestamp() + make_interval(secs => $4) END
            FROM unnest($2::bigint[], $3::bigint[]) AS h(n, epoch)
            WHERE r.job = $1 AND r.n = h.n AND r.epoch = h.epoch RETURNING r.n"
        );
        let give_back = format!(
            "UPDATE {s}.range r SET lease_until = NULL, owner = NULL
            FROM unnest($2::bigint[], $3::bigint[]) AS h(n, epoch)
            WHERE r.job = $1 AND r.n = h.n AND r.epoch = h.epoch AND NOT r.finished"
        );
        let lock = format!("SELECT FROM {s}.range WHERE job = $1 AND n = ANY($2) ORDER BY n FOR UPDATE");
        let look = format!(
            "SELECT b.n FROM {s}.block b JOIN unnest($2::bigint[], $3::bigint[], $4::int[]) AS h(n, epoch, seq)
            ON b.n = h.n AND b.epoch = h.epoch AND b.seq = h.seq WHERE b.job = $1"
        );
        let status = format!(
            "SELECT count(*) FILTER (WHERE NOT finished), coalesce(sum(done), 0)::bigint,
                coalesce(sum(quarantined), 0)::bigint FROM {s}.range WHERE job = $1"
        );
        let [claim, blocks, append, heartbeat, give_back, lock, look, status] =
            [claim, blocks, append, heartbeat, give_back, lock, look, status].map(Arc::from);
        Self { claim, blocks, append, heartbeat, give_back, lock, look, status }
    }
}

/// One worker's access to one job.
#[derive(Clone, Debug)]
pub(crate) struct Leases {
    pub(crate) pool: PgPool,
    pub(crate) bounds: Bounds,
    texts: Arc<Texts>,
    job: i64,
    /// Names this run and no other, not even another run of the same worker.
    owner: Arc<str>,
    lease_s: f64,
}

/// A claimed range, and its existing blocks.
#[derive(Debug)]
pub(crate) struct Claimed {
    pub(crate) n: i64,
    pub(crate) first: i64,
    pub(crate) count: i32,
    pub(crate) epoch: i64,
    pub(crate) seq: i32,
    pub(crate) blocks: Vec<u8>,
    /// How many rows the blocks came in.
    pub(crate) rows: i32,
}

/// An append to a range: the blocks, and how many items are then finished and in quarantine.
#[derive(Clone, Debug)]
pub(crate) struct Append {
    pub(crate) n: i64,
    pub(crate) epoch: i64,
    /// The rows that are there.
    pub(crate) seq: i32,
    pub(crate) done: i32,
    pub(crate) quarantined: i32,
    pub(crate) body: Vec<u8>,
}

/// The standing of a whole job.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Standing {
    /// Ranges that are not finished.
    pub(crate) open: i64,
    pub(crate) done: i64,
    pub(crate) quarantined: i64,
}

impl Leases {
    pub(crate) fn new(pool: PgPool, bounds: Bounds, schema: &str, job: i64, owner: &str, lease: Duration) -> Self {
        let texts = Arc::new(Texts::of(schema));
        Self { pool, bounds, texts, job, owner: owner.into(), lease_s: lease.as_secs_f64() }
    }

    /// Takes at most `limit` of the lowest ranges that nobody holds, except those in `known`, and reads their blocks.
    pub(crate) async fn claim(&self, limit: usize, known: &[i64]) -> Result<Vec<Claimed>, sqlx::Error> {
        let mut tx = Tx::begin(&self.pool, &self.bounds).await?;
        let rows = statement(&self.texts.claim)
            .bind(self.job)
            .bind(&*self.owner)
            .bind(self.lease_s)
            .bind(i64::try_from(limit).unwrap_or(i64::MAX))
            .bind(known)
            .fetch_all(tx.connection()?)
            .await?;
        let mut claimed = rows.iter().map(claimed).collect::<Result<Vec<_>, _>>()?;
        claimed.sort_unstable_by_key(|range| range.n);
        let begun: Vec<i64> = claimed.iter().filter(|range| range.seq > 0).map(|range| range.n).collect();
        if !begun.is_empty() {
            // In the same transaction: until it ends, no other worker can add to these ranges.
            let blocks = statement(&self.texts.blocks).bind(self.job).bind(begun);
            for row in blocks.fetch_all(tx.connection()?).await? {
                let (n, body): (i64, &[u8]) = (row.try_get(0)?, row.try_get(1)?);
                if let Some(range) = claimed.iter_mut().find(|range| range.n == n) {
                    range.blocks.extend_from_slice(body);
                    range.rows += 1;
                }
            }
        }
        tx.commit().await?;
        Ok(claimed)
    }

    /// Adds to ranges and returns those that took the append. The rest were claimed by another worker, or the append is
    /// a repeat.
    pub(crate) async fn append(&self, appends: &[Append]) -> Result<Vec<i64>, sqlx::Error> {
        let mut tx = Tx::begin(&self.pool, &self.bounds).await?;
        let taken = self.append_on(tx.connection()?, appends).await?;
        tx.commit().await?;
        Ok(taken)
    }

    /// Works like `append`, within a transaction that the caller ends.
    pub(crate) async fn append_on(
        &self,
        connection: &mut PgConnection,
        appends: &[Append],
    ) -> Result<Vec<i64>, sqlx::Error> {
        let rows = statement(&self.texts.append)
            .bind(self.job)
            .bind(appends.iter().map(|append| append.n).collect::<Vec<_>>())
            .bind(appends.iter().map(|append| append.epoch).collect::<Vec<_>>())
            .bind(appends.iter().map(|append| append.seq).collect::<Vec<_>>())
            .bind(appends.iter().map(|append| append.done).collect::<Vec<_>>())
            .bind(appends.iter().map(|append| append.quarantined).collect::<Vec<_>>())
            .bind(appends.iter().map(|append| &append.body[..]).collect::<Vec<_>>())
            .bind(self.lease_s)
            .fetch_all(connection)
            .await?;
        rows.iter().map(|row| row.try_get(0)).collect()
    }

    /// Looks up which of these appends are in the database: an append may have lost its answer, or changed no row.
    ///
    /// The transaction whose answer was lost may still be committing. It holds the rows of its ranges, so the first
    /// statement here waits for it by locking them. A second statement looks for the block, because a statement sees
    /// only what was committed when it began.
    pub(crate) async fn look(&self, appends: &[Append]) -> Result<Vec<i64>, sqlx::Error> {
        let mut tx = Tx::begin(&self.pool, &self.bounds).await?;
        let numbers = || appends.iter().map(|append| append.n).collect::<Vec<_>>();
        statement(&self.texts.lock).bind(self.job).bind(numbers()).execute(tx.connection()?).await?;
        let rows = statement(&self.texts.look)
            .bind(self.job)
            .bind(numbers())
            .bind(appends.iter().map(|append| append.epoch).collect::<Vec<_>>())
            .bind(appends.iter().map(|append| append.seq + 1).collect::<Vec<_>>())
            .fetch_all(tx.connection()?)
            .await?;
        tx.commit().await?;
        rows.iter().map(|row| row.try_get(0)).collect()
    }

    /// Renews the leases of ranges, given by number and epoch, and returns those that are still held.
    pub(crate) async fn heartbeat(&self, held: &[(i64, i64)]) -> Result<Vec<i64>, sqlx::Error> {
        let mut tx = Tx::begin(&self.pool, &self.bounds).await?;
        let (numbers, epochs): (Vec<i64>, Vec<i64>) = held.iter().copied().unzip();
        let rows = statement(&self.texts.heartbeat)
            .bind(self.job)
            .bind(numbers)
            .bind(epochs)
            .bind(self.lease_s)
            .fetch_all(tx.connection()?)
            .await?;
        tx.commit().await?;
        rows.iter().map(|row| row.try_get(0)).collect()
    }

    /// Frees ranges for other workers at once.
    pub(crate) async fn give_back(&self, held: &[(i64, i64)]) -> Result<(), sqlx::Error> {
        let mut tx = Tx::begin(&self.pool, &self.bounds).await?;
        let (numbers, epochs): (Vec<i64>, Vec<i64>) = held.iter().copied().unzip();
        let given = statement(&self.texts.give_back).bind(self.job).bind(numbers).bind(epochs);
        given.execute(tx.connection()?).await?;
        tx.commit().await
    }

    pub(crate) async fn standing(&self) -> Result<Standing, sqlx::Error> {
        let mut tx = Tx::begin(&self.pool, &self.bounds).await?;
        let row = statement(&self.texts.status).bind(self.job).fetch_one(tx.connection()?).await?;
        tx.commit().await?;
        Ok(Standing { open: row.try_get(0)?, done: row.try_get(1)?, quarantined: row.try_get(2)? })
    }
}

fn claimed(row: &PgRow) -> Result<Claimed, sqlx::Error> {
    let (n, first, count) = (row.try_get(0)?, row.try_get(1)?, row.try_get(2)?);
    let (epoch, seq) = (row.try_get(3)?, row.try_get(4)?);
    Ok(Claimed { n, first, count, epoch, seq, blocks: Vec::new(), rows: 0 })
}
