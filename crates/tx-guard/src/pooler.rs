//! What stands between a pool and its server.
//!
//! Invariant: nothing that outlives a transaction is set where that would be somebody else's next session.

/// What there is between a pool and its server. Set with [`TxPoolBuilder::pooler`](crate::TxPoolBuilder::pooler).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
#[non_exhaustive]
pub enum PoolerMode {
    /// Nothing: each connection has a session of its own, as also behind a pooler in session mode.
    ///
    /// On PostgreSQL it is looked at when the pool is opened: its first connection and the one for cancelling are asked for
    /// their sessions in turn. A pooler in transaction mode is refused with
    /// [`TxError::Pooler`](crate::TxError::Pooler), before anything was set.
    #[default]
    None,
    /// A pooler that gives each transaction another session, such as PgBouncer with `pool_mode = transaction`. PostgreSQL
    /// alone.
    ///
    /// No session is changed for longer than a transaction: what sqlx has prepared there by name is forgotten at its end.
    /// Each message of ours outside a transaction is one simple query. The session of a transaction is learnt behind its
    /// `BEGIN`, which takes one more round trip and is its first query, so that `SET TRANSACTION` is refused after it. It is
    /// cancelled over another connection of the pooler, and only as long as it is in that very transaction. So the pooler needs at least one session more (`default_pool_size`) than there are transactions at the
    /// same time: a cancel that finds none free comes late, and its session is lost.
    ///
    /// What a direct session of our own can do is missing here, as in a wrapped pool: writes that follow in the level
    /// between, after a `begin` of sqlx was cancelled two levels deep, do not pass the guard and may stand. A wrapped pool
    /// must lead to the server itself.
    Transaction,
}
