//! sqlx transactions that end when they are dropped, and say how they ended.

mod backend;
mod commit;
mod error;
mod guard;
mod pool;
#[cfg(feature = "postgres")]
mod postgres;
mod reaper;
#[cfg(feature = "sqlite")]
mod sqlite;

pub use backend::{Backend, Options};
pub use commit::{CommitOutcome, OutcomeHandle};
pub use error::{CommitError, TxError};
pub use guard::TransactionGuard;
pub use pool::{CloseReport, PoolSource, TxPool, TxPoolBuilder};
