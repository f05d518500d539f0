//! The task that keeps a worker's ranges: it claims them, appends what is recorded, renews the leases, and gives the
//! ranges back.
//!
//! Invariant: only this task sends anything of a run to the database, one transaction after the other, and dropping the
//! run does not cut it: the task appends what was recorded, gives the ranges back and ends. It waits for an unreachable
//! database as long as the store's `outage` and no longer.

use std::{
    collections::{BTreeMap, HashSet},
    sync::Arc,
    time::Duration,
};

use tokio::{runtime::Handle, time::Instant};

use crate::{
    error::TaskError,
    item,
    log::{Chain, Identity},
    postgres::{
        PgStore, job,
        job::{Job, Offer},
        leases::{Append, Claimed, Leases, Standing},
        ledger::{Ledger, Place, sealed},
        place, schema,
        schema::Unusable,
        session::{Bounds, answered, is_passing},
        shared::{Batch, Hold, LetGo, Seen, Shared, Told},
    },
    timer::Timer,
};

/// About how much one transaction appends: far below the limit of a message to the server.
const BATCH_BYTES: usize = 16 << 20;
/// If a range was exhausted within this time, the next claim takes twice as many, up to [`MOST_FRESH`].
const FAST: Duration = Duration::from_millis(100);
/// If a range took longer, the next claim takes one, so that slow items are shared evenly.
const SLOW: Duration = Duration::from_secs(1);
const MOST_FRESH: usize = 8;
/// The wait after the database's first failure. It doubles up to [`LONGEST_WAIT`].
pub(crate) const FIRST_WAIT: Duration = Duration::from_millis(20);
pub(crate) const LONGEST_WAIT: Duration = Duration::from_secs(1);
/// The shortest time between two queries for the standing of the whole job.
const STANDING_EVERY: Duration = Duration::from_secs(1);

/// A range that is held, and where its next append belongs.
#[derive(Debug)]
struct Held {
    hold: Hold,
    chain: Chain,
    seq: i32,
}

/// What the keeper does next.
enum Next {
    Stop,
    Heartbeat,
    Append,
    Claim(usize),
    Wait(Instant),
}

/// The keeper of one run.
pub(crate) struct Keeper {
    store: PgStore,
    shared: Arc<Shared>,
    every: Duration,
    job: Job,
    leases: Leases,
    held: BTreeMap<i64, Held>,
    heartbeat_at: Instant,
    claim_at: Instant,
    standing_at: Instant,
    fresh: usize,
    fenced: u32,
}

/// Starts the keeper on the runtime. It ends soon after [`Shared::stop`].
pub(crate) fn start(store: PgStore, shared: &Arc<Shared>, offer: Offer, every: Duration) -> Result<(), TaskError> {
    const NO_RUNTIME: TaskError = TaskError::Config(
        "a job on PostgreSQL needs tokio's runtime with all its drivers: build the runtime with `enable_all`",
    );
    let runtime = Handle::try_current().map_err(|_| NO_RUNTIME)?;
    Timer::default().set(Instant::now()).map_err(|_| NO_RUNTIME)?;
    // An instant cannot hold the end of a longer one.
    let every = every.min(item::LONGEST_WAIT);
    let ended = Ended(Arc::clone(shared));
    let shared = Arc::clone(shared);
    runtime.spawn(async move {
        let _ended = ended;
        let outcome = match Keeper::open(store, &shared, &offer, every).await {
            Ok(mut keeper) => {
                drop(offer);
                keeper.keep().await
            }
            Err(error) => Err(error),
        };
        shared.tell_end(|| outcome);
    });
    Ok(())
}

/// Tells the loop that the keeper is gone, if it ends without reporting because its runtime was shut down.
struct Ended(Arc<Shared>);

impl Drop for Ended {
    fn drop(&mut self) {
        self.0.tell_end(|| Err(std::io::Error::other("the runtime that kept the leases of this run is gone").into()));
    }
}

impl Keeper {
    pub(crate) async fn open(
        store: PgStore,
        shared: &Arc<Shared>,
        offer: &Offer,
        every: Duration,
    ) -> Result<Self, TaskError> {
        let bounds = store.bounds();
        let job = store.patiently("open the job", || open(&store, &bounds, offer)).await?;
        let owner = format!("{} {:016x}", store.owner, fastrand::u64(..));
        let leases = Leases::new(store.pool.clone(), bounds, &store.schema, job.id, &owner, store.lease);
        shared.tell(Told::Opened { salt: job.header.salt, leases: leases.clone() });
        let now = Instant::now();
        Ok(Self {
            every,
            shared: Arc::clone(shared),
            job,
            leases,
            held: BTreeMap::new(),
            heartbeat_at: now,
            claim_at: now,
            standing_at: now,
            fresh: 1,
            fenced: 0,
            store,
        })
    }

