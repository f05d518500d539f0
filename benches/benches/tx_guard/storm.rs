//! How long the locks of many transactions stay taken that are dropped at once, far away from the server.

use std::time::Duration;

use cancel_safe_tx_guard::Options;
use sqlx::{MySql, Postgres};

use crate::measure::{Table, show};
use crate::storms::{Doing, Report, Stormy, quantile, storm};

/// The time for the round trips, plus the machine's own time.
fn bar(drops: u32, round_trip: Duration) -> Duration {
    let machine = if drops > 100 { 300 } else { 50 };
    round_trip * 3 + Duration::from_millis(machine)
}

/// The number of storms of a kind whose times are combined.
fn times(drops: u32) -> usize {
    if drops > 100 { 3 } else { 10 }
}

/// Storms of a kind, one row.
async fn row<D: Stormy>(table: &mut Table, options: &Options<D>, drops: u32, round_trip: Duration, doing: Doing) {
    let mut all = Report { locks: Vec::new(), slots: Vec::new(), lost: 0, terminated: 0, cancels: 0, missed: 0 };
    for _ in 0..times(drops) {
        let storm = storm::<D>(options, drops, round_trip, doing).await;
        all.locks.extend(storm.locks);
        all.slots.extend(storm.slots);
        all.lost += storm.lost;
        all.terminated += storm.terminated;
        all.cancels += storm.cancels;
        all.missed += storm.missed;
    }
    let both = |times: &[Duration]| [0.5, 0.99].map(|q| show(quantile(times, q))).join(" / ");
    let what = if doing == Doing::Idle { "idle guards" } else { "drops" };
    // A pool keeps a limited number of events for a listener, so some of a larger storm are not counted.
    let at_least = if all.missed > 0 { "≥ " } else { "" };
    table.row([
        format!("{}, {drops} {what}, round trip {} ms", D::TITLE, round_trip.as_millis()),
        format!("p99 {}", show(bar(drops, round_trip))),
        both(&all.locks),
        both(&all.slots),
        format!("{} of {}", all.lost, all.locks.len()),
        format!("{at_least}{}", all.terminated),
        format!("{at_least}{}", all.cancels),
    ]);
}

async fn rows<D: Stormy>(table: &mut Table, options: &Options<D>) {
    for drops in [100, 1_000] {
        for round_trip in [0, 20, 60].map(Duration::from_millis) {
            row::<D>(table, options, drops, round_trip, Doing::Running).await;
        }
    }
    row::<D>(table, options, 100, Duration::from_millis(20), Doing::Idle).await;
}

pub(crate) async fn run(postgres: &str, mysql: &str) {
    println!("after a storm of drops, until the row of each transaction, and its connection, is free: p50 / p99");
    let mut table =
        Table::new(&["", "bar", "locks free", "connections back", "sessions lost", "terminated", "cancels"]);
    rows::<Postgres>(&mut table, &postgres.parse().unwrap()).await;
    rows::<MySql>(&mut table, &mysql.parse().unwrap()).await;
    table.print();
}
