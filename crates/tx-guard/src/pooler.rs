//! What stands between a pool and its server.
//!
//! Invariant: no setting outlives a transaction if the session may belong to another client next.

/// What there is between a pool and its server. Set with [`TxPoolBuilder::pooler`](crate::TxPoolBuilder::pooler).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
#[non_exhaustive]
pub enum PoolerMode {
    /// Nothing: each connection has its own session, as it also has behind a pooler in session mode.
    ///
    /// On PostgreSQL the pool checks this when it is opened: it asks its first connection and the one that cancels for
    /// their sessions in turn. It refuses a pooler in transaction mode with
    /// [`TxError::Pooler`](crate::TxError::Pooler), before it sets anything.
    #[default]
    None,
    /// A pooler that gives each transaction another session, such as PgBouncer with `pool_mode = transaction`.
    /// PostgreSQL only.
    ///
    /// The pool changes no session for longer than a transaction, and forgets what sqlx has prepared there by name at
    /// its end. Each of its messages outside a transaction is one simple query. It learns the session of a transaction
    /// after `BEGIN`. That takes one more round trip and is the transaction's first query, so `SET TRANSACTION` is
    /// refused after it.
    ///
    /// It cancels a session over another connection of the pooler, and only while the session is in that very
    /// transaction. So the pooler needs at least one session more (`default_pool_size`) than there are concurrent
    /// transactions: a cancel that finds no free session comes late, and the session that it was meant for is lost.
    ///
    /// As in a wrapped pool, one protection of the crate's direct sessions is missing here: if a `begin` of sqlx was
    /// cancelled two levels deep, later writes in the level between do not pass the guard and may stand. A wrapped pool
    /// must lead to the server itself.
    Transaction,
}
