//! A certificate and its key, renewed together while a server reads them.
//!
//! ```text
//! cargo run -p cancel-safe-atomic-fs --example certificate
//! ```
//!
//! Every third renewal is dropped in the middle. Two servers read the pair: one opens both files together, the other
//! reads one after the other, as most code does. If the first ever finds a certificate with another one's key, or the
//! last commit is not what is on the disk, the exit code is 1.
#![expect(clippy::print_stdout, reason = "an example speaks through its output")]

use std::error::Error;
use std::io::Read as _;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use cancel_safe_atomic_fs::{self as atomic_fs, MultiFileTransaction};

const RENEWALS: u32 = 300;

/// Replaces both files, or neither.
async fn renew(pair: &[PathBuf; 2], serial: u32) -> Result<(), atomic_fs::Error> {
    let mut tx = MultiFileTransaction::new();
    for path in pair {
        tx.add_file(path, format!("serial {serial}")).await?;
    }
    tx.commit().await
}

/// Both files, as they were at one moment.
async fn together(pair: &[PathBuf; 2]) -> Result<[String; 2], Box<dyn Error>> {
    let mut found = [String::new(), String::new()];
    for (mut file, text) in atomic_fs::open_together(pair).await?.into_iter().zip(&mut found) {
        file.read_to_string(text)?;
    }
    Ok(found)
}

/// One file, and then the other.
async fn in_turn([certificate, key]: &[PathBuf; 2]) -> Result<[String; 2], Box<dyn Error>> {
    Ok([tokio::fs::read_to_string(certificate).await?, tokio::fs::read_to_string(key).await?])
}

/// Reads until the renewals have ended; how often, and how often the two did not fit.
async fn serve<R>(read: impl Fn() -> R, renewed: &AtomicBool) -> Result<(u32, u32), Box<dyn Error>>
where
    R: Future<Output = Result<[String; 2], Box<dyn Error>>>,
{
    let (mut reads, mut mixed) = (0, 0);
    while !renewed.load(Ordering::Relaxed) {
        let [certificate, key] = read().await?;
        reads += 1;
        mixed += u32::from(certificate != key);
    }
    Ok((reads, mixed))
}

async fn run(directory: &Path) -> Result<ExitCode, Box<dyn Error>> {
    let pair = ["cert.pem", "key.pem"].map(|name| directory.join(name));
    renew(&pair, 0).await?;
    let renewed = AtomicBool::new(false);
    let renewals = async {
        let mut dropped = 0;
        for serial in 1..=RENEWALS {
            let limit = if serial % 3 == 0 { Duration::from_micros(u64::from(serial) * 5) } else { Duration::MAX };
            match tokio::time::timeout(limit, renew(&pair, serial)).await {
                Ok(committed) => committed?,
                Err(_) => dropped += 1,
            }
        }
        // A commit that was dropped was decided before its drop returned, so this one is the last.
        renew(&pair, RENEWALS + 1).await?;
        renewed.store(true, Ordering::Relaxed);
        Ok::<_, Box<dyn Error>>(dropped)
    };
    let (dropped, careful, plain) =
        tokio::join!(renewals, serve(|| together(&pair), &renewed), serve(|| in_turn(&pair), &renewed));
    let (dropped, (careful, mixed), (plain, plainly_mixed)) = (dropped?, careful?, plain?);
    println!("{RENEWALS} renewals, {dropped} of them dropped in the middle");
    println!("opened together: {careful} reads, {mixed} of a certificate with another one's key");
    println!("one by one:      {plain} reads, {plainly_mixed} of a certificate with another one's key");
    let last = format!("serial {}", RENEWALS + 1);
    let is_last = together(&pair).await? == [last.clone(), last];
    Ok(if is_last && mixed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

#[tokio::main]
async fn main() -> Result<ExitCode, Box<dyn Error>> {
    let directory = tempfile::tempdir()?;
    run(directory.path()).await
}
