//! The routes. Invariant: no handler waits longer than a transfer may take, except for an event stream, which ends with
//! the server.

use std::sync::Arc;

use axum::extract::{Path, State};
use axum::http::StatusCode;
use axum::response::sse::Sse;
use axum::response::{Html, IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use cancel_safe_shutdown::axum::{Cancelled, readiness, serve};
use cancel_safe_shutdown::{BoxError, WorkerContext};
use cancel_safe_tx_guard::{TxError, TxPool};
use serde::Deserialize;
use serde_json::json;
use tokio::net::TcpListener;

use super::live::{End, Live, events};
use super::store::Bank;
use super::transfer::{settled, transfer_money, transfer_money_in_two};
use super::{Order, Outcome, Settings, complain, is_key};

/// What the handlers share.
struct Site<DB: Bank> {
    db: TxPool<DB>,
    live: Arc<Live>,
    broken: bool,
}

type Shared<DB> = State<Arc<Site<DB>>>;

/// The worker.
pub(super) async fn http<DB: Bank>(cx: WorkerContext, settings: Settings, live: Arc<Live>) -> Result<(), BoxError> {
    let db: TxPool<DB> = cx.provided().ok_or("there is no pool")?;
    let listener = TcpListener::bind(settings.listen).await?;
    announce(&listener)?;
    let ready = readiness(live.readiness());
    let site = Arc::new(Site { db, live, broken: settings.broken });
    let router = Router::new()
        .route("/", get(async || Html(include_str!("page.html"))))
        .route("/events", get(watch::<DB>))
        .route("/healthz", ready)
        .route("/accounts", get(accounts::<DB>))
        .route("/transfers", post(transfer::<DB>))
        .route("/transfers/{key}", get(outcome::<DB>))
        .route("/slow", post(slow::<DB>))
        .with_state(site);
    Ok(serve(listener, router, cx).await?)
}

#[expect(clippy::print_stdout, reason = "whoever has started it has to know the port")]
fn announce(listener: &TcpListener) -> std::io::Result<()> {
    println!("listening on http://{}", listener.local_addr()?);
    Ok(())
}

/// If it is dropped with its connection, it begins no commit; a commit that has begun runs to its end.
async fn transfer<DB: Bank>(State(site): Shared<DB>, Json(order): Json<Order>) -> Response {
    if let Some(fault) = order.fault() {
        return (StatusCode::BAD_REQUEST, fault).into_response();
    }
    let counted = site.live.count();
    let (status, outcome, end) = handle_transfer_request(&site, &order).await;
    counted.ends(end);
    (status, Json(json!({ "key": order.key, "outcome": outcome }))).into_response()
}

/// Transfers money within five seconds, and returns what it knows.
async fn handle_transfer_request<DB: Bank>(site: &Site<DB>, order: &Order) -> (StatusCode, Outcome, End) {
    let pause = site.live.pause();
    let result = if site.broken {
        transfer_money_in_two(&site.db, order, pause).await
    } else {
        transfer_money(&site.db, order, pause).await
    };
    match result {
        Ok((row, _)) if !row.is_of(order) => (StatusCode::UNPROCESSABLE_ENTITY, Outcome::NotCommitted, End::Failed),
        Ok((row, is_new)) => {
            let end = match row.outcome {
                _ if !is_new => End::Repeated,
                Outcome::Refused => End::Refused,
                _ => End::Completed,
            };
            let status = if row.outcome == Outcome::Refused { StatusCode::CONFLICT } else { StatusCode::OK };
            (status, row.outcome, end)
        }
        Err(error) if error.is_unknown() => (StatusCode::ACCEPTED, Outcome::Unknown, End::Unknown),
        Err(error) if error.is_timeout() => (StatusCode::GATEWAY_TIMEOUT, Outcome::NotCommitted, End::TimedOut),
        Err(error) => {
            complain(format_args!("{}: {error}", order.key));
            (StatusCode::SERVICE_UNAVAILABLE, Outcome::NotCommitted, End::Failed)
        }
    }
}

/// Tells a client whether a transfer was committed, if the client never got the answer.
async fn outcome<DB: Bank>(State(site): Shared<DB>, Path(key): Path<String>) -> Result<Response, Failed> {
    if !is_key(&key) {
        return Ok(StatusCode::BAD_REQUEST.into_response());
    }
    Ok(match settled(&site.db, &key).await? {
        Some(row) => Json(row).into_response(),
        None => {
            let nothing = json!({ "key": key, "outcome": Outcome::NotCommitted });
            (StatusCode::NOT_FOUND, Json(nothing)).into_response()
        }
    })
}

async fn accounts<DB: Bank>(State(site): Shared<DB>) -> Result<Response, Failed> {
    Ok(Json(DB::balances(&site.db).await.map_err(TxError::from)?).into_response())
}

async fn watch<DB: Bank>(State(site): Shared<DB>, Cancelled(token): Cancelled) -> Response {
    Sse::new(events(Arc::clone(&site.live), site.db.clone(), token)).into_response()
}

#[derive(Deserialize)]
struct Slow {
    ms: u64,
}

async fn slow<DB: Bank>(State(site): Shared<DB>, Json(Slow { ms }): Json<Slow>) -> StatusCode {
    site.live.set_pause(ms);
    StatusCode::NO_CONTENT
}

/// A query that the database did not answer.
struct Failed(TxError);

impl From<TxError> for Failed {
    fn from(error: TxError) -> Self {
        Self(error)
    }
}

impl IntoResponse for Failed {
    fn into_response(self) -> Response {
        complain(format_args!("{}", self.0));
        StatusCode::SERVICE_UNAVAILABLE.into_response()
    }
}
