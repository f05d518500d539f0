//! One connection of a pool: opened or borrowed, maintained, closed or given back.
//!
//! Invariant: a connection that is being opened, or was requested from the user's own sqlx pool, is not lost with its
//! caller. Otherwise callers with short deadlines would open and abandon connections for ever.

use std::future::pending;
use std::sync::Arc;
use std::time::Duration;

use futures_util::FutureExt;
use sqlx::pool::PoolConnection;
use sqlx::{ConnectOptions, Connection};
use tokio::runtime::Handle;
use tokio::task::AbortHandle;
use tokio::time::{Instant, timeout};

use crate::backend::{Backend, First, Options};
use crate::pooler::PoolerMode;
use crate::queue::Idle;
use crate::reset::Reset;
use crate::upkeep::Upkeep;

/// The proofs behind the `expect`s below.
const LINKED: &str = "the connection is taken out only by what consumes the session, and by its drop";
const PROBED: &str = "a session is handed out only after its probe was learnt";

/// One connection, and what was learned about it. Its drop closes the connection, wherever that came from.
pub(crate) struct Session<DB: Backend> {
    link: Option<Link<DB>>,
    /// `None` until a borrowed connection was recognised.
    probe: Option<DB::Probe>,
    /// `None` if the connection does not need it.
    home: Option<Home>,
    /// Whether it was used before.
    is_used: bool,
    /// `None` for a connection without an age limit.
    expiry: Option<Instant>,
    idle_since: Instant,
    /// The state that it must have for each transaction, if that is checked.
    state: Option<String>,
}

/// A connection, and its owner.
enum Link<DB: Backend> {
    Own(DB::Connection),
    /// From the user's sqlx pool, with the runtime on which the pool takes it back.
    Lent(PoolConnection<DB>, Handle),
}

impl<DB: Backend> Session<DB> {
    /// Opens one of our own connections. The user's hook prepares it first, then we do. The first session of a pool is
    /// compared with the session of the cancelling connection.
    pub(crate) async fn open(
        options: &Arc<Options<DB>>,
        upkeep: &Upkeep<DB>,
        pooler: PoolerMode,
        first: Option<&DB::Canceller>,
    ) -> Result<Self, sqlx::Error> {
        let since = Instant::now();
        let mut conn = options.connect().await?;
        if let Some(after_connect) = &upkeep.after_connect {
            after_connect(&mut conn).await?;
        }
        let probe = DB::probe(&mut conn, pooler, first.map(|canceller| First { canceller, options, since })).await?;
        let home = DB::NEEDS_ITS_RUNTIME.then(Home::here);
        let state = match upkeep.reset {
            Reset::Verify => DB::state(&mut conn, &probe, &upkeep.verify).await?,
            Reset::Discard | Reset::None => None,
        };
        Ok(Self {
            link: Some(Link::Own(conn)),
            probe: Some(probe),
            home,
            is_used: false,
            expiry: upkeep.expiry(),
            idle_since: Instant::now(),
            state,
        })
    }

    /// Makes a session from a borrowed connection, of which it is unknown how long it has been idle.
    pub(crate) fn lent(conn: PoolConnection<DB>, runtime: Handle) -> Self {
        Self {
            link: Some(Link::Lent(conn, runtime)),
            probe: None,
            home: None,
            is_used: true,
            expiry: None,
            idle_since: Instant::now(),
            state: None,
        }
    }

    /// Learns what cancelling on it needs, if that is not known yet.
    pub(crate) async fn recognise(&mut self, known: &DB::Known) -> Result<(), sqlx::Error> {
        if self.probe.is_none() {
            let probe = DB::recognise(self.connection_mut(), known).await?;
            self.probe = Some(probe);
        }
        Ok(())
    }

    pub(crate) fn connection(&self) -> &DB::Connection {
        match self.link.as_ref().expect(LINKED) {
            Link::Own(conn) => conn,
            Link::Lent(conn, _) => conn,
        }
    }

    fn connection_mut(&mut self) -> &mut DB::Connection {
        self.link.as_mut().expect(LINKED).connection_mut()
    }

    pub(crate) fn parts(&mut self) -> (&mut DB::Connection, &DB::Probe) {
        (self.link.as_mut().expect(LINKED).connection_mut(), self.probe.as_ref().expect(PROBED))
    }

    /// The connection for a hook of the user's.
    async fn lend(&mut self) -> Result<&mut DB::Connection, sqlx::Error> {
        let (conn, probe) = self.parts();
        DB::count_none(conn, probe).await?;
        Ok(conn)
    }

    pub(crate) fn probe(&self) -> &DB::Probe {
        self.probe.as_ref().expect(PROBED)
    }

    pub(crate) fn is_used(&self) -> bool {
        self.is_used
    }

    pub(crate) fn is_lent(&self) -> bool {
        matches!(self.link, Some(Link::Lent(..)))
    }

