//! The pool as an sqlx [`Executor`], for queries without a transaction.
//!
//! Invariant: a query runs on a [`Reader`](crate::Reader) that its future or stream owns, so dropping that drops the
//! reader, which settles the session.

use async_stream::try_stream;
use futures_util::TryStreamExt;
use futures_util::future::BoxFuture;
use futures_util::stream::BoxStream;
use sqlx::{Either, Execute, Executor, SqlStr};
use sqlx_core::describe::Describe;

use crate::TxPool;
use crate::backend::Backend;

/// Each query takes a [`reader`](TxPool::reader), with its limitations, and returns it at its end. Two queries may run
/// on two sessions. Rows are read from the server on demand, and a stream holds its session as long as it lives.
///
/// The pool is no [`Acquire`](sqlx::Acquire), because the `begin` of that trait has no guard. Pass a guard's or a
/// reader's connection, `&mut *tx`, to functions that take one.
///
/// # Cancel safety
///
/// Futures and streams may be dropped at any point: the running statement is cancelled on the server, and the session
/// returns to its pool when it is quiet, or is closed. A write that is dropped on a wrapped pool may have been
/// committed.
///
/// # Errors
///
/// The errors of [`reader`](TxPool::reader) come as sqlx errors: a closed pool is
/// [`PoolClosed`](sqlx::Error::PoolClosed), an exhausted pool is [`PoolTimedOut`](sqlx::Error::PoolTimedOut), and any
/// other [`TxError`](crate::TxError) is inside an [`Io`](sqlx::Error::Io).
///
/// # Examples
///
/// ```
/// # #[cfg(feature = "sqlite")] {
/// # tokio::runtime::Runtime::new().unwrap().block_on(async {
/// # use cancel_safe_tx_guard::TxPool;
/// let db = TxPool::<sqlx::Sqlite>::connect("sqlite::memory:").await?;
/// let two: i64 = sqlx::query_scalar("SELECT 1 + ?").bind(1).fetch_one(&db).await?;
/// assert_eq!(two, 2);
/// # Ok::<(), cancel_safe_tx_guard::TxError>(())
/// # }).unwrap();
/// # }
/// ```
impl<'p, DB: Backend> Executor<'p> for &'_ TxPool<DB>
where
    for<'c> &'c mut DB::Connection: Executor<'c, Database = DB>,
{
    type Database = DB;

    fn fetch_many<'e, 'q: 'e, E>(self, query: E) -> BoxStream<'e, Result<Either<DB::QueryResult, DB::Row>, sqlx::Error>>
    where
        E: 'q + Execute<'q, DB>,
    {
        let pool = self.clone();
        Box::pin(try_stream! {
            let mut reader = pool.reader().await?;
            let mut rows = reader.fetch_many(query);
            while let Some(row) = rows.try_next().await? {
                yield row;
            }
        })
    }

    fn fetch_optional<'e, 'q: 'e, E>(self, query: E) -> BoxFuture<'e, Result<Option<DB::Row>, sqlx::Error>>
    where
        E: 'q + Execute<'q, DB>,
    {
        let pool = self.clone();
        Box::pin(async move { pool.reader().await?.fetch_optional(query).await })
    }

    fn prepare_with<'e>(
        self,
        sql: SqlStr,
        parameters: &'e [DB::TypeInfo],
    ) -> BoxFuture<'e, Result<DB::Statement, sqlx::Error>>
    where
        'p: 'e,
    {
        let pool = self.clone();
        Box::pin(async move { pool.reader().await?.prepare_with(sql, parameters).await })
    }

    fn describe<'e>(self, sql: SqlStr) -> BoxFuture<'e, Result<Describe<DB>, sqlx::Error>>
    where
        'p: 'e,
    {
        let pool = self.clone();
        Box::pin(async move { pool.reader().await?.describe(sql).await })
    }
}
