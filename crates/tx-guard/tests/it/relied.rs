//! What the crate relies on in sqlx beyond what sqlx promises: one test for each habit, which fails with a sentence that
//! names it when sqlx changes it. `docs/architecture.md` says which room relies on which.
//!
//! None of our pools is in this room: a failure here is sqlx's, and a failure elsewhere is ours.

use futures_util::{FutureExt, StreamExt};
use sqlx::database::HasStatementCache;
use sqlx::mysql::MySqlConnectOptions;
use sqlx::pool::PoolOptions;
use sqlx::postgres::PgConnectOptions;
use sqlx::{
    Column, ConnectOptions, Connection, Database, Either, Executor, MySql, PgConnection, Postgres, Row, SqlSafeStr,
    Sqlite, SqliteConnection, Statement,
};
use sqlx_core::transaction::TransactionManager;
use tokio::sync::OnceCell;

use crate::fuzz::cut::cut;
use crate::on_all;
use crate::world::{PATIENCE, POSTGRES, Server, TestDb, World, eventually, url};

type MySqlManager = <MySql as Database>::TransactionManager;

on_all!(the_depth_counts_transactions_of_sqlx_alone);

fn depth<D: Database>(conn: &D::Connection) -> usize {
    D::TransactionManager::get_transaction_depth(conn)
}

fn start_rollback<D: Database>(conn: &mut D::Connection) {
    D::TransactionManager::start_rollback(conn);
}

async fn begin<D: Database>(conn: &mut D::Connection, sql: &'static str) -> Result<(), sqlx::Error> {
    D::TransactionManager::begin(conn, Some(sql.into_sql_str())).await
}

/// The code of the database's error.
fn code(answer: &Result<Vec<i64>, sqlx::Error>) -> Option<String> {
    Some(answer.as_ref().err()?.as_database_error()?.code()?.into_owned())
}

/// `backend`: sqlx's depth says whether a transaction is open, on each use of a guard.
async fn the_depth_counts_transactions_of_sqlx_alone<D: TestDb>() {
    const HABIT: &str = "sqlx has changed: its depth is not any more the number of its own transactions that are open";
    let world = World::<D>::new().await;
    let mut conn = world.plain().await;
    assert_eq!(depth::<D>(&conn), 0, "{HABIT}");
    begin::<D>(&mut conn, "BEGIN").await.unwrap();
    assert_eq!(depth::<D>(&conn), 1, "{HABIT}");
    world.insert(&mut conn, 1).await.unwrap();
    D::TransactionManager::begin(&mut conn, None).await.unwrap();
    assert_eq!(depth::<D>(&conn), 2, "{HABIT}");
    let refused = begin::<D>(&mut conn, "BEGIN").await;
    assert!(matches!(refused, Err(sqlx::Error::InvalidSavePointStatement)), "{HABIT}: {refused:?}");
    // A commit takes one level away, and a rollback another.
    D::TransactionManager::commit(&mut conn).await.unwrap();
    assert_eq!(depth::<D>(&conn), 1, "{HABIT}");
    // sqlx does not read the SQL.
    D::execute(&mut conn, "COMMIT".to_owned()).await.unwrap();
    assert_eq!(depth::<D>(&conn), 1, "{HABIT}: it sees what SQL does");
    D::execute(&mut conn, "BEGIN".to_owned()).await.unwrap();
    D::TransactionManager::rollback(&mut conn).await.unwrap();
    assert_eq!(depth::<D>(&conn), 0, "{HABIT}");
    assert_eq!(world.committed().await, [1]);
    world.run(format!("DROP TABLE {}", world.table)).await;
}

