//! The limits of a pool, with their defaults.
//!
//! Invariant: every wait has a limit, and each limit has its default here.

use std::time::Duration;

use crate::pooler::PoolerMode;

/// More than any server accepts.
pub(crate) const MOST_CONNECTIONS: u32 = 65_535;

/// The duration that stands for "no limit" when it is added to a point in time.
pub(crate) const FOREVER: Duration = Duration::from_secs(30 * 365 * 24 * 60 * 60);

/// How many connections there may be, and how long each wait may take.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Limits {
    pub(crate) max_connections: u32,
    /// For the whole begin of a transaction.
    pub(crate) acquire_timeout: Duration,
    /// For opening one session.
    pub(crate) connect_timeout: Duration,
    /// For the answer to BEGIN on a session that was used before.
    pub(crate) begin_timeout: Duration,
    /// For cancelling and rolling back, before the session is terminated.
    pub(crate) settle_timeout: Duration,
    /// For a commit whose caller has gone.
    pub(crate) commit_timeout: Duration,
    /// For finding out how a commit with a lost connection ended.
    pub(crate) resolve_timeout: Duration,
    /// For a server that is seen waiting for us while we wait for what a dropped statement has left unread.
    pub(crate) catch_up_timeout: Duration,
    /// The same for the answer to COMMIT.
    pub(crate) answer_timeout: Duration,
    /// For the farewell to one session.
    pub(crate) goodbye_timeout: Duration,
    /// What is between here and the server.
    pub(crate) pooler: PoolerMode,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            max_connections: 10,
            acquire_timeout: Duration::from_secs(30),
            connect_timeout: Duration::from_secs(10),
            begin_timeout: Duration::from_secs(2),
            settle_timeout: Duration::from_secs(2),
            commit_timeout: Duration::from_secs(600),
            resolve_timeout: Duration::from_secs(10),
            catch_up_timeout: Duration::from_secs(5),
            answer_timeout: Duration::from_secs(2),
            goodbye_timeout: Duration::from_secs(1),
            pooler: PoolerMode::None,
        }
    }
}
