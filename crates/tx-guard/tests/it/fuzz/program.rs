//! Random transactions, and the book of the promises they got.
//!
//! Invariant: the possible effect of a statement is in the book before the statement is sent, so a cut at any moment
//! leaves no row in the table that is missing from the book.

use std::cell::Cell;
use std::panic::AssertUnwindSafe;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use cancel_safe_tx_guard::{CommitError, OutcomeHandle, Retry, TransactionGuard, TxError, TxPool};
use fastrand::Rng;
use futures_util::FutureExt;
use futures_util::future::LocalBoxFuture;
use sqlx::Connection;

use super::FuzzDb;
use super::cut::cut;
use crate::world::PATIENCE;

/// How many keys each program may write.
pub(crate) const KEYS: i64 = 256;

/// The accounts between which transfers are made; their keys are negative.
pub(crate) const ACCOUNTS: i64 = 6;

/// After how many pendings to cut, or not at all.
type Cut = Option<u32>;

/// The statements of one transaction, and its intended end.
#[derive(Debug)]
pub(crate) struct Program {
    steps: Vec<Step>,
    end: End,
    /// Whether to ignore an error that leaves the transaction usable.
    careless: bool,
}

#[derive(Debug)]
enum Step {
    Insert { rows: i64, cut: Cut },
    Transfer { from: i64, to: i64, amount: i64 },
    Read { cut: Cut },
    HalfRead,
    Nap { cut: Cut },
    Fail,
    Savepoint { steps: Vec<Step>, undo: bool, cut: Cut },
    Nested { steps: Vec<Step>, end: NestedEnd, begin: Cut },
}

#[derive(Debug)]
enum NestedEnd {
    Commit(Cut),
    Rollback(Cut),
    Drop,
}

#[derive(Debug)]
enum End {
    Commit(Cut),
    CommitWithin(Duration),
    Rollback(Cut),
    Drop,
    Closure { timeout: Option<Duration>, serializable: bool },
}

fn maybe(random: &mut Rng, one_in: u32, most: u32) -> Cut {
    (random.u32(..one_in) == 0).then(|| random.u32(1..=most))
}

impl Program {
    pub(crate) fn random(random: &mut Rng) -> Self {
        let steps = Step::several(random, 2);
        let end = match random.u8(..12) {
            0..=3 => End::Commit(None),
            4..=5 => End::Commit(Some(random.u32(1..=3))),
            6 => End::CommitWithin(Duration::from_micros(random.u64(..1_500))),
            7 => End::Rollback(maybe(random, 2, 3)),
            8 => End::Drop,
            _ => End::Closure {
                timeout: random.bool().then(|| Duration::from_micros(random.u64(500..8_000))),
                serializable: random.u8(..4) == 0,
            },
        };
        Self { steps, end, careless: random.u8(..4) == 0 }
    }
}

impl Step {
    fn several(random: &mut Rng, depth: u32) -> Vec<Self> {
        (0..random.u32(1..=4)).map(|_| Self::random(random, depth)).collect()
    }

    fn random(random: &mut Rng, depth: u32) -> Self {
        match random.u8(..if depth == 0 { 18 } else { 24 }) {
            0..=9 => Self::Insert { rows: random.i64(1..=3), cut: maybe(random, 16, 3) },
            10..=13 => {
                let from = random.i64(1..=ACCOUNTS);
                let to = (from + random.i64(0..ACCOUNTS - 1)) % ACCOUNTS + 1;
                Self::Transfer { from, to, amount: random.i64(1..=9) }
            }
            14 => Self::Read { cut: maybe(random, 3, 3) },
            15 => Self::HalfRead,
            16 => Self::Nap { cut: maybe(random, 2, 2) },
            17 => Self::Fail,
            18..=20 => Self::Savepoint {
                steps: Self::several(random, depth - 1),
                undo: random.u8(..3) == 0,
                cut: maybe(random, 6, 8),
            },
            _ => Self::Nested {
                steps: Self::several(random, depth - 1),
                end: match random.u8(..4) {
                    0..=1 => NestedEnd::Commit(maybe(random, 6, 3)),
                    2 => NestedEnd::Rollback(maybe(random, 6, 3)),
                    _ => NestedEnd::Drop,
                },
                begin: maybe(random, 8, 3),
            },
        }
    }
}

/// Whether the effect of a statement belongs to the transaction.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Standing {
    /// It said `Ok`.
    Done,
    /// It failed, or its savepoint was undone.
    Undone,
    /// Its own future, or the end of its savepoint, was dropped and the transaction continued: all entries with the
    /// same number count, or none.
    May(usize),
}

