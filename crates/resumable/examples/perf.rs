//! scratch
use cancel_safe_resumable::{FileStore, ResumableTask};
use tokio_util::sync::CancellationToken;
fn main() {
    let a: Vec<String> = std::env::args().collect();
    let (mode, n) = (a[1].clone(), a[2].parse::<u64>().unwrap());
    let rt = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let dir = tempfile::tempdir().unwrap();
    let rounds: u32 = a.get(3).map_or(1, |r| r.parse().unwrap());
    let mut best = f64::MAX;
    for r in 0..rounds {
        let path = dir.path().join(format!("b{r}.ckpt"));
        let t = std::time::Instant::now();
        rt.block_on(async {
            match mode.as_str() {
                "process" => {
                    let mut task = ResumableTask::new((0..n).collect(), path.clone(), CancellationToken::new());
                    task.process(|x| async move { x * 2 }).await.unwrap();
                }
                c => {
                    let b = ResumableTask::builder("bench").store(FileStore::at(&path)).concurrency(c.parse().unwrap());
                    b.stream(0..n, |_, x: u64| async move { Ok::<u64, _>(x * 2) }).finish().await.unwrap();
                }
            }
        });
        best = best.min(t.elapsed().as_secs_f64() * 1e9 / n as f64);
    }
    eprintln!("{mode}: {best:.1} ns an item");
}
