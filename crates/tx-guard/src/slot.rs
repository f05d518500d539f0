//! Where the connection of a transaction comes from, and where it goes: our own slots, or the user's sqlx pool.
//!
//! Invariant: a slot that is dropped without having been released closes its connection, so no path, not even one
//! nobody thought of, puts a connection back that might still be in a transaction.

use std::sync::Arc;
use std::time::Duration;

use deadpool::managed::{self, Object, PoolError, TimeoutType};
use futures_util::FutureExt;
use sqlx::Connection;
use sqlx::pool::PoolConnection;
use tokio::runtime::Handle;
use tokio::time::{Instant, timeout_at};

use crate::backend::{Backend, CommitMode, Options};
use crate::events::Teller;
use crate::pooler::PoolerMode;
use crate::session::Manager;
use crate::work::Work;
use crate::{CloseReport, TxError};

/// What the clones of a pool, its guards and the reaper share.
pub(crate) struct Shared<DB: Backend> {
    source: Source<DB>,
    pub(crate) options: Arc<Options<DB>>,
    pub(crate) commit_mode: CommitMode,
    pub(crate) known: DB::Known,
    pub(crate) canceller: DB::Canceller,
    pub(crate) work: Arc<Work>,
    pub(crate) teller: Teller,
}

pub(crate) enum Source<DB: Backend> {
    Owned { sessions: managed::Pool<Manager<DB>>, limits: Limits },
    Wrapped(sqlx::Pool<DB>),
}

/// The limits of slots of our own.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Limits {
    pub(crate) max_connections: u32,
    pub(crate) acquire_timeout: Duration,
    pub(crate) connect_timeout: Duration,
    pub(crate) pooler: PoolerMode,
}

impl<DB: Backend> Shared<DB> {
    pub(crate) fn new(
        source: Source<DB>,
        options: Arc<Options<DB>>,
        canceller: DB::Canceller,
        commit_mode: CommitMode,
    ) -> Self {
        let known = DB::Known::default();
        Self { source, options, commit_mode, known, canceller, work: Arc::default(), teller: Teller::new() }
    }

    /// Takes a connection, not later than at the deadline.
    pub(crate) async fn acquire(&self, deadline: Option<Instant>) -> Result<Held<DB>, TxError> {
        if self.work.is_closed() {
            return Err(TxError::Closed);
        }
        let Some(deadline) = deadline else { return self.acquire_from_source().await };
        let limit = deadline.saturating_duration_since(Instant::now());
        match timeout_at(deadline, self.acquire_from_source()).await {
            Ok(acquired) => acquired,
            Err(_) => Err(self.too_late(limit)),
        }
    }

    async fn acquire_from_source(&self) -> Result<Held<DB>, TxError> {
        let target = || DB::target(&self.options);
        match &self.source {
            Source::Owned { sessions, limits } => match sessions.get().await {
                Ok(session) => Ok(Held::Owned(session)),
                Err(PoolError::Timeout(TimeoutType::Wait)) => Err(self.too_late(limits.acquire_timeout)),
                Err(PoolError::Timeout(_) | PoolError::Backend(sqlx::Error::PoolTimedOut)) => {
                    Err(TxError::ConnectTimeout { target: target(), timeout: limits.connect_timeout })
                }
                Err(PoolError::Backend(error)) => Err(DB::connect_error(target(), error)),
                Err(PoolError::NoRuntimeSpecified) => Err(TxError::NoRuntime),
                // There are no hooks that could fail, so what is left is a closed pool.
                Err(PoolError::Closed | PoolError::PostCreateHook(_)) => Err(TxError::Closed),
            },
            Source::Wrapped(pool) => match pool.acquire().await {
                Ok(conn) => Ok(Held::Wrapped(conn)),
                Err(sqlx::Error::PoolClosed) => Err(TxError::Closed),
                Err(sqlx::Error::PoolTimedOut) => Err(self.too_late(pool.options().get_acquire_timeout())),
                Err(error) => Err(DB::connect_error(target(), error)),
            },
        }
    }

    /// What was waited for so long: a connection that somebody else has, or a new one. sqlx waits for a server that is
    /// down as for a connection that is in use.
    fn too_late(&self, timeout: Duration) -> TxError {
        let target = DB::target(&self.options);
        let (max_connections, all_open) = match &self.source {
            Source::Owned { sessions, limits } => {
                let status = sessions.status();
                (limits.max_connections, status.size >= status.max_size)
            }
            Source::Wrapped(pool) => {
                let max_connections = pool.options().get_max_connections();
                (max_connections, pool.size() >= max_connections)
            }
        };
        match all_open {
            true => TxError::PoolExhausted { target, max_connections, timeout },
            false => TxError::ConnectTimeout { target, timeout },
        }
    }