/// One statement, in the book.
#[derive(Debug)]
pub(crate) struct Entry {
    pub(crate) keys: std::ops::Range<i64>,
    /// Taken from one account and given to another.
    pub(crate) transfer: Option<(i64, i64, i64)>,
    pub(crate) standing: Standing,
}

/// The caller's result.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Said {
    /// Nothing: cut, or still under way.
    Nothing,
    Committed,
    NotCommitted,
    Unknown,
}

/// One transaction, in the book.
#[derive(Debug)]
pub(crate) struct Attempt {
    pub(crate) handle: Option<OutcomeHandle>,
    pub(crate) entries: Vec<Entry>,
    pub(crate) said: Said,
    /// Why its commit must not succeed.
    pub(crate) doomed: Option<&'static str>,
    pub(crate) hooks: Arc<AtomicU32>,
    pub(crate) may_be_unknown: bool,
    /// The error of its commit, if the caller got it.
    pub(crate) error: Option<String>,
    /// The first entry after the oldest sqlx savepoint to which a rollback went. That savepoint still exists, and sqlx
    /// uses its name again.
    stale: Option<usize>,
}

/// The stage of a program.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(usize)]
pub(crate) enum Stage {
    Begin,
    Statement,
    Savepoint,
    Nested,
    Commit,
    Rollback,
    /// Nothing was under way when it was cut, or it never began.
    Idle,
}

/// Everything that is known about one program.
#[derive(Debug)]
pub(crate) struct Page {
    pub(crate) attempts: Vec<Attempt>,
    pub(crate) stage: Stage,
    pub(crate) inner_cuts: Vec<Stage>,
    /// The text for the description of a violation.
    pub(crate) program: String,
    first: i64,
}

/// The page of one program. It outlives its task.
#[derive(Debug, Clone)]
pub(crate) struct Book(Arc<Mutex<Page>>);

impl Book {
    pub(crate) fn new(first: i64) -> Self {
        Self(Arc::new(Mutex::new(Page {
            attempts: Vec::new(),
            stage: Stage::Idle,
            inner_cuts: Vec::new(),
            program: String::new(),
            first,
        })))
    }

    pub(crate) fn page(&self) -> MutexGuard<'_, Page> {
        self.0.lock().unwrap()
    }

    fn stage(&self, stage: Stage) {
        self.page().stage = stage;
    }

    fn attempt(&self, handle: Option<OutcomeHandle>) -> Arc<AtomicU32> {
        let hooks = Arc::new(AtomicU32::new(0));
        let (entries, said, doomed) = (Vec::new(), Said::Nothing, None);
        let (may_be_unknown, error, stale) = (false, None, None);
        let attempt =
            Attempt { handle, entries, said, doomed, hooks: Arc::clone(&hooks), may_be_unknown, error, stale };
        self.page().attempts.push(attempt);
        hooks
    }

    fn last<T>(&self, look: impl FnOnce(&mut Attempt) -> T) -> T {
        look(self.page().attempts.last_mut().unwrap())
    }

    /// Adds a new entry, which is possible until more is known.
    fn enter(&self, rows: i64, transfer: Option<(i64, i64, i64)>) -> (usize, std::ops::Range<i64>) {
        let first = self.page().first;
        self.last(|attempt| {
            let start = attempt.entries.last().map_or(first, |entry| entry.keys.end);
            let keys = start..start + rows;
            assert!(keys.end <= first + KEYS, "a program writes too much");
            let entry = attempt.entries.len();
            attempt.entries.push(Entry { keys: keys.clone(), transfer, standing: Standing::May(entry) });
            (entry, keys)
        })
    }

    fn settle(&self, entry: usize, standing: Standing) {
        self.last(|attempt| attempt.entries[entry].standing = standing);
    }

    /// Marks the entries from `start` on as undone, together with their savepoint.
    fn undone_since(&self, start: usize) {
        self.last(|attempt| attempt.entries[start..].iter_mut().for_each(|entry| entry.standing = Standing::Undone));
    }

    /// A nested transaction of sqlx from `start` on was rolled back.
    fn nested_undone(&self, start: usize) {
        self.undone_since(start);
        self.last(|attempt| attempt.stale = Some(attempt.stale.map_or(start, |stale| stale.min(start))));
    }

    /// The commit of a nested transaction of sqlx was dropped. Released or not, sqlx then rolls back to its name, which
    /// may be that of an older savepoint, and of several the last. What was in doubt before stays so by itself.
    fn nested_in_doubt(&self, start: usize) {
        self.last(|attempt| {
            let stale = attempt.stale.unwrap_or(start).min(start);
            for (index, entry) in attempt.entries.iter_mut().enumerate().skip(stale) {
                if entry.standing == Standing::Done {
                    entry.standing = Standing::May(index.min(start));
                }
            }
        });
    }

    fn entries(&self) -> usize {
        self.last(|attempt| attempt.entries.len())
    }

    /// Runs the future of a step, which may be cut while the program goes on.
    async fn within<T>(&self, stage: Stage, after: Cut, future: impl Future<Output = T>) -> Option<T> {
        self.stage(stage);
        let output = cut(future, after).await;
        if output.is_none() {
            self.page().inner_cuts.push(stage);
        }
        output
    }
}

