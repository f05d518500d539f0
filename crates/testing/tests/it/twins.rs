//! Broken twins that the exploration has to catch at their await, and fixed ones on which it has to be silent.

use std::cell::Cell;
use std::time::Duration;

use cancel_safe_testing::{Explore, Outcome, Way};

struct Bank(Cell<i64>, Cell<i64>);
impl Bank {
    async fn new() -> Self {
        tokio::task::yield_now().await;
        Bank(Cell::new(60), Cell::new(40))
    }
    async fn transfer(&self, n: i64) {
        self.0.set(self.0.get() - n);
        tokio::time::sleep(Duration::from_millis(5)).await;
        self.1.set(self.1.get() + n);
    }
    async fn sum(&self) -> i64 {
        tokio::task::yield_now().await;
        self.0.get() + self.1.get()
    }
}

#[test]
fn bank() {
    let t = std::time::Instant::now();
    let report =
        Explore::new().budgets([1, 2, 3]).ways([Way::Eager, Way::Settled, Way::Shutdown]).paused_time(true).run(
            async || Bank::new().await,
            async |bank| bank.transfer(30).await,
            async |bank, outcome| {
                let _ = matches!(outcome, Outcome::Completed(_));
                let sum = bank.sum().await;
                if sum == 100 { Ok(()) } else { Err(format!("money gone: {sum}")) }
            },
        );
    println!("{report} {:?}", t.elapsed());
    println!("{report:#?}");
}