/// `guard`: a nested `begin` that was cut has ended the guard's transaction exactly if the depth is zero.
async fn a_nested_begin_that_is_cut_leaves_the_depth_that_is_true<D: Server>() {
    let world = World::<D>::new().await;
    for levels in 1..3 {
        for polls in 1.. {
            let mut conn = world.plain().await;
            begin::<D>(&mut conn, "BEGIN").await.unwrap();
            world.insert(&mut conn, 1).await.unwrap();
            for _ in 1..levels {
                D::TransactionManager::begin(&mut conn, None).await.unwrap();
            }
            let whole = cut(conn.begin(), Some(polls)).await.is_some();
            let open = depth::<D>(&conn) > 0;
            let there = D::numbers(&mut conn, format!("SELECT n FROM {}", world.table)).await.unwrap() == [1];
            assert_eq!(
                open, there,
                "sqlx has changed: behind a nested begin that was dropped, its depth does not say whether the transaction \
                 stands"
            );
            conn.close().await.unwrap();
            if whole {
                break;
            }
        }
    }
    world.run(format!("DROP TABLE {}", world.table)).await;
}

#[tokio::test]
async fn a_nested_begin_that_is_cut_leaves_the_depth_that_is_true_on_postgres() {
    a_nested_begin_that_is_cut_leaves_the_depth_that_is_true::<Postgres>().await;
}

#[tokio::test]
async fn a_nested_begin_that_is_cut_leaves_the_depth_that_is_true_on_mysql() {
    a_nested_begin_that_is_cut_leaves_the_depth_that_is_true::<MySql>().await;
}

/// `postgres`: BEGIN and its limits go in one message.
#[tokio::test]
async fn a_begin_of_several_statements_is_one_message_on_postgres() {
    const HABIT: &str = "sqlx has changed: `begin` does not take several statements any more";
    let mut conn = plain::<Postgres>().await;
    begin::<Postgres>(&mut conn, "BEGIN READ ONLY; SET LOCAL statement_timeout = 4711").await.expect(HABIT);
    let shown = "SELECT current_setting('statement_timeout') LIKE '4711ms'";
    assert!(sqlx::query_scalar::<_, bool>(shown).fetch_one(&mut conn).await.unwrap(), "{HABIT}");
    start_rollback::<Postgres>(&mut conn);
    // If a later one of several statements fails, the begin returns its error.
    let refused = begin::<Postgres>(&mut conn, "BEGIN; SET LOCAL statement_timeout = 'never'").await;
    assert!(matches!(refused, Err(sqlx::Error::Database(_))), "{HABIT}: {refused:?}");
    // A statement that begins nothing has an error of its own: such a session is taken for dead.
    let mut conn = plain::<Postgres>().await;
    let none = begin::<Postgres>(&mut conn, "SELECT 1").await;
    assert!(matches!(none, Err(sqlx::Error::BeginFailed)), "sqlx has changed: a BEGIN without effect is {none:?}");
}

/// Whether the sqlx that runs here queues a `ROLLBACK` behind a `begin` that is dropped.
pub(crate) static TAKES_BACK: OnceCell<bool> = OnceCell::const_new();

pub(crate) async fn takes_dropped_begins_back() -> bool {
    let look = async || {
        let mut conn = plain::<Postgres>().await;
        // Repeated until one is dropped before its answer.
        while begin::<Postgres>(&mut conn, "SELECT 1").now_or_never().is_some() {}
        conn.should_flush()
    };
    *TAKES_BACK.get_or_init(look).await
}

/// `postgres`: the queue behind a dropped `begin` shows whether sqlx takes it back, and so whether the depth of a
/// transaction that was cut two levels deep is zero or one.
#[tokio::test]
async fn a_begin_that_is_taken_back_leaves_one_level_more_on_postgres() {
    let takes_back = takes_dropped_begins_back().await;
    // A server that is near may have answered within the poll.
    for _ in 0..1_000 {
        let mut conn = plain::<Postgres>().await;
        begin::<Postgres>(&mut conn, "BEGIN").await.unwrap();
        let mut nested = conn.begin().await.unwrap();
        let is_cut = cut(nested.begin(), Some(1)).await.is_none();
        // Forgotten, because its own end is not tested here.
        std::mem::forget(nested);
        if is_cut {
            let levels = depth::<Postgres>(&conn);
            let said = "sqlx has changed: a begin that was cut two levels deep leaves another depth";
            return assert_eq!(levels, usize::from(takes_back), "{said}");
        }
    }
    panic!("no begin was cut, so this test shows nothing");
}

