//! Random transactions, cut at random moments; then the table is compared with the promises.
//!
//! A round is one program: statements, savepoints, nested transactions of sqlx, an end; and at most one cut of the
//! whole (after a random number of polls, by a timeout, by the abort of its task) in addition to cuts of single steps.
//! Many run at once, alternately on one of the crate's pools and on a wrapped pool. By default they run for some
//! seconds on each database; `CANCEL_SAFE_CAMPAIGN=full` runs 100,000 rounds on each. `CANCEL_SAFE_FUZZ_SEED` repeats
//! the programs of a seed.

mod check;
pub(crate) mod cut;
mod program;

use std::cell::Cell;
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};
use std::time::{Duration, Instant};

use cancel_safe_campaign::publish_campaign;
use cancel_safe_tx_guard::{Options, PoolerMode, TxError, TxPool};
use fastrand::Rng;
use futures_util::StreamExt;
use futures_util::future::join_all;
use sqlx::mysql::MySqlConnectOptions;
use sqlx::pool::PoolOptions;
use sqlx::postgres::PgConnectOptions;
use sqlx::sqlite::{SqliteConnectOptions, SqliteSynchronous};
use sqlx::{Connection, MySql, MySqlConnection, PgConnection, Postgres, Sqlite, SqliteConnection};
use tokio::runtime::Handle;
use tokio::task::{LocalSet, spawn_local};
use tokio::time::{sleep, timeout};

use self::check::{Sums, Tally};
use self::cut::cut;
use self::program::{ACCOUNTS, Book, KEYS, Program, Run, Source};
use crate::pooler;
use crate::relied::{TAKES_BACK, takes_dropped_begins_back};
use crate::world::{PATIENCE, TestDb, World, eventually};

const FULL_ROUNDS: i64 = 100_000;
/// After this many rounds everything comes to rest and is compared.
const BATCH: i64 = 500;
const THREADS: usize = 2;
const TASKS_PER_THREAD: usize = 4;
/// Fewer than the tasks, so that waits for a connection are cut as well.
const CONNECTIONS: u32 = 7;

/// What the campaign needs to know about a database, beyond the needs of the other tests.
pub(crate) trait FuzzDb: TestDb {
    /// How many rounds run in well under half a minute.
    const QUICK_ROUNDS: i64;
    /// A statement of a few milliseconds.
    const NAP: &'static str;
    /// A query of more rows than one message holds.
    const MANY: &'static str = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 900)
        SELECT i FROM n";

    /// Whether the pools are safe from a `begin` that is cut inside a nested transaction of sqlx: the crate's own, and a
    /// wrapped one.
    const DEEP: [bool; 2];
    /// Whether sqlx finds its place again after a cut query.
    const READS_GO_ON: bool = true;
    /// Whether the outcome may be unknown when a transaction has ended without its guard, after an ignored error or a
    /// cut nested transaction: there the guard cannot tell a rollback from a COMMIT.
    const LOST_IS_UNKNOWN: bool = false;

    /// The same for the sqlx that runs here.
    fn lost_is_unknown() -> bool {
        Self::LOST_IS_UNKNOWN
    }

    /// Whether a pool is safe from such a `begin` with the sqlx that runs here.
    async fn is_deep(which: usize) -> bool {
        Self::DEEP[which]
    }

    /// SQL that creates and removes a user of that name, if sessions are found by user name.
    fn user(_: &str) -> Option<[String; 2]> {
        None
    }

    /// SQL for each session of an sqlx pool when it is opened.
    const SETTINGS: &'static str = "SELECT 1";

    /// Options for sessions that can be found by `name`, and that wait only a moment for locks.
    fn tuned(options: Options<Self>, name: &str) -> Options<Self>;

    fn settings(conn: &mut Self::Connection) -> impl Future<Output = Result<(), sqlx::Error>> + Send;

    /// Reads one row and leaves the others.
    async fn half_read(conn: &mut Self::Connection, sql: &'static str) -> Result<(), sqlx::Error>;

    /// Whether a session of that name is in a transaction, as seen by another session.
    async fn in_transaction(beside: &mut Self::Connection, name: &str) -> bool;
}

impl FuzzDb for Sqlite {
    const QUICK_ROUNDS: i64 = 6_000;
    const NAP: &'static str =
        "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 20000) SELECT count(*) FROM n";

