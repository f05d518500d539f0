//! The same few operations through each crate: a transaction, a statement through the pool, a nested begin that is cut.

use std::pin::pin;
use std::sync::{Arc, Mutex};
use std::task::Poll;

use cancel_safe_tx_guard::{CommitOutcome, OutcomeHandle, TxPool};
use futures_util::future::BoxFuture;
use sqlx::postgres::PgPoolOptions;
use sqlx::{AssertSqlSafe, Connection, PgPool, Postgres};

use crate::measure::{Place, execute};

pub(crate) type BoxError = Box<dyn std::error::Error + Send + Sync>;
pub(crate) type Worked<T> = BoxFuture<'static, Result<T, BoxError>>;

/// The operations in a crate's own API. Statements continue after an error, as with careless callers.
pub(crate) trait Peer: Send + Sync {
    /// Begins, runs each statement, commits, and returns the result of the commit.
    fn work(&self, sql: Vec<String>) -> Worked<()>;

    /// Runs a statement through the pool.
    fn through_the_pool(&self, sql: String) -> Worked<()>;

    /// Begins, runs `first`, begins a nested transaction that is dropped after `pendings` pendings, runs `second`, and
    /// commits or rolls back. `false` if the nested one was faster.
    fn nested(&self, first: String, second: String, pendings: u32, commit: bool) -> Worked<bool>;

    /// How the last transaction ended, if the crate can say.
    fn last_outcome(&self) -> Option<BoxFuture<'static, CommitOutcome>> {
        None
    }
}

/// One contestant: a crate, with its own pool.
#[derive(Clone)]
pub(crate) struct Contestant {
    pub(crate) name: &'static str,
    pub(crate) peer: Arc<dyn Peer>,
    /// The name of its sessions.
    application: String,
}

impl Contestant {
    fn new(name: &'static str, application: String, peer: impl Peer + 'static) -> Self {
        Self { name, peer: Arc::new(peer), application }
    }

    /// How many of its sessions are in an abandoned transaction.
    pub(crate) async fn leaked(&self, place: &Place) -> i64 {
        let sql = format!(
            "SELECT count(*) FROM pg_stat_activity WHERE application_name = '{}' AND xact_start IS NOT NULL",
            self.application
        );
        place.number(sql).await
    }
}

/// Drops `future` when it has been pending `pendings` times. `None` if it was dropped.
pub(crate) async fn cut<T>(future: impl Future<Output = T>, pendings: u32) -> Option<T> {
    let (mut future, mut left) = (pin!(future), pendings);
    std::future::poll_fn(|cx| match future.as_mut().poll(cx) {
        Poll::Ready(output) => Poll::Ready(Some(output)),
        Poll::Pending => {
            left -= 1;
            if left == 0 { Poll::Ready(None) } else { Poll::Pending }
        }
    })
    .await
}

struct Guarded {
    db: TxPool<Postgres>,
    last: Arc<Mutex<Option<OutcomeHandle>>>,
}

impl Peer for Guarded {
    fn work(&self, sql: Vec<String>) -> Worked<()> {
        let (db, last) = (self.db.clone(), Arc::clone(&self.last));
        *last.lock().unwrap() = None;
        Box::pin(async move {
            let mut tx = db.begin().await?;
            *last.lock().unwrap() = Some(tx.outcome_handle());
            for sql in sql {
                drop(execute(&mut tx, sql).await);
            }
            Ok(tx.commit().await?)
        })
    }

    fn through_the_pool(&self, sql: String) -> Worked<()> {
        self.work(vec![sql])
    }

    fn nested(&self, first: String, second: String, pendings: u32, commit: bool) -> Worked<bool> {
        let db = self.db.clone();
        Box::pin(async move {
            let mut tx = db.begin().await?;
            drop(execute(&mut tx, first).await);
            let dropped = cut(tx.begin(), pendings).await.is_none();
            drop(execute(&mut tx, second).await);
            if commit {
                tx.commit().await?
            } else {
                tx.rollback().await?
            }
            Ok(dropped)
        })
    }

    fn last_outcome(&self) -> Option<BoxFuture<'static, CommitOutcome>> {
        let handle = self.last.lock().unwrap().clone();
        Some(Box::pin(async move {
            match handle {
                Some(handle) => handle.outcome().await,
                None => CommitOutcome::RolledBack,
            }
        }))
    }
}