/// `postgres`, the fence, readers and hooks: one poll of `begin`, or of a query, queues its message ahead of what follows,
/// whatever becomes of it; a `begin` that is forgotten is not taken back.
#[tokio::test]
async fn one_poll_of_a_begin_queues_its_message_on_postgres() {
    const HABIT: &str =
        "sqlx has changed: one poll of a begin does not queue its message ahead of what follows any more";
    let mut conn = plain::<Postgres>().await;
    // A server that is near may have answered at once.
    let fence = "SET SESSION CHARACTERISTICS AS TRANSACTION READ ONLY";
    drop(begin::<Postgres>(&mut conn, fence).now_or_never());
    let fenced = "SELECT (current_setting('default_transaction_read_only') = 'on')::int::bigint".to_owned();
    assert_eq!(Postgres::numbers(&mut conn, fenced).await.unwrap(), [1], "{HABIT}");

    let mut conn = plain::<Postgres>().await;
    let query = "SET lock_timeout = 4711".to_owned();
    drop(Postgres::execute(&mut conn, query).now_or_never());
    let queued = "SELECT (current_setting('lock_timeout') = '4711ms')::int::bigint".to_owned();
    assert_eq!(Postgres::numbers(&mut conn, queued).await.unwrap(), [1], "{HABIT}, nor does one of a query");

    let mut conn = plain::<Postgres>().await;
    let mut hold = Box::pin(begin::<Postgres>(&mut conn, "BEGIN READ ONLY"));
    drop(hold.as_mut().now_or_never());
    std::mem::forget(hold);
    for _ in 0..2 {
        let held = "SELECT (current_setting('transaction_read_only') = 'on')::int::bigint".to_owned();
        assert_eq!(Postgres::numbers(&mut conn, held).await.unwrap(), [1], "{HABIT}, or takes a forgotten one back");
    }
}

/// `mysql`: START TRANSACTION, its settings and its mark go in one message.
#[tokio::test]
async fn a_begin_of_several_statements_is_one_message_on_mysql() {
    const HABIT: &str = "sqlx has changed: `begin` does not take several statements any more";
    let mut conn = plain::<MySql>().await;
    begin::<MySql>(&mut conn, "SET lock_wait_timeout = 4711; START TRANSACTION; SAVEPOINT a").await.expect(HABIT);
    let numbers = MySql::numbers(&mut conn, "SELECT CAST(@@lock_wait_timeout AS SIGNED)".to_owned()).await;
    assert_eq!(numbers.unwrap(), [4711], "{HABIT}");
    assert_eq!(depth::<MySql>(&conn), 1, "{HABIT}");
    let mut conn = plain::<MySql>().await;
    let none = begin::<MySql>(&mut conn, "DO 1").await;
    assert!(matches!(none, Err(sqlx::Error::BeginFailed)), "sqlx has changed: a BEGIN without effect is {none:?}");
}

/// `proof`, `slot` and the three rollbacks: a rollback is queued without waiting and counts at once; it goes out with
/// the next message, or by one poll of `flush`.
async fn a_rollback_is_queued_and_counts_at_once<D: Server>() {
    const HABIT: &str = "sqlx has changed: `start_rollback` does not queue the rollback any more and lower the depth";
    let world = World::<D>::new().await;
    let mut conn = world.plain().await;
    let start = async |conn: &mut D::Connection, n: i64| {
        begin::<D>(conn, "BEGIN").await.unwrap();
        world.insert(conn, n).await.unwrap();
        start_rollback::<D>(conn);
        assert_eq!(depth::<D>(conn), 0, "{HABIT}");
    };
    start(&mut conn, 1).await;
    // A statement of its own, so if it runs after the rollback, it is committed at once.
    world.insert(&mut conn, 2).await.unwrap();
    assert_eq!(world.committed().await, [2], "{HABIT}");
    start(&mut conn, 3).await;
    let sent = conn.flush().now_or_never();
    assert!(sent.is_none_or(|sent| sent.is_ok()), "sqlx has changed: `flush` fails where an answer is due");
    // Nobody touches the connection: the row is free if the rollback was sent by that one poll.
    let mut other = world.plain().await;
    let freed = tokio::time::timeout(PATIENCE, world.insert(&mut other, 3)).await;
    assert!(freed.is_ok(), "sqlx has changed: one poll of `flush` does not send what is queued any more");
    world.run(format!("DROP TABLE {}", world.table)).await;
}