    /// The commit hook sees all.
    const DEEP: [bool; 2] = [true, true];

    fn tuned(options: SqliteConnectOptions, _: &str) -> SqliteConnectOptions {
        options.busy_timeout(Duration::from_millis(50)).synchronous(SqliteSynchronous::Off)
    }

    async fn settings(conn: &mut SqliteConnection) -> Result<(), sqlx::Error> {
        sqlx::raw_sql(Self::SETTINGS).execute(conn).await.map(drop)
    }

    async fn half_read(conn: &mut SqliteConnection, sql: &'static str) -> Result<(), sqlx::Error> {
        sqlx::query(sql).fetch(conn).next().await.transpose().map(drop)
    }

    /// A checkpoint that empties the log needs a database in which nobody reads or writes.
    async fn in_transaction(beside: &mut SqliteConnection, _: &str) -> bool {
        Sqlite::execute(beside, "PRAGMA busy_timeout = 20".to_owned()).await.unwrap();
        Sqlite::numbers(beside, "PRAGMA wal_checkpoint(TRUNCATE)".to_owned()).await.unwrap() != [0]
    }
}

impl FuzzDb for Postgres {
    const QUICK_ROUNDS: i64 = 6_000;
    const NAP: &'static str = "SELECT pg_sleep(0.002)";

    const DEEP: [bool; 2] = [true, false];

    fn lost_is_unknown() -> bool {
        TAKES_BACK.get().copied().unwrap_or_default()
    }

    async fn is_deep(which: usize) -> bool {
        Self::DEEP[which] && !takes_dropped_begins_back().await
    }

    fn tuned(options: PgConnectOptions, name: &str) -> PgConnectOptions {
        options.application_name(name).options([("lock_timeout", "50ms")])
    }

    async fn settings(conn: &mut PgConnection) -> Result<(), sqlx::Error> {
        sqlx::raw_sql(Self::SETTINGS).execute(conn).await.map(drop)
    }

    async fn half_read(conn: &mut PgConnection, sql: &'static str) -> Result<(), sqlx::Error> {
        sqlx::query(sql).fetch(conn).next().await.transpose().map(drop)
    }

    async fn in_transaction(beside: &mut PgConnection, name: &str) -> bool {
        let open = format!(
            "SELECT count(*) FROM pg_stat_activity WHERE application_name = '{name}' AND xact_start IS NOT NULL"
        );
        Postgres::numbers(beside, open).await.unwrap() != [0]
    }
}

impl FuzzDb for MySql {
    const QUICK_ROUNDS: i64 = 6_000;
    const NAP: &'static str = "SELECT SLEEP(0.002)";
    const DEEP: [bool; 2] = [false, false];
    const READS_GO_ON: bool = false;
    const LOST_IS_UNKNOWN: bool = true;
    /// Otherwise locks that the twin has leaked would cause waits of a minute.
    const SETTINGS: &'static str = "SET innodb_lock_wait_timeout = 1";

    fn user(name: &str) -> Option<[String; 2]> {
        let user = format!("'{name}'@'localhost', '{name}'@'%'");
        let grants = ["localhost", "%"].map(|host| format!("; GRANT ALL ON *.* TO '{name}'@'{host}'"));
        Some([format!("CREATE USER {user}{}", grants.concat()), format!("DROP USER {user}")])
    }

    fn tuned(options: MySqlConnectOptions, name: &str) -> MySqlConnectOptions {
        options.username(name)
    }

    async fn settings(conn: &mut MySqlConnection) -> Result<(), sqlx::Error> {
        sqlx::raw_sql(Self::SETTINGS).execute(conn).await.map(drop)
    }

    async fn half_read(conn: &mut MySqlConnection, sql: &'static str) -> Result<(), sqlx::Error> {
        sqlx::query(sql).fetch(conn).next().await.transpose().map(drop)
    }