impl Peer for PgPool {
    fn work(&self, sql: Vec<String>) -> Worked<()> {
        let pool = self.clone();
        Box::pin(async move {
            let mut tx = pool.begin().await?;
            for sql in sql {
                drop(execute(&mut tx, sql).await);
            }
            Ok(tx.commit().await?)
        })
    }

    fn through_the_pool(&self, sql: String) -> Worked<()> {
        let pool = self.clone();
        Box::pin(async move {
            sqlx::query(AssertSqlSafe(sql)).execute(&pool).await?;
            Ok(())
        })
    }

    fn nested(&self, first: String, second: String, pendings: u32, commit: bool) -> Worked<bool> {
        let pool = self.clone();
        Box::pin(async move {
            let mut tx = pool.begin().await?;
            drop(execute(&mut tx, first).await);
            let dropped = cut((*tx).begin(), pendings).await.is_none();
            drop(execute(&mut tx, second).await);
            if commit {
                tx.commit().await?
            } else {
                tx.rollback().await?
            }
            Ok(dropped)
        })
    }
}

/// A name for the sessions of one pool.
fn application() -> String {
    format!("tx_bench_{}", fastrand::u64(..))
}

async fn guarded(place: &Place, connections: u32) -> Contestant {
    let application = application();
    let options = place.options.clone().application_name(&application);
    let db = TxPool::builder().max_connections(connections).connect_with(options).await.unwrap();
    Contestant::new("tx-guard", application, Guarded { db, last: Arc::default() })
}

/// The same on a tuned sqlx pool.
pub(crate) async fn wrapped(place: &Place, connections: u32) -> Contestant {
    let application = application();
    let pool = PgPoolOptions::new().max_connections(connections).test_before_acquire(false);
    let pool = pool.connect_with(place.options.clone().application_name(&application)).await.unwrap();
    Contestant::new("tx-guard, wrapped", application, Guarded { db: TxPool::wrap(pool), last: Arc::default() })
}

async fn sqlx(name: &'static str, place: &Place, connections: u32, test: bool) -> Contestant {
    let application = application();
    let pool = PgPoolOptions::new().max_connections(connections).test_before_acquire(test);
    let pool = pool.connect_with(place.options.clone().application_name(&application)).await.unwrap();
    Contestant::new(name, application, pool)
}

/// This crate, sqlx in its two variants, and the peers, each with a pool of `connections` connections.
pub(crate) async fn all(place: &Place, connections: u32) -> Vec<Contestant> {
    let ours = guarded(place, connections).await;
    let plain = sqlx("sqlx", place, connections, true).await;
    let tuned = sqlx("sqlx, tuned", place, connections, false).await;
    let all = vec![ours, plain, tuned];
    #[cfg(feature = "peers")]
    let all = [all, others::all(place, connections).await].concat();
    all
}

#[cfg(feature = "peers")]
mod others {
    //! The peers that only `cargo xtask bench` compiles.

    use diesel::result::Error as DieselError;
    use diesel_async::pooled_connection::AsyncDieselConnectionManager;
    use diesel_async::{AsyncConnection, AsyncPgConnection, RunQueryDsl};
    use sea_orm::{ConnectionTrait, DatabaseConnection, TransactionTrait};

    use super::*;

    pub(super) async fn all(place: &Place, connections: u32) -> Vec<Contestant> {
        vec![sea_orm(place, connections).await, deadpool(place, connections), diesel(place, connections)]
    }

    fn url(place: &Place, application: &str) -> String {
        let separator = if place.url.contains('?') { '&' } else { '?' };
        format!("{}{separator}application_name={application}", place.url)
    }

    async fn sea_orm(place: &Place, connections: u32) -> Contestant {
        let application = application();
        let mut options = sea_orm::ConnectOptions::new(url(place, &application));
        options.max_connections(connections).sqlx_logging(false);
        let db = sea_orm::Database::connect(options).await.unwrap();
        Contestant::new("sea-orm", application, db)
    }

    impl Peer for DatabaseConnection {
        fn work(&self, sql: Vec<String>) -> Worked<()> {
            let db = self.clone();
            Box::pin(async move {
                let tx = db.begin().await?;
                for sql in sql {
                    drop(tx.execute_unprepared(&sql).await);
                }
                Ok(tx.commit().await?)
            })
        }

