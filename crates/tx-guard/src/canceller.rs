//! The connection over which statements on other connections are cancelled: kept warm, and never the user's.
//!
//! Invariant: it is used again only after a complete answer. A call that was dropped or has failed leaves nothing behind
//! that could be mistaken for the answer to the next one, and a signal that had no answer is never said to have been
//! acknowledged.

use std::fmt;
use std::future::pending;
use std::sync::{OnceLock, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use futures_util::future::BoxFuture;
use sqlx::{ConnectOptions, Connection};
use tokio::runtime::{Builder, Handle, Runtime};
use tokio::sync::Mutex;
use tokio::task::JoinSet;
use tokio::time::timeout;

/// How long the warm connection may take to answer before a new one is opened in its stead. It may have been idle for
/// hours, and firewalls forget such connections without telling either end.
const WARM_LIMIT: Duration = Duration::from_millis(500);

#[expect(unnameable_types, reason = "an associated type of the sealed half of `Backend`")]
pub struct Canceller<C>(Mutex<Option<Warm<C>>>);

/// A connection, and since when it has been open.
struct Warm<C> {
    conn: C,
    since: Instant,
}

impl<C: Connection + 'static> Warm<C> {
    async fn open(options: &C::Options) -> Result<Self, sqlx::Error> {
        // Before it is opened: what is older than this is older than the connection.
        let since = Instant::now();
        let Some(beside) = beside() else { return Ok(Self { conn: options.connect().await?, since }) };
        // A set, because its drop takes what was begun with it.
        let mut opening = JoinSet::new();
        let options = options.clone();
        opening.spawn_on(async move { options.connect().await }, &beside);
        match opening.join_next().await {
            Some(Ok(opened)) => Ok(Self { conn: opened?, since }),
            Some(Err(_)) | None => Err(sqlx::Error::WorkerCrashed),
        }
    }
}

/// A thread for all cancels of the process, on which nothing else runs: the runtime of a transaction may be busy reading
/// what is to be cancelled, and answers to cancels would wait for that. `None` where there is no thread to be had.
pub(crate) fn beside() -> Option<Handle> {
    static BESIDE: OnceLock<Option<Handle>> = OnceLock::new();
    let start = || {
        // The thread first: a runtime that is not needed could not be dropped inside another, which panics.
        let (give, given) = mpsc::channel::<Runtime>();
        let run = move || given.recv().map(|runtime| runtime.block_on(pending::<()>()));
        thread::Builder::new().name("tx-guard-cancel".to_owned()).spawn(run).ok()?;
        let runtime = Builder::new_current_thread().enable_all().build().ok()?;
        let handle = runtime.handle().clone();
        give.send(runtime).ok()?;
        Some(handle)
    };
    BESIDE.get_or_init(start).clone()
}

impl<C: Connection + 'static> Canceller<C> {
    /// Opens the connection ahead of its first use.
    pub(crate) async fn warm(&self, options: &C::Options) -> Result<(), sqlx::Error> {
        // Whoever has it has opened it, or is about to.
        let Ok(mut warm) = self.0.try_lock() else { return Ok(()) };
        if warm.is_none() {
            *warm = Some(Warm::open(options).await?);
        }
        Ok(())
    }

    /// Lets `ask` use the connection, which is told since when it has been open, and opens another one if it fails.
    ///
    /// # Errors
    ///
    /// There may be a signal under way that was not acknowledged.
    pub(crate) async fn ask<T>(
        &self,
        options: &C::Options,
        ask: impl for<'c> Fn(&'c mut C, Instant) -> BoxFuture<'c, Result<T, sqlx::Error>>,
    ) -> Result<T, sqlx::Error> {
        let mut warm = self.0.lock().await;
        let mut doubt = None;
        if let Some(mut taken) = warm.take() {
            match timeout(WARM_LIMIT, ask(&mut taken.conn, taken.since)).await {
                Ok(Ok(answer)) => {
                    *warm = Some(taken);
                    return Ok(answer);
                }
                Ok(Err(error)) => doubt = Some(error),
                Err(_) => doubt = Some(sqlx::Error::Protocol("the connection for cancelling does not answer".into())),
            }
        }
        let mut opened = Warm::open(options).await?;
        let answer = ask(&mut opened.conn, opened.since).await?;
        *warm = Some(opened);
        // The signal that had no answer may be under way behind this one, so the session must not be used again.
        doubt.map_or(Ok(answer), Err)
    }

    pub(crate) async fn close(&self) {
        if let Some(warm) = self.0.lock().await.take() {
            // A server that is gone needs no farewell.
            drop(warm.conn.close().await);
        }
    }
}

impl<C> Default for Canceller<C> {
    fn default() -> Self {
        Self(Mutex::new(None))
    }
}

impl<C> fmt::Debug for Canceller<C> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Canceller").finish_non_exhaustive()
    }
}

#[cfg(all(test, unix))]
mod tests {
    use std::env;
    use std::process::Command;

    use super::*;

    /// Set in a process in which no thread can be started.
    const CHILD: &str = "TX_GUARD_TEST_WITHOUT_THREADS";

    #[test]
    fn where_no_thread_is_to_be_had_there_is_none() {
        if env::var_os(CHILD).is_some() {
            let runtime = Builder::new_current_thread().build().unwrap();
            runtime.block_on(async { assert!(beside().is_none()) });
            return;
        }
        let name = "canceller::tests::where_no_thread_is_to_be_had_there_is_none";
        let output = Command::new(env::current_exe().unwrap())
            .args(["--exact", name, "--test-threads=1"])
            // No machine has room for a stack of 2^50 bytes.
            .envs([(CHILD, "1"), ("RUST_MIN_STACK", "1125899906842624")])
            .output()
            .unwrap();
        let printed = String::from_utf8_lossy(&output.stdout);
        assert!(output.status.success() && printed.contains("1 passed"), "{printed}");
    }
}