/// Makes an error of a panic in the driver: sqlx-mysql has one where it has lost its place in the answers, which only a
/// program that runs on after a cut can see.
async fn driver<T>(statement: impl Future<Output = Result<T, sqlx::Error>>) -> Result<T, sqlx::Error> {
    AssertUnwindSafe(statement).catch_unwind().await.unwrap_or(Err(sqlx::Error::WorkerCrashed))
}

/// The source of transactions: the crate, or plain sqlx, which is the twin that the check must catch.
pub(crate) enum Source<D: FuzzDb> {
    Ours(TxPool<D>),
    Plain(sqlx::Pool<D>),
}

impl<D: FuzzDb> Source<D> {
    /// How long it may take until everything is at rest. The twin waits for something that never comes.
    pub(crate) fn rest(&self) -> Duration {
        match self {
            Self::Ours(_) => PATIENCE,
            Self::Plain(_) => Duration::from_secs(2),
        }
    }
}

impl<D: FuzzDb> Clone for Source<D> {
    fn clone(&self) -> Self {
        match self {
            Self::Ours(db) => Self::Ours(db.clone()),
            Self::Plain(pool) => Self::Plain(pool.clone()),
        }
    }
}

/// A transaction in the hands of a step.
enum Hand<'a, D: FuzzDb> {
    Ours(&'a mut TransactionGuard<D>),
    Plain(&'a mut D::Connection),
}

impl<D: FuzzDb> Hand<'_, D> {
    fn conn(&mut self) -> &mut D::Connection {
        match self {
            Self::Ours(tx) => tx,
            Self::Plain(conn) => conn,
        }
    }
}

/// One running program.
pub(crate) struct Run<D: FuzzDb> {
    pub(crate) source: Source<D>,
    pub(crate) table: Arc<str>,
    pub(crate) book: Book,
    /// Whether to cut a `begin` inside a nested transaction of sqlx as well: not where nothing can repair that.
    pub(crate) deep: bool,
    /// Whether it is inside a cut after which the program continues.
    pub(crate) in_cut: Cell<bool>,
}

impl<D: FuzzDb> Run<D> {
    pub(crate) async fn whole(&self, program: &Program) {
        match (&self.source, &program.end) {
            (Source::Ours(db), End::Closure { timeout, serializable }) => {
                self.closure(db, program, *timeout, *serializable).await;
            }
            (Source::Ours(db), _) => {
                self.book.stage(Stage::Begin);
                // A pool with all connections in use, or a busy database, gives no transaction.
                let Ok(mut tx) = db.begin().await else { return };
                let worked = self.in_guard(&mut tx, program).await;
                self.end(tx, program, worked).await;
            }
            (Source::Plain(pool), _) => {
                self.book.stage(Stage::Begin);
                let Ok(mut tx) = pool.begin().await else { return };
                let hooks = self.book.attempt(None);
                let worked = self.steps(Hand::Plain(&mut *tx), &program.steps).await;
                self.end_plain(tx, program, worked, &hooks).await;
            }
        }
    }

    async fn in_guard(&self, tx: &mut TransactionGuard<D>, program: &Program) -> Result<(), TxError> {
        let hooks = self.book.attempt(Some(tx.outcome_handle()));
        tx.after_commit(move || {
            hooks.fetch_add(1, Ordering::Relaxed);
        });
        match self.steps(Hand::Ours(tx), &program.steps).await {
            // A transfer may be half done, and nobody commits that.
            Err(error) if program.careless && !self.half_done() => {
                // The commit reports whether the database has aborted the transaction.
                drop(error);
                self.book.last(|attempt| attempt.may_be_unknown = D::lost_is_unknown());
                Ok(())
            }
            worked => worked,
        }
    }

    fn half_done(&self) -> bool {
        self.book.last(|attempt| attempt.entries.last().is_some_and(|entry| entry.transfer.is_some()))
    }

