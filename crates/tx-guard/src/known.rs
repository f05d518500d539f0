//! Recognises the connections of a wrapped pool, so that what is needed to cancel on one is learnt once.
//!
//! Invariant: what was learnt of one connection is never taken for another's. sqlx keeps a prepared statement for each
//! connection; a connection is recognised by the address of that, and as long as we hold it, nothing else can be there.

use std::collections::VecDeque;
use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use sqlx::database::HasStatementCache;
use sqlx::{Connection, Database, Executor, SqlSafeStr, Statement};

/// How many connections are remembered. What is forgotten is learnt again.
const LIMIT: usize = 256;

#[expect(unnameable_types, reason = "an associated type of the sealed half of `Backend`")]
pub struct Known<DB: Database, T> {
    learnt: Mutex<VecDeque<(DB::Statement, T)>>,
    /// The connections keep no statements, so there is nothing to recognise them by.
    no_cache: AtomicBool,
}

impl<DB: Database + HasStatementCache, T: Copy> Known<DB, T> {
    /// The statement by which this connection is recognised. That costs a round trip when it is met for the first time,
    /// and nothing later.
    pub(crate) async fn statement(
        &self,
        conn: &mut DB::Connection,
        sql: &'static str,
    ) -> Result<Option<DB::Statement>, sqlx::Error>
    where
        for<'c> &'c mut DB::Connection: Executor<'c, Database = DB>,
    {
        if self.no_cache.load(Ordering::Relaxed) {
            return Ok(None);
        }
        let statement = conn.prepare(sql.into_sql_str()).await?;
        if conn.cached_statements_size() == 0 {
            self.no_cache.store(true, Ordering::Relaxed);
            return Ok(None);
        }
        Ok(Some(statement))
    }

    pub(crate) fn find(&self, statement: &DB::Statement) -> Option<T> {
        let sought = address::<DB>(statement)?;
        self.lock().iter().find(|(known, _)| address::<DB>(known) == Some(sought)).map(|(_, learnt)| *learnt)
    }

    pub(crate) fn remember(&self, statement: DB::Statement, learnt: T) {
        let mut all = self.lock();
        if all.len() == LIMIT {
            all.pop_front();
        }
        all.push_back((statement, learnt));
    }

    fn lock(&self) -> MutexGuard<'_, VecDeque<(DB::Statement, T)>> {
        self.learnt.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Where the columns of the statement are kept, which all clones of the statement share.
fn address<DB: Database>(statement: &DB::Statement) -> Option<usize> {
    let columns = statement.columns();
    (!columns.is_empty()).then(|| columns.as_ptr().addr())
}

impl<DB: Database, T> Default for Known<DB, T> {
    fn default() -> Self {
        Self { learnt: Mutex::default(), no_cache: AtomicBool::new(false) }
    }
}

impl<DB: Database, T> fmt::Debug for Known<DB, T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Known").finish_non_exhaustive()
    }
}