    async fn in_transaction(beside: &mut MySqlConnection, name: &str) -> bool {
        let open = format!(
            "SELECT count(*) FROM information_schema.innodb_trx
             JOIN information_schema.processlist ON id = trx_mysql_thread_id WHERE user = '{name}'"
        );
        MySql::numbers(beside, open).await.unwrap() != [0]
    }
}

fn rounds<D: FuzzDb>() -> i64 {
    let full = std::env::var("CANCEL_SAFE_CAMPAIGN").is_ok_and(|form| form == "full");
    if full { FULL_ROUNDS } else { D::QUICK_ROUNDS }
}

#[expect(clippy::print_stdout, reason = "a random test prints its seed")]
fn seed() -> u64 {
    let given = std::env::var("CANCEL_SAFE_FUZZ_SEED").ok().map(|seed| seed.parse().unwrap());
    let seed = given.unwrap_or_else(|| fastrand::u64(..));
    println!("again with the same programs: CANCEL_SAFE_FUZZ_SEED={seed}");
    seed
}

/// How the whole of a program is cut.
#[derive(Debug, Clone, Copy)]
enum Whole {
    Not,
    Polls(u32),
    Timeout(Duration),
    Abort(Duration),
}

impl Whole {
    fn random(random: &mut Rng) -> Self {
        let moment = Duration::from_micros(random.u64(..6_000));
        match random.u8(..6) {
            0..=1 => Self::Not,
            2..=3 => Self::Polls(random.u32(1..=30)),
            4 => Self::Timeout(moment),
            _ => Self::Abort(moment),
        }
    }
}

/// One database, its table, and the findings so far.
struct Campaign<D: FuzzDb> {
    world: World<D>,
    random: Rng,
    /// The number of the next program.
    next: i64,
    sums: Sums,
    tally: Tally,
}

impl<D: FuzzDb> Campaign<D> {
    async fn new(seed: u64) -> Self {
        let world = World::<D>::new().await;
        let accounts = (1..=ACCOUNTS).map(|account| format!("(-{account}, 0)")).collect::<Vec<_>>().join(",");
        world.run(format!("INSERT INTO {} (n, v) VALUES {accounts}", world.table)).await;
        if let Some([make, _]) = D::user(&world.table) {
            world.run(make).await;
        }
        Self { world, random: Rng::with_seed(seed), next: 0, sums: Sums::default(), tally: Tally::default() }
    }

    fn options(&self) -> Options<D> {
        D::tuned(self.world.options.clone(), &self.world.table)
    }

    /// Removes the table and the user.
    async fn end(self) {
        self.world.run(format!("DROP TABLE {}", self.world.table)).await;
        if let Some([_, remove]) = D::user(&self.world.table) {
            self.world.run(remove).await;
        }
    }

    async fn plain_pool(&self) -> sqlx::Pool<D> {
        let pool = PoolOptions::<D>::new().max_connections(CONNECTIONS).acquire_timeout(PATIENCE);
        let pool = pool.after_connect(|conn, _| Box::pin(D::settings(conn)));
        pool.connect_with(self.options()).await.unwrap()
    }

    /// Runs `programs` programs, several at a time on each of several threads.
    async fn run(&mut self, source: &Source<D>, deep: bool, programs: i64) -> Vec<(i64, Book)> {
        let (first, seed) = (self.next, self.random.u64(..));
        self.next += programs;
        let next = Arc::new(AtomicI64::new(first));
        let threads: Vec<_> = (0..THREADS)
            .map(|_| {
                let (source, next, runtime) = (source.clone(), Arc::clone(&next), Handle::current());
                let table: Arc<str> = self.world.table.as_str().into();
                std::thread::spawn(move || {
                    let worker = async || {
                        let mut books = Vec::new();
                        loop {
                            let id = next.fetch_add(1, Ordering::Relaxed);
                            if id >= first + programs {
                                return books;
                            }
                            let book = Book::new(id * KEYS);
                            let run = Run {
                                source: source.clone(),
                                table: Arc::clone(&table),
                                book: book.clone(),
                                deep,
                                in_cut: Cell::new(false),
                            };
                            let round = round(run, Rng::with_seed(seed.wrapping_add(id.unsigned_abs())));
                            let cut = timeout(PATIENCE, round).await;
                            books.push((id, book, cut));
                        }
                    };
                    let all = join_all((0..TASKS_PER_THREAD).map(|_| worker()));
                    runtime.block_on(LocalSet::new().run_until(all)).into_iter().flatten().collect::<Vec<_>>()
                })
            })
            .collect();
        let join = move || threads.into_iter().flat_map(|thread| thread.join().unwrap()).collect::<Vec<_>>();
        let mut books = Vec::new();
        for (id, book, cut) in tokio::task::spawn_blocking(join).await.unwrap() {
            self.tally.rounds += 1;
            match cut {
                Ok(true) => self.tally.cut_at(book.page().stage),
                Ok(false) => {}
                Err(_) => self.tally.leak(&format!("program {id} does not end: {:?}", book.page())),
            }
            for &stage in &book.page().inner_cuts {
                self.tally.cut_at(stage);
            }
            books.push((id, book));
        }
        books
    }