    async fn end(&self, tx: TransactionGuard<D>, program: &Program, worked: Result<(), TxError>) {
        let said = match (&program.end, worked) {
            (End::Commit(after), Ok(())) => match self.book.within(Stage::Commit, *after, tx.commit()).await {
                Some(Ok(())) => Said::Committed,
                Some(Err(error)) => self.failed(&error),
                None => Said::Nothing,
            },
            (End::CommitWithin(within), Ok(())) => {
                self.book.stage(Stage::Commit);
                match tx.commit_within(*within).await {
                    Ok(()) => Said::Committed,
                    Err(CommitError::Pending(_)) => Said::Nothing,
                    Err(CommitError::Failed(error)) => self.failed(&error),
                    Err(_) => Said::NotCommitted,
                }
            }
            (End::Rollback(after), _) => {
                drop(self.book.within(Stage::Rollback, *after, tx.rollback()).await);
                Said::NotCommitted
            }
            _ => {
                drop(tx);
                Said::NotCommitted
            }
        };
        self.book.last(|attempt| attempt.said = said);
        self.book.stage(Stage::Idle);
    }

    /// The result of a failed commit, recorded for the description of a violation.
    fn failed(&self, error: &TxError) -> Said {
        let source = std::error::Error::source(error).map(ToString::to_string).unwrap_or_default();
        // A closure that did not begin has no attempt.
        if let Some(attempt) = self.book.page().attempts.last_mut() {
            attempt.error = Some(format!("{error}: {source}"));
        }
        if error.is_unknown() { Said::Unknown } else { Said::NotCommitted }
    }

    /// Ends it as its users do: anything but `Ok` counts as failed.
    async fn end_plain(
        &self,
        tx: sqlx::Transaction<'static, D>,
        program: &Program,
        worked: Result<(), TxError>,
        hooks: &AtomicU32,
    ) {
        let after = match (&program.end, worked) {
            (End::Rollback(after), _) => {
                drop(self.book.within(Stage::Rollback, *after, tx.rollback()).await);
                return;
            }
            (End::Drop, _) | (_, Err(_)) => return,
            (End::Commit(after), Ok(())) => *after,
            (_, Ok(())) => None,
        };
        let committed = self.book.within(Stage::Commit, after, tx.commit()).await;
        if committed.is_some_and(|committed| committed.is_ok()) {
            hooks.fetch_add(1, Ordering::Relaxed);
            self.book.last(|attempt| attempt.said = Said::Committed);
        }
    }

    async fn closure(&self, db: &TxPool<D>, program: &Program, timeout: Option<Duration>, serializable: bool) {
        self.book.stage(Stage::Begin);
        let retry = Retry::attempts(3).backoff(Duration::from_millis(1), Duration::from_millis(4));
        let mut tx = db.tx().timeout(timeout).retry(retry);
        if serializable {
            tx = tx.serializable();
        }
        let run = tx.run(async |tx| {
            self.in_guard(tx, program).await?;
            // The rest belongs to the commit.
            self.book.stage(Stage::Commit);
            Ok(())
        });
        let said = match run.await {
            Ok(()) => Said::Committed,
            Err(TxError::Pending(_)) => Said::Nothing,
            Err(error) => self.failed(&error),
        };
        let mut page = self.book.page();
        page.stage = Stage::Idle;
        if let Some(attempt) = page.attempts.last_mut() {
            attempt.said = said;
        }
    }

