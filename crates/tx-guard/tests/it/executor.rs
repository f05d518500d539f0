//! The pool as an sqlx executor: queries without a transaction, whole, dropped and refused.

use std::time::{Duration, Instant};

use cancel_safe_testing::{Report, drop_after};
use cancel_safe_tx_guard::{TxError, TxPool};
use futures_util::stream::BoxStream;
use futures_util::{FutureExt, StreamExt, TryStreamExt};
use sqlx::pool::PoolOptions;
use sqlx::{Acquire, AssertSqlSafe, Executor, MySql, Pool, Postgres, SqlSafeStr, Sqlite, Statement};
use tokio::time::timeout;

use crate::cancel::{Stage, explore, side_by_side};
use crate::on_all;
use crate::silence::within;
use crate::world::{PATIENCE, SOON, TestDb, World, eventually};

/// Operations on a pool, as its users write them.
trait OnPool: TestDb {
    async fn one(db: &TxPool<Self>, sql: String) -> Result<i64, sqlx::Error>;
    async fn optional(db: &TxPool<Self>, sql: String) -> Result<Option<i64>, sqlx::Error>;
    async fn all(db: &TxPool<Self>, sql: String) -> Result<Vec<i64>, sqlx::Error>;
    /// It borrows nothing, like the stream of an sqlx pool.
    fn stream(db: &TxPool<Self>, sql: String) -> BoxStream<'static, Result<(), sqlx::Error>>;
    async fn write(db: &TxPool<Self>, sql: String) -> Result<(), sqlx::Error>;
    /// How many columns a query has according to the database, and according to the pool's description.
    async fn columns(db: &TxPool<Self>, sql: String) -> Result<[usize; 2], sqlx::Error>;
}

macro_rules! on_pool {
    ($($db:ident),+) => {
        $(impl OnPool for $db {
            async fn one(db: &TxPool<Self>, sql: String) -> Result<i64, sqlx::Error> {
                sqlx::query_scalar(AssertSqlSafe(sql)).fetch_one(db).await
            }

            async fn optional(db: &TxPool<Self>, sql: String) -> Result<Option<i64>, sqlx::Error> {
                sqlx::query_scalar(AssertSqlSafe(sql)).fetch_optional(db).await
            }

            async fn all(db: &TxPool<Self>, sql: String) -> Result<Vec<i64>, sqlx::Error> {
                sqlx::query_scalar(AssertSqlSafe(sql)).fetch_all(db).await
            }

            fn stream(db: &TxPool<Self>, sql: String) -> BoxStream<'static, Result<(), sqlx::Error>> {
                sqlx::query(AssertSqlSafe(sql)).fetch(db).map_ok(drop).boxed()
            }

            async fn write(db: &TxPool<Self>, sql: String) -> Result<(), sqlx::Error> {
                sqlx::query(AssertSqlSafe(sql)).execute(db).await.map(drop)
            }

            async fn columns(db: &TxPool<Self>, sql: String) -> Result<[usize; 2], sqlx::Error> {
                let prepared = db.prepare(AssertSqlSafe(sql.clone()).into_sql_str()).await?;
                let described = db.describe(AssertSqlSafe(sql).into_sql_str()).await?;
                Ok([prepared.columns().len(), described.columns().len()])
            }
        })+
    };
}

on_pool!(Sqlite, Postgres, MySql);

fn numbers<D: TestDb>(world: &World<D>) -> String {
    format!("SELECT n FROM {} ORDER BY n", world.table)
}

fn insert<D: TestDb>(world: &World<D>, n: i64) -> String {
    format!("INSERT INTO {} (n) VALUES ({n})", world.table)
}

/// Commits on a guard, on the same session.
async fn commits<D: TestDb>(world: &World<D>, db: &TxPool<D>, n: i64) {
    let mut tx = within(db.begin()).await.unwrap();
    world.insert(&mut tx, n).await.unwrap();
    within(tx.commit()).await.unwrap();
}

/// A pool of one session that belongs to the user.
async fn wrapped<D: TestDb>(world: &World<D>) -> (Pool<D>, TxPool<D>) {
    let pool = PoolOptions::<D>::new().max_connections(1).connect_with(world.options.clone()).await.unwrap();
    (pool.clone(), TxPool::wrap(pool))
}

