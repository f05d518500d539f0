//! The handlers as they are on plain sqlx. `guarded.rs` is the same file after one commit.
//!
//! Invariant: each handler answers like its twin, as long as no client hangs up.

use axum::extract::{Path, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use axum::routing::{delete, get, post};
use axum::{Json, Router};
use sqlx::{Sqlite, SqliteConnection};

use super::shop::{self, NewOrder, Order, Refusal, Transfer};

type Db = sqlx::Pool<Sqlite>;

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
    Database(#[from] sqlx::Error),
}

impl IntoResponse for AppError {
    fn into_response(self) -> Response {
        let status = match &self {
            Self::Refused(_) => StatusCode::CONFLICT,
            Self::Database(_) => StatusCode::INTERNAL_SERVER_ERROR,
        };
        (status, self.to_string()).into_response()
    }
}

async fn list(State(db): State<Db>) -> Result<Json<Vec<Order>>, AppError> {
    let mut tx = db.begin().await?;
    let orders = shop::orders(&mut tx).await?;
    tx.commit().await?;
    Ok(Json(orders))
}

async fn place(State(db): State<Db>, Json(order): Json<NewOrder>) -> Result<Json<Order>, AppError> {
    let mut tx = db.begin_with("BEGIN IMMEDIATE").await?;
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
    let mut tx = db.begin_with("BEGIN IMMEDIATE").await?;
    transfer_in(&mut tx, &transfer).await?;
    tx.commit().await?;
    Ok(StatusCode::NO_CONTENT)
}

async fn transfer_in(tx: &mut SqliteConnection, transfer: &Transfer) -> Result<(), AppError> {
    if !shop::withdraw(tx, transfer).await? {
        return Err(Refusal::Overdrawn.into());
    }
    Ok(shop::deposit(tx, transfer).await?)
}

async fn cancel(State(db): State<Db>, Path(id): Path<i64>) -> Result<StatusCode, AppError> {
    let mut tx = db.begin_with("BEGIN IMMEDIATE").await?;
    cancel_in(&mut tx, id).await?;
    tx.commit().await?;
    Ok(StatusCode::NO_CONTENT)
}

async fn cancel_in(tx: &mut SqliteConnection, id: i64) -> Result<(), AppError> {
    let Some(order) = shop::strike_out(tx, id).await? else { return Err(Refusal::NoSuchOrder.into()) };
    Ok(shop::put_back_in_stock(tx, &order).await?)
}
