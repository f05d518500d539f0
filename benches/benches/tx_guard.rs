//! What a dropped transaction leaves behind and for how long, the cost of a guard, and the faults of the peers.
//!
//! The bars are measured in one run beside plain sqlx, both default and tuned (`test_before_acquire(false)`); the
//! faults beside the peers, with the feature `peers`. Criterion repeats one thing until its time is known; here most of
//! the times are waits of seconds for other transactions' locks, and costs are ratios of blocks that take turns. So
//! this bench has its own harness. `cargo xtask bench tx_guard` starts the servers; the names `latency`, `drops`,
//! `storm`, `goodput` and `faults` choose a part.

#![expect(clippy::print_stdout, reason = "a bench speaks through its output")]
#![expect(clippy::unwrap_used, reason = "a bench that fails has nothing to measure")]

#[path = "tx_guard/drops.rs"]
mod drops;
#[path = "tx_guard/faults.rs"]
mod faults;
#[path = "tx_guard/goodput.rs"]
mod goodput;
#[path = "tx_guard/latency.rs"]
mod latency;
#[path = "tx_guard/measure.rs"]
mod measure;
#[path = "tx_guard/peers.rs"]
mod peers;
#[path = "tx_guard/storm.rs"]
mod storm;
/// The storms from the tests of the crate.
#[path = "../../crates/tx-guard/tests/it/network/storm.rs"]
mod storms;

/// Set by `cargo xtask bench`.
const POSTGRES: &str = "CANCEL_SAFE_TEST_POSTGRES_URL";
const MYSQL: &str = "CANCEL_SAFE_TEST_MYSQL_URL";

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    // Run as a child that will be killed.
    if let [role, target, row] = arguments.as_slice()
        && let Some(role) = drops::Role::named(role)
    {
        return runtime.block_on(drops::hold(role, target, row.parse().unwrap()));
    }
    let chosen: Vec<&str> = arguments.iter().map(String::as_str).filter(|name| !name.starts_with('-')).collect();
    let wants = |part: &str| chosen.is_empty() || chosen.contains(&part);
    let server = |variable: &str| {
        std::env::var(variable).unwrap_or_else(|_| panic!("set {variable}, or run `cargo xtask bench tx_guard`"))
    };
    let (postgres, mysql) = (server(POSTGRES), server(MYSQL));
    if wants("latency") {
        runtime.block_on(latency::run(&postgres));
    }
    if wants("drops") {
        runtime.block_on(drops::run(&postgres, &mysql));
    }
    if wants("storm") {
        runtime.block_on(storm::run(&postgres, &mysql));
    }
    if wants("goodput") {
        runtime.block_on(goodput::run(&postgres));
    }
    if wants("faults") {
        runtime.block_on(faults::run(&postgres));
    }
}
