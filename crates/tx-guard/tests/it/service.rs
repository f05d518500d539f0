//! Transactions as services use them: behind `&self`, with borrowed requests, in a task and in the handler of a web
//! server. Mostly this tests that they compile.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use axum::Router;
use axum::extract::{Path, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use cancel_safe_tx_guard::{Retry, TransactionGuard, TxError, TxPool};
use sqlx::Sqlite;

use crate::world::{PATIENCE, TestDb, World};

/// Like many error types, it is not a `std::error::Error`.
#[derive(Debug)]
enum AppError {
    Db(TxError),
    Refused,
}

impl From<TxError> for AppError {
    fn from(error: TxError) -> Self {
        Self::Db(error)
    }
}

impl From<sqlx::Error> for AppError {
    fn from(error: sqlx::Error) -> Self {
        Self::Db(error.into())
    }
}

impl IntoResponse for AppError {
    fn into_response(self) -> Response {
        match self {
            Self::Db(error) => (StatusCode::INTERNAL_SERVER_ERROR, error.to_string()).into_response(),
            Self::Refused => StatusCode::CONFLICT.into_response(),
        }
    }
}

struct Request {
    n: i64,
    note: String,
}

#[derive(Clone)]
struct Service {
    db: TxPool<Sqlite>,
    table: Arc<str>,
    hooks: Arc<AtomicU32>,
}

impl Service {
    /// A function of the application, which knows nothing of attempts.
    async fn insert(&self, tx: &mut TransactionGuard<Sqlite>, request: &Request, by: &str) -> Result<i64, AppError> {
        if request.note.is_empty() || by.is_empty() {
            return Err(AppError::Refused);
        }
        let insert = format!("INSERT INTO {} (n, v) VALUES ({}, {})", self.table, request.n, by.len());
        Sqlite::execute(tx, insert).await?;
        let hooks = Arc::clone(&self.hooks);
        tx.after_commit(move || {
            hooks.fetch_add(1, Ordering::Relaxed);
        });
        Ok(request.n)
    }

    async fn in_a_loop(&self, request: &Request, by: &str) -> Result<i64, AppError> {
        let mut attempts = self.db.tx().serializable().timeout(PATIENCE).retry(Retry::default()).attempts();
        loop {
            let mut tx = attempts.next().await?;
            let worked = attempts.within(self.insert(&mut tx, request, by)).await;
            if let Some(n) = attempts.end(tx, worked).await? {
                return Ok(n);
            }
        }
    }

    async fn boxed(&self, request: &Request, by: &str) -> Result<i64, AppError> {
        let tx = self.db.tx().serializable().timeout(PATIENCE).retry(Retry::default());
        tx.run_boxed(|mut tx| Box::pin(async move { self.insert(&mut tx, request, by).await })).await
    }

    async fn boxed_with_a_savepoint(&self, request: &Request, by: &str) -> Result<i64, AppError> {
        let tx = self.db.tx().serializable().timeout(PATIENCE).retry(Retry::default());
        tx.run_boxed(|mut tx| {
            Box::pin(async move {
                let tried: Result<i64, AppError> = tx
                    .savepoint_boxed(|mut sp| {
                        Box::pin(async move {
                            self.insert(&mut sp, request, by).await?;
                            Err(AppError::Refused)
                        })
                    })
                    .await;
                assert!(matches!(tried, Err(AppError::Refused)));
                self.insert(&mut tx, request, by).await
            })
        })
        .await
    }

    async fn in_hand(&self, request: &Request, by: &str) -> Result<i64, AppError> {
        let mut tx = self.db.tx().immediate().timeout(PATIENCE).begin().await?;
        let n = self.insert(&mut tx, request, by).await?;
        tx.commit().await?;
        Ok(n)
    }

    async fn by(&self, way: &str, request: &Request) -> Result<i64, AppError> {
        match way {
            "loop" => self.in_a_loop(request, way).await,
            "boxed" => self.boxed(request, way).await,
            "savepoint" => self.boxed_with_a_savepoint(request, way).await,
            "hand" => self.in_hand(request, way).await,
            _ => Err(AppError::Refused),
        }
    }
}

async fn put(State(service): State<Service>, Path((way, n)): Path<(String, i64)>) -> Result<String, AppError> {
    let request = Request { n, note: way.clone() };
    Ok(service.by(&way, &request).await?.to_string())
}

/// Everything in the handler, where the closure owns only the state.
async fn put_here(State(service): State<Service>, Path(n): Path<i64>, note: String) -> Result<String, AppError> {
    let request = Request { n, note };
    let (by, request) = ("here", &request);
    let service = &service;
    let tx = service.db.tx().immediate().retry(Retry::attempts(3));
    let n = tx.run_boxed(|mut tx| Box::pin(async move { service.insert(&mut tx, request, by).await })).await?;
    Ok(n.to_string())
}

const WAYS: [&str; 4] = ["loop", "boxed", "savepoint", "hand"];

async fn service() -> (World<Sqlite>, Service) {
    let world = World::<Sqlite>::new().await;
    let db = world.pool(2).await;
    let table = world.table.clone().into();
    (world, Service { db, table, hooks: Arc::default() })
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_way_compiles_and_commits_inside_a_spawned_task() {
    let (world, service) = service().await;
    let mut tasks = tokio::task::JoinSet::new();
    for (n, way) in (1..).zip(WAYS) {
        let service = service.clone();
        tasks.spawn(async move {
            let request = Request { n, note: way.to_owned() };
            service.by(way, &request).await.unwrap()
        });
    }
    let mut done = tasks.join_all().await;
    done.sort_unstable();
    assert_eq!((done, world.committed().await), (vec![1, 2, 3, 4], vec![1, 2, 3, 4]));
    // The savepoint's hook went with it.
    assert_eq!(service.hooks.load(Ordering::Relaxed), 4);
    world.end(service.db).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_way_compiles_and_commits_inside_an_axum_handler() {
    let (world, service) = service().await;
    let router =
        Router::new().route("/by/{way}/{n}", get(put)).route("/here/{n}", post(put_here)).with_state(service.clone());
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let server = tokio::spawn(async move { axum::serve(listener, router).await });
    for (n, way) in (1..).zip(WAYS) {
        let said = http(address, format!("GET /by/{way}/{n} HTTP/1.0\r\n\r\n")).await;
        assert!(said.starts_with("HTTP/1.0 200") && said.ends_with(&format!("\r\n\r\n{n}")), "{said}");
    }
    let said = http(address, "POST /here/5 HTTP/1.0\r\ncontent-length: 4\r\n\r\nnote".to_owned()).await;
    assert!(said.starts_with("HTTP/1.0 200") && said.ends_with("\r\n\r\n5"), "{said}");
    let said = http(address, "POST /here/6 HTTP/1.0\r\n\r\n".to_owned()).await;
    assert!(said.starts_with("HTTP/1.0 409"), "{said}");
    assert_eq!(world.committed().await, [1, 2, 3, 4, 5]);
    server.abort();
    drop(server.await);
    world.end(service.db).await;
}

async fn http(address: std::net::SocketAddr, request: String) -> String {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    let talk = async {
        let mut stream = tokio::net::TcpStream::connect(address).await.unwrap();
        #[expect(clippy::disallowed_methods, reason = "nobody drops the client of a test halfway")]
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut said = String::new();
        stream.read_to_string(&mut said).await.unwrap();
        said
    };
    tokio::time::timeout(PATIENCE, talk).await.unwrap()
}

/// The closure of `run` owns what it needs, so its future is `Send`.
#[tokio::test]
async fn a_closure_that_owns_what_it_needs_can_be_spawned() {
    let (world, service) = service().await;
    let ran = tokio::spawn({
        let service = service.clone();
        async move {
            let (db, request) = (service.db.clone(), Request { n: 1, note: "owned".to_owned() });
            db.tx()
                .timeout(Duration::from_secs(30))
                .run(async move |tx| service.insert(tx, &request, "owner").await)
                .await
        }
    });
    assert_eq!(ran.await.unwrap().unwrap(), 1);
    assert_eq!(world.committed().await, [1]);
    world.end(service.db).await;
}