    pub(crate) async fn keep(&mut self) -> Result<Standing, TaskError> {
        loop {
            match self.next() {
                Next::Stop => {
                    self.leave().await?;
                    return Ok(Standing::default());
                }
                Next::Heartbeat => self.heartbeat().await?,
                Next::Append => self.append().await?,
                Next::Claim(limit) => {
                    if let Some(standing) = self.claim(limit).await? {
                        return Ok(standing);
                    }
                }
                Next::Wait(until) => self.shared.changed(until).await,
            }
        }
    }

    fn next(&mut self) -> Next {
        let Seen { stop, dirty_since, hurry, fresh, pace, let_go, has_room } = self.shared.see();
        let now = Instant::now();
        for (hold, why) in let_go {
            self.let_go(hold, why);
        }
        if stop {
            return Next::Stop;
        }
        if !self.held.is_empty() && now >= self.heartbeat_at {
            return Next::Heartbeat;
        }
        let due = dirty_since.map(|since| since + self.every);
        if hurry || due.is_some_and(|due| now >= due) {
            return Next::Append;
        }
        match pace {
            Some(pace) if pace < FAST => self.fresh = (self.fresh * 2).min(MOST_FRESH),
            Some(pace) if pace > SLOW => self.fresh = 1,
            Some(_) | None => {}
        }
        let wants = has_room && fresh <= self.fresh / 2 && !self.is_fenced();
        if wants && now >= self.claim_at {
            return Next::Claim(self.fresh - fresh);
        }
        let far = now + self.store.lease;
        let claim_at = if wants { self.claim_at } else { far };
        let heartbeat_at = if self.held.is_empty() { far } else { self.heartbeat_at };
        Next::Wait(claim_at.min(heartbeat_at).min(due.unwrap_or(far)))
    }

    /// Claims ranges and hands them to the loop. Returns the standing of the job if it is complete.
    async fn claim(&mut self, limit: usize) -> Result<Option<Standing>, TaskError> {
        let known: Vec<i64> = self.held.keys().copied().collect();
        let leases = &self.leases;
        let claimed = self.store.patiently("claim", || leases.claim(limit, &known)).await?;
        let now = Instant::now();
        if claimed.is_empty() {
            // Other workers hold the rest. One of their leases may run out.
            self.claim_at = now + self.store.look_again();
        }
        if self.held.is_empty() {
            self.heartbeat_at = now + self.store.heartbeat_every();
        }
        let found_none = claimed.is_empty() && self.held.is_empty();
        for range in claimed {
            self.grant(range)?;
        }
        if found_none || now >= self.standing_at {
            let standing = self.standing().await?;
            return Ok((found_none && standing.open == 0).then_some(standing));
        }
        Ok(None)
    }

    async fn standing(&mut self) -> Result<Standing, TaskError> {
        let leases = &self.leases;
        let standing = self.store.patiently("look at the job", || leases.standing()).await?;
        self.standing_at = Instant::now() + STANDING_EVERY;
        self.shared.tell(Told::Standing(standing));
        Ok(standing)
    }

    fn grant(&mut self, range: Claimed) -> Result<(), TaskError> {
        let Claimed { n, first, count, epoch, seq, blocks, rows } = range;
        let path = place(&self.store.schema, &format!("{}/{n}", self.job.header.job));
        let damaged = |detail| TaskError::Corrupt { path: path.clone(), offset: 0, detail };
        let (Ok(first), Ok(count)) = (usize::try_from(first), usize::try_from(count)) else {
            return Err(damaged("the range is not one that this crate has made"));
        };
        if rows != seq {
            return Err(damaged("blocks of the range are missing"));
        }
        let mut ledger = Ledger::new(self.job.header.salt, n, count);
        let identity: Identity = self.job.header.identity;
        ledger.read(first as u64, identity, &blocks, &path, |_| {})?;
        let (hold, (done, quarantined)) = (Hold { n, epoch }, ledger.counts());
        self.held.insert(n, Held { hold, chain: ledger.chain, seq });
        self.shared.grant(hold, first, ledger.items, Place { chain: ledger.chain, seq, done, quarantined });
        Ok(())
    }

    /// Appends everything recorded so far.
    async fn append(&mut self) -> Result<(), TaskError> {
        loop {
            let batches = self.shared.take(BATCH_BYTES);
            if batches.is_empty() {
                return Ok(());
            }
            let mut appends = Vec::with_capacity(batches.len());
            let mut ends = Vec::with_capacity(batches.len());
            for batch in batches {
                let Batch { hold, mut blocks, records, done, quarantined, finished } = batch;
                let Some(held) = self.held.get(&hold.n).filter(|held| held.hold == hold) else { continue };
                let mut chain = held.chain;
                let body = sealed(&mut blocks, &mut chain, finished);
                appends.push(Append { n: hold.n, epoch: hold.epoch, seq: held.seq, done, quarantined, body });
                ends.push((hold, chain, records, finished.is_some()));
            }
            let taken = self.appended(&appends).await?;
            for (hold, chain, records, is_finished) in ends {
                if !taken.contains(&hold.n) {
                    self.lose(hold);
                    continue;
                }
                if is_finished {
                    self.held.remove(&hold.n);
                } else if let Some(held) = self.held.get_mut(&hold.n) {
                    held.chain = chain;
                    held.seq += 1;
                }
                self.shared.tell(Told::Appended { hold, records });
            }
            if self.held.is_empty() {
                // The job may be complete.
                self.claim_at = Instant::now();
            }
        }
    }