    /// Compares the table with the books, once everything is at rest.
    async fn compare(&mut self, source: &Source<D>, books: Vec<(i64, Book)>) {
        let mut beside = self.world.plain().await;
        check::settle(&books, &mut self.tally).await;
        let start = Instant::now();
        while D::in_transaction(&mut beside, &self.world.table).await {
            if start.elapsed() > source.rest() {
                self.tally.leak("a session is in a transaction that nobody has");
                break;
            }
            sleep(Duration::from_millis(2)).await;
        }
        let written = self.probe(source).await;
        let table = &self.world.table;
        let rows = D::numbers(&mut beside, format!("SELECT n FROM {table} WHERE n >= 0")).await.unwrap();
        let sums = format!("SELECT v FROM {table} WHERE n < 0 ORDER BY n DESC");
        let sums = D::numbers(&mut beside, sums).await.unwrap();
        check::compare(&books, rows, &written, &mut self.sums, &sums, &mut self.tally);
        drop(D::execute(&mut beside, format!("DELETE FROM {table} WHERE n >= 0")).await);
        drop(beside.close().await);
    }

    /// Writes one row over each connection of the pool at the same time. All connections must be there, and rows that
    /// got `Ok` must stay.
    async fn probe(&mut self, source: &Source<D>) -> Vec<i64> {
        let keys = self.next * KEYS..self.next * KEYS + i64::from(CONNECTIONS);
        self.next += 1;
        let insert = |n: i64| format!("INSERT INTO {} (n) VALUES ({n})", self.world.table);
        // Each task keeps its transaction until all have one.
        let all = tokio::sync::Barrier::new(keys.clone().count());
        let mut written = Vec::new();
        let writes = keys.map(async |n| {
            let write = async {
                match source {
                    Source::Ours(db) => {
                        let tx = db.begin().await.ok()?;
                        all.wait().await;
                        // One after the other, as some databases allow only one writer: a busy database may be tried
                        // again.
                        drop(tx);
                        let run = db.tx().retry(cancel_safe_tx_guard::Retry::attempts(50)).serializable();
                        run.run(async |tx| Ok::<_, TxError>(D::execute(tx, insert(n)).await?)).await.ok()
                    }
                    Source::Plain(pool) => {
                        let mut conn = pool.acquire().await.ok()?;
                        all.wait().await;
                        D::execute(&mut conn, insert(n)).await.ok()
                    }
                }
            };
            timeout(source.rest(), write).await.ok().flatten().map(|()| n)
        });
        for write in join_all(writes).await {
            match write {
                Some(n) => written.push(n),
                None => self.tally.leak("a connection of the pool cannot be had, or does not write"),
            }
        }
        written
    }
}

/// Whether the whole was cut.
async fn round<D: FuzzDb>(run: Run<D>, mut random: Rng) -> bool {
    let program = Program::random(&mut random);
    run.book.page().program = format!("{program:?}");
    match Whole::random(&mut random) {
        Whole::Not => {
            run.whole(&program).await;
            false
        }
        Whole::Polls(polls) => cut(run.whole(&program), Some(polls)).await.is_none(),
        Whole::Timeout(moment) => timeout(moment, run.whole(&program)).await.is_err(),
        Whole::Abort(moment) => {
            let task = spawn_local(async move { run.whole(&program).await });
            sleep(moment).await;
            task.abort();
            match task.await {
                Ok(()) => false,
                Err(error) if error.is_cancelled() => true,
                Err(error) => std::panic::resume_unwind(error.into_panic()),
            }
        }
    }
}

async fn no_transaction_is_leaked_torn_or_wrongly_told<D: FuzzDb>(database: &str) {
    let mut campaign = Campaign::<D>::new(seed()).await;
    let pool = campaign.plain_pool().await;
    let owned = TxPool::builder().max_connections(CONNECTIONS).acquire_timeout(PATIENCE);
    let owned = owned.connect_with(campaign.options()).await.unwrap();
    let sources = [Source::Ours(owned.clone()), Source::Ours(TxPool::wrap(pool.clone()))];
    for batch in 0..rounds::<D>() / BATCH {
        let which = usize::from(batch % 2 == 1);
        let source = &sources[which];
        let books = campaign.run(source, D::is_deep(which).await, BATCH).await;
        campaign.compare(source, books).await;
    }
    // All connections of a wrapped pool are back as well.
    eventually("sqlx has its connections back", async || pool.num_idle() == pool.size() as usize).await;
    campaign.tally.print(database);
    let Tally { rounds, .. } = campaign.tally;
    publish_campaign("tx-guard", &format!("random-cuts/{database}"), rounds, campaign.tally.violations());
    campaign.tally.assert_clean();
    pool.close().await;
    let report = owned.close(PATIENCE).await;
    assert!(report.is_clean(), "{report}");
    campaign.end().await;
}

/// Behind a pooler, where some settings must not be changed: a `begin` that is cut two levels deep is not fenced there.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_transaction_is_leaked_torn_or_wrongly_told_behind_a_pooler() {
    let _alone = pooler::alone().await;
    // The check below reads the answer.
    takes_dropped_begins_back().await;
    let mut campaign = Campaign::<Postgres>::new(seed()).await;
    let db = TxPool::builder().max_connections(CONNECTIONS).acquire_timeout(PATIENCE);
    let behind = pooler::options().application_name(&campaign.world.table);
    let db = db.pooler(PoolerMode::Transaction).connect_with(behind).await.unwrap();
    let source = Source::Ours(db.clone());
    // There, a wait for a lock may last until the server finds a deadlock, which takes a second.
    for _ in 0..rounds::<Postgres>() / BATCH / 12 {
        let books = campaign.run(&source, false, BATCH).await;
        campaign.compare(&source, books).await;
    }
    campaign.tally.print("PgBouncer");
    let Tally { rounds, .. } = campaign.tally;
    publish_campaign("tx-guard", "random-cuts/PgBouncer", rounds, campaign.tally.violations());
    campaign.tally.assert_clean();
    let report = db.close(PATIENCE).await;
    assert!(report.is_clean(), "{report}");
    // sqlx itself ends the transaction of a `begin` that is cut two levels deep, and from then on another client has
    // its session: statements prepared there stay until the next transaction of such a pool comes by.
    let mut left = pooler::visit_all(&format!("{}; DEALLOCATE ALL", pooler::LEFT)).await;
    left.retain(|left| !left.starts_with("the prepared statement sqlx_s_"));
    assert_eq!(left, [""; 0], "something was left on the sessions of others");
    campaign.end().await;
}

