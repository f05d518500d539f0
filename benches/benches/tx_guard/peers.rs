//! The same few things through each crate: a transaction, a statement through the pool, a nested begin that is cut.

use std::pin::pin;
use std::sync::{Arc, Mutex};
use std::task::Poll;

use cancel_safe_tx_guard::{CommitOutcome, OutcomeHandle, TxPool};
use futures_util::future::BoxFuture;
use sqlx::postgres::PgPoolOptions;
use sqlx::{AssertSqlSafe, Connection, PgPool, Postgres};

use crate::measure::{Place, execute};

pub(crate) type Worked<T> = BoxFuture<'static, Result<T, String>>;

/// Statements go on after an error, as careless callers do.
pub(crate) trait Peer: Send + Sync {
    /// Begins, runs each statement, commits, and says what the commit said.
    fn work(&self, sql: Vec<String>) -> Worked<()>;

    /// Runs a statement through the pool.
    fn through_the_pool(&self, sql: String) -> Worked<()>;

    /// Begins, runs `first`, begins a nested transaction that is dropped after so many pendings, runs `second`, and
    /// commits or rolls back. `false` if the nested one was faster.
    fn nested(&self, first: String, second: String, pendings: u32, commit: bool) -> Worked<bool>;

    /// How the last transaction ended, where that can be asked.
    fn last_outcome(&self) -> Option<BoxFuture<'static, CommitOutcome>> {
        None
    }

    /// The name of its sessions.
    fn application(&self) -> &str;

    /// How many of its sessions are in a transaction that nobody has.
    fn leaked<'a>(&'a self, place: &'a Place) -> BoxFuture<'a, i64> {
        let sql = format!(
            "SELECT count(*) FROM pg_stat_activity WHERE application_name = '{}' AND xact_start IS NOT NULL",
            self.application()
        );
        Box::pin(place.number(sql))
    }
}

/// Drops `future` when it has been pending so many times. None if it was dropped.
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

fn text(error: impl std::fmt::Display) -> String {
    error.to_string()
}

struct Guarded {
    db: TxPool<Postgres>,
    last: Arc<Mutex<Option<OutcomeHandle>>>,
    application: String,
}

impl Peer for Guarded {
    fn work(&self, sql: Vec<String>) -> Worked<()> {
        let (db, last) = (self.db.clone(), Arc::clone(&self.last));
        *last.lock().unwrap() = None;
        Box::pin(async move {
            let mut tx = db.begin().await.map_err(text)?;
            *last.lock().unwrap() = Some(tx.outcome_handle());
            for sql in sql {
                drop(execute(&mut tx, sql).await);
            }
            tx.commit().await.map_err(text)
        })
    }

    fn through_the_pool(&self, sql: String) -> Worked<()> {
        self.work(vec![sql])
    }

