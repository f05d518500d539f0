//! Durable replacement and streaming of files, beside std and beside `tokio::fs` with one await a step.
//!
//! Everything that is called durable syncs the file and its directory, so that like is compared with like.
#![expect(clippy::unwrap_used, reason = "a bench that fails has nothing to measure")]

use std::fs::File;
use std::hint::black_box;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

use cancel_safe_atomic_fs::{self as atomic_fs, AtomicFileWriter, Durability};
use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use tokio::runtime::Runtime;

const CHUNK_BYTES: usize = 8 << 10;
const STREAM_BYTES: usize = 64 << 20;

/// A directory on the disk that holds the build, removed at the end.
struct Scratch(PathBuf);

impl Scratch {
    fn new() -> Self {
        let path = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("atomic-fs-{}", std::process::id()));
        std::fs::create_dir_all(&path).unwrap();
        Self(path)
    }

    fn file(&self) -> PathBuf {
        self.0.join("file")
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        drop(std::fs::remove_dir_all(&self.0));
    }
}

/// What a careful program does by hand: create, write, sync, rename, sync the directory.
fn std_replace(path: &Path, content: &[u8]) {
    let temp = path.with_extension("tmp");
    let mut file = File::create(&temp).unwrap();
    file.write_all(content).unwrap();
    file.sync_all().unwrap();
    std::fs::rename(&temp, path).unwrap();
    File::open(path.parent().unwrap()).unwrap().sync_all().unwrap();
}

/// The same with one await a step.
#[expect(clippy::disallowed_methods, reason = "this is what ours is compared with")]
async fn naive_replace(path: &Path, content: &[u8]) {
    use tokio::io::AsyncWriteExt;
    let temp = path.with_extension("tmp");
    let mut file = tokio::fs::File::create(&temp).await.unwrap();
    file.write_all(content).await.unwrap();
    file.flush().await.unwrap();
    file.sync_all().await.unwrap();
    tokio::fs::rename(&temp, path).await.unwrap();
    tokio::fs::File::open(path.parent().unwrap()).await.unwrap().sync_all().await.unwrap();
}

fn replace(c: &mut Criterion) {
    let runtime = Runtime::new().unwrap();
    let scratch = Scratch::new();
    let path = scratch.file();
    for (name, bytes) in [("4KiB", 4 << 10), ("1MiB", 1 << 20), ("64MiB", 64 << 20)] {
        let mut group = c.benchmark_group("replace");
        group.throughput(Throughput::Bytes(bytes as u64)).sample_size(if bytes > 1 << 20 { 10 } else { 60 });
        let content = vec![b'x'; bytes];
        group.bench_function(BenchmarkId::new("std", name), |b| b.iter(|| std_replace(&path, black_box(&content))));
        group.bench_function(BenchmarkId::new("atomic-fs", name), |b| {
            b.to_async(&runtime).iter(async || atomic_fs::write(&path, black_box(&content)).await.unwrap());
        });
        group.bench_function(BenchmarkId::new("tokio-fs", name), |b| {
            b.to_async(&runtime).iter(async || naive_replace(&path, black_box(&content)).await);
        });
        group.finish();
    }
}

/// Nothing is synced here: the disk would hide what the chunks cost.
#[expect(clippy::disallowed_methods, reason = "this is what ours is compared with")]
fn stream(c: &mut Criterion) {
    use tokio::io::AsyncWriteExt;
    let runtime = Runtime::new().unwrap();
    let scratch = Scratch::new();
    let path = scratch.file();
    let chunk = vec![b'x'; CHUNK_BYTES];
    let mut group = c.benchmark_group("stream-64MiB-by-8KiB");
    group.throughput(Throughput::Bytes(STREAM_BYTES as u64)).sample_size(10);
    group.bench_function("std-BufWriter-256KiB", |b| {
        b.iter(|| {
            let temp = path.with_extension("tmp");
            let mut writer = BufWriter::with_capacity(256 << 10, File::create(&temp).unwrap());
            for _ in 0..STREAM_BYTES / CHUNK_BYTES {
                writer.write_all(black_box(&chunk)).unwrap();
            }
            writer.flush().unwrap();
            std::fs::rename(&temp, &path).unwrap();
        });
    });
    group.bench_function("atomic-fs", |b| {
        b.to_async(&runtime).iter(async || {
            let options = AtomicFileWriter::options().durability(Durability::None);
            let mut writer = options.open(&path).await.unwrap();
            for _ in 0..STREAM_BYTES / CHUNK_BYTES {
                writer.write_all(black_box(&chunk)).await.unwrap();
            }
            writer.commit().await.unwrap();
        });
    });
    group.bench_function("tokio-fs-File", |b| {
        b.to_async(&runtime).iter(async || {
            let temp = path.with_extension("tmp");
            let mut file = tokio::fs::File::create(&temp).await.unwrap();
            for _ in 0..STREAM_BYTES / CHUNK_BYTES {
                file.write_all(black_box(&chunk)).await.unwrap();
            }
            file.flush().await.unwrap();
            tokio::fs::rename(&temp, &path).await.unwrap();
        });
    });
    group.finish();
}

/// Many small files: the kernel groups the syncs of concurrent writers by itself.
fn many(c: &mut Criterion) {
    const FILES: usize = 200;
    let runtime = Runtime::new().unwrap();
    let scratch = Scratch::new();
    let content = [b'x'; 4 << 10];
    let mut group = c.benchmark_group("200-files-of-4KiB");
    group.throughput(Throughput::Elements(FILES as u64)).sample_size(10);
    group.bench_function("std-in-turn", |b| {
        b.iter(|| (0..FILES).for_each(|i| std_replace(&scratch.0.join(i.to_string()), &content)));
    });
    group.bench_function("atomic-fs-32-at-once", |b| {
        b.to_async(&runtime).iter(async || {
            let mut tasks = tokio::task::JoinSet::new();
            for i in 0..FILES {
                if tasks.len() == 32 {
                    tasks.join_next().await.unwrap().unwrap();
                }
                let path = scratch.0.join(i.to_string());
                tasks.spawn(async move { atomic_fs::write(path, content).await.unwrap() });
            }
            tasks.join_all().await;
        });
    });
    group.finish();
}

criterion_group!(benches, replace, stream, many);
criterion_main!(benches);
