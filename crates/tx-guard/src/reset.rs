//! Whether a session goes back as it was.
//!
//! Invariant: what is compared is read in the words of the database itself, and what is not known to be as it was is reset,
//! or its session closed.

/// How a session is made the same for each transaction. From [`TxPoolBuilder::reset`](crate::TxPoolBuilder::reset).
///
/// Sessions of a wrapped pool, and those behind a [`PoolerMode::Transaction`](crate::PoolerMode), go back as they are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
#[non_exhaustive]
pub enum Reset {
    /// After each transaction a short list is compared with what it was when the session was opened: on PostgreSQL the role,
    /// the `search_path` and the settings named by [`verify`](crate::TxPoolBuilder::verify); on MySQL the database and the
    /// variables named. Session locks (`pg_advisory_lock`, `GET_LOCK`) are released. When something differs, everything is
    /// reset as with `Discard`, and on MySQL the session is closed. What was `SET LOCAL` ends with its transaction and does
    /// not count.
    ///
    /// On PostgreSQL the message that ends the transaction asks for all this where callers wait for a session, or the next
    /// one would. Otherwise, and on MySQL, a message behind it does, for which only the next user of the session waits, and
    /// [`close`](crate::TxPool::close): session locks may then be held for a round trip after `commit` has returned.
    ///
    /// On SQLite nothing is compared.
    #[default]
    Verify,
    /// After each transaction everything is reset that PostgreSQL's `DISCARD ALL` resets, except prepared statements, and
    /// the hook [`after_connect`](crate::TxPoolBuilder::after_connect) runs again. On MySQL, where sqlx has no means to do
    /// that, each session is closed after its transaction. On SQLite nothing is reset.
    Discard,
    /// A session goes back as it is.
    None,
}

/// Whether it can be the name of a setting, so that it can be written into SQL.
pub(crate) fn is_name(name: &str) -> bool {
    let name = name.strip_prefix('@').unwrap_or(name);
    !name.is_empty() && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'_' || byte == b'.')
}
