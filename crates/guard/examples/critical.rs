//! A thousand money transfers, each with a timeout that may fire between its two halves.
//!
//! ```text
//! cargo run -p cancel-safe-guard --example critical
//! ```
//!
//! First with tokio's timeout, which loses money, then with a critical section and a timeout that honours it. If that
//! one loses any, the exit code is 1.
#![expect(clippy::print_stdout, reason = "an example speaks through its output")]

use std::cell::Cell;
use std::process::ExitCode;
use std::time::Duration;

use cancel_safe_guard::{critical, timeout};
use tokio::time::sleep;

const TRANSFERS: u64 = 1_000;

struct Bank {
    alice: Cell<i64>,
    bob: Cell<i64>,
}

impl Bank {
    fn new() -> Self {
        Self { alice: Cell::new(1_000), bob: Cell::new(0) }
    }

    async fn withdraw_and_deposit(&self) {
        self.alice.set(self.alice.get() - 1);
        sleep(Duration::from_millis(2)).await; // the audit: dropped here, the money is gone
        self.bob.set(self.bob.get() + 1);
    }

    fn missing(&self) -> i64 {
        1_000 - self.alice.get() - self.bob.get()
    }
}

/// May be dropped: nothing has happened yet.
async fn check_the_limits() {
    sleep(Duration::from_millis(2)).await;
}

/// The limit of each transfer: in the checks, in the middle of the transfer, or after it.
fn limit(number: u64) -> Duration {
    Duration::from_millis(number % 6)
}

#[tokio::main(flavor = "current_thread", start_paused = true)]
async fn main() -> ExitCode {
    let plain = Bank::new();
    let mut cut = 0;
    for number in 0..TRANSFERS {
        let transfer = async {
            check_the_limits().await;
            plain.withdraw_and_deposit().await;
        };
        cut += u64::from(tokio::time::timeout(limit(number), transfer).await.is_err());
    }
    println!("tokio's timeout:    {cut} of {TRANSFERS} cut, {} missing", plain.missing());

    let guarded = Bank::new();
    let mut cut = 0;
    for number in 0..TRANSFERS {
        let transfer = async {
            check_the_limits().await;
            critical(guarded.withdraw_and_deposit()).await;
        };
        cut += u64::from(timeout(limit(number), transfer).await.is_err());
    }
    println!("a critical section: {cut} of {TRANSFERS} cut, {} missing", guarded.missing());

    if guarded.missing() == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