/// The twin: sqlx alone, in which the same check finds the faults.
async fn plain_sqlx_is_caught<D: FuzzDb>(database: &str) {
    let mut campaign = Campaign::<D>::new(seed()).await;
    for _ in 0..20 {
        // A new pool for each round, because nobody can wait for what the last one has leaked.
        let pool = campaign.plain_pool().await;
        let source = Source::Plain(pool.clone());
        let books = campaign.run(&source, true, BATCH / 5).await;
        campaign.compare(&source, books).await;
        drop(timeout(source.rest(), pool.close()).await);
        if campaign.tally.violations() > 0 {
            break;
        }
    }
    campaign.tally.print(&format!("{database}, plain sqlx"));
    assert!(campaign.tally.violations() > 0, "plain sqlx passes, so the check shows nothing");
    campaign.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_transaction_is_leaked_torn_or_wrongly_told_on_sqlite() {
    no_transaction_is_leaked_torn_or_wrongly_told::<Sqlite>("SQLite").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_transaction_is_leaked_torn_or_wrongly_told_on_postgres() {
    no_transaction_is_leaked_torn_or_wrongly_told::<Postgres>("PostgreSQL").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_transaction_is_leaked_torn_or_wrongly_told_on_mysql() {
    no_transaction_is_leaked_torn_or_wrongly_told::<MySql>("MySQL").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn plain_sqlx_is_caught_on_sqlite() {
    plain_sqlx_is_caught::<Sqlite>("SQLite").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn plain_sqlx_is_caught_on_postgres() {
    plain_sqlx_is_caught::<Postgres>("PostgreSQL").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn plain_sqlx_is_caught_on_mysql() {
    plain_sqlx_is_caught::<MySql>("MySQL").await;
}