async fn a_query_on_the_pool_sees_what_is_committed_and_costs_no_session<D: OnPool>() {
    let world = World::<D>::new().await;
    let db = world.pool(1).await;
    let mut expected = Vec::new();
    for n in 0..3 {
        assert_eq!(within(D::all(&db, numbers(&world))).await.unwrap(), expected);
        commits(&world, &db, n).await;
        expected.push(n);
        let last = format!("SELECT n FROM {} WHERE n = {n}", world.table);
        assert_eq!(within(D::one(&db, last.clone())).await.unwrap(), n);
        assert_eq!(within(D::optional(&db, last)).await.unwrap(), Some(n));
        let none = format!("SELECT n FROM {} WHERE n > {n}", world.table);
        assert_eq!(within(D::optional(&db, none)).await.unwrap(), None);
        assert_eq!(
            within(D::stream(&db, numbers(&world)).try_collect::<Vec<_>>()).await.unwrap().len(),
            expected.len()
        );
    }
    assert_eq!(within(D::columns(&db, format!("SELECT n, v FROM {}", world.table))).await.unwrap(), [2, 2]);
    assert_eq!(db.metrics().opened, 1);
    world.end(db).await;
}

async fn an_error_of_a_query_on_the_pool_leaves_its_session_to_others<D: OnPool>() {
    let world = World::<D>::new().await;
    let db = world.pool(1).await;
    for n in 0..3 {
        let error = within(D::one(&db, "SELECT n FROM no_such_table".to_owned())).await.unwrap_err();
        assert!(matches!(error, sqlx::Error::Database(_)), "{error}");
        let error = within(D::stream(&db, "SELECT n FROM no_such_table".to_owned()).try_next()).await.unwrap_err();
        assert!(matches!(error, sqlx::Error::Database(_)), "{error}");
        commits(&world, &db, n).await;
    }
    assert_eq!(db.metrics().opened, 1);
    world.end(db).await;
}

/// The rows never end, so they were not read ahead either.
async fn a_stream_that_is_dropped_midway_gives_its_session_back<D: OnPool>() {
    let world = World::<D>::new().await;
    let db = world.pool(1).await;
    for n in 0..3 {
        let mut rows = D::stream(&db, D::ENDLESS.to_owned());
        for _ in 0..=n {
            within(rows.try_next()).await.unwrap().unwrap();
        }
        assert_eq!(db.metrics().in_use, 1);
        let start = Instant::now();
        drop(rows);
        commits(&world, &db, n).await;
        assert!(start.elapsed() < SOON, "{:?}", start.elapsed());
    }
    assert_eq!(within(D::all(&db, numbers(&world))).await.unwrap(), [0, 1, 2]);
    world.end(db).await;
}

async fn a_stream_that_has_ended_holds_no_session<D: OnPool>() {
    let world = World::<D>::new().await;
    let db = world.pool(1).await;
    let mut rows = D::stream(&db, numbers(&world));
    assert!(within(rows.try_next()).await.unwrap().is_none());
    commits(&world, &db, 1).await;
    drop(rows);
    world.end(db).await;
}

async fn a_slow_query_that_is_dropped_ends_and_gives_its_session_back<D: OnPool>() {
    let world = World::<D>::new().await;
    let db = world.pool(1).await;
    for n in 0..3 {
        timeout(Duration::from_millis(30), D::optional(&db, D::SLOW.to_owned())).await.unwrap_err();
        let start = Instant::now();
        commits(&world, &db, n).await;
        assert!(start.elapsed() < SOON, "{:?}", start.elapsed());
    }
    world.end(db).await;
}

async fn a_write_on_the_pool_is_refused<D: OnPool>() {
    let world = World::<D>::new().await;
    let db = world.pool(1).await;
    within(D::write(&db, insert(&world, 1))).await.unwrap_err();
    // A statement that is already known is refused as well.
    within(D::write(&db, insert(&world, 1))).await.unwrap_err();
    commits(&world, &db, 2).await;
    assert_eq!(world.committed().await, [2]);
    world.end(db).await;
}