#[tokio::test]
async fn a_rollback_is_queued_and_counts_at_once_on_postgres() {
    a_rollback_is_queued_and_counts_at_once::<Postgres>().await;
}

#[tokio::test]
async fn a_rollback_is_queued_and_counts_at_once_on_mysql() {
    a_rollback_is_queued_and_counts_at_once::<MySql>().await;
}

/// `settle` and `in_step`: `flush` is ready in its first poll if there is nothing to read, and waits otherwise.
async fn a_flush_says_in_one_poll_whether_an_answer_is_due<D: Server>(nap: &'static str) {
    const HABIT: &str = "sqlx has changed: `flush` does not say any more whether an answer is due";
    let mut conn = plain::<D>().await;
    D::numbers(&mut conn, format!("SELECT CAST(1 AS {})", D::BIGINT)).await.unwrap();
    assert!(matches!(conn.flush().now_or_never(), Some(Ok(()))), "{HABIT}: it waits without need");
    assert!(D::execute(&mut conn, nap.to_owned()).now_or_never().is_none());
    assert!(conn.flush().now_or_never().is_none(), "{HABIT}: it does not wait for the answer to a dropped statement");
    conn.flush().await.unwrap();
    assert!(matches!(conn.flush().now_or_never(), Some(Ok(()))), "{HABIT}: it waits without need");
}

#[tokio::test]
async fn a_flush_says_in_one_poll_whether_an_answer_is_due_on_postgres() {
    a_flush_says_in_one_poll_whether_an_answer_is_due::<Postgres>("SELECT pg_sleep(2)").await;
}

#[tokio::test]
async fn a_flush_says_in_one_poll_whether_an_answer_is_due_on_mysql() {
    a_flush_says_in_one_poll_whether_an_answer_is_due::<MySql>("DO SLEEP(2)").await;
}

/// `in_step`: a preparation first sends what is queued, and reads the answer to it.
#[tokio::test]
async fn a_preparation_is_behind_the_rollback_that_was_queued_on_mysql() {
    let world = World::<MySql>::new().await;
    let mut conn = world.plain().await;
    begin::<MySql>(&mut conn, "BEGIN").await.unwrap();
    world.insert(&mut conn, 1).await.unwrap();
    start_rollback::<MySql>(&mut conn);
    let prepared = (&mut conn).prepare("SELECT 7 AS seven".into_sql_str()).await.unwrap();
    assert_eq!(prepared.columns()[0].name(), "seven", "sqlx has changed: a preparation reads the answer to a rollback");
    let mut other = world.plain().await;
    let freed = tokio::time::timeout(PATIENCE, world.insert(&mut other, 1)).await;
    assert!(freed.is_ok(), "sqlx has changed: a preparation does not send what is queued any more");
    world.run(format!("DROP TABLE {}", world.table)).await;
}