    /// Appends, and returns the ranges that took the append, even if the connection breaks meanwhile.
    async fn appended(&self, appends: &[Append]) -> Result<HashSet<i64>, TaskError> {
        let leases = &self.leases;
        let taken = self.store.patiently("append", || leases.append(appends)).await?;
        let mut taken: HashSet<i64> = taken.into_iter().collect();
        if taken.len() < appends.len() {
            // An append that changed no row may repeat one whose answer was lost: then the block is there, with our
            // epoch.
            let there = self.store.patiently("look for a block", || leases.look(appends)).await?;
            taken.extend(there);
        }
        Ok(taken)
    }

    fn let_go(&mut self, hold: Hold, why: LetGo) {
        if self.held.get(&hold.n).is_none_or(|held| held.hold != hold) {
            return;
        }
        match why {
            LetGo::Lost => self.lose(hold),
            LetGo::Finished => {
                self.held.remove(&hold.n);
                if self.held.is_empty() {
                    // The job may be complete.
                    self.claim_at = Instant::now();
                }
            }
        }
    }

    fn lose(&mut self, hold: Hold) {
        self.held.remove(&hold.n);
        self.fenced += 1;
        self.shared.lose(hold);
        if self.is_fenced() {
            // The loop stops the running items before anything is given back.
            let path = place(&self.store.schema, &self.job.header.job);
            self.shared.tell(Told::Fenced(TaskError::Fenced { path, ranges: self.fenced }));
        }
        #[cfg(feature = "tracing")]
        tracing::warn!(job = self.job.header.job, range = hold.n, "another worker has taken over a range");
    }

    async fn heartbeat(&mut self) -> Result<(), TaskError> {
        let held: Vec<Hold> = self.held.values().map(|held| held.hold).collect();
        let pairs: Vec<_> = held.iter().map(|hold| (hold.n, hold.epoch)).collect();
        let leases = &self.leases;
        let kept = self.store.patiently("renew leases", || leases.heartbeat(&pairs)).await?;
        self.heartbeat_at = Instant::now() + self.store.heartbeat_every();
        for hold in held.into_iter().filter(|hold| !kept.contains(&hold.n)) {
            self.lose(hold);
        }
        if Instant::now() >= self.standing_at {
            self.standing().await?;
        }
        Ok(())
    }

    /// Appends what is recorded, and gives back the unfinished ranges.
    async fn leave(&mut self) -> Result<(), TaskError> {
        self.append().await?;
        let held: Vec<_> = self.held.values().map(|held| (held.hold.n, held.hold.epoch)).collect();
        self.held.clear();
        if held.is_empty() {
            return Ok(());
        }
        let leases = &self.leases;
        self.store.patiently("give ranges back", || leases.give_back(&held)).await
    }

    /// Whether the run has lost more ranges than it may.
    fn is_fenced(&self) -> bool {
        self.fenced > self.store.tolerated
    }
}

async fn open(store: &PgStore, bounds: &Bounds, offer: &Offer) -> Result<Job, Unusable> {
    schema::ensure(&store.pool, bounds, &store.schema).await?;
    job::open(&store.pool, bounds, &store.schema, offer).await
}

impl PgStore {
    /// Runs a database operation, and retries it on transient failures, for at most the outage.
    pub(crate) async fn patiently<T, E, Fut>(
        &self,
        action: &'static str,
        mut what: impl FnMut() -> Fut,
    ) -> Result<T, TaskError>
    where
        E: Into<Unusable>,
        Fut: Future<Output = Result<T, E>>,
    {
        let (started, mut wait) = (Instant::now(), FIRST_WAIT);
        loop {
            let said = async { what().await.map_err(Into::into) };
            let error = match answered(self.answer_within, said).await {
                Ok(value) => return Ok(value),
                Err(Unusable::Refused(error)) => return Err(error),
                Err(Unusable::Database(error)) => error,
            };
            if !is_passing(&error) || started.elapsed() >= self.outage {
                return Err(TaskError::Database { action, source: error.into() });
            }
            tokio::time::sleep(wait.mul_f64(0.5 + fastrand::f64() / 2.0)).await;
            wait = (wait * 2).min(LONGEST_WAIT);
        }
    }
}
