//! Maintenance of a pool's sessions: their number, their age, and the user's hooks.
//!
//! Invariant: a hook that fails costs its session, never a transaction.

use std::panic::{AssertUnwindSafe, resume_unwind};
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use futures_util::FutureExt;
use tokio::time::Instant;

use crate::backend::{Backend, Options};
use crate::reset::Reset;

/// The shortest and the longest time between two checks of the sessions.
const SHORTEST_PERIOD: Duration = Duration::from_millis(10);
const LONGEST_PERIOD: Duration = Duration::from_secs(30);

/// By how much lifetimes differ, so that sessions that were opened together are not closed together.
const JITTER: f64 = 0.1;

/// sqlx's message if it was compiled without a runtime.
const WITHOUT_RUNTIME: &str = "one of the `runtime` features of SQLx must be enabled";

/// What a hook returns: a boxed future that borrows the connection.
pub type HookFuture<'c, T> = Pin<Box<dyn Future<Output = Result<T, sqlx::Error>> + Send + 'c>>;

/// A hook that is shared by all sessions of a pool.
pub(crate) type Hook<DB, T> =
    Arc<dyn for<'c> Fn(&'c mut <DB as sqlx::Database>::Connection) -> HookFuture<'c, T> + Send + Sync>;

/// Gives the options for each session that is opened.
pub(crate) type Rotation<DB> = Arc<dyn Fn() -> HookFuture<'static, Options<DB>> + Send + Sync>;

pub(crate) struct Upkeep<DB: Backend> {
    pub(crate) min_connections: u32,
    pub(crate) max_lifetime: Option<Duration>,
    pub(crate) idle_timeout: Option<Duration>,
    pub(crate) after_connect: Option<Hook<DB, ()>>,
    pub(crate) before_begin: Option<Hook<DB, ()>>,
    pub(crate) after_release: Option<Hook<DB, bool>>,
    pub(crate) rotation: Option<Rotation<DB>>,
    pub(crate) reset: Reset,
    /// The names of the settings to compare.
    pub(crate) verify: Vec<String>,
}

impl<DB: Backend> Default for Upkeep<DB> {
    fn default() -> Self {
        Self {
            min_connections: 0,
            // Without a server there is no load to reduce, and an in-memory database disappears with its last session.
            max_lifetime: DB::IS_REMOTE.then_some(Duration::from_secs(30 * 60)),
            idle_timeout: DB::IS_REMOTE.then_some(Duration::from_secs(10 * 60)),
            after_connect: None,
            before_begin: None,
            after_release: None,
            rotation: None,
            reset: Reset::default(),
            verify: Vec::new(),
        }
    }
}

impl<DB: Backend> Upkeep<DB> {
    /// When a session opened now will be too old.
    pub(crate) fn expiry(&self) -> Option<Instant> {
        let lifetime = self.max_lifetime?.mul_f64(1.0 - JITTER * fastrand::f64());
        Instant::now().checked_add(lifetime)
    }

    /// How long a pool waits between two checks of its sessions.
    pub(crate) fn period(&self) -> Duration {
        let shortest = self.max_lifetime.into_iter().chain(self.idle_timeout).min().unwrap_or(LONGEST_PERIOD);
        (shortest / 4).clamp(SHORTEST_PERIOD, LONGEST_PERIOD)
    }
}

/// `None` if sqlx panics because it was compiled without a runtime.
pub(crate) async fn with_runtime<T>(opening: impl Future<Output = T>) -> Option<T> {
    match AssertUnwindSafe(opening).catch_unwind().await {
        Ok(opened) => Some(opened),
        Err(panic) => {
            let said = panic.downcast_ref::<&str>().copied().or(panic.downcast_ref::<String>().map(String::as_str));
            match said {
                Some(WITHOUT_RUNTIME) => None,
                _ => resume_unwind(panic),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_sqlx_without_a_runtime_is_no_panic() {
        let missing = async { std::panic::panic_any(WITHOUT_RUNTIME) };
        assert!(with_runtime::<()>(missing).await.is_none());
    }

    #[tokio::test]
    #[should_panic(expected = "something else")]
    async fn any_other_panic_goes_on() {
        let other = async { panic!("something else") };
        with_runtime::<()>(other).await;
    }
}
