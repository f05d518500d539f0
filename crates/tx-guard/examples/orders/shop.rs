//! The shop's steps on a connection, whichever code has begun the transaction. Not a line changes with a guard.
//!
//! Invariant: each function is one step; steps that belong together run in one transaction of the handler.

use serde::{Deserialize, Serialize};
use sqlx::{Row, SqliteConnection};

#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct NewOrder {
    pub(crate) item: String,
    pub(crate) count: i64,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Order {
    pub(crate) id: i64,
    pub(crate) item: String,
    pub(crate) count: i64,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Transfer {
    pub(crate) from: i64,
    pub(crate) to: i64,
    pub(crate) amount: i64,
}

/// Why the shop says no.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Refusal {
    #[error("there are not enough left")]
    SoldOut,
    #[error("there is not enough in the account")]
    Overdrawn,
    #[error("there is no such order")]
    NoSuchOrder,
}

pub(crate) const TABLES: &str = "CREATE TABLE stock (item TEXT PRIMARY KEY, count INTEGER NOT NULL);
    CREATE TABLE orders (id INTEGER PRIMARY KEY, item TEXT NOT NULL, count INTEGER NOT NULL);
    CREATE TABLE accounts (id INTEGER PRIMARY KEY, balance INTEGER NOT NULL)";

/// Opens an empty shop with this much stock of one item and this many accounts.
pub(crate) async fn open(
    tx: &mut SqliteConnection,
    item: &str,
    count: i64,
    accounts: i64,
    balance: i64,
) -> Result<(), sqlx::Error> {
    sqlx::raw_sql(TABLES).execute(&mut *tx).await?;
    sqlx::query("INSERT INTO stock VALUES ($1, $2)").bind(item).bind(count).execute(&mut *tx).await?;
    for id in 0..accounts {
        sqlx::query("INSERT INTO accounts VALUES ($1, $2)").bind(id).bind(balance).execute(&mut *tx).await?;
    }
    Ok(())
}

pub(crate) async fn orders(tx: &mut SqliteConnection) -> Result<Vec<Order>, sqlx::Error> {
    let rows = sqlx::query("SELECT id, item, count FROM orders ORDER BY id").fetch_all(tx).await?;
    rows.iter().map(|row| Ok(Order { id: row.try_get(0)?, item: row.try_get(1)?, count: row.try_get(2)? })).collect()
}

/// Takes items from the stock; returns whether there were enough.
pub(crate) async fn take_from_stock(tx: &mut SqliteConnection, order: &NewOrder) -> Result<bool, sqlx::Error> {
    let take = "UPDATE stock SET count = count - $2 WHERE item = $1 AND count >= $2 AND $2 > 0";
    let taken = sqlx::query(take).bind(&order.item).bind(order.count).execute(tx).await?;
    Ok(taken.rows_affected() == 1)
}

pub(crate) async fn write_down(tx: &mut SqliteConnection, order: NewOrder) -> Result<Order, sqlx::Error> {
    let insert = sqlx::query("INSERT INTO orders (item, count) VALUES ($1, $2)").bind(&order.item).bind(order.count);
    let id = insert.execute(tx).await?.last_insert_rowid();
    Ok(Order { id, item: order.item, count: order.count })
}

pub(crate) async fn strike_out(tx: &mut SqliteConnection, id: i64) -> Result<Option<NewOrder>, sqlx::Error> {
    let strike = sqlx::query("DELETE FROM orders WHERE id = $1 RETURNING item, count").bind(id);
    let Some(row) = strike.fetch_optional(tx).await? else { return Ok(None) };
    Ok(Some(NewOrder { item: row.try_get(0)?, count: row.try_get(1)? }))
}

pub(crate) async fn put_back_in_stock(tx: &mut SqliteConnection, order: &NewOrder) -> Result<(), sqlx::Error> {
    let put = sqlx::query("UPDATE stock SET count = count + $2 WHERE item = $1");
    put.bind(&order.item).bind(order.count).execute(tx).await.map(drop)
}

/// Takes money from the account; returns whether there was enough.
pub(crate) async fn withdraw(tx: &mut SqliteConnection, transfer: &Transfer) -> Result<bool, sqlx::Error> {
    let withdraw = "UPDATE accounts SET balance = balance - $2 WHERE id = $1 AND balance >= $2 AND $2 > 0";
    let withdrawn = sqlx::query(withdraw).bind(transfer.from).bind(transfer.amount).execute(tx).await?;
    Ok(withdrawn.rows_affected() == 1)
}

pub(crate) async fn deposit(tx: &mut SqliteConnection, transfer: &Transfer) -> Result<(), sqlx::Error> {
    let deposit = sqlx::query("UPDATE accounts SET balance = balance + $2 WHERE id = $1");
    deposit.bind(transfer.to).bind(transfer.amount).execute(tx).await.map(drop)
}