    fn nested(&self, first: String, second: String, pendings: u32, commit: bool) -> Worked<bool> {
        let db = self.db.clone();
        Box::pin(async move {
            let mut tx = db.begin().await.map_err(text)?;
            drop(execute(&mut tx, first).await);
            let dropped = cut(tx.begin(), pendings).await.is_none();
            drop(execute(&mut tx, second).await);
            if commit {
                tx.commit().await.map_err(text)?
            } else {
                tx.rollback().await.map_err(text)?
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

    fn application(&self) -> &str {
        &self.application
    }
}

struct Sqlx {
    pool: PgPool,
    application: String,
}

impl Peer for Sqlx {
    fn work(&self, sql: Vec<String>) -> Worked<()> {
        let pool = self.pool.clone();
        Box::pin(async move {
            let mut tx = pool.begin().await.map_err(text)?;
            for sql in sql {
                drop(execute(&mut tx, sql).await);
            }
            tx.commit().await.map_err(text)
        })
    }

    fn through_the_pool(&self, sql: String) -> Worked<()> {
        let pool = self.pool.clone();
        Box::pin(async move { sqlx::query(AssertSqlSafe(sql)).execute(&pool).await.map(drop).map_err(text) })
    }

    fn nested(&self, first: String, second: String, pendings: u32, commit: bool) -> Worked<bool> {
        let pool = self.pool.clone();
        Box::pin(async move {
            let mut tx = pool.begin().await.map_err(text)?;
            drop(execute(&mut tx, first).await);
            let dropped = cut((*tx).begin(), pendings).await.is_none();
            drop(execute(&mut tx, second).await);
            if commit {
                tx.commit().await.map_err(text)?
            } else {
                tx.rollback().await.map_err(text)?
            }
            Ok(dropped)
        })
    }

    fn application(&self) -> &str {
        &self.application
    }
}

/// A name for the sessions of one pool.
fn application() -> String {
    format!("tx_bench_{}", fastrand::u64(..))
}

async fn guarded(place: &Place, connections: u32) -> Arc<dyn Peer> {
    let application = application();
    let options = place.options.clone().application_name(&application);
    let db = TxPool::builder().max_connections(connections).connect_with(options).await.unwrap();
    Arc::new(Guarded { db, last: Arc::default(), application })
}

async fn sqlx(place: &Place, connections: u32, test: bool) -> Arc<dyn Peer> {
    let application = application();
    let pool = PgPoolOptions::new().max_connections(connections).test_before_acquire(test);
    let pool = pool.connect_with(place.options.clone().application_name(&application)).await.unwrap();
    Arc::new(Sqlx { pool, application })
}

pub(crate) type Named = (String, Arc<dyn Peer>);

/// This crate, and sqlx in its two ways.
pub(crate) async fn default_and_tuned(place: &Place, connections: u32) -> Vec<Named> {
    vec![
        ("tx-guard".to_owned(), guarded(place, connections).await),
        ("sqlx".to_owned(), sqlx(place, connections, true).await),
        ("sqlx, tuned".to_owned(), sqlx(place, connections, false).await),
    ]
}

/// Those, and the peers.
pub(crate) async fn all(place: &Place, connections: u32) -> Vec<Named> {
    let all = default_and_tuned(place, connections).await;
    #[cfg(feature = "peers")]
    let all = [all, others::all(place, connections).await].concat();
    all
}

#[cfg(feature = "peers")]
mod others {
    //! Those that only `cargo xtask bench` compiles.

    use diesel_async::pooled_connection::AsyncDieselConnectionManager;
    use diesel_async::{AsyncConnection, AsyncPgConnection, RunQueryDsl};
    use sea_orm::{ConnectionTrait, TransactionTrait};

    use super::*;

    pub(super) async fn all(place: &Place, connections: u32) -> Vec<Named> {
        vec![
            ("sea-orm".to_owned(), sea_orm(place, connections).await),
            ("deadpool-postgres".to_owned(), deadpool(place, connections)),
            ("diesel-async".to_owned(), diesel(place, connections)),
        ]
    }

    fn url(place: &Place, application: &str) -> String {
        let separator = if place.url.contains('?') { '&' } else { '?' };
        format!("{}{separator}application_name={application}", place.url)
    }

    struct SeaOrm {
        db: sea_orm::DatabaseConnection,
        application: String,
    }

    async fn sea_orm(place: &Place, connections: u32) -> Arc<dyn Peer> {
        let application = application();
        let mut options = sea_orm::ConnectOptions::new(url(place, &application));
        options.max_connections(connections).sqlx_logging(false);
        let db = sea_orm::Database::connect(options).await.unwrap();
        Arc::new(SeaOrm { db, application })
    }

    impl Peer for SeaOrm {
        fn work(&self, sql: Vec<String>) -> Worked<()> {
            let db = self.db.clone();
            Box::pin(async move {
                let tx = db.begin().await.map_err(text)?;
                for sql in sql {
                    drop(tx.execute_unprepared(&sql).await);
                }
                tx.commit().await.map_err(text)
            })
        }

        fn through_the_pool(&self, sql: String) -> Worked<()> {
            let db = self.db.clone();
            Box::pin(async move { db.execute_unprepared(&sql).await.map(drop).map_err(text) })
        }

        fn nested(&self, first: String, second: String, pendings: u32, commit: bool) -> Worked<bool> {
            let db = self.db.clone();
            Box::pin(async move {
                let tx = db.begin().await.map_err(text)?;
                drop(tx.execute_unprepared(&first).await);
                let dropped = cut(tx.begin(), pendings).await.is_none();
                drop(tx.execute_unprepared(&second).await);
                if commit {
                    tx.commit().await.map_err(text)?
                } else {
                    tx.rollback().await.map_err(text)?
                }
                Ok(dropped)
            })
        }

        fn application(&self) -> &str {
            &self.application
        }
    }

    struct Deadpool {
        pool: deadpool_postgres::Pool,
        application: String,
    }

    fn deadpool(place: &Place, connections: u32) -> Arc<dyn Peer> {
        let application = application();
        let config: tokio_postgres::Config = url(place, &application).parse().unwrap();
        let manager = deadpool_postgres::Manager::new(config, tokio_postgres::NoTls);
        let pool = deadpool_postgres::Pool::builder(manager).max_size(connections as usize).build().unwrap();
        Arc::new(Deadpool { pool, application })
    }

    impl Peer for Deadpool {
        fn work(&self, sql: Vec<String>) -> Worked<()> {
            let pool = self.pool.clone();
            Box::pin(async move {
                let mut client = pool.get().await.map_err(text)?;
                let tx = client.transaction().await.map_err(text)?;
                for sql in sql {
                    drop(tx.batch_execute(&sql).await);
                }
                tx.commit().await.map_err(text)
            })
        }

        fn through_the_pool(&self, sql: String) -> Worked<()> {
            let pool = self.pool.clone();
            Box::pin(async move {
                let client = pool.get().await.map_err(text)?;
                client.batch_execute(&sql).await.map_err(text)
            })
        }

        fn nested(&self, first: String, second: String, pendings: u32, commit: bool) -> Worked<bool> {
            let pool = self.pool.clone();
            Box::pin(async move {
                let mut client = pool.get().await.map_err(text)?;
                let mut tx = client.transaction().await.map_err(text)?;
                drop(tx.batch_execute(&first).await);
                let dropped = cut(tx.transaction(), pendings).await.is_none();
                drop(tx.batch_execute(&second).await);
                if commit {
                    tx.commit().await.map_err(text)?
                } else {
                    tx.rollback().await.map_err(text)?
                }
                Ok(dropped)
            })
        }

        fn application(&self) -> &str {
            &self.application
        }
    }

    type DieselPool = diesel_async::pooled_connection::deadpool::Pool<AsyncPgConnection>;

    struct Diesel {
        pool: DieselPool,
        application: String,
    }

    fn diesel(place: &Place, connections: u32) -> Arc<dyn Peer> {
        let application = application();
        let manager = AsyncDieselConnectionManager::<AsyncPgConnection>::new(url(place, &application));
        let pool = DieselPool::builder(manager).max_size(connections as usize).build().unwrap();
        Arc::new(Diesel { pool, application })
    }

    async fn run(conn: &mut AsyncPgConnection, sql: String) -> Result<(), diesel::result::Error> {
        diesel::sql_query(sql).execute(conn).await.map(drop)
    }

    impl Peer for Diesel {
        fn work(&self, sql: Vec<String>) -> Worked<()> {
            let pool = self.pool.clone();
            Box::pin(async move {
                let mut conn = pool.get().await.map_err(text)?;
                let conn: &mut AsyncPgConnection = &mut conn;
                let worked = conn.transaction(async move |conn: &mut AsyncPgConnection| {
                    for sql in sql {
                        drop(run(conn, sql).await);
                    }
                    Ok::<_, diesel::result::Error>(())
                });
                worked.await.map_err(text)
            })
        }

        fn through_the_pool(&self, sql: String) -> Worked<()> {
            let pool = self.pool.clone();
            Box::pin(async move {
                let mut conn = pool.get().await.map_err(text)?;
                run(&mut conn, sql).await.map_err(text)
            })
        }

        fn nested(&self, first: String, second: String, pendings: u32, commit: bool) -> Worked<bool> {
            let pool = self.pool.clone();
            Box::pin(async move {
                let mut conn = pool.get().await.map_err(text)?;
                let conn: &mut AsyncPgConnection = &mut conn;
                let worked = conn.transaction(async move |conn: &mut AsyncPgConnection| {
                    drop(run(conn, first).await);
                    let inner = conn.transaction(async |_: &mut AsyncPgConnection| Ok::<_, diesel::result::Error>(()));
                    let dropped = cut(inner, pendings).await.is_none();
                    drop(run(conn, second).await);
                    if commit { Ok(dropped) } else { Err(diesel::result::Error::RollbackTransaction) }
                });
                match worked.await {
                    Err(diesel::result::Error::RollbackTransaction) => Ok(true),
                    worked => worked.map_err(text),
                }
            })
        }

        fn application(&self) -> &str {
            &self.application
        }
    }
}
