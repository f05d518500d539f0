//! New files that become durable together, with `--durability end`: until then each is pending in the catalogue and has no
//! row, so that the next start looks at its bytes again.
//!
//! Invariant: here too, a row exists only when its file is durable; and the number of waiting files is bounded.

use std::sync::{Arc, Mutex, PoisonError};

use super::catalogue::{Catalogue, Change, Row};
use super::home::{Home, HomeError, blocking};

/// The most files that wait to be made durable. The row of each is held in memory.
const MAX_LATE: usize = 8192;

/// The files that wait.
#[derive(Debug, Default)]
pub(crate) struct Late {
    rows: Mutex<Vec<Row>>,
}

impl Late {
    /// Takes a file that is in its place. If the most files are waiting, makes all of them durable.
    pub(crate) async fn add(&self, row: Row, home: &Arc<Home>, catalogue: &Catalogue) -> Result<(), HomeError> {
        let is_full = {
            let mut rows = self.rows.lock().unwrap_or_else(PoisonError::into_inner);
            rows.push(row);
            rows.len() >= MAX_LATE
        };
        if is_full { self.flush(home, catalogue).await } else { Ok(()) }
    }

    /// Makes all files durable that wait, and then writes their rows. Dropped or failed, it leaves them pending.
    pub(crate) async fn flush(&self, home: &Arc<Home>, catalogue: &Catalogue) -> Result<(), HomeError> {
        let rows = std::mem::take(&mut *self.rows.lock().unwrap_or_else(PoisonError::into_inner));
        let place = Arc::clone(home);
        let rows = blocking(move |_| {
            place.make_durable(rows.iter().map(|row| row.path.as_str()))?;
            Ok(rows)
        })
        .await?;
        Ok(catalogue.apply_all(rows.into_iter().map(|row| Change::Put(Box::new(row))).collect()).await?)
    }
}
