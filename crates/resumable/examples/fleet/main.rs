//! Eight worker processes share one job on one PostgreSQL, and are killed and frozen while they work.
//!
//! ```text
//! cargo run -p cancel-safe-resumable --features postgres --example fleet
//! cargo run -p cancel-safe-resumable --features postgres --example fleet -- --database postgres://me@db/jobs
//! ```
//!
//! Without `--database` it starts a private server, crashes it once on the way, and removes it afterwards. At the end
//! it reads the results back and checks each block: every item must be recorded once, with the right result. Otherwise
//! the exit code is 1.

pub(crate) mod cluster;

use std::fmt;
use std::io::Write as _;
use std::process::{Child, Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

use cancel_safe_resumable::{PgStore, ResumableTask, TaskError};
use clap::Parser;
use futures_util::StreamExt;
use sqlx::postgres::PgPoolOptions;
use sqlx::{AssertSqlSafe, PgPool, Row};

use self::cluster::Cluster;

/// Worker processes share one job on one PostgreSQL, and are killed and frozen while they work.
#[derive(Debug, Clone, Parser)]
pub(crate) struct Settings {
    /// `postgres://…` [default: a private server]
    #[arg(long, value_name = "URL")]
    pub(crate) database: Option<String>,
    /// How many worker processes
    #[arg(long, default_value_t = 8)]
    pub(crate) workers: usize,
    /// How many items
    #[arg(long, default_value_t = 100_000)]
    pub(crate) items: u64,
    /// How many workers are killed, and how many are frozen past their lease
    #[arg(long, default_value_t = 12)]
    pub(crate) blows: usize,
    /// Repeats the random choices of another run
    #[arg(long)]
    pub(crate) seed: Option<u64>,
    /// What a worker process is started with, beside its own program
    #[arg(skip)]
    pub(crate) worker: Vec<String>,
}

/// In the environment of a worker: what it works on.
pub(crate) const WORKER: &str = "RESUMABLE_FLEET";
const JOB: &str = "squares";
const LEASE: Duration = Duration::from_secs(1);
/// The exit code of a worker that has lost ranges to others.
const FENCED: i32 = 3;

#[tokio::main]
async fn main() -> ExitCode {
    if let Ok(work) = std::env::var(WORKER) {
        return ExitCode::from(work_as_told(&work).await);
    }
    match start(Settings::parse()).await {
        Ok(report) => {
            drop(writeln!(std::io::stdout(), "{report}"));
            if report.is_right() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
        }
        Err(error) => {
            drop(writeln!(std::io::stderr(), "failed: {error}"));
            ExitCode::FAILURE
        }
    }
}

fn square(x: u64) -> u64 {
    x * x + 1
}

fn store(pool: PgPool, schema: &str) -> PgStore {
    PgStore::new(pool).schema(schema).range_items(200).lease(LEASE)
}

/// A worker process: works on the job until it is complete.
pub(crate) async fn work_as_told(told: &str) -> u8 {
    let mut words = told.split_whitespace();
    let (Some(url), Some(schema), Some(items)) = (words.next(), words.next(), words.next()) else { return 2 };
    let (Ok(pool), Ok(items)) = (PgPoolOptions::new().max_connections(2).connect_lazy(url), items.parse()) else {
        return 2;
    };
    let builder = ResumableTask::builder(JOB).store(store(pool, schema)).concurrency(16);
    let run = builder.stream(0..items, |_, x: u64| async move {
        tokio::time::sleep(Duration::from_millis(2)).await;
        Ok(square(x))
    });
    match run.finish().await {
        Ok(_) => 0,
        Err(TaskError::Fenced { .. }) => FENCED as u8,
        Err(error) => {
            drop(writeln!(std::io::stderr(), "a worker failed: {error:?}"));
            1
        }
    }
}

/// How the fleet ended.
#[derive(Debug, Default)]
pub(crate) struct Report {
    pub(crate) items: u64,
    pub(crate) recorded: u64,
    /// What is wrong with the results, if anything is.
    pub(crate) wrong: Option<String>,
    pub(crate) started: usize,
    pub(crate) killed: usize,
    pub(crate) frozen: usize,
    pub(crate) fenced: usize,
    pub(crate) failed: usize,
    /// How often the server was crashed.
    pub(crate) crashed: usize,
    pub(crate) taken_over: i64,
    pub(crate) elapsed: Duration,
    pub(crate) seed: u64,
}

impl Report {
    pub(crate) fn is_right(&self) -> bool {
        self.wrong.is_none() && self.recorded == self.items && self.failed == 0
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let rate = self.items as f64 / self.elapsed.as_secs_f64();
        writeln!(f, "items                        {:>9}", self.items)?;
        writeln!(f, "recorded, each once          {:>9}", self.recorded)?;
        writeln!(f, "workers started              {:>9}", self.started)?;
        writeln!(f, "  killed                     {:>9}", self.killed)?;
        writeln!(f, "  frozen past their lease    {:>9}", self.frozen)?;
        writeln!(f, "  ended as fenced            {:>9}", self.fenced)?;
        writeln!(f, "  failed                     {:>9}", self.failed)?;
        writeln!(f, "crashes of the server        {:>9}", self.crashed)?;
        writeln!(f, "ranges taken over            {:>9}", self.taken_over)?;
        writeln!(f, "items a second               {rate:>9.0}")?;
        match &self.wrong {
            Some(wrong) => write!(f, "WRONG: {wrong} (seed {})", self.seed),
            None if self.is_right() => write!(f, "every result is there, once (seed {})", self.seed),
            None => write!(f, "WRONG: see above (seed {})", self.seed),
        }
    }
}

/// Runs a fleet.
pub(crate) async fn start(settings: Settings) -> Result<Report, String> {
    let mut cluster = if settings.database.is_none() { Some(Cluster::start()?) } else { None };
    let url = settings.database.clone().or_else(|| cluster.as_ref().map(Cluster::url)).unwrap_or_default();
    let pool = PgPoolOptions::new().max_connections(2).connect(&url).await.map_err(|error| error.to_string())?;
    let schema = format!("resumable_fleet_{}", std::process::id());
    let seed = settings.seed.unwrap_or_else(|| fastrand::u64(..));
    let mut fleet = Fleet {
        told: format!("{url} {schema} {}", settings.items),
        workers: Vec::new(),
        report: Report { items: settings.items, seed, ..Report::default() },
        random: fastrand::Rng::with_seed(seed),
        settings,
    };
    let outcome = fleet.run(&pool, &schema, cluster.as_mut()).await;
    let report = match outcome {
        Ok(()) => verify(std::mem::take(&mut fleet.report), &pool, &schema).await,
        Err(error) => Err(error),
    };
    let dropped = sqlx::raw_sql(AssertSqlSafe(format!("DROP SCHEMA IF EXISTS {schema} CASCADE"))).execute(&pool).await;
    pool.close().await;
    drop(cluster);
    dropped.map_err(|error| error.to_string())?;
    report
}

struct Worker {
    process: Child,
    /// When to thaw it, if it is frozen.
    frozen: Option<Instant>,
}

struct Fleet {
    settings: Settings,
    told: String,
    workers: Vec<Worker>,
    report: Report,
    random: fastrand::Rng,
}

impl Drop for Fleet {
    fn drop(&mut self) {
        for worker in &mut self.workers {
            drop(worker.process.kill());
            drop(worker.process.wait());
        }
    }
}

impl Fleet {
    /// Works, kills and freezes until the job is complete and all workers have ended.
    async fn run(&mut self, pool: &PgPool, schema: &str, mut server: Option<&mut Cluster>) -> Result<(), String> {
        let begun = Instant::now();
        let (mut blows, mut complete, mut done) = (0, false, 0);
        while !(complete && self.workers.is_empty()) {
            while !complete && self.workers.len() < self.settings.workers {
                self.spawn()?;
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
            done = recorded(pool, schema).await.unwrap_or(done);
            self.show(done, &begun);
            if !complete && done >= self.settings.items {
                complete = true;
                self.report.elapsed = begun.elapsed();
            }
            // Each blow is due at a share of the work, so that a fast machine is struck as often as a slow one.
            let due = done.saturating_mul(self.settings.blows as u64 + 1) / self.settings.items.max(1);
            if !complete && blows < self.settings.blows && due > blows as u64 {
                blows += 1;
                self.strike()?;
            }
            if !complete
                && done > self.settings.items / 2
                && let Some(server) = server.take()
            {
                server.crash()?;
                server.serve()?;
                self.report.crashed += 1;
            }
            self.thaw()?;
            self.reap()?;
        }
        println_over("");
        Ok(())
    }

    fn spawn(&mut self) -> Result<(), String> {
        let program = std::env::current_exe().map_err(|error| error.to_string())?;
        let mut command = Command::new(program);
        command.args(&self.settings.worker).env(WORKER, &self.told).stdin(Stdio::null()).stdout(Stdio::null());
        let process = command.spawn().map_err(|error| error.to_string())?;
        self.workers.push(Worker { process, frozen: None });
        self.report.started += 1;
        Ok(())
    }

    /// Kills a worker, or freezes it for longer than its lease.
    fn strike(&mut self) -> Result<(), String> {
        let struck = self.random.usize(..self.workers.len());
        let is_kill = self.random.bool();
        let worker = &mut self.workers[struck];
        if worker.frozen.is_some() {
            return Ok(());
        }
        if is_kill {
            worker.process.kill().map_err(|error| error.to_string())?;
            self.report.killed += 1;
        } else {
            signal(&worker.process, "-STOP")?;
            worker.frozen = Some(Instant::now() + LEASE * 2);
            self.report.frozen += 1;
        }
        Ok(())
    }

    fn thaw(&mut self) -> Result<(), String> {
        for worker in &mut self.workers {
            if worker.frozen.is_some_and(|until| until <= Instant::now()) {
                worker.frozen = None;
                signal(&worker.process, "-CONT")?;
            }
        }
        Ok(())
    }

    /// Removes the workers that have ended from the list.
    fn reap(&mut self) -> Result<(), String> {
        let mut left = Vec::new();
        for mut worker in std::mem::take(&mut self.workers) {
            match worker.process.try_wait().map_err(|error| error.to_string())? {
                None => left.push(worker),
                Some(status) => match status.code() {
                    // `None` is a signal, which we sent.
                    Some(0) | None => {}
                    Some(FENCED) => self.report.fenced += 1,
                    Some(_) => self.report.failed += 1,
                },
            }
        }
        self.workers = left;
        Ok(())
    }

    fn show(&self, done: u64, begun: &Instant) {
        let Report { killed, frozen, fenced, .. } = self.report;
        let share = (done * 40 / self.settings.items.max(1)) as usize;
        let bar = format!("{}{}", "#".repeat(share.min(40)), ".".repeat(40 - share.min(40)));
        let rate = done as f64 / begun.elapsed().as_secs_f64();
        let workers = self.workers.len();
        println_over(&format!(
            "[{bar}] {done} of {} items, {rate:.0} a second, {workers} workers, {killed} killed, {frozen} frozen, {fenced} fenced",
            self.settings.items
        ));
    }
}

/// Writes over the last line, if this is a terminal.
fn println_over(text: &str) {
    let mut out = std::io::stdout();
    if std::io::IsTerminal::is_terminal(&out) {
        drop(write!(out, "\r\x1b[K{text}").and_then(|()| out.flush()));
    }
}

fn signal(process: &Child, signal: &str) -> Result<(), String> {
    let sent = Command::new("kill").args([signal, &process.id().to_string()]).stderr(Stdio::null()).status();
    sent.map(drop).map_err(|error| format!("kill: {error}"))
}

/// How many items are recorded. Unknown before the first worker has created the tables, and while the server is down.
async fn recorded(pool: &PgPool, schema: &str) -> Option<u64> {
    let sql = format!("SELECT done::bigint FROM {schema}.progress WHERE job = '{JOB}'");
    let row = sqlx::query(AssertSqlSafe(sql)).persistent(false).fetch_one(pool).await;
    row.ok().map(|row| row.get::<i64, _>(0).unsigned_abs())
}

/// Reads the results, which checks each block and that nothing is recorded twice.
async fn verify(mut report: Report, pool: &PgPool, schema: &str) -> Result<Report, String> {
    let mut results = store(pool.clone(), schema).results::<u64>(JOB);
    while let Some(done) = results.next().await {
        match done {
            Ok(done) if done.index as u64 == report.recorded && done.result == Ok(square(report.recorded)) => {
                report.recorded += 1;
            }
            Ok(done) => report.wrong = Some(format!("item {}: {:?}", done.index, done.result)),
            Err(error) => report.wrong = Some(error.to_string()),
        }
    }
    let sql = format!("SELECT taken_over::bigint FROM {schema}.progress WHERE job = '{JOB}'");
    let row = sqlx::query(AssertSqlSafe(sql)).persistent(false).fetch_one(pool).await;
    report.taken_over = row.map_err(|error| error.to_string())?.get(0);
    Ok(report)
}
