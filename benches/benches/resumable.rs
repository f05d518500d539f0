//! The cost of a checkpoint when an item costs nothing, beside the tutorials' scheme (all results rewritten as JSON
//! after every hundredth item), beside other stores, and in a fleet beside a queue of rows.
//!
//! `cargo xtask bench resumable` starts the server; the names `items`, `stores` and `fleet` choose a part.
//!
//! The figure of a whole run includes everything: creating and locking the file, the last fsync, unlocking it. The JSON
//! scheme never syncs.

#![expect(clippy::print_stdout, reason = "a bench speaks through its output")]

use std::{
    fs,
    path::{Path, PathBuf},
    time::Duration,
};

use cancel_safe_resumable::{Codec, FileStore, ResumableTask};
use criterion::{BenchmarkId, Criterion, SamplingMode, Throughput, criterion_group};
use tokio::runtime::Runtime;
use tokio_util::sync::CancellationToken;

#[path = "resumable/fleet.rs"]
mod fleet;
#[path = "resumable/stores.rs"]
mod stores;

/// At this size the fixed cost of a run is small beside the items.
const ITEMS: u64 = 1_000_000;
/// At a million items the JSON scheme would take minutes for each run: its cost grows with the square.
const JSON_ITEMS: u64 = 20_000;

fn runtime() -> Runtime {
    tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime is built from nothing")
}

/// A run of a stream of trivial items.
async fn stream(path: &Path, items: u64, concurrency: usize, codec: Codec) {
    let builder = ResumableTask::builder("bench").store(FileStore::at(path)).concurrency(concurrency).codec(codec);
    let run = builder.stream(0..items, |_, x: u64| async move { Ok(x * 2) });
    run.finish().await.expect("nothing stops the run");
}

/// The simple form, which returns all results.
async fn process(path: &Path, items: u64) {
    let mut task = ResumableTask::new((0..items).collect(), path.to_owned(), CancellationToken::new());
    let results = task.process(|x| async move { x * 2 }).await.expect("nothing stops the run");
    assert_eq!(results.len() as u64, items);
}

async fn rewritten_json(path: &Path, items: u64) {
    let mut results = Vec::new();
    for x in 0..items {
        results.push(x * 2);
        if x % 100 == 0 {
            let text = serde_json::to_vec(&results).expect("numbers are JSON");
            tokio::fs::write(path, text).await.expect("the directory is writable");
        }
    }
}

fn bench(c: &mut Criterion) {
    let (runtime, dir) = (runtime(), tempfile::tempdir().expect("a directory is made"));
    let path = dir.path().join("bench.ckpt");
    let mut group = c.benchmark_group("resumable");
    group.sample_size(10).sampling_mode(SamplingMode::Flat).measurement_time(Duration::from_secs(3));

    group.throughput(Throughput::Elements(ITEMS));
    for concurrency in [1, 64] {
        group.bench_function(BenchmarkId::new("stream, 10⁶ trivial items, at once", concurrency), |b| {
            b.iter_batched(
                || remove(&path),
                |()| runtime.block_on(stream(&path, ITEMS, concurrency, Codec::MessagePack)),
                criterion::BatchSize::PerIteration,
            );
        });
    }
    report_size(&path, "MessagePack", ITEMS);
    group.bench_function("stream, 10⁶ trivial items, postcard", |b| {
        b.iter_batched(
            || remove(&path),
            |()| runtime.block_on(stream(&path, ITEMS, 1, Codec::Postcard)),
            criterion::BatchSize::PerIteration,
        );
    });
    report_size(&path, "postcard", ITEMS);
    group.bench_function("process, 10⁶ trivial items", |b| {
        b.iter_batched(
            || remove(&path),
            |()| runtime.block_on(process(&path, ITEMS)),
            criterion::BatchSize::PerIteration,
        );
    });
    remove(&path);
    runtime.block_on(process(&path, ITEMS));
    group.bench_function("process, 10⁶ items restored", |b| b.iter(|| runtime.block_on(process(&path, ITEMS))));

    group.throughput(Throughput::Elements(JSON_ITEMS));
    group.bench_function("process, 20,000 trivial items", |b| {
        b.iter_batched(
            || remove(&path),
            |()| runtime.block_on(process(&path, JSON_ITEMS)),
            criterion::BatchSize::PerIteration,
        );
    });
    group.bench_function("JSON rewritten every 100 of 20,000 items", |b| {
        b.iter_batched(
            || remove(&path),
            |()| runtime.block_on(rewritten_json(&path, JSON_ITEMS)),
            criterion::BatchSize::PerIteration,
        );
    });
    group.finish();
}

fn remove(path: &PathBuf) {
    if path.exists() {
        fs::remove_file(path).expect("the file of the last run is removed");
    }
}

fn report_size(path: &Path, codec: &str, items: u64) {
    if let Ok(metadata) = fs::metadata(path) {
        println!("{codec}: {} bytes, {:.2} an item", metadata.len(), metadata.len() as f64 / items as f64);
    }
}

criterion_group!(benches, bench);
/// Set by `cargo xtask bench`.
const POSTGRES: &str = "CANCEL_SAFE_TEST_POSTGRES_URL";

fn main() {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let parts: Vec<&str> =
        words.iter().map(String::as_str).filter(|word| ["items", "stores", "fleet"].contains(word)).collect();
    let wants = |part: &str| parts.is_empty() || parts.contains(&part);
    if wants("items") {
        if parts.is_empty() {
            benches();
        } else {
            // Without the arguments, because criterion would take a part's name for a filter.
            bench(&mut Criterion::default());
        }
        Criterion::default().final_summary();
    }
    // `cargo test` runs benches too, and needs no figures.
    if !words.iter().any(|word| word == "--bench") {
        return;
    }
    if wants("stores") {
        stores::run(&runtime());
    }
    if wants("fleet") {
        let url = std::env::var(POSTGRES);
        let url = url.unwrap_or_else(|_| panic!("set {POSTGRES}, or run `cargo xtask bench resumable`"));
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build();
        runtime.expect("a runtime is built from nothing").block_on(fleet::run(&url));
    }
}
