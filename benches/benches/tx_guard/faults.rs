//! The faults of dropped transactions: this crate, sqlx and the peers meet each of them in the same way.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::{Duration, Instant};

use cancel_safe_tx_guard::CommitOutcome;
use futures_util::future::{FutureExt, join_all};
use tokio::time::timeout;

use crate::measure::{Place, Table, execute, show};
use crate::peers::{BoxError, Contestant, Worked, all, cut};

/// After how many pendings something is dropped: no crate has more.
const PENDINGS: std::ops::RangeInclusive<u32> = 1..=6;
const ROUNDS: usize = 4;
/// How long a dropped transaction may take to have its effect.
const SETTLE: Duration = Duration::from_millis(30);

/// How long to wait for a lock that may never be released.
const LONGEST: Duration = Duration::from_secs(14);

/// `None` if it takes longer than anything here should.
async fn patiently<T>(future: impl Future<Output = T>) -> Option<T> {
    timeout(Duration::from_secs(2), future).await.ok()
}

/// Turns a panic into an error.
async fn calmly<T>(work: Worked<T>) -> Result<T, BoxError> {
    AssertUnwindSafe(work).catch_unwind().await.unwrap_or_else(|_| Err("a panic".into()))
}

struct Faults {
    place: Place,
    next: i64,
}

impl Faults {
    /// An unused key.
    fn key(&mut self) -> i64 {
        self.next += 1;
        self.next
    }

    fn insert(&self, n: i64) -> String {
        format!("INSERT INTO {} (n) VALUES ({n})", self.place.table)
    }

    async fn is_there(&self, n: i64) -> bool {
        self.place.number(format!("SELECT count(*) FROM {} WHERE n = {n}", self.place.table)).await == 1
    }

    /// New pools of one connection, so that the next user meets whatever is left on it.
    async fn contestants(&self) -> Vec<Contestant> {
        all(&self.place, 1).await
    }
}

pub(crate) async fn run(url: &str) {
    let mut faults = Faults { place: Place::open(url, 50).await, next: 1_000 };
    let contestants = faults.contestants().await;
    let head: Vec<&str> = std::iter::once("").chain(contestants.iter().map(|it| it.name)).collect();
    let mut table = Table::new(&head);
    let mut row = |what: &str, cells: Vec<String>| table.row(std::iter::once(what.to_owned()).chain(cells));

    row("dropped in `pg_sleep(10)`: the row is free after", sleeping(&faults, &contestants).await);
    row("`begin` dropped: later writes through the pool that said Ok and are lost", begins(&mut faults).await);
    row("nested `begin` dropped: commits that said Ok and are not whole", nested(&mut faults, true).await);
    row("nested `begin` dropped: rollbacks that said Ok and did not happen", nested(&mut faults, false).await);
    let mut cells = Vec::new();
    for contestant in &contestants {
        let n = faults.key();
        let said = patiently(calmly(contestant.peer.work(vec![faults.insert(n), faults.insert(n)]))).await;
        let there = faults.is_there(n).await;
        cells.push(match said {
            Some(Ok(())) if !there => "Ok".to_owned(),
            Some(Ok(())) => "Ok, and it is there".to_owned(),
            Some(Err(_)) => "an error".to_owned(),
            None => "nothing".to_owned(),
        });
    }
    row("commit of an aborted transaction says", cells);
    row("dropped transactions that have committed", commits(&mut faults).await);
    row("dropped outside a runtime", outside(&faults).await);
    println!("the faults, each in the same scenario");
    table.print();
    drop(contestants);
    faults.place.close().await;
}

/// Runs all at the same time, each on its own row.
async fn sleeping(faults: &Faults, contestants: &[Contestant]) -> Vec<String> {
    let place = &faults.place;
    let waits = contestants.iter().zip(1..).map(async |(contestant, row)| {
        let work = contestant.peer.work(vec![place.update(row), "SELECT pg_sleep(10)".to_owned()]);
        assert!(timeout(Duration::from_millis(300), work).await.is_err(), "it was not slow");
        let mut conn = place.conn().await;
        let start = Instant::now();
        match timeout(LONGEST, execute(&mut conn, place.update(row))).await {
            Ok(freed) => {
                freed.unwrap();
                show(start.elapsed())
            }
            Err(_) => format!("more than {}", show(LONGEST)),
        }
    });
    join_all(waits).await
}