    fn steps<'a>(&'a self, mut hand: Hand<'a, D>, steps: &'a [Step]) -> LocalBoxFuture<'a, Result<(), TxError>> {
        Box::pin(async move {
            for step in steps {
                self.step(&mut hand, step).await?;
            }
            Ok(())
        })
    }

    async fn step(&self, hand: &mut Hand<'_, D>, step: &Step) -> Result<(), TxError> {
        match step {
            Step::Read { .. } | Step::HalfRead | Step::Nap { .. } if self.in_cut.get() && !D::READS_GO_ON => Ok(()),
            Step::Insert { rows, cut } => {
                let (entry, keys) = self.book.enter(*rows, None);
                let values = keys.map(|n| format!("({n})")).collect::<Vec<_>>().join(",");
                let sql = format!("INSERT INTO {} (n) VALUES {values}", self.table);
                self.write(hand, entry, *cut, sql).await
            }
            Step::Transfer { from, to, amount } => {
                let (entry, keys) = self.book.enter(1, Some((*from, *to, *amount)));
                let (table, n) = (&self.table, keys.start);
                let sql = format!(
                    "UPDATE {table} SET v = v - {amount} WHERE n = -{from};
                     UPDATE {table} SET v = v + {amount} WHERE n = -{to}; INSERT INTO {table} (n) VALUES ({n})"
                );
                self.write(hand, entry, None, sql).await
            }
            Step::Read { cut } => {
                let sql = format!("SELECT n FROM {} WHERE n < 0", self.table);
                let cut = cut.filter(|_| D::READS_GO_ON);
                self.book.within(Stage::Statement, cut, driver(D::numbers(hand.conn(), sql))).await.transpose()?;
                Ok(())
            }
            Step::HalfRead => {
                self.book.stage(Stage::Statement);
                Ok(D::half_read(hand.conn(), D::MANY).await?)
            }
            Step::Nap { cut } => {
                let nap = driver(D::execute(hand.conn(), D::NAP.to_owned()));
                let cut = cut.filter(|_| D::READS_GO_ON);
                self.book.within(Stage::Statement, cut, nap).await.transpose()?;
                Ok(())
            }
            Step::Fail => {
                self.book.stage(Stage::Statement);
                driver(D::execute(hand.conn(), format!("INSERT INTO {} (n) VALUES (-1)", self.table))).await?;
                Ok(())
            }
            Step::Savepoint { steps, undo, cut } => match hand {
                Hand::Ours(tx) => self.savepoint(tx, steps, *undo, *cut).await,
                Hand::Plain(conn) => {
                    let end = if *undo { &NestedEnd::Drop } else { &NestedEnd::Commit(None) };
                    self.nested(conn, steps, end, cut.filter(|_| self.deep)).await
                }
            },
            Step::Nested { steps, end, begin } => {
                let begin = begin.filter(|_| self.deep || matches!(hand, Hand::Ours(_)));
                self.nested(hand.conn(), steps, end, begin).await
            }
        }
    }

    async fn write(&self, hand: &mut Hand<'_, D>, entry: usize, cut: Cut, sql: String) -> Result<(), TxError> {
        match self.book.within(Stage::Statement, cut, driver(D::execute(hand.conn(), sql))).await {
            Some(Ok(())) => self.book.settle(entry, Standing::Done),
            // Nobody knows what it has done.
            Some(Err(error @ sqlx::Error::WorkerCrashed)) => return Err(error.into()),
            Some(Err(error)) => {
                self.book.settle(entry, Standing::Undone);
                return Err(error.into());
            }
            None => {}
        }
        Ok(())
    }

    async fn savepoint(
        &self,
        tx: &mut TransactionGuard<D>,
        steps: &[Step],
        undo: bool,
        after: Cut,
    ) -> Result<(), TxError> {
        let start = self.book.entries();
        let in_cut = self.in_cut.replace(self.in_cut.get() || after.is_some());
        let work = tx.savepoint(async |sp: &mut TransactionGuard<D>| {
            self.steps(Hand::Ours(sp), steps).await?;
            self.book.stage(Stage::Savepoint);
            if undo { Err(TxError::application("undone on purpose")) } else { Ok(()) }
        });
        let worked = self.book.within(Stage::Savepoint, after, work).await;
        self.in_cut.set(in_cut);
        match worked {
            Some(Ok(())) => Ok(()),
            // It was undone, or the transaction cannot be committed: a commit that succeeds shows that it was undone.
            Some(Err(error)) => {
                self.book.undone_since(start);
                if undo { Ok(()) } else { Err(error) }
            }
            None => {
                self.book.last(|attempt| attempt.doomed = Some("a savepoint was cut"));
                Ok(())
            }
        }
    }

    async fn nested(
        &self,
        conn: &mut D::Connection,
        steps: &[Step],
        end: &NestedEnd,
        begin: Cut,
    ) -> Result<(), TxError> {
        self.book.last(|attempt| attempt.may_be_unknown |= D::lost_is_unknown());
        let Some(nested) = self.book.within(Stage::Nested, begin, conn.begin()).await else { return Ok(()) };
        let mut nested = nested?;
        let start = self.book.entries();
        if let Err(error) = self.steps(Hand::Plain(&mut *nested), steps).await {
            drop(nested);
            self.book.nested_undone(start);
            return Err(error);
        }
        match end {
            NestedEnd::Commit(after) => match self.book.within(Stage::Nested, *after, nested.commit()).await {
                Some(Ok(())) => {}
                Some(Err(error)) => {
                    self.book.nested_undone(start);
                    return Err(error.into());
                }
                None => self.book.nested_in_doubt(start),
            },
            NestedEnd::Rollback(after) => {
                // Cut or not, sqlx rolls back on drop as well.
                drop(self.book.within(Stage::Nested, *after, nested.rollback()).await);
                self.book.nested_undone(start);
            }
            NestedEnd::Drop => {
                drop(nested);
                self.book.nested_undone(start);
            }
        }
        Ok(())
    }
}
