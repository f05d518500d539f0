//! The main job as a whole process: 10,000 files of 1 KiB from loopback, beside a plain reqwest loop that writes with
//! `tokio::fs::write` and keeps no catalogue; and its peak memory, also with a body of 1 GiB.
//!
//! Both clients are child processes, so that neither shares a heap with the server. Times are medians of five runs that
//! alternate; everything is written to the file system of `target/`.

#![expect(clippy::print_stdout, reason = "a bench speaks through its output")]

use std::convert::Infallible;
use std::io::Write;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures_util::StreamExt;
use http_body_util::{BodyExt, Full, StreamBody, combinators::BoxBody};
use hyper::body::{Frame, Incoming};
use hyper::service::service_fn;
use hyper::{Request, Response};
use hyper_util::rt::TokioIo;
use tokio::net::TcpListener;

const FILES: usize = 10_000;
const CONCURRENCY: usize = 32;
const RUNS: usize = 5;
const PIECE: usize = 64 * 1024;
const PIECES: usize = (1 << 30) / PIECE;

fn main() {
    let arguments: Vec<String> = std::env::args().collect();
    if let [_, mode, base, out] = &arguments[..]
        && mode == "plain"
    {
        return plain(base, Path::new(out));
    }
    let runtime =
        tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().expect("a runtime");
    let listener = runtime.block_on(TcpListener::bind((Ipv4Addr::LOCALHOST, 0))).expect("a free port");
    let base = format!("http://{}", listener.local_addr().expect("an address"));
    runtime.spawn(serve(listener));

    let mirror = build();
    let place = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join("mirror-bench");
    let fresh = || {
        let _absent = std::fs::remove_dir_all(&place);
        std::fs::create_dir_all(&place).expect("a writable target directory");
    };
    let list = |urls: String| {
        let path = place.join("urls.txt");
        std::fs::write(&path, urls).expect("a writable target directory");
        path
    };
    let many = (0..FILES).map(|number| format!("{base}/{}/{number}\n", number % 100)).collect::<String>();
    let per = CONCURRENCY.to_string();

    let (mut ours, mut theirs) = (Vec::new(), Vec::new());
    for _ in 0..RUNS {
        fresh();
        theirs.push(run(Command::new(&arguments[0]).arg("plain").arg(&base).arg(place.join("plain"))));
        fresh();
        let mut command = Command::new(&mirror);
        command.arg("--manifest").arg(list(many.clone())).arg("--out").arg(place.join("out"));
        ours.push(run(command.args(["--concurrency", &per, "--per-host", &per])));
    }
    fresh();
    let mut command = Command::new(&mirror);
    let large = run(command.arg("--manifest").arg(list(format!("{base}/large\n"))).arg("--out").arg(place.join("out")));
    fresh();

    let (ours, theirs) = (median(ours), median(theirs));
    let rate = |seconds: f64| FILES as f64 / seconds;
    println!("{FILES} files of 1 KiB, {CONCURRENCY} at once, median of {RUNS}:");
    println!(
        "  mirror, durable, with catalogue and checkpoint  {:>7.0} files/s  peak {:>4} MiB",
        rate(ours.0),
        ours.1 >> 10
    );
    println!(
        "  plain reqwest and tokio::fs::write              {:>7.0} files/s  peak {:>4} MiB",
        rate(theirs.0),
        theirs.1 >> 10
    );
    println!("  ratio {:.2}", theirs.0 / ours.0);
    println!("one body of 1 GiB: {:.0} MiB/s, peak {} MiB", 1024.0 / large.0, large.1 >> 10);
}

/// Builds the example as `cargo demo` does, and returns its path.
fn build() -> PathBuf {
    let built = Command::new(env!("CARGO"))
        .args(["build", "--quiet", "--release", "--package", "cancel-safe", "--example", "mirror", "--all-features"])
        .status()
        .expect("cargo");
    assert!(built.success());
    Path::new(env!("CARGO_TARGET_TMPDIR")).parent().expect("the target directory").join("release/examples/mirror")
}

/// Runs a command, which must succeed. Returns the seconds, and the peak of resident memory in KiB.
fn run(command: &mut Command) -> (f64, u64) {
    let started = Instant::now();
    let mut child = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().expect("an executable");
    let status = format!("/proc/{}/status", child.id());
    let mut peak = 0;
    loop {
        // The kernel keeps the peak, so that occasional reading misses only what the last moment added.
        let text = std::fs::read_to_string(&status).unwrap_or_default();
        let mark = text.lines().find_map(|line| line.strip_prefix("VmHWM:")?.trim().strip_suffix(" kB")?.parse().ok());
        peak = peak.max(mark.unwrap_or(0));
        if let Some(status) = child.try_wait().expect("a child") {
            assert!(status.success(), "{command:?}: {status}");
            return (started.elapsed().as_secs_f64(), peak);
        }
        std::thread::park_timeout(Duration::from_millis(5));
    }
}

fn median(mut runs: Vec<(f64, u64)>) -> (f64, u64) {
    runs.sort_by(|a, b| a.0.total_cmp(&b.0));
    let peak = runs.iter().map(|run| run.1).max().unwrap_or(0);
    (runs[runs.len() / 2].0, peak)
}

/// The usual program without these crates.
fn plain(base: &str, out: &Path) {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().expect("a runtime");
    runtime.block_on(async {
        let client = reqwest::Client::new();
        futures_util::stream::iter(0..FILES)
            .for_each_concurrent(CONCURRENCY, |number| {
                let (client, url) = (client.clone(), format!("{base}/{}/{number}", number % 100));
                let directory = out.join((number % 100).to_string());
                async move {
                    let body = client.get(url).send().await.expect("a response").bytes().await.expect("a body");
                    tokio::fs::create_dir_all(&directory).await.expect("a directory");
                    tokio::fs::write(directory.join(number.to_string()), body).await.expect("a file");
                }
            })
            .await;
    });
}

async fn serve(listener: TcpListener) {
    while let Ok((stream, _)) = listener.accept().await {
        tokio::spawn(async move {
            let answer = service_fn(|request| async move { Ok::<_, Infallible>(respond(&request)) });
            let connection = hyper::server::conn::http1::Builder::new().serve_connection(TokioIo::new(stream), answer);
            if let Err(error) = connection.await {
                let _closed = writeln!(std::io::stderr(), "connection: {error}");
            }
        });
    }
}

fn respond(request: &Request<Incoming>) -> Response<BoxBody<Bytes, Infallible>> {
    if request.uri().path() == "/large" {
        let piece = Bytes::from(vec![7; PIECE]);
        let pieces = futures_util::stream::iter((0..PIECES).map(move |_| Ok(Frame::data(piece.clone()))));
        return Response::new(BodyExt::boxed(StreamBody::new(pieces)));
    }
    Response::new(Full::new(Bytes::from(vec![b'x'; 1024])).boxed())
}
