//! The error for a user who has chosen no database.

use cancel_safe_tx_guard::{TxError, TxPool};
use sqlx::Postgres;

fn main() {
    let _never = async { Ok::<_, TxError>(TxPool::<Postgres>::connect("postgres://localhost/none").await?) };
}