/// The rollbacks: a dropped statement's remains answer first, at most once, and the next statement gets their errors.
#[tokio::test]
async fn the_error_of_a_dropped_statement_is_told_to_the_next_one_on_postgres() {
    const HABIT: &str = "sqlx has changed: the error of a dropped statement is not told to the next one any more";
    let mut conn = plain::<Postgres>().await;
    // The statement has not failed yet when the first poll ends.
    let failing = "SELECT pg_sleep(1); SELECT 1 / 0".to_owned();
    assert!(Postgres::execute(&mut conn, failing).now_or_never().is_none());
    let next = Postgres::numbers(&mut conn, "SELECT 1::BIGINT".to_owned()).await;
    assert_eq!(code(&next).as_deref(), Some("22012"), "{HABIT}: {next:?}");
    let next = Postgres::numbers(&mut conn, "SELECT 2::BIGINT".to_owned()).await;
    assert_eq!(next.unwrap(), [2], "{HABIT} alone");
}

/// `proof`: a message of several statements answers one by one, the name of its column identifies its row, and an error
/// ends it.
#[tokio::test]
async fn a_message_of_several_statements_is_answered_one_by_one_on_postgres() {
    const HABIT: &str = "sqlx has changed: `raw_sql` does not tell the answers to the statements of one message apart";
    let mut conn = plain::<Postgres>().await;
    let parts = parts(&mut conn, "SELECT 7 AS ours; BEGIN; COMMIT AND CHAIN; SELECT 1 / 0; SELECT 8").await;
    let said: Vec<String> = parts
        .iter()
        .map(|part| match part {
            Ok(Either::Right(row)) => {
                let text = row.try_get_raw(0).ok().and_then(|value| value.as_str().ok().map(str::to_owned));
                format!("{}={}", row.columns()[0].name(), text.expect("rows of the simple protocol are text"))
            }
            Ok(Either::Left(_)) => "done".to_owned(),
            Err(error) => error.as_database_error().and_then(|error| error.code()).unwrap_or_default().into_owned(),
        })
        .collect();
    assert_eq!(said, ["ours=7", "done", "done", "done", "22012"], "{HABIT}");
}

/// `in_step`: the same, where each end of an answer is counted.
#[tokio::test]
async fn a_message_of_several_statements_is_answered_one_by_one_on_mysql() {
    const HABIT: &str = "sqlx has changed: `raw_sql` does not tell the answers to the statements of one message apart";
    let mut conn = plain::<MySql>().await;
    let (mut said, sql) = (Vec::new(), "SELECT 7; DO 0; RELEASE SAVEPOINT none; DO 0");
    {
        let mut answers = sqlx::raw_sql(sql).fetch_many(&mut conn);
        while let Some(answer) = answers.next().await {
            said.push(match answer {
                Ok(Either::Right(row)) => {
                    row.try_get::<i64, _>(0).map_or_else(|error| error.to_string(), |n| n.to_string())
                }
                Ok(Either::Left(_)) => "done".to_owned(),
                Err(_) => "error".to_owned(),
            });
        }
    }
    assert_eq!(said, ["7", "done", "done", "error"], "{HABIT}");
}

async fn parts(
    conn: &mut PgConnection,
    sql: &'static str,
) -> Vec<Result<Either<sqlx::postgres::PgQueryResult, sqlx::postgres::PgRow>, sqlx::Error>> {
    sqlx::raw_sql(sql).fetch_many(conn).collect().await
}

/// `known`: all clones of a statement in the cache share one list of columns, and no two connections do.
async fn a_connection_is_told_by_the_columns_of_a_statement_it_keeps<D>(without_cache: D::Connection)
where
    D: Server + HasStatementCache,
    for<'c> &'c mut D::Connection: Executor<'c, Database = D>,
{
    const HABIT: &str = "sqlx has changed: a connection cannot be told any more by the columns of a statement it keeps";
    const SQL: &str = "SELECT 1, 2";
    let address = |statement: &D::Statement| statement.columns().as_ptr().addr();
    let mut one = plain::<D>().await;
    let mut two = plain::<D>().await;
    let first = one.prepare(SQL.into_sql_str()).await.unwrap();
    let again = one.prepare(SQL.into_sql_str()).await.unwrap();
    let other = two.prepare(SQL.into_sql_str()).await.unwrap();
    assert_eq!(address(&first), address(&again), "{HABIT}: it is copied");
    assert_ne!(address(&first), address(&other), "{HABIT}: connections share it");
    assert_eq!(one.cached_statements_size(), 1, "{HABIT}: it is not counted");
    one.clear_cached_statements().await.unwrap();
    let anew = one.prepare(SQL.into_sql_str()).await.unwrap();
    assert_ne!(address(&first), address(&anew), "{HABIT}: it outlives the cache");
    let mut without = without_cache;
    without.prepare(SQL.into_sql_str()).await.unwrap();
    assert_eq!(without.cached_statements_size(), 0, "{HABIT}: a cache of none has one");
}

