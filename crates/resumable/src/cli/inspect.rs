//! A checkpoint's description of itself, and whether it is intact.
//!
//! Invariant: every number shown was just read from the file.

use std::{io::Write, path::Path};

use crate::cli::{Failure, is_held, open};

pub(super) fn inspect(path: &Path, out: &mut dyn Write) -> Result<(), Failure> {
    let checkpoint = open(path)?;
    let (counts, is_held) = (checkpoint.counts(), is_held(path));
    let state = match (is_held, checkpoint.is_sealed()) {
        (true, _) => "a run holds it",
        (false, true) => "complete",
        (false, false) => "not complete: run it again to go on",
    };
    let (bytes, live) = (checkpoint.len_bytes(), checkpoint.live_bytes());
    let mut lines: Vec<(&str, String)> = vec![
        ("file", path.display().to_string()),
        ("job", checkpoint.job()),
        ("version", checkpoint.version()),
        ("result type", checkpoint.result_type()),
        ("codec", checkpoint.codec().map_or_else(|| "unknown".to_owned(), |codec| format!("{codec:?}"))),
        ("items by", if checkpoint.is_keyed() { "key" } else { "position" }.to_owned()),
        ("state", state.to_owned()),
        ("sessions", checkpoint.sessions().to_string()),
    ];
    lines.extend(counts.read.map(|read| ("items read", read.to_string())));
    lines.extend([
        ("results", counts.results.to_string()),
        ("quarantined", counts.quarantined.to_string()),
        ("uncertain", counts.uncertain.to_string()),
        ("to be retried", counts.failed.to_string()),
        ("bytes", format!("{bytes}, of which about {} are superseded", bytes.saturating_sub(live))),
    ]);
    if checkpoint.torn_bytes() > 0 {
        lines.push(("torn tail", torn(checkpoint.torn_bytes(), is_held)));
    }
    for (name, value) in lines {
        writeln!(out, "{name:<14}{value}")?;
    }
    Ok(())
}

fn torn(bytes: u64, is_held: bool) -> String {
    let whose = if is_held { "which the run may be writing" } else { "which the next run cuts off" };
    format!("{bytes} bytes, {whose}")
}

pub(super) fn verify(path: &Path, out: &mut dyn Write) -> Result<(), Failure> {
    let checkpoint = open(path)?;
    let state = if checkpoint.is_sealed() { "complete" } else { "not complete" };
    write!(out, "{}: intact, {} results, {state}", path.display(), checkpoint.counts().results)?;
    if checkpoint.torn_bytes() > 0 {
        write!(out, ", behind them a torn tail of {}", torn(checkpoint.torn_bytes(), is_held(path)))?;
    }
    Ok(writeln!(out)?)
}
