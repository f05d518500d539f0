//! Behind PgBouncer in transaction mode, where each transaction has another session, and where other applications use
//! the same sessions: they never see anything of ours.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use cancel_safe_tx_guard::{CommitOutcome, PoolerMode, TransactionGuard, TxError, TxEvent, TxPool};
use futures_util::StreamExt;
use futures_util::future::join_all;
use futures_util::stream;
use sqlx::postgres::PgConnectOptions;
use sqlx::{ConnectOptions, Connection, PgConnection, Postgres, Sqlite};
use tokio::sync::{Mutex, MutexGuard};
use tokio::task::JoinHandle;
use tokio::time::timeout;

use crate::fuzz::cut::cut;
use crate::world::{PATIENCE, SOON, TestDb, World, url};

const PGBOUNCER: &str = "CANCEL_SAFE_TEST_PGBOUNCER_URL";

/// The pooler's maximum of sessions. A client with this many has them all.
const SESSIONS: usize = 150;

/// A query for what is left on this transaction's session. The pooler itself gives each session its client's first five
/// settings, and the last one to sessions of a server that the user has named.
pub(crate) const LEFT: &str =
    "SELECT name || ' = ' || setting FROM pg_settings WHERE source = 'session' AND name NOT IN
        ('client_encoding', 'DateStyle', 'TimeZone', 'standard_conforming_strings', 'application_name', 'search_path')
    UNION ALL SELECT 'the prepared statement ' || name || ': ' || statement FROM pg_prepared_statements
    UNION ALL SELECT 'an advisory lock' FROM pg_locks WHERE locktype = 'advisory' AND pid = pg_backend_pid()";

pub(crate) fn options() -> PgConnectOptions {
    url(PGBOUNCER).parse::<PgConnectOptions>().unwrap().statement_cache_capacity(0)
}

/// Opens one transaction on each session of the pooler at the same time, runs `sql` in each, and returns all the
/// resulting texts.
pub(crate) async fn visit_all(sql: &str) -> Vec<String> {
    let visits = stream::iter(0..SESSIONS).map(async |_| {
        let mut conn = options().connect().await.unwrap();
        Postgres::execute(&mut conn, "BEGIN".to_owned()).await.unwrap();
        let texts: Vec<_> = sqlx::raw_sql(sqlx::AssertSqlSafe(sql.to_owned())).fetch_all(&mut conn).await.unwrap();
        (conn, texts.iter().map(|row| sqlx::Row::get::<String, _>(row, 0)).collect::<Vec<_>>())
    });
    // No session is given back before all are taken.
    let visited: Vec<_> = visits.buffer_unordered(16).collect().await;
    let mut all = Vec::new();
    for (mut conn, texts) in visited {
        Postgres::execute(&mut conn, "COMMIT".to_owned()).await.unwrap();
        conn.close().await.unwrap();
        all.extend(texts);
    }
    all
}

/// Another application behind the same pooler, which writes and sleeps all the time and must not be disturbed.
struct Neighbour {
    is_over: Arc<AtomicBool>,
    working: JoinHandle<i64>,
}

impl Neighbour {
    fn moves_in(table: &str) -> Self {
        let is_over = Arc::<AtomicBool>::default();
        let (over, table) = (Arc::clone(&is_over), table.to_owned());
        let working = tokio::spawn(async move {
            let mut conn: PgConnection = options().connect().await.unwrap();
            let mut written = 0;
            while written == 0 || !over.load(Ordering::Relaxed) {
                for sql in [format!("INSERT INTO {table} (n) VALUES ({written})"), "SELECT pg_sleep(0.002)".to_owned()]
                {
                    Postgres::execute(&mut conn, sql).await.expect("a neighbour was disturbed");
                }
                written += 1;
            }
            conn.close().await.unwrap();
            written
        });
        Self { is_over, working }
    }

    /// Ends it, and returns how much it has written.
    async fn leaves(self) -> i64 {
        self.is_over.store(true, Ordering::Relaxed);
        timeout(PATIENCE, self.working).await.unwrap().unwrap()
    }
}

/// Makes sure that no other test uses the pooler.
pub(crate) async fn alone() -> MutexGuard<'static, ()> {
    static ALONE: Mutex<()> = Mutex::const_new(());
    ALONE.lock().await
}

/// A pool behind the pooler, with neighbours. Only one exists at a time, because each uses all sessions at its end.
struct Pooled {
    world: World<Postgres>,
    theirs: World<Postgres>,
    db: TxPool<Postgres>,
    neighbours: Vec<Neighbour>,
    _alone: MutexGuard<'static, ()>,
}