    /// Drops the idle sessions of our own, which closes them.
    pub(crate) fn forget_idle(&self) {
        if let Source::Owned { sessions, .. } = &self.source {
            drop(sessions.retain(|_, _| false).removed);
            drop(sessions.manager().spares());
        }
    }

    /// The same, for the last time and without a farewell.
    pub(crate) fn forget(&self) {
        if let Source::Owned { sessions, .. } = &self.source {
            sessions.close();
            drop(sessions.manager().last_spares());
        }
    }

    pub(crate) fn report(&self) -> CloseReport {
        let load = self.work.load();
        CloseReport { in_use: load.open, settling: load.settling }
    }

    /// Says goodbye to the idle sessions of our own, and lets nobody wait for one any more.
    pub(crate) async fn close_idle(&self) {
        if let Source::Owned { sessions, .. } = &self.source {
            let idle = sessions.retain(|_, _| false).removed;
            sessions.close();
            for session in idle.into_iter().chain(sessions.manager().last_spares()) {
                session.close().await;
            }
        }
    }
}

/// A connection that was taken from its pool and is in no transaction yet.
pub(crate) enum Held<DB: Backend> {
    Owned(Object<Manager<DB>>),
    Wrapped(PoolConnection<DB>),
}

/// A connection that may be in a transaction. Closed by its drop, unless it was released before.
pub(crate) struct Slot<DB: Backend> {
    /// Taken only by the release and the drop.
    lease: Option<Lease<DB>>,
    runtime: Handle,
}

enum Lease<DB: Backend> {
    Owned(Object<Manager<DB>>),
    /// The probe is learnt before anybody has the slot.
    Wrapped(PoolConnection<DB>, Option<DB::Probe>),
}

/// The proofs behind the `expect`s below.
const LEASED: &str = "the lease is taken only by the release and the drop, after which nobody has the slot";
const PROBED: &str = "a slot is handed out only after its probe was learnt";

impl<DB: Backend> Slot<DB> {
    pub(crate) async fn new(held: Held<DB>, runtime: Handle, known: &DB::Known) -> Result<Self, sqlx::Error> {
        let lease = match held {
            Held::Owned(session) => Lease::Owned(session),
            Held::Wrapped(conn) => Lease::Wrapped(conn, None),
        };
        // A slot already, because a connection that does not answer must be closed: its pool would wait for it.
        let mut slot = Self { lease: Some(lease), runtime };
        if let Some(Lease::Wrapped(conn, probe)) = &mut slot.lease {
            *probe = Some(DB::recognise(conn, known).await?);
        }
        Ok(slot)
    }

    pub(crate) fn connection(&self) -> &DB::Connection {
        match self.lease.as_ref().expect(LEASED) {
            Lease::Owned(session) => &session.conn,
            Lease::Wrapped(conn, _) => conn,
        }
    }

    pub(crate) fn parts(&mut self) -> (&mut DB::Connection, &DB::Probe) {
        match self.lease.as_mut().expect(LEASED) {
            Lease::Owned(session) => {
                let session = &mut **session;
                (&mut session.conn, &session.probe)
            }
            Lease::Wrapped(conn, probe) => (conn, probe.as_ref().expect(PROBED)),
        }
    }

    /// Gives the connection back to its pool, or closes it if the pool was closed meanwhile.
    pub(crate) async fn release(mut self, closed: bool) {
        match self.lease.take() {
            Some(Lease::Owned(session)) if closed => Object::take(session).close().await,
            Some(Lease::Owned(mut session)) => {
                // What was left to be sent goes on its way, and its answer need not be waited for. sqlx does the same for
                // its own. Of a connection that fails here, the next one to use it will hear.
                drop(session.conn.flush().now_or_never());
                session.rest();
            }
            Some(Lease::Wrapped(conn, _)) => self.give(conn),
            None => {}
        }
    }

    /// An sqlx pool spawns a task when a connection leaves a hand, and panics where it finds no runtime.
    fn give(&self, conn: PoolConnection<DB>) {
        let _entered = self.runtime.enter();
        drop(conn);
    }
}

impl<DB: Backend> Drop for Slot<DB> {
    fn drop(&mut self) {
        match self.lease.take() {
            Some(Lease::Owned(session)) => {
                DB::interrupt(&session.probe);
                drop(Object::take(session));
            }
            Some(Lease::Wrapped(conn, probe)) => {
                probe.iter().for_each(DB::interrupt);
                let _entered = self.runtime.enter();
                drop(conn.detach());
            }
            None => {}
        }
    }
}
