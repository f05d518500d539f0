//! A count that never comes down
//!
//! A counter, a permit that was forgotten on purpose, the probe of a circuit breaker: nothing is visibly wrong until the
//! limit is reached, weeks later, by requests that do not exist. What goes up before an await must come down in a destructor.

use std::cell::Cell;
use std::time::Duration;

use cancel_safe_guard::Guard;
use cancel_safe_testing::{Explore, Report};
use tokio::time::sleep;

// Broken:
async fn call_bad(in_flight: &Cell<u32>) {
    in_flight.set(in_flight.get() + 1);
    send().await;
    in_flight.set(in_flight.get() - 1);
}

// Mended:
async fn call_good(in_flight: &Cell<u32>) {
    in_flight.set(in_flight.get() + 1);
    let _down = Guard::new(|| in_flight.set(in_flight.get() - 1));
    send().await;
}

// Judged:
async fn send() {
    sleep(Duration::from_millis(10)).await;
}

fn explore(call: impl AsyncFn(&Cell<u32>)) -> Report {
    Explore::new().paused_time(true).run(
        async || Cell::new(0),
        call,
        async |in_flight, _outcome| match in_flight.get() {
            0 => Ok(()),
            ghosts => Err(format!("{ghosts} counted as in flight, but no caller is left")),
        },
    )
}

pub(super) fn broken() -> Report {
    explore(call_bad)
}

pub(super) fn mended() -> Report {
    explore(call_good)
}
