//! A cache that is filled once, dropped at every await point: as most people write it, and mended.
//!
//! ```text
//! cargo run -p cancel-safe-testing --example explore
//! ```
//!
//! The first report shows where a drop leaves the cache "loading" for ever, and how to repeat just that run. If the
//! mended cache is not clean, or the first one is, the exit code is 1.
#![expect(clippy::print_stdout, reason = "an example speaks through its output")]

use std::cell::Cell;
use std::process::ExitCode;
use std::time::Duration;

use cancel_safe_testing::{Explore, Report};

#[derive(Debug, Clone, Copy, PartialEq)]
enum Entry {
    Empty,
    Loading,
    Loaded,
}

async fn fetch() {
    tokio::time::sleep(Duration::from_millis(10)).await;
}

/// Leaves `Loading` behind if it is dropped while it fetches: nobody ever loads the entry again.
async fn fill(entry: &Cell<Entry>) {
    entry.set(Entry::Loading);
    fetch().await;
    entry.set(Entry::Loaded);
}

/// The same, which puts the entry back unless it was loaded.
async fn fill_or_put_back(entry: &Cell<Entry>) {
    struct PutBack<'a>(&'a Cell<Entry>);
    impl Drop for PutBack<'_> {
        fn drop(&mut self) {
            if self.0.get() == Entry::Loading {
                self.0.set(Entry::Empty);
            }
        }
    }
    entry.set(Entry::Loading);
    let _put_back = PutBack(entry);
    fetch().await;
    entry.set(Entry::Loaded);
}

/// How to set up, what to drop, what must hold afterwards.
fn explore(fill: impl AsyncFn(&Cell<Entry>)) -> Report {
    Explore::new().paused_time(true).run(
        async || Cell::new(Entry::Empty),
        async |entry| fill(entry).await,
        async |entry, _outcome| match entry.get() {
            Entry::Loading => Err("nobody loads it again".to_owned()),
            Entry::Empty | Entry::Loaded => Ok(()),
        },
    )
}

fn main() -> ExitCode {
    let broken = explore(fill);
    println!("as most people write it:\n{broken}\n");
    let mended = explore(fill_or_put_back);
    println!("mended:\n{mended}");
    if mended.is_clean() && !broken.is_clean() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
