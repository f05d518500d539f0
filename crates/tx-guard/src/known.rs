//! Recognises the connections of a wrapped pool, so that the data for cancelling on one is learned only once.
//!
//! Invariant: data of one connection is never used for another. sqlx keeps a prepared statement for each connection.
//! The address of that statement identifies the connection, and as long as we hold the statement, nothing else can have
//! that address.

use std::collections::VecDeque;
use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use sqlx::database::HasStatementCache;
use sqlx::{Connection, Database, Executor, SqlSafeStr, Statement};

/// How many connections are remembered. A forgotten one is learned again.
const LIMIT: usize = 256;

#[expect(unnameable_types, reason = "an associated type of the sealed half of `Backend`")]
pub struct Known<DB: Database, T> {
    learnt: Mutex<VecDeque<(DB::Statement, T)>>,
    /// Whether the connections keep no statements, so that nothing identifies them.
    no_cache: AtomicBool,
}

impl<DB: Database + HasStatementCache, T: Copy> Known<DB, T> {
    /// The statement that identifies this connection. It costs a round trip the first time, and nothing later.
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

/// The address of the statement's columns, which all clones of the statement share.
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