        fn through_the_pool(&self, sql: String) -> Worked<()> {
            let db = self.clone();
            Box::pin(async move {
                db.execute_unprepared(&sql).await?;
                Ok(())
            })
        }

        fn nested(&self, first: String, second: String, pendings: u32, commit: bool) -> Worked<bool> {
            let db = self.clone();
            Box::pin(async move {
                let tx = db.begin().await?;
                drop(tx.execute_unprepared(&first).await);
                let dropped = cut(tx.begin(), pendings).await.is_none();
                drop(tx.execute_unprepared(&second).await);
                if commit {
                    tx.commit().await?
                } else {
                    tx.rollback().await?
                }
                Ok(dropped)
            })
        }
    }

    fn deadpool(place: &Place, connections: u32) -> Contestant {
        let application = application();
        let config: tokio_postgres::Config = url(place, &application).parse().unwrap();
        let manager = deadpool_postgres::Manager::new(config, tokio_postgres::NoTls);
        let pool = deadpool_postgres::Pool::builder(manager).max_size(connections as usize).build().unwrap();
        Contestant::new("deadpool-postgres", application, pool)
    }

    impl Peer for deadpool_postgres::Pool {
        fn work(&self, sql: Vec<String>) -> Worked<()> {
            let pool = self.clone();
            Box::pin(async move {
                let mut client = pool.get().await?;
                let tx = client.transaction().await?;
                for sql in sql {
                    drop(tx.batch_execute(&sql).await);
                }
                Ok(tx.commit().await?)
            })
        }

        fn through_the_pool(&self, sql: String) -> Worked<()> {
            let pool = self.clone();
            Box::pin(async move { Ok(pool.get().await?.batch_execute(&sql).await?) })
        }

        fn nested(&self, first: String, second: String, pendings: u32, commit: bool) -> Worked<bool> {
            let pool = self.clone();
            Box::pin(async move {
                let mut client = pool.get().await?;
                let mut tx = client.transaction().await?;
                drop(tx.batch_execute(&first).await);
                let dropped = cut(tx.transaction(), pendings).await.is_none();
                drop(tx.batch_execute(&second).await);
                if commit {
                    tx.commit().await?
                } else {
                    tx.rollback().await?
                }
                Ok(dropped)
            })
        }
    }

    type DieselPool = diesel_async::pooled_connection::deadpool::Pool<AsyncPgConnection>;

    fn diesel(place: &Place, connections: u32) -> Contestant {
        let application = application();
        let manager = AsyncDieselConnectionManager::<AsyncPgConnection>::new(url(place, &application));
        let pool = DieselPool::builder(manager).max_size(connections as usize).build().unwrap();
        Contestant::new("diesel-async", application, pool)
    }

    async fn run(conn: &mut AsyncPgConnection, sql: String) -> Result<(), DieselError> {
        diesel::sql_query(sql).execute(conn).await.map(drop)
    }

    impl Peer for DieselPool {
        fn work(&self, sql: Vec<String>) -> Worked<()> {
            let pool = self.clone();
            Box::pin(async move {
                let mut conn = pool.get().await?;
                let conn: &mut AsyncPgConnection = &mut conn;
                let worked = conn.transaction(async move |conn: &mut AsyncPgConnection| {
                    for sql in sql {
                        drop(run(conn, sql).await);
                    }
                    Ok::<_, DieselError>(())
                });
                Ok(worked.await?)
            })
        }

        fn through_the_pool(&self, sql: String) -> Worked<()> {
            let pool = self.clone();
            Box::pin(async move { Ok(run(&mut *pool.get().await?, sql).await?) })
        }

        fn nested(&self, first: String, second: String, pendings: u32, commit: bool) -> Worked<bool> {
            let pool = self.clone();
            Box::pin(async move {
                let mut conn = pool.get().await?;
                let conn: &mut AsyncPgConnection = &mut conn;
                let worked = conn.transaction(async move |conn: &mut AsyncPgConnection| {
                    drop(run(conn, first).await);
                    let inner = conn.transaction(async |_: &mut AsyncPgConnection| Ok::<_, DieselError>(()));
                    let dropped = cut(inner, pendings).await.is_none();
                    drop(run(conn, second).await);
                    if commit { Ok(dropped) } else { Err(DieselError::RollbackTransaction) }
                });
                match worked.await {
                    Err(DieselError::RollbackTransaction) => Ok(true),
                    worked => Ok(worked?),
                }
            })
        }
    }
}
