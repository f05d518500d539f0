//! The handlers with guarded transactions. `plain.rs` is the same file before that change.
//!
//! Invariant: whenever a client hangs up, an order or a transfer is there as a whole or not at all.

use std::time::Duration;

use axum::extract::{Path, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use axum::routing::{delete, get, post};
use axum::{Json, Router};
use cancel_safe_tx_guard::{Retry, TxError, TxPool, is_transient};
use sqlx::{Sqlite, SqliteConnection};

use super::shop::{self, NewOrder, Order, Refusal, Transfer};

type Db = TxPool<Sqlite>;

/// How long a request may take, the wait for a connection included.
const LIMIT: Duration = Duration::from_secs(10);

pub(crate) fn router(db: Db) -> Router {
    Router::new()
        .route("/orders", get(list).post(place))
        .route("/orders/{id}", delete(cancel))
        .route("/transfers", post(transfer))
        .with_state(db)
}

#[derive(Debug, thiserror::Error)]
pub(crate) enum AppError {
    #[error(transparent)]
    Refused(#[from] Refusal),
    #[error("the database failed")]
    Database(#[from] TxError),
}

impl From<sqlx::Error> for AppError {
    fn from(error: sqlx::Error) -> Self {
        Self::Database(error.into())
    }
}

/// Whether the error is worth another attempt: a serialization failure, a deadlock, a busy database.
fn passes(error: &AppError) -> bool {
    is_transient(error)
}

impl IntoResponse for AppError {
    fn into_response(self) -> Response {
        let status = match &self {
            Self::Refused(_) => StatusCode::CONFLICT,
            Self::Database(error) if error.is_unavailable() => StatusCode::SERVICE_UNAVAILABLE,
            Self::Database(error) if error.is_timeout() => StatusCode::GATEWAY_TIMEOUT,
            Self::Database(_) => StatusCode::INTERNAL_SERVER_ERROR,
        };
        (status, self.to_string()).into_response()
    }
}

async fn list(State(db): State<Db>) -> Result<Json<Vec<Order>>, AppError> {
    let mut tx = db.tx().read_only().timeout(LIMIT).begin().await?;
    let orders = shop::orders(&mut tx).await?;
    tx.commit().await?;
    Ok(Json(orders))
}

async fn place(State(db): State<Db>, Json(order): Json<NewOrder>) -> Result<Json<Order>, AppError> {
    let mut tx = db.tx().immediate().timeout(LIMIT).begin().await?;
    let placed = place_in(&mut tx, order).await?;
    tx.commit().await?;
    Ok(Json(placed))
}

async fn place_in(tx: &mut SqliteConnection, order: NewOrder) -> Result<Order, AppError> {
    if !shop::take_from_stock(tx, &order).await? {
        return Err(Refusal::SoldOut.into());
    }
    Ok(shop::write_down(tx, order).await?)
}

async fn transfer(State(db): State<Db>, Json(transfer): Json<Transfer>) -> Result<StatusCode, AppError> {
    let transfer = &transfer;
    let tx = db.tx().immediate().timeout(LIMIT).retry(Retry::default()).retry_if(passes);
    tx.run_boxed(|mut tx| Box::pin(async move { transfer_in(&mut tx, transfer).await })).await?;
    Ok(StatusCode::NO_CONTENT)
}

async fn transfer_in(tx: &mut SqliteConnection, transfer: &Transfer) -> Result<(), AppError> {
    if !shop::withdraw(tx, transfer).await? {
        return Err(Refusal::Overdrawn.into());
    }
    Ok(shop::deposit(tx, transfer).await?)
}

async fn cancel(State(db): State<Db>, Path(id): Path<i64>) -> Result<StatusCode, AppError> {
    let tx = db.tx().immediate().timeout(LIMIT).retry(Retry::default()).retry_if(passes);
    let mut attempts = tx.attempts();
    loop {
        let mut tx = attempts.next().await?;
        let worked = attempts.within(cancel_in(&mut tx, id)).await;
        if attempts.end(tx, worked).await?.is_some() {
            return Ok(StatusCode::NO_CONTENT);
        }
    }
}

async fn cancel_in(tx: &mut SqliteConnection, id: i64) -> Result<(), AppError> {
    let Some(order) = shop::strike_out(tx, id).await? else { return Err(Refusal::NoSuchOrder.into()) };
    Ok(shop::put_back_in_stock(tx, &order).await?)
}
