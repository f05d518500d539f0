//! The size of the primitives of `cancel-safe-guard`, and of the tokens used with them: the value itself, and its
//! memory on the heap. These are counts, not times: one run is enough.
#![expect(clippy::print_stdout, reason = "the table is the result")]

use std::alloc::System;
use std::future::{Future, ready};
use std::time::Duration;

use cancel_safe_guard::{Guard, Reaper, critical, timeout, with_token};
use stats_alloc::{INSTRUMENTED_SYSTEM, Region, StatsAlloc};
use tokio_util::sync::CancellationToken;

#[global_allocator]
static ALLOCATOR: &StatsAlloc<System> = &INSTRUMENTED_SYSTEM;

const HOUR: Duration = Duration::from_secs(3600);

/// Makes a value and prints its size.
fn weigh<T>(name: &str, make: impl FnOnce() -> T) -> T {
    let region = Region::new(ALLOCATOR);
    let value = make();
    let heap = region.change();
    println!("{name:<34} {:>5} {:>5} {:>12}", size_of::<T>(), heap.bytes_allocated, heap.allocations);
    value
}

fn one() -> impl Future<Output = u32> {
    ready(1)
}

fn main() {
    println!("{:<34} {:>5} {:>5} {:>12}", "", "value", "heap", "allocations");
    let token = weigh("CancellationToken", CancellationToken::new);
    drop(weigh("CancellationToken, a first child", || token.child_token()));
    let _older = token.child_token();
    drop(weigh("CancellationToken, a second child", || token.child_token()));
    drop(weigh("Guard, of a reference", || Guard::new(|| drop(token.clone()))));
    // tokio's timeout needs its runtime when it is created.
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build();
    let runtime = runtime.expect("a runtime is built from nothing");
    let _inside = runtime.enter();
    drop(weigh("a future that is ready", one));
    drop(weigh("critical of it", || critical(one())));
    drop(weigh("timeout of it", || timeout(HOUR, one())));
    drop(weigh("tokio::time::timeout of it", || tokio::time::timeout(HOUR, one())));
    drop(weigh("with_token of it", || with_token(&token, one())));
    let reaper = weigh("Reaper", Reaper::new);
    drop(weigh("Reaper::shield of it", || reaper.shield(one())));
}
