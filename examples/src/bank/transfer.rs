//! A transfer, its limit, and the query for its outcome. Invariant: it says "not committed" only after a rollback, and
//! "unknown" only when that is the truth.

use std::time::Duration;

use cancel_safe_tx_guard::{Retry, TransactionGuard, TxError, TxPool};
use tokio::time::sleep;

use super::store::Bank;
use super::{Order, Outcome, Row};

/// Transfers money once for each key. Returns the row of the key, and whether this call wrote it.
///
/// If dropped, it has committed nothing, unless its COMMIT was on the way: [`settled`] tells. It pauses for `pause`
/// half-way.
pub(super) async fn transfer_money<DB: Bank>(
    db: &TxPool<DB>,
    order: &Order,
    pause: Duration,
) -> Result<(Row, bool), TxError> {
    let tx = db.tx().immediate().timeout(order.limit()).retry(Retry::attempts(5));
    tx.run_boxed(|mut tx| {
        Box::pin(async move {
            let tx: &mut TransactionGuard<DB> = &mut tx;
            if !claim::<DB>(tx, order, Outcome::Completed).await? {
                let row = DB::recorded(tx, &order.key).await?;
                return Ok((row.ok_or_else(|| TxError::application("the row of the key is gone"))?, false));
            }
            let outcome = move_money::<DB>(tx, order, pause).await?;
            if outcome == Outcome::Refused {
                let sql = "UPDATE transfers SET outcome = ? WHERE id = ?";
                DB::change(tx, sql, &["refused", &order.key], &[]).await?;
            }
            Ok((row(order, outcome), true))
        })
    })
    .await
}

/// The same with a common mistake: the effect and its record are two transactions.
pub(super) async fn transfer_money_in_two<DB: Bank>(
    db: &TxPool<DB>,
    order: &Order,
    pause: Duration,
) -> Result<(Row, bool), TxError> {
    if let Some(row) = settled(db, &order.key).await? {
        return Ok((row, false));
    }
    let mut tx = db.tx().immediate().timeout(order.limit()).begin().await?;
    let outcome = move_money::<DB>(&mut tx, order, Duration::ZERO).await?;
    tx.commit().await?;
    // If the client hangs up here, the money has moved, and the client is told that it has not.
    sleep(pause).await;
    let mut tx = db.tx().immediate().timeout(order.limit()).begin().await?;
    claim::<DB>(&mut tx, order, outcome).await?;
    tx.commit().await?;
    Ok((row(order, outcome), true))
}

/// The outcome of a key: its row, or `None` if nothing was committed and nothing is in flight any more.
///
/// If there is no row yet, a transfer may be about to commit it. So this claims the key, which waits for that transfer,
/// and gives it back.
pub(super) async fn settled<DB: Bank>(db: &TxPool<DB>, key: &str) -> Result<Option<Row>, TxError> {
    let nothing = Order { key: key.to_owned(), from: 0, to: 0, amount: 0, limit_ms: None };
    let mut tx = db.tx().immediate().timeout(nothing.limit()).begin().await?;
    let is_free = claim::<DB>(&mut tx, &nothing, Outcome::Completed).await?;
    let row = if is_free { None } else { DB::recorded(&mut tx, key).await? };
    tx.rollback().await?;
    Ok(row)
}

/// Writes the row, and returns whether there was none before.
async fn claim<DB: Bank>(conn: &mut DB::Connection, order: &Order, outcome: Outcome) -> Result<bool, sqlx::Error> {
    let word = if outcome == Outcome::Refused { "refused" } else { "completed" };
    let Order { key, from, to, amount, .. } = order;
    Ok(DB::change(conn, DB::CLAIM, &[key, word], &[*from, *to, *amount]).await? == 1)
}

async fn move_money<DB: Bank>(
    conn: &mut DB::Connection,
    order: &Order,
    pause: Duration,
) -> Result<Outcome, sqlx::Error> {
    let Order { from, to, amount, .. } = *order;
    // Always the lower account first; otherwise two opposite transfers would wait for each other.
    let mut changes = [(from, -amount), (to, amount)];
    changes.sort_unstable();
    let [first, second] = changes;
    let is_first_changed = add::<DB>(conn, first).await?;
    if !pause.is_zero() {
        sleep(pause).await;
    }
    let is_second_changed = is_first_changed && add::<DB>(conn, second).await?;
    if is_first_changed && !is_second_changed {
        // The receiver came first, and the sender would be overdrawn.
        add::<DB>(conn, (first.0, -first.1)).await?;
    }
    Ok(if is_second_changed { Outcome::Completed } else { Outcome::Refused })
}

/// Adds to an account, unless it would be overdrawn.
async fn add<DB: Bank>(conn: &mut DB::Connection, (id, amount): (i64, i64)) -> Result<bool, sqlx::Error> {
    let sql = "UPDATE accounts SET balance = balance + ? WHERE id = ? AND balance + ? >= 0";
    Ok(DB::change(conn, sql, &[], &[amount, id, amount]).await? == 1)
}

fn row(order: &Order, outcome: Outcome) -> Row {
    let Order { key, from, to, amount, .. } = order.clone();
    Row { key, from, to, amount, outcome }
}
