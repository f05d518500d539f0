//! A settings file that is saved again and again, with a limit so short that many saves are cut.
//!
//! ```text
//! cargo run -p cancel-safe-atomic-fs --example settings
//! ```
//!
//! A reader opens the file all the while, and each save that was cut is followed by a look at the file a moment later.
//! If the reader ever finds half a file, or if a save lands after its timeout was reported, the exit code is 1.
#![expect(clippy::print_stdout, reason = "an example speaks through its output")]

use std::error::Error;
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use cancel_safe_atomic_fs as atomic_fs;

const SAVES: u64 = 400;

/// The number of the save, 2,000 times, so that half a file would show.
fn settings(number: u64) -> Vec<u64> {
    vec![number; 2_000]
}

/// The number in the file, or nothing if the file is not whole.
fn number(json: &[u8]) -> Option<u64> {
    let found: Vec<u64> = serde_json::from_slice(json).ok()?;
    found.first().copied().filter(|first| found == settings(*first))
}

#[tokio::main]
async fn main() -> Result<ExitCode, Box<dyn Error>> {
    let directory = tempfile::tempdir()?;
    let path = directory.path().join("settings.json");
    atomic_fs::write_json(&path, &settings(0)).await?;

    let saved = AtomicBool::new(false);
    let read = async {
        let (mut reads, mut torn) = (0_u64, 0_u64);
        while !saved.load(Ordering::Relaxed) {
            torn += u64::from(number(&tokio::fs::read(&path).await?).is_none());
            reads += 1;
        }
        Ok::<_, std::io::Error>((reads, torn))
    };
    let save = async {
        let (mut landed, mut cut, mut late) = (0_u64, 0_u64, 0_u64);
        for save in 1..=SAVES {
            // From nothing to about the time that a save takes.
            let limit = Duration::from_micros(save * 5_000 / SAVES);
            let before = number(&tokio::fs::read(&path).await?);
            match atomic_fs::write_json_with_timeout(&path, &settings(save), limit).await {
                Ok(()) => landed += 1,
                Err(error) if error.is_timeout() => {
                    cut += 1;
                    // Time enough for a rename that was still on its way.
                    tokio::time::sleep(Duration::from_millis(2)).await;
                    late += u64::from(number(&tokio::fs::read(&path).await?) != before);
                }
                Err(error) => return Err(error.into()),
            }
        }
        saved.store(true, Ordering::Relaxed);
        Ok::<_, Box<dyn Error>>((landed, cut, late))
    };
    let (read, save) = tokio::join!(read, save);
    let ((reads, torn), (landed, cut, late)) = (read?, save?);
    println!("{SAVES} saves: {landed} landed, {cut} were cut, {late} landed after their timeout");
    println!("{reads} reads meanwhile: {torn} found half a file");
    Ok(if torn + late == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
