//! The sessions of a wrapped pool are identified once, and are never mistaken for one another.

use std::time::{Duration, Instant};

use cancel_safe_tx_guard::{Options, TxPool};
use sqlx::database::HasStatementCache;
use sqlx::mysql::MySqlConnectOptions;
use sqlx::pool::PoolOptions;
use sqlx::postgres::PgConnectOptions;
use sqlx::{Connection, MySql, MySqlConnection, PgConnection, Postgres};

use crate::commit::works_as_before;
use crate::world::{SOON, Server, TestDb, World};

trait Sessions: Server + HasStatementCache {
    /// Options that keep no statements, which could identify a session.
    fn without_cache(options: Options<Self>) -> Options<Self>;
    /// Sleeps for a while, and returns whether it was left undisturbed.
    async fn nap(conn: &mut Self::Connection) -> bool;
}

impl Sessions for Postgres {
    fn without_cache(options: PgConnectOptions) -> PgConnectOptions {
        options.statement_cache_capacity(0)
    }

    async fn nap(conn: &mut PgConnection) -> bool {
        Self::execute(conn, "SELECT pg_sleep(0.2)".to_owned()).await.is_ok()
    }
}

impl Sessions for MySql {
    fn without_cache(options: MySqlConnectOptions) -> MySqlConnectOptions {
        options.statement_cache_capacity(0)
    }

    async fn nap(conn: &mut MySqlConnection) -> bool {
        Self::numbers(conn, "SELECT CAST(SLEEP(0.2) AS SIGNED)".to_owned()).await.is_ok_and(|woken| woken == [0])
    }
}

/// Cancels statements on three sessions of one pool in turn, while the other sessions continue theirs.
async fn each_cancel_reaches_the_session_it_is_meant_for<D: Sessions>(cached: bool) {
    let world = World::<D>::new().await;
    let options = if cached { world.options.clone() } else { D::without_cache(world.options.clone()) };
    let pool = PoolOptions::<D>::new().max_connections(3).connect_with(options).await.unwrap();
    let db = TxPool::wrap(pool.clone());
    for round in 0..6 {
        let mut bystanders = [db.begin().await.unwrap(), db.begin().await.unwrap()];
        let mut tx = db.begin().await.unwrap();
        world.insert(&mut tx, 1).await.unwrap();
        let slow = D::execute(&mut tx, D::SLOW.to_owned());
        assert!(tokio::time::timeout(Duration::from_millis(30), slow).await.is_err(), "it was not slow");
        let handle = tx.outcome_handle();
        let start = Instant::now();
        let [one, two] = &mut bystanders;
        let naps = futures_util::future::join(D::nap(one), D::nap(two));
        drop(tx);
        let ((one, two), _) = futures_util::future::join(naps, handle.outcome()).await;
        assert!(one && two, "a bystander was disturbed");
        assert!(start.elapsed() < SOON, "{:?}", start.elapsed());
        drop(bystanders);
        if round % 2 == 1 {
            // Another connection replaces a known one.
            let conn = pool.acquire().await.unwrap();
            conn.detach().close().await.unwrap();
        }
        // The cached statements are thrown away, and with them what identified the connection.
        let mut conn = pool.acquire().await.unwrap();
        conn.clear_cached_statements().await.unwrap();
    }
    works_as_before(&world, &db).await;
    world.end(db).await;
    pool.close().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn each_cancel_reaches_the_session_it_is_meant_for_on_postgres() {
    each_cancel_reaches_the_session_it_is_meant_for::<Postgres>(true).await;
    each_cancel_reaches_the_session_it_is_meant_for::<Postgres>(false).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn each_cancel_reaches_the_session_it_is_meant_for_on_mysql() {
    each_cancel_reaches_the_session_it_is_meant_for::<MySql>(true).await;
    each_cancel_reaches_the_session_it_is_meant_for::<MySql>(false).await;
}