async fn the_errors_of_the_pool_come_as_those_of_sqlx<D: OnPool>() {
    let world = World::<D>::new().await;
    let db = TxPool::<D>::builder().max_connections(1).acquire_timeout(Duration::from_millis(20));
    let db = db.connect_with(world.options.clone()).await.unwrap();
    let held = db.begin().await.unwrap();
    let error = within(D::one(&db, numbers(&world))).await.unwrap_err();
    assert!(matches!(error, sqlx::Error::PoolTimedOut), "{error}");
    let error = TxError::from(error);
    assert!(error.is_unavailable() && error.is_timeout(), "{error}");
    held.rollback().await.unwrap();
    assert!(db.close(PATIENCE).await.is_clean());
    let error = within(D::stream(&db, numbers(&world)).try_next()).await.unwrap_err();
    assert!(matches!(error, sqlx::Error::PoolClosed), "{error}");
    world.end(db).await;
}

/// Its owner uses the only session as well.
async fn a_wrapped_pool_answers_queries<D: OnPool>() {
    let world = World::<D>::new().await;
    let (pool, db) = wrapped(&world).await;
    assert_eq!(within(D::all(&db, numbers(&world))).await.unwrap(), [0_i64; 0]);
    within(D::stream(&db, D::MILLION.to_owned()).try_next()).await.unwrap().unwrap();
    timeout(Duration::from_millis(30), D::optional(&db, D::SLOW.to_owned())).await.unwrap_err();
    commits(&world, &db, 1).await;
    let mut conn = within(pool.acquire()).await.unwrap();
    world.insert(&mut conn, 2).await.unwrap();
    drop(conn);
    assert_eq!(within(D::all(&db, numbers(&world))).await.unwrap(), [1, 2]);
    world.end(db).await;
    pool.close().await;
}

on_all!(
    a_query_on_the_pool_sees_what_is_committed_and_costs_no_session,
    an_error_of_a_query_on_the_pool_leaves_its_session_to_others,
    a_stream_that_is_dropped_midway_gives_its_session_back,
    a_stream_that_has_ended_holds_no_session,
    a_slow_query_that_is_dropped_ends_and_gives_its_session_back,
    a_write_on_the_pool_is_refused,
    the_errors_of_the_pool_come_as_those_of_sqlx,
    a_wrapped_pool_answers_queries,
);

async fn write_on_a_wrapped_pool<D: OnPool>() -> Result<(), sqlx::Error> {
    let world = World::<D>::new().await;
    let (pool, db) = wrapped(&world).await;
    let written = within(D::write(&db, insert(&world, 1))).await;
    assert_eq!(world.committed().await, if written.is_ok() { vec![1] } else { Vec::new() });
    commits(&world, &db, 2).await;
    // The owner can still write on its own connections.
    let mut conn = within(pool.acquire()).await.unwrap();
    world.insert(&mut conn, 3).await.unwrap();
    drop(conn);
    world.end(db).await;
    pool.close().await;
    written
}

/// There the session is the user's, and may write.
#[tokio::test]
async fn a_write_on_a_wrapped_pool_is_committed_by_servers() {
    write_on_a_wrapped_pool::<Postgres>().await.unwrap();
    write_on_a_wrapped_pool::<MySql>().await.unwrap();
}

/// The hooks that refuse it are set on each connection.
#[tokio::test]
async fn a_write_on_a_wrapped_pool_is_refused_by_sqlite() {
    write_on_a_wrapped_pool::<Sqlite>().await.unwrap_err();
}

#[test]
fn a_query_on_the_pool_outside_any_runtime_is_an_error() {
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let db = runtime.block_on(TxPool::<Sqlite>::connect("sqlite::memory:")).unwrap();
    let error = Sqlite::one(&db, "SELECT 1".to_owned()).now_or_never().unwrap().unwrap_err();
    assert!(matches!(error, sqlx::Error::Io(_)), "{error:?}");
    assert!(matches!(TxError::from(error), TxError::NoRuntime));
}

/// If a type implements `Acquire`, this trait is ambiguous for it, so this compiles only as long as it does not.
trait NoAcquire<Way> {
    const HOLDS: () = ();
}

struct If;

impl<T> NoAcquire<()> for T {}

impl<T: for<'a> Acquire<'a>> NoAcquire<If> for T {}

/// Otherwise it would begin transactions without a guard.
const _: [(); 3] = [
    <&TxPool<Sqlite> as NoAcquire<_>>::HOLDS,
    <&TxPool<Postgres> as NoAcquire<_>>::HOLDS,
    <&TxPool<MySql> as NoAcquire<_>>::HOLDS,
];

