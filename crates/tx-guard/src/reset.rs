//! Restoring a session before it goes back to its pool.
//!
//! Invariant: the compared state is read from the database itself; state that is not known to be unchanged is reset, or
//! the session is closed.

/// How a session is restored for the next transaction. Set with [`TxPoolBuilder::reset`](crate::TxPoolBuilder::reset).
///
/// Sessions of a wrapped pool, and sessions behind a [`PoolerMode::Transaction`](crate::PoolerMode), go back as they
/// are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
#[non_exhaustive]
pub enum Reset {
    /// After each transaction the pool compares a short list with its state when the session was opened: on PostgreSQL
    /// the role, the `search_path`, the two settings that the pool itself makes (`default_transaction_read_only` and
    /// `client_connection_check_interval`) and those named by [`verify`](crate::TxPoolBuilder::verify); on MySQL the
    /// database and the named variables. It also releases session locks (`pg_advisory_lock`, `GET_LOCK`). If something
    /// differs, it resets everything as with `Discard`, or closes the session on MySQL. A `SET LOCAL` ends with its
    /// transaction and does not count.
    ///
    /// On PostgreSQL the message that ends the transaction asks for all this, with a prepared statement called
    /// `txg_state`. On MySQL a separate message follows. Only the next user of the session and
    /// [`close`](crate::TxPool::close) wait for it, so a lock of MySQL's `GET_LOCK` may be held for a round trip after
    /// `commit` has returned.
    ///
    /// On SQLite nothing is compared.
    #[default]
    Verify,
    /// After each transaction the pool resets everything that PostgreSQL's `DISCARD ALL` resets, except prepared
    /// statements, and runs the hook [`after_connect`](crate::TxPoolBuilder::after_connect) again. On MySQL sqlx has no
    /// means to do that, so each session is closed after its transaction. On SQLite nothing is reset.
    Discard,
    /// A session goes back as it is.
    None,
}

/// Whether `name` is a valid name of a setting, so that it can be written into SQL.
pub(crate) fn is_name(name: &str) -> bool {
    let name = name.strip_prefix('@').unwrap_or(name);
    !name.is_empty() && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'_' || byte == b'.')
}