async fn begins(faults: &mut Faults) -> Vec<String> {
    let mut lost = Vec::new();
    for pendings in PENDINGS {
        for _ in 0..ROUNDS {
            for (index, Contestant { peer, .. }) in faults.contestants().await.into_iter().enumerate() {
                if lost.len() <= index {
                    lost.push((0, 0));
                }
                if patiently(cut(calmly(peer.work(Vec::new())), pendings)).await.is_none_or(|done| done.is_some()) {
                    continue;
                }
                lost[index].1 += 1;
                tokio::time::sleep(SETTLE).await;
                let n = faults.key();
                let said = patiently(calmly(peer.through_the_pool(faults.insert(n)))).await;
                if matches!(said, Some(Ok(()))) && !faults.is_there(n).await {
                    lost[index].0 += 1;
                }
            }
        }
    }
    lost.into_iter().map(|(lost, of)| format!("{lost} of {of}")).collect()
}

async fn nested(faults: &mut Faults, commit: bool) -> Vec<String> {
    let mut wrong: Vec<(usize, usize, usize)> = Vec::new();
    for pendings in PENDINGS {
        for _ in 0..ROUNDS {
            for (index, Contestant { peer, .. }) in faults.contestants().await.into_iter().enumerate() {
                if wrong.len() <= index {
                    wrong.push((0, 0, 0));
                }
                let (first, second) = (faults.key(), faults.key());
                let work = peer.nested(faults.insert(first), faults.insert(second), pendings, commit);
                let said = patiently(calmly(work)).await;
                tokio::time::sleep(SETTLE).await;
                let there = usize::from(faults.is_there(first).await) + usize::from(faults.is_there(second).await);
                match said {
                    // Faster than the cut.
                    Some(Ok(false)) => {}
                    Some(Ok(true)) => {
                        wrong[index].1 += 1;
                        wrong[index].0 += usize::from(there != if commit { 2 } else { 0 });
                    }
                    Some(Err(_)) | None => {
                        wrong[index].1 += 1;
                        // An error that has left something behind is no better.
                        wrong[index].2 += usize::from(there != 0);
                    }
                }
            }
        }
    }
    let show = |(wrong, of, halves)| match halves {
        0 => format!("{wrong} of {of}"),
        halves => format!("{wrong} of {of}, and {halves} errors that left something"),
    };
    wrong.into_iter().map(show).collect()
}

async fn commits(faults: &mut Faults) -> Vec<String> {
    let mut cells = Vec::new();
    for Contestant { peer, .. } in faults.contestants().await {
        let (mut dropped, mut committed, mut told, mut stuck) = (0, 0, 0, false);
        for round in 0..120 {
            let n = faults.key();
            match patiently(cut(calmly(peer.work(vec![faults.insert(n)])), 1 + round % 10)).await {
                Some(None) => {}
                Some(Some(_)) => continue,
                None => {
                    stuck = true;
                    break;
                }
            }
            dropped += 1;
            let outcome = match peer.last_outcome() {
                Some(outcome) => Some(timeout(Duration::from_secs(5), outcome).await.unwrap()),
                None => None,
            };
            tokio::time::sleep(SETTLE).await;
            let there = faults.is_there(n).await;
            committed += usize::from(there);
            let expected = if there { CommitOutcome::Committed } else { CommitOutcome::RolledBack };
            told += usize::from(outcome == Some(expected));
        }
        let told = match told {
            0 => "none of which can be told".to_owned(),
            told => format!("{told} of {dropped} told rightly"),
        };
        let stuck = if stuck { ", and then the pool gave no connection any more" } else { "" };
        cells.push(format!("{committed} of {dropped}, {told}{stuck}"));
    }
    cells
}

/// A thread without a runtime drops the future of a transaction.
async fn outside(faults: &Faults) -> Vec<String> {
    let mut cells = Vec::new();
    let before = std::panic::take_hook();
    std::panic::set_hook(Box::new(|_| {}));
    for Contestant { peer, .. } in faults.contestants().await {
        let mut work = peer.work(vec!["SELECT pg_sleep(0.5)".to_owned()]);
        assert!(timeout(Duration::from_millis(100), &mut work).await.is_err(), "it was not slow");
        let panicked = std::thread::spawn(move || catch_unwind(AssertUnwindSafe(move || drop(work))).is_err());
        let panicked = panicked.join().unwrap_or(true);
        cells.push(if panicked { "a panic" } else { "no panic" }.to_owned());
    }
    std::panic::set_hook(before);
    cells
}