impl Pooled {
    async fn new(connections: u32) -> Self {
        let alone = alone().await;
        let (world, theirs) = (World::new().await, World::new().await);
        let pool = TxPool::builder().max_connections(connections).pooler(PoolerMode::Transaction);
        let db = pool.connect_with(url(PGBOUNCER).parse().unwrap()).await.unwrap();
        let neighbours = vec![Neighbour::moves_in(&theirs.table)];
        Self { world, theirs, db, neighbours, _alone: alone }
    }

    async fn begin(&self) -> TransactionGuard<Postgres> {
        timeout(PATIENCE, self.db.begin()).await.unwrap().unwrap()
    }

    /// Checks that the neighbours were not disturbed, and that nothing was left on any session.
    async fn end(self) {
        let mut written = 0;
        for neighbour in self.neighbours {
            written += neighbour.leaves().await;
        }
        assert_eq!(self.theirs.committed().await, (0..written).collect::<Vec<_>>());
        self.world.end(self.db).await;
        self.theirs.run(format!("DROP TABLE {}", self.theirs.table)).await;
        assert_eq!(visit_all(LEFT).await, [""; 0], "something was left on the sessions of others");
    }
}

/// Drops `tx` while a statement runs in it, and waits until it is settled.
async fn drop_running(mut tx: TransactionGuard<Postgres>) -> CommitOutcome {
    let slow = Postgres::execute(&mut tx, Postgres::SLOW.to_owned());
    assert!(timeout(Duration::from_millis(30), slow).await.is_err(), "it was not slow");
    let handle = tx.outcome_handle();
    drop(tx);
    timeout(PATIENCE, handle.outcome()).await.unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_pooler_that_was_not_told_of_is_refused_before_anything_is_set() {
    let pooled = Pooled::new(1).await;
    for _ in 0..5 {
        let error = TxPool::<Postgres>::connect(&url(PGBOUNCER)).await.unwrap_err();
        assert!(matches!(error, TxError::Pooler { .. }), "{error:?}");
        assert!(error.is_connect());
        let said = error.to_string();
        assert!(said.contains(".pooler(PoolerMode::Transaction)") && said.contains("127.0.0.1"), "{said}");
        assert!(!said.contains(options().get_username()), "{said}");
    }
    pooled.end().await;
}

#[tokio::test]
async fn a_database_without_poolers_says_so() {
    let pool = TxPool::<Sqlite>::builder().pooler(PoolerMode::Transaction).connect("sqlite::memory:").await;
    assert!(matches!(pool, Err(TxError::InvalidOption { option: "pooler", .. })), "{pool:?}");
}

/// The twin: anything left on a session is found.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_left_on_a_session_is_found() {
    let pooled = Pooled::new(1).await;
    let mut careless = options().connect().await.unwrap();
    Postgres::execute(&mut careless, "SET lock_timeout = 4711".to_owned()).await.unwrap();
    careless.close().await.unwrap();
    assert_eq!(visit_all(LEFT).await, ["lock_timeout = 4711"]);
    assert!(visit_all("RESET lock_timeout").await.is_empty());
    pooled.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn commits_rollbacks_and_drops_do_what_they_do_elsewhere_behind_a_pooler() {
    let pooled = Pooled::new(2).await;
    let world = &pooled.world;
    let mut expected = Vec::new();
    for round in 0..10 {
        let n = round * 10;
        let mut tx = pooled.begin().await;
        world.insert(&mut tx, n).await.unwrap();
        let rows: Vec<i64> = Postgres::numbers(&mut tx, format!("SELECT {n}::BIGINT")).await.unwrap();
        assert_eq!(rows, [n]);
        tx.commit().await.unwrap();
        expected.push(n);
        let mut tx = pooled.begin().await;
        world.insert(&mut tx, n + 1).await.unwrap();
        tx.rollback().await.unwrap();
        let mut tx = pooled.begin().await;
        world.insert(&mut tx, n + 2).await.unwrap();
        let handle = tx.outcome_handle();
        drop(tx);
        assert_eq!(timeout(PATIENCE, handle.outcome()).await.unwrap(), CommitOutcome::RolledBack);
        let mut tx = pooled.begin().await;
        world.insert(&mut tx, n + 3).await.unwrap();
        assert_eq!(drop_running(tx).await, CommitOutcome::RolledBack);
        // Others can write all of these rows.
        let mut tx = pooled.begin().await;
        for k in 1..4 {
            let insert = timeout(SOON, world.insert(&mut tx, n + k)).await;
            insert.expect("a row is still locked").expect("a row is there that was rolled back");
        }
        tx.rollback().await.unwrap();
    }
    assert_eq!(world.committed().await, expected);
    pooled.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_commit_that_is_dropped_anywhere_is_told_behind_a_pooler() {
    let pooled = Pooled::new(2).await;
    let (mut expected, mut next) = (Vec::new(), 0);
    for _ in 0..5 {
        for polls in 1.. {
            next += 1;
            let mut tx = pooled.begin().await;
            pooled.world.insert(&mut tx, next).await.unwrap();
            let handle = tx.outcome_handle();
            let whole = cut(tx.commit(), Some(polls)).await.is_some();
            match timeout(PATIENCE, handle.outcome()).await.unwrap() {
                CommitOutcome::Committed => expected.push(next),
                CommitOutcome::RolledBack => {}
                outcome => panic!("{outcome:?}"),
            }
            if whole {
                break;
            }
        }
    }
    assert_eq!(pooled.world.committed().await, expected);
    pooled.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn savepoints_and_cut_begins_of_sqlx_let_nothing_stand_that_was_not_committed_behind_a_pooler() {
    let pooled = Pooled::new(2).await;
    let (mut expected, mut next, mut lost) = (Vec::new(), 0, 0);
    for _ in 0..5 {
        for polls in 1.. {
            next += 10;
            let mut tx = pooled.begin().await;
            pooled.world.insert(&mut tx, next).await.unwrap();
            let (world, n) = (&pooled.world, next);
            let undone = tx.savepoint(async |sp| {
                world.insert(sp, n + 1).await?;
                Err::<(), _>(TxError::application("undone"))
            });
            assert!(undone.await.is_err());
            let whole = cut(tx.begin(), Some(polls)).await.is_some();
            // If the begin has taken the transaction with it, this row must not stand by itself.
            let written = pooled.world.insert(&mut tx, next + 2).await.is_ok();
            match tx.commit().await {
                Ok(()) => {
                    expected.push(next);
                    expected.extend(written.then_some(next + 2));
                }
                Err(error) => {
                    assert!(matches!(error, TxError::Lost { .. } | TxError::Aborted { .. }), "{error:?}");
                    lost += 1;
                }
            }
            assert_eq!(pooled.world.committed().await, expected, "after {polls} polls");
            if whole {
                break;
            }
        }
    }
    assert!(lost > 0, "no begin was cut, so this test shows nothing");
    pooled.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_storm_behind_a_pooler_disturbs_nobody() {
    const DROPS: u32 = 50;
    let pooled = Pooled::new(DROPS).await;
    let mut events = pooled.db.events();
    for round in 0..3 {
        let guards = join_all((0..DROPS).map(async |n| {
            let mut tx = pooled.begin().await;
            pooled.world.insert(&mut tx, i64::from(n)).await.unwrap();
            tx
        }));
        let guards = guards.await;
        let start = Instant::now();
        let outcomes = join_all(guards.into_iter().map(drop_running)).await;
        assert!(outcomes.iter().all(|outcome| *outcome == CommitOutcome::RolledBack), "{outcomes:?}");
        assert!(start.elapsed() < SOON, "round {round}: {:?}", start.elapsed());
        let mut tx = pooled.begin().await;
        for n in 0..DROPS {
            let insert = timeout(SOON, pooled.world.insert(&mut tx, n.into())).await;
            insert.expect("a row is still locked").expect("a row is there that was rolled back");
        }
        tx.rollback().await.unwrap();
    }
    let mut terminated = 0;
    while let Ok(Some(event)) = timeout(Duration::from_millis(50), events.next()).await {
        terminated += usize::from(event == TxEvent::SessionTerminated);
    }
    assert_eq!(terminated, 0, "sessions were lost");
    pooled.end().await;
}

/// A transaction that its own SQL has ended no longer has its session, which another client may have.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_cancel_reaches_who_has_the_session_of_a_transaction_that_has_ended() {
    let mut pooled = Pooled::new(4).await;
    // Enough neighbours to take every session at once.
    let table = &pooled.theirs.table;
    for n in 1..4 {
        let table = format!("{table}_{n}");
        pooled.world.run(format!("CREATE TABLE {table} (n BIGINT PRIMARY KEY)")).await;
        pooled.neighbours.push(Neighbour::moves_in(&table));
    }
    let extra = pooled.neighbours.split_off(1);
    for _ in 0..3 {
        let mut tx = pooled.begin().await;
        Postgres::execute(&mut tx, "COMMIT".to_owned()).await.unwrap();
        // This runs on whatever session the pooler has given it.
        let nap = Postgres::execute(&mut tx, "SELECT pg_sleep(3)".to_owned());
        assert!(timeout(Duration::from_millis(30), nap).await.is_err(), "it did not sleep");
        let handle = tx.outcome_handle();
        drop(tx);
        timeout(PATIENCE, handle.outcome()).await.unwrap();
    }
    for (neighbour, n) in extra.into_iter().zip(1..) {
        assert!(neighbour.leaves().await > 0);
        pooled.world.run(format!("DROP TABLE {}_{n}", pooled.theirs.table)).await;
    }
    pooled.end().await;
}