#[tokio::test]
async fn a_connection_is_told_by_the_columns_of_a_statement_it_keeps_on_postgres() {
    let options: PgConnectOptions = Postgres::place().1;
    let without = options.statement_cache_capacity(0).connect().await.unwrap();
    a_connection_is_told_by_the_columns_of_a_statement_it_keeps::<Postgres>(without).await;
}

#[tokio::test]
async fn a_connection_is_told_by_the_columns_of_a_statement_it_keeps_on_mysql() {
    let options: MySqlConnectOptions = MySql::place().1;
    let without = options.statement_cache_capacity(0).connect().await.unwrap();
    a_connection_is_told_by_the_columns_of_a_statement_it_keeps::<MySql>(without).await;
}

/// `slot`: a connection that is dropped is closed, whatever runs on it, so the server ends its session.
async fn a_dropped_connection_is_closed<D: Server>(id: &'static str, sessions: &'static str) {
    let mut beside = plain::<D>().await;
    let mut conn = plain::<D>().await;
    let id = D::numbers(&mut conn, id.to_owned()).await.unwrap()[0];
    let sessions = sessions.replace('?', &id.to_string());
    assert_eq!(D::numbers(&mut beside, sessions.clone()).await.unwrap(), [1]);
    begin::<D>(&mut conn, "BEGIN").await.unwrap();
    drop(conn);
    let gone = async || D::numbers(&mut beside, sessions.clone()).await.unwrap() == [0];
    eventually("sqlx has changed: a dropped connection is not closed any more", gone).await;
}

#[tokio::test]
async fn a_dropped_connection_is_closed_on_postgres() {
    let sessions = "SELECT count(*) FROM pg_stat_activity WHERE pid = ?";
    a_dropped_connection_is_closed::<Postgres>("SELECT pg_backend_pid()::BIGINT", sessions).await;
}

#[tokio::test]
async fn a_dropped_connection_is_closed_on_mysql() {
    let sessions = "SELECT count(*) FROM information_schema.processlist WHERE id = ?";
    a_dropped_connection_is_closed::<MySql>("SELECT CAST(CONNECTION_ID() AS SIGNED)", sessions).await;
}

/// `mysql`: a rollback that fails takes no level away, so it can be tried again.
#[tokio::test]
async fn a_rollback_that_fails_takes_no_level_away_on_mysql() {
    let mut conn = plain::<MySql>().await;
    begin::<MySql>(&mut conn, "START TRANSACTION").await.unwrap();
    MySqlManager::begin(&mut conn, None).await.unwrap();
    MySql::execute(&mut conn, "ROLLBACK".to_owned()).await.unwrap();
    assert!(MySqlManager::rollback(&mut conn).await.is_err(), "there is no savepoint any more");
    assert_eq!(depth::<MySql>(&conn), 2, "sqlx has changed: a rollback that fails takes a level away");
}

async fn plain<D: TestDb>() -> D::Connection {
    D::place().1.connect().await.unwrap()
}

