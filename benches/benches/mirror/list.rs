//! A list of a million lines: how soon the first request comes, and how much memory there is by then.

use std::fmt::Write;
use std::io::Read;
use std::net::{Ipv4Addr, TcpListener};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use super::grounds::Ground;
use super::speed::resident;

const LINES: usize = 1_000_000;
const ROUNDS: usize = 5;

/// Starts mirror, and ends it when its first request is there.
pub(crate) fn first_request(ground: &Ground, mirror: &Path) {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("a free port");
    let base = format!("http://{}", listener.local_addr().expect("an address"));
    listener.set_nonblocking(true).expect("a socket");
    let list = ground.path.join("million.list");
    let mut text = String::new();
    for number in 0..LINES {
        let _infallible = writeln!(text, "{base}/data/{:03}/object-{number:07}.bin", number % 1000);
    }
    std::fs::write(&list, text).expect("a writable directory");
    let out = ground.path.join("million");
    let mut seconds = Vec::new();
    let mut peak = 0;
    for _ in 0..ROUNDS {
        let _absent = std::fs::remove_dir_all(&out);
        let started = Instant::now();
        let mut child = Command::new(mirror)
            .arg("--manifest")
            .arg(&list)
            .arg("--out")
            .arg(&out)
            .args(["--retries", "0"])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("an executable");
        let mut first = loop {
            match listener.accept() {
                Ok((first, _)) => break first,
                Err(_) => assert!(child.try_wait().expect("a child").is_none(), "it has ended without a request"),
            }
            std::thread::park_timeout(Duration::from_millis(1));
        };
        first.set_nonblocking(false).expect("a socket");
        let _begun = first.read(&mut [0]).expect("a request");
        seconds.push(started.elapsed().as_secs_f64());
        peak = peak.max(resident(&child));
        child.kill().expect("a child");
        child.wait().expect("a child");
        // Those that were under way as well.
        while listener.accept().is_ok() {}
    }
    seconds.sort_by(f64::total_cmp);
    println!("\na list of {LINES} lines, to the first request, {ROUNDS} rounds:");
    println!(
        "  median {:.2} s, most {:.2} s, most memory {} MiB",
        seconds[ROUNDS / 2],
        seconds[ROUNDS - 1],
        peak >> 10
    );
}
