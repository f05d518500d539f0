//! How many transactions impatient callers complete, and what they leave behind.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use tokio::task::JoinSet;
use tokio::time::timeout;

use crate::measure::{Place, Table, order, quantile};
use crate::peers::{Contestant, all, wrapped};

const TASKS: i64 = 16;
const CONNECTIONS: u32 = 8;
const TIME: Duration = Duration::from_secs(2);

/// How often patient contestants take turns, and how long a turn is.
const TURNS: usize = 7;
const TURN: Duration = Duration::from_millis(700);

/// How many backends PostgreSQL has started for this database.
async fn sessions(place: &Place) -> i64 {
    let count = "SELECT sessions FROM pg_stat_database WHERE datname = current_database()";
    place.number(count.to_owned()).await
}

async fn goodput(contestant: &Contestant, place: &Place, longest_ms: u64) -> String {
    // The count is a second late, also for our own queries.
    let settle = || tokio::time::sleep(Duration::from_millis(1_200));
    settle().await;
    let before = sessions(place).await;
    let (done, seed) = (Arc::new(AtomicUsize::new(0)), AtomicU32::new(1));
    let start = Instant::now();
    let mut tasks = JoinSet::new();
    for task in 0..TASKS {
        let (peer, done, update) = (Arc::clone(&contestant.peer), Arc::clone(&done), place.update(task + 1));
        let mut random = fastrand::Rng::with_seed(seed.fetch_add(1, Ordering::Relaxed).into());
        tasks.spawn(async move {
            while start.elapsed() < TIME {
                let patience = Duration::from_micros(random.u64(..longest_ms * 1_000));
                if let Ok(Ok(())) = timeout(patience, peer.work(vec![update.clone()])).await {
                    done.fetch_add(1, Ordering::Relaxed);
                }
            }
        });
    }
    tasks.join_all().await;
    let per_second = done.load(Ordering::Relaxed) as f64 / start.elapsed().as_secs_f64();
    settle().await;
    let leaked = contestant.leaked(place).await;
    // Without the connections of the queries before and in between.
    let sessions = (sessions(place).await - before - 2).max(0);
    format!("{per_second:.0}/s, {sessions} sessions, {leaked} leaked")
}

/// Transactions per second of callers that wait as long as it takes.
async fn unhurried(contestant: &Contestant, place: &Place) -> f64 {
    let start = Instant::now();
    let mut tasks = JoinSet::new();
    for task in 0..TASKS {
        let (peer, update) = (Arc::clone(&contestant.peer), place.update(task + 1));
        tasks.spawn(async move {
            let mut done = 0_usize;
            while start.elapsed() < TURN {
                peer.work(vec![update.clone()]).await.unwrap();
                done += 1;
            }
            done
        });
    }
    let done: usize = tasks.join_all().await.into_iter().sum();
    done as f64 / start.elapsed().as_secs_f64()
}

/// In turns, so that other load on the machine affects all of them: medians of the rates and of the ratios to tuned
/// sqlx.
async fn without_deadlines(contestants: &[Contestant], place: &Place) -> Vec<String> {
    let mut rates = vec![Vec::new(); contestants.len()];
    for turn in 0..TURNS + 1 {
        for index in order(turn, contestants.len()) {
            let rate = unhurried(&contestants[index], place).await;
            // The first turn warms everything up.
            if turn > 0 {
                rates[index].push(rate);
            }
        }
    }
    let tuned = contestants.iter().position(|contestant| contestant.name == "sqlx, tuned").unwrap();
    let base = rates[tuned].clone();
    let show = |rates: &Vec<f64>| {
        let ratios: Vec<f64> = rates.iter().zip(&base).map(|(ours, theirs)| ours / theirs).collect();
        format!("{:.0}/s, {:.2} ×", quantile(rates, 0.5), quantile(&ratios, 0.5))
    };
    rates.iter().map(show).collect()
}

pub(crate) async fn run(url: &str) {
    let place = Place::open(url, TASKS).await;
    println!(
        "{TASKS} tasks on {CONNECTIONS} connections whose deadlines are random up to 2, 6, 15 ms: transactions a second,"
    );
    println!("sessions opened meanwhile, transactions left open");
    println!("without a deadline also the ratio to tuned sqlx");
    let mut table = Table::new(&["", "0 to 2 ms", "0 to 6 ms", "0 to 15 ms", "no deadline"]);
    let mut contestants = all(&place, CONNECTIONS).await;
    contestants.insert(1, wrapped(&place, CONNECTIONS).await);
    let unhurried = without_deadlines(&contestants, &place).await;
    for (contestant, unhurried) in contestants.iter().zip(unhurried) {
        let mut cells = vec![contestant.name.to_owned()];
        for longest in [2, 6, 15] {
            cells.push(goodput(contestant, &place, longest).await);
        }
        cells.push(unhurried);
        table.row(cells);
    }
    table.print();
    place.close().await;
}
