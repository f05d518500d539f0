//! What the server is told to end, and when a transaction ends there by itself.

use std::env;

use sqlx::ConnectOptions;
use tokio::time::sleep;

use super::*;
use crate::backend::Cancels;

fn options() -> Arc<MySqlConnectOptions> {
    let url = env::var("CANCEL_SAFE_TEST_MYSQL_URL");
    Arc::new(url.expect("set CANCEL_SAFE_TEST_MYSQL_URL or run cargo xtask test tx-guard").parse().unwrap())
}

/// Waits until the session learns that it was ended.
async fn ends(conn: &mut MySqlConnection) {
    while conn.ping().await.is_ok() {
        sleep(Duration::from_millis(5)).await;
    }
}

#[tokio::test]
async fn those_who_have_gone_keep_nobody_else_from_being_killed() {
    let options = options();
    let mut beside = options.connect().await.unwrap();
    let (mut one, mut two) = (options.connect().await.unwrap(), options.connect().await.unwrap());
    let ids = [identify(&mut one, false).await.unwrap().id, identify(&mut two, false).await.unwrap().id];
    kill(&mut beside, "KILL CONNECTION", &ids[..1]).await.unwrap();
    ends(&mut one).await;
    let count = format!("SELECT COUNT(*) FROM information_schema.processlist WHERE id = {}", ids[0]);
    while sqlx::query_scalar::<_, i64>(AssertSqlSafe(count.clone())).fetch_one(&mut beside).await.unwrap() > 0 {
        sleep(Duration::from_millis(5)).await;
    }
    two.ping().await.unwrap();
    kill(&mut beside, "KILL CONNECTION", &ids).await.unwrap();
    ends(&mut two).await;
    // Any other error is reported.
    let refused = kill(&mut beside, "KILL NOBODY", &ids).await.unwrap_err();
    assert!(matches!(refused, sqlx::Error::Database(_)), "{refused:?}");
    beside.close().await.unwrap();
}

#[tokio::test]
async fn what_waits_for_its_client_is_not_cancelled_and_what_runs_is() {
    let options = options();
    let canceller = <MySql as Driver>::Canceller::default();
    let mut conn = options.connect().await.unwrap();
    let thread = MySql::probe(&mut conn, PoolerMode::None, None).await.unwrap();
    // Repeated, because a session that has just answered may not be waiting yet, and a busy server may not answer in
    // time.
    let until = async |wanted, seen| while canceller.signal(&options, wanted, &thread).await != Ok(seen) {};
    until(Wanted::Look, Activity::Idle).await;
    until(Wanted::Cancel, Activity::Idle).await;
    conn.ping().await.unwrap();
    let again = async {
        loop {
            until(Wanted::Cancel, Activity::Unseen).await;
        }
    };
    // A cancelled SLEEP is an error in MariaDB, and an answer in MySQL.
    tokio::select! {
        slept = sqlx::raw_sql("SELECT SLEEP(10000)").execute(&mut conn) => drop(slept),
        () = again => unreachable!("it cancels for ever"),
    }
    until(Wanted::Terminate, Activity::Unseen).await;
    ends(&mut conn).await;
}

#[test]
fn the_limits_of_a_server_come_later_than_ours() {
    let remaining = Duration::from_millis(1_500);
    let limits = |flavour: Flavour| -> Vec<_> {
        flavour.limits().iter().map(|limit| (*limit, flavour.limit(limit, remaining))).collect()
    };
    let locks = [("innodb_lock_wait_timeout", "2".to_owned()), ("lock_wait_timeout", "2".to_owned())];
    let [statement, idle] = [("max_statement_time", "1.750"), ("idle_transaction_timeout", "3")];
    let owned = |(name, limit): (&'static str, &str)| (name, limit.to_owned());
    assert_eq!(limits(Flavour::MariaDb), [vec![owned(statement)], locks.to_vec(), vec![owned(idle)]].concat());
    let statement = owned(("max_execution_time", "1751"));
    assert_eq!(limits(Flavour::MySql), [vec![statement], locks.to_vec()].concat());
    for flavour in [Flavour::MariaDb, Flavour::MySql] {
        for limit in flavour.limits() {
            let longest = flavour.limit(limit, Duration::MAX);
            let most = if *limit == "max_execution_time" { f64::from(u32::MAX) } else { 31_536_000.0 };
            assert_eq!(longest.parse::<f64>().ok(), Some(most), "{limit}");
        }
    }
}

/// A message absorbs a late cancel, so one is sent even if nothing is found and nothing is left to prove.
#[tokio::test]
async fn a_rollback_reaches_the_server_whatever_it_finds() {
    let mut conn = options().connect().await.unwrap();
    let thread = MySql::probe(&mut conn, PoolerMode::None, None).await.unwrap();
    let rollbacks = async |conn: &mut MySqlConnection| {
        let count = sqlx::raw_sql("SHOW SESSION STATUS LIKE 'Com_rollback'").fetch_one(conn).await.unwrap();
        count.get::<String, _>(1).parse::<u32>().unwrap()
    };
    let before = rollbacks(&mut conn).await;
    thread.in_step.store(true, Ordering::Relaxed);
    assert_eq!(MySql::rollback(&mut conn, &thread).await.unwrap(), Rollback::TooLate);
    assert_eq!(rollbacks(&mut conn).await, before + 1);
    conn.close().await.unwrap();
}
