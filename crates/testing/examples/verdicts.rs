//! Which of these reads may lose a `select!`? Each is dropped and called again; no check is written.
//!
//! ```text
//! cargo run -p cancel-safe-testing --example verdicts
//! ```
//!
//! The answers are those of the documentation of tokio; if one differs, the exit code is 1.
#![expect(clippy::print_stdout, reason = "an example speaks through its output")]
#![expect(clippy::disallowed_methods, reason = "it is about an operation that may lose data")]

use std::process::ExitCode;
use std::time::Duration;

use cancel_safe_testing::{Explore, Verdict};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, DuplexStream, duplex};
use tokio::sync::mpsc;
use tokio::time::sleep;

/// Eight bytes in two halves, a second apart; the peer stays.
async fn slow_pipe() -> DuplexStream {
    let (mut peer, pipe) = duplex(64);
    tokio::spawn(async move {
        for half in [b"abcd", b"efgh"] {
            if peer.write_all(half).await.is_err() {
                return;
            }
            sleep(Duration::from_secs(1)).await;
        }
        std::future::pending().await
    });
    pipe
}

/// Two messages, a second apart.
async fn slow_channel() -> mpsc::Receiver<u32> {
    let (sender, receiver) = mpsc::channel(1);
    tokio::spawn(async move {
        for message in [1, 2] {
            sleep(Duration::from_secs(1)).await;
            if sender.send(message).await.is_err() {
                return;
            }
        }
        std::future::pending().await
    });
    receiver
}

fn main() -> ExitCode {
    let explore = || Explore::new().paused_time(true);
    let calls = [
        (
            "mpsc::Receiver::recv",
            true,
            explore().cancel_safe(slow_channel, async |receiver| receiver.recv().await, async |_| ()),
        ),
        (
            "AsyncReadExt::read",
            true,
            explore().cancel_safe(
                slow_pipe,
                async |pipe| {
                    let mut bytes = [0; 4];
                    pipe.read(&mut bytes).await.map(|length| bytes[..length].to_vec()).ok()
                },
                async |_| (),
            ),
        ),
        (
            "AsyncReadExt::read_exact",
            false,
            explore().cancel_safe(
                slow_pipe,
                async |pipe| {
                    let mut bytes = [0; 8];
                    pipe.read_exact(&mut bytes).await.map(|_| bytes).ok()
                },
                async |_| (),
            ),
        ),
    ];
    let mut as_documented = true;
    for (name, documented, report) in calls {
        let safe = report.verdict() == Verdict::Safe;
        as_documented &= safe == documented;
        println!("{name}\n  {}\n", report.to_string().replace('\n', "\n  "));
    }
    if as_documented { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