    /// Whether the runtime on which it could wait is gone.
    pub(crate) fn is_homeless(&self) -> bool {
        self.home.as_ref().is_some_and(Home::has_ended)
    }

    pub(crate) fn is_expired(&self) -> bool {
        self.expiry.is_some_and(|expiry| Instant::now() >= expiry)
    }

    pub(crate) fn is_idle_for(&self, limit: Duration) -> bool {
        self.idle_since.elapsed() >= limit
    }

    /// Whether there is something to do after a transaction has ended on it.
    pub(crate) fn is_looked_at(&self, upkeep: &Upkeep<DB>) -> bool {
        let has_changed = || self.state.as_ref().is_some_and(|state| !DB::was_seen(self.probe(), state));
        !self.is_lent() && (upkeep.after_release.is_some() || upkeep.reset == Reset::Discard || has_changed())
    }

    /// Lets the user's hook check it, and restores it. Returns false if it must be closed.
    pub(crate) async fn look_over(&mut self, upkeep: &Upkeep<DB>) -> Result<bool, sqlx::Error> {
        if let Some(after_release) = &upkeep.after_release
            && !after_release(self.lend().await?).await?
        {
            return Ok(false);
        }
        let is_same = match (upkeep.reset, &self.state) {
            (Reset::Discard, _) => false,
            (Reset::Verify, Some(_)) => {
                let (conn, probe) = self.parts();
                DB::state(conn, probe, &upkeep.verify).await? == self.state
            }
            (Reset::Verify, None) | (Reset::None, _) => true,
        };
        if is_same { Ok(true) } else { self.mend(upkeep).await }
    }

    /// Resets it and prepares it again, as if it were new. Returns false if that is not possible.
    async fn mend(&mut self, upkeep: &Upkeep<DB>) -> Result<bool, sqlx::Error> {
        let conn = self.lend().await?;
        if !DB::discard(conn).await? {
            return Ok(false);
        }
        if let Some(after_connect) = &upkeep.after_connect {
            after_connect(conn).await?;
        }
        // This session is not behind a pooler, because there nothing is compared.
        let probe = DB::probe(conn, PoolerMode::None, None).await?;
        self.probe = Some(probe);
        Ok(true)
    }

    /// Interrupts its running statement, if that is possible without waiting.
    pub(crate) fn interrupt(&self) {
        self.probe.iter().for_each(DB::interrupt);
    }

    /// Says goodbye, within the limit. The database sees the end of the connection in any case; this only makes it a polite
    /// one.
    pub(crate) async fn close(mut self, limit: Duration) {
        match self.link.take() {
            Some(Link::Own(conn)) => drop(timeout(limit, conn.close()).await),
            Some(Link::Lent(conn, _)) => drop(timeout(limit, conn.close()).await),
            None => {}
        }
    }

    /// Gives a borrowed connection back, and returns when the user's pool has it. If that takes longer than `limit`,
    /// for example because the server does not answer, the connection is closed.
    pub(crate) async fn give_back(mut self, limit: Duration) {
        if let Some(Link::Lent(mut conn, _)) = self.link.take() {
            drop(timeout(limit, conn.return_to_pool()).await);
        }
    }
}

impl<DB: Backend> Idle for Session<DB> {
    fn rest(mut self) -> Option<Self> {
        self.is_used = true;
        match &mut self.link {
            Some(Link::Own(conn)) => {
                // Anything still unsent is sent now, and nobody need wait for its answer. sqlx does the same for its
                // own connections. If the connection fails here, its next user notices.
                self.idle_since = Instant::now();
                if conn.should_flush() {
                    drop(conn.flush().now_or_never());
                }
                Some(self)
            }
            Some(Link::Lent(..)) => {
                if let Some(Link::Lent(conn, runtime)) = self.link.take() {
                    // An sqlx pool spawns a task for each returned connection, and panics outside a runtime.
                    let _entered = runtime.enter();
                    drop(conn);
                }
                None
            }
            None => None,
        }
    }
}

impl<DB: Backend> Link<DB> {
    fn connection_mut(&mut self) -> &mut DB::Connection {
        match self {
            Self::Own(conn) => conn,
            Self::Lent(conn, _) => conn,
        }
    }
}

impl<DB: Backend> Drop for Session<DB> {
    fn drop(&mut self) {
        if let Some(Link::Lent(conn, runtime)) = self.link.take() {
            let _entered = runtime.enter();
            drop(conn.detach());
        }
    }
}

/// The runtime on which a connection was opened. After its end, the connection works only as long as it never has to
/// wait, and may fail inside COMMIT.
struct Home(AbortHandle);

impl Home {
    /// A task that ends with its runtime, and only then.
    fn here() -> Self {
        Self(tokio::spawn(pending::<()>()).abort_handle())
    }

    fn has_ended(&self) -> bool {
        self.0.is_finished()
    }
}

impl Drop for Home {
    fn drop(&mut self) {
        self.0.abort();
    }
}