/// As the handler of a web server requires.
#[tokio::test]
async fn a_query_behind_a_shared_reference_can_be_sent_to_another_thread() {
    struct Service(TxPool<Sqlite>);

    impl Service {
        async fn answer(&self, to: &str) -> Result<i64, TxError> {
            let length = sqlx::query_scalar::<_, i64>("SELECT length(?)").bind(to);
            let answers: Vec<_> = length.fetch(&self.0).try_collect().await?;
            let more: i64 = sqlx::query_scalar("SELECT ?").bind(answers[0]).fetch_one(&self.0).await?;
            Ok(more)
        }
    }

    let service = Service(TxPool::<Sqlite>::connect("sqlite::memory:").await.unwrap());
    let answer = tokio::spawn(async move { service.answer("four").await });
    assert_eq!(answer.await.unwrap().unwrap(), 4);
}

/// Nor does one that was dropped after its first poll.
#[tokio::test]
async fn a_stream_that_was_never_polled_holds_no_session() {
    let world = World::<Sqlite>::new().await;
    let db = world.pool(1).await;
    let never = Sqlite::stream(&db, numbers(&world));
    let mut dropped = Sqlite::stream(&db, Sqlite::ENDLESS.to_owned());
    drop(drop_after(1, dropped.try_next()).await);
    drop(dropped);
    commits(&world, &db, 1).await;
    eventually("nothing is left", async || db.metrics().in_use + db.metrics().settling == 0).await;
    drop(never);
    world.end(db).await;
}

/// Everything that a pool does for a query: an answer, a stream that is dropped midway, another answer, and a
/// description.
async fn queries<D: OnPool>(stage: &Stage<D>) {
    let (world, db) = (&stage.world, &stage.db);
    assert_eq!(D::one(db, format!("SELECT COUNT(*) FROM {}", world.table)).await.unwrap(), 0);
    let mut rows = D::stream(db, D::MILLION.to_owned());
    for _ in 0..2 {
        rows.try_next().await.unwrap().unwrap();
    }
    drop(rows);
    assert_eq!(D::all(db, numbers(world)).await.unwrap(), [0_i64; 0]);
    assert_eq!(D::columns(db, numbers(world)).await.unwrap(), [1, 1]);
}

fn on_a_pool_of_its_own<D: OnPool>() -> Report {
    explore().run(
        async || Stage::<D>::new().await,
        async |stage| {
            queries(stage).await;
            D::write(&stage.db, insert(&stage.world, 1)).await.unwrap_err();
        },
        async |stage, outcome| stage.check(outcome, &[]).await,
    )
}

#[test]
fn queries_dropped_anywhere_leave_a_session_that_works_on_sqlite() {
    on_a_pool_of_its_own::<Sqlite>().publish("tx-guard", "queries (SQLite)").assert_clean();
}

#[test]
fn queries_dropped_anywhere_leave_a_session_that_works_on_postgres() {
    on_a_pool_of_its_own::<Postgres>().publish("tx-guard", "queries (PostgreSQL)").assert_clean();
}

#[test]
fn queries_dropped_anywhere_leave_a_session_that_works_on_mysql() {
    on_a_pool_of_its_own::<MySql>().publish("tx-guard", "queries (MySQL)").assert_clean();
}

fn on_a_wrapped_pool<D: OnPool>() -> Report {
    explore().budgets([]).run(
        async || {
            let world = World::<D>::new().await;
            let (pool, db) = wrapped(&world).await;
            (Stage::over(world, db), pool)
        },
        async |(stage, _)| queries(stage).await,
        async |(stage, pool), outcome| {
            let mut conn = within(pool.acquire()).await.map_err(|error| error.to_string())?;
            D::numbers(&mut conn, numbers(&stage.world)).await.map_err(|error| error.to_string())?;
            drop(conn);
            stage.check(outcome, &[]).await
        },
    )
}

#[test]
fn queries_on_a_wrapped_pool_dropped_anywhere_leave_a_session_that_works() {
    side_by_side([
        || on_a_wrapped_pool::<Sqlite>().publish("tx-guard", "queries, wrapped (SQLite)").assert_clean(),
        || on_a_wrapped_pool::<Postgres>().publish("tx-guard", "queries, wrapped (PostgreSQL)").assert_clean(),
        || on_a_wrapped_pool::<MySql>().publish("tx-guard", "queries, wrapped (MySQL)").assert_clean(),
    ]);
}
