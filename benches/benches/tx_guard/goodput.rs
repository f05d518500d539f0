//! How many transactions get done by callers who do not wait long, and what they leave behind.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use tokio::task::JoinSet;
use tokio::time::timeout;

use crate::measure::{Place, Table};
use crate::peers::{Contestant, all};

const TASKS: i64 = 16;
const CONNECTIONS: u32 = 8;
const TIME: Duration = Duration::from_secs(2);

/// How many backends PostgreSQL has started for this database.
async fn sessions(place: &Place) -> i64 {
    let count = "SELECT sessions FROM pg_stat_database WHERE datname = current_database()";
    place.number(count.to_owned()).await
}

async fn goodput(contestant: &Contestant, place: &Place, longest_ms: u64) -> String {
    // Counted a second late, and so are our own questions.
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
    // Less the connections of the questions before and between.
    let sessions = (sessions(place).await - before - 2).max(0);
    format!("{per_second:.0}/s, {sessions} sessions, {leaked} leaked")
}

pub(crate) async fn run(url: &str) {
    let place = Place::open(url, TASKS).await;
    println!(
        "{TASKS} tasks on {CONNECTIONS} connections whose deadlines are random up to 2, 6, 15 ms: transactions a second,"
    );
    println!("sessions opened meanwhile, transactions left open");
    let mut table = Table::new(&["", "0 to 2 ms", "0 to 6 ms", "0 to 15 ms"]);
    for contestant in all(&place, CONNECTIONS).await {
        let mut cells = vec![contestant.name.to_owned()];
        for longest in [2, 6, 15] {
            cells.push(goodput(&contestant, &place, longest).await);
        }
        table.row(cells);
    }
    table.print();
    place.close().await;
}
