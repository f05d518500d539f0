//! What a checkpoint says of itself, whether it is whole, and how it gets smaller.
//!
//! Invariant: a number that is shown was read from the file just now.

use std::{io::Write, path::Path};

use crate::{
    cli::{Failure, Opened, open},
    codec::Codec,
    error::TaskError,
    history::{History, Past},
    log::Identity,
};

/// How many items are in which state.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Counts {
    results: usize,
    quarantined: usize,
    uncertain: usize,
    failed: usize,
}

fn count(history: &mut History, path: &Path) -> Result<Counts, TaskError> {
    let mut counts = Counts::default();
    let keys = (history.header.identity == Identity::Key).then(|| history.keys());
    for position in 0..keys.as_ref().map_or(history.marked(), Vec::len) {
        let key = keys.as_ref().and_then(|keys| keys.get(position)).map(String::as_str);
        match history.of(position, key).map_err(|error| TaskError::io("read checkpoint", path, error))? {
            Past::Nothing => {}
            Past::Result(_) => counts.results += 1,
            Past::Quarantined { .. } => counts.quarantined += 1,
            Past::Uncertain => counts.uncertain += 1,
            Past::Failed { .. } => counts.failed += 1,
        }
    }
    Ok(counts)
}

pub(super) fn inspect(path: &Path, out: &mut dyn Write) -> Result<(), Failure> {
    let mut opened = open(path)?;
    let is_held = opened.is_held();
    let Opened { history, .. } = &mut opened;
    let counts = count(history, path)?;
    let header = &history.header;
    let identity = match header.identity {
        Identity::Position => "position",
        Identity::Key => "key",
    };
    let state = match (is_held, history.sealed) {
        (true, _) => "a run holds it",
        (false, Some(_)) => "complete",
        (false, None) => "not complete: run it again to go on",
    };
    let lines: [(&str, String); 13] = [
        ("file", path.display().to_string()),
        ("job", header.job.clone()),
        ("version", header.version.clone()),
        ("result type", header.result_type.clone()),
        ("codec", Codec::name_of(header.codec)),
        ("items by", identity.to_owned()),
        ("state", state.to_owned()),
        ("sessions", history.epoch.to_string()),
        ("items read", history.marked().to_string()),
        ("results", counts.results.to_string()),
        ("quarantined", format!("{}, {} of them uncertain", counts.quarantined + counts.uncertain, counts.uncertain)),
        ("to be retried", counts.failed.to_string()),
        ("bytes", format!("{}, {} of them superseded", history.end, history.end.saturating_sub(history.live_bytes()))),
    ];
    for (name, value) in lines {
        writeln!(out, "{name:<14}{value}")?;
    }
    if history.torn_bytes > 0 {
        writeln!(out, "{:<14}{}", "torn tail", torn(history.torn_bytes, is_held))?;
    }
    Ok(())
}

fn torn(bytes: u64, is_held: bool) -> String {
    match is_held {
        true => format!("{bytes} bytes, which the run may be writing"),
        false => format!("{bytes} bytes, which the next run cuts off"),
    }
}

pub(super) fn verify(path: &Path, out: &mut dyn Write) -> Result<(), Failure> {
    let mut opened = open(path)?;
    let is_held = opened.is_held();
    let Opened { history, .. } = &mut opened;
    let counts = count(history, path)?;
    let state = if history.sealed.is_some() { "complete" } else { "not complete" };
    write!(out, "{}: intact, {} results, {state}", path.display(), counts.results)?;
    if history.torn_bytes > 0 {
        write!(out, ", behind them a torn tail of {}", torn(history.torn_bytes, is_held))?;
    }
    Ok(writeln!(out)?)
}