/// `sqlite`: the hooks stay where they were set, and see what runs on sqlx's own thread; a ping waits for all that was
/// queued before it.
#[tokio::test]
async fn hooks_stay_and_a_ping_is_behind_what_was_dropped_on_sqlite() {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering};

    const HABIT: &str = "sqlx has changed: hooks of SQLite do not see what sqlx's own thread does any more";
    let world = World::<Sqlite>::new().await;
    let mut conn: SqliteConnection = world.plain().await;
    let (commits, rollbacks) = (Arc::<AtomicUsize>::default(), Arc::<AtomicUsize>::default());
    let steps = Arc::<AtomicUsize>::default();
    {
        let mut handle = conn.lock_handle().await.unwrap();
        let (commits, rollbacks, steps) = (Arc::clone(&commits), Arc::clone(&rollbacks), Arc::clone(&steps));
        handle.set_commit_hook(move || commits.fetch_add(1, Ordering::SeqCst) == 0);
        handle.set_rollback_hook(move || {
            rollbacks.fetch_add(1, Ordering::SeqCst);
        });
        handle.set_progress_handler(100, move || steps.fetch_add(1, Ordering::SeqCst) < usize::MAX);
    }
    world.insert(&mut conn, 1).await.unwrap();
    let refused = world.insert(&mut conn, 2).await;
    assert!(refused.is_err(), "{HABIT}: a commit was not stopped");
    assert_eq!((commits.load(Ordering::SeqCst), rollbacks.load(Ordering::SeqCst)), (2, 1), "{HABIT}");
    let count = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n LIMIT 50000) SELECT count(*) FROM n";
    // Dropped: it may not have begun, but it was queued.
    drop(Sqlite::execute(&mut conn, count.to_owned()).now_or_never());
    conn.ping().await.unwrap();
    assert!(
        steps.load(Ordering::SeqCst) > 1_000,
        "sqlx has changed: a ping of SQLite is not behind what was queued before it any more"
    );
    drop(conn);
    assert_eq!(world.committed().await, [1]);
}

/// `sqlite`: sqlx returns `Ok` if it counts no transaction, and keeps its count if SQLite has rolled back by itself.
#[tokio::test]
async fn a_commit_of_nothing_is_fine_and_a_failed_rollback_takes_no_level_away_on_sqlite() {
    type Manager = <Sqlite as Database>::TransactionManager;
    let world = World::<Sqlite>::new().await;
    let mut conn = world.plain().await;
    assert!(Manager::commit(&mut conn).await.is_ok(), "sqlx has changed: a commit without a transaction is an error");
    begin::<Sqlite>(&mut conn, "BEGIN IMMEDIATE").await.unwrap();
    Sqlite::execute(&mut conn, "ROLLBACK".to_owned()).await.unwrap();
    let refused = Manager::rollback(&mut conn).await;
    assert!(matches!(refused, Err(sqlx::Error::Database(_))), "sqlx has changed: {refused:?}");
    assert_eq!(depth::<Sqlite>(&conn), 1, "sqlx has changed: a rollback that fails takes a level away");
}

/// With a slow server, and without waiting for it.
#[tokio::test]
async fn a_connection_is_back_when_its_return_has_ended_on_postgres() {
    let options: PgConnectOptions = url(POSTGRES).parse().unwrap();
    let pool = PoolOptions::<Postgres>::new().max_connections(1).connect_with(options).await.unwrap();
    let mut conn = pool.acquire().await.unwrap();
    begin::<Postgres>(&mut conn, "BEGIN").await.unwrap();
    assert!(!conn.should_flush());
    start_rollback::<Postgres>(&mut conn);
    assert!(conn.should_flush(), "should_flush does not tell what is queued any more");
    conn.return_to_pool().await;
    assert_eq!(pool.num_idle(), 1, "a connection is not back when return_to_pool has ended");
    let mut conn = pool.acquire().await.unwrap();
    assert!(!conn.should_flush(), "what was queued is still there");
    let slow = Postgres::execute(&mut conn, Postgres::SLOW.to_owned());
    assert!(tokio::time::timeout(std::time::Duration::from_millis(20), slow).await.is_err());
    let returned = tokio::time::timeout(std::time::Duration::from_millis(20), conn.return_to_pool()).await;
    assert!(returned.is_err(), "return_to_pool does not wait for what still runs");
    assert_eq!(pool.size(), 0, "a connection whose return was dropped still counts");
    pool.close().await;
}
