//! The finished items of a checkpoint as JSON lines.
//!
//! Invariant: each line is a whole JSON object, and an item has one at most.

use std::{io::Write, path::Path};

use serde::Serialize;

use crate::{
    cli::{Failure, json::Value, open},
    codec::Codec,
    error::TaskError,
    history::Past,
    log::Identity,
};

/// One finished item.
#[derive(Debug, Serialize)]
struct Line<'a> {
    #[serde(skip_serializing_if = "Option::is_none")]
    index: Option<usize>,
    #[serde(skip_serializing_if = "Option::is_none")]
    key: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    result: Option<Value>,
    #[serde(skip_serializing_if = "Option::is_none")]
    quarantined: Option<InQuarantine>,
}

#[derive(Debug, Serialize)]
struct InQuarantine {
    attempts: u32,
    cause: String,
    uncertain: bool,
}

pub(super) fn export(path: &Path, out: &mut dyn Write) -> Result<(), Failure> {
    let mut history = open(path)?.history;
    let codec = Codec::name_of(history.header.codec);
    if history.header.codec != Codec::MessagePack.number() {
        let why = format!(
            "its results are written as {codec}, which cannot be read without their type `{}`: read it with the program \
             that wrote it",
            history.header.result_type
        );
        return Err(Failure::NotExported { path: path.to_owned(), why });
    }
    let keys = (history.header.identity == Identity::Key).then(|| history.keys());
    let count = keys.as_ref().map_or(history.marked(), Vec::len);
    for position in 0..count {
        let key = keys.as_ref().and_then(|keys| keys.get(position)).map(String::as_str);
        let failed = |error| TaskError::io("read checkpoint", path, error);
        let past = history.of(position, key).map_err(failed)?;
        let index = key.is_none().then_some(position);
        let (mut result, mut quarantined) = (None, None);
        match past {
            Past::Nothing | Past::Failed { .. } => continue,
            Past::Result(payload) => match Codec::MessagePack.decode(payload) {
                Ok(value) => result = Some(value),
                Err(cause) => {
                    let why = format!("result {position} is not MessagePack ({cause}): run `resumable verify`");
                    return Err(Failure::NotExported { path: path.to_owned(), why });
                }
            },
            Past::Quarantined { attempts, cause } => {
                quarantined = Some(InQuarantine { attempts, cause, uncertain: false });
            }
            Past::Uncertain => {
                let cause = "it was started, and the run ended before its result was recorded".to_owned();
                quarantined = Some(InQuarantine { attempts: 1, cause, uncertain: true });
            }
        }
        write_line(&Line { index, key, result, quarantined }, out)?;
    }
    Ok(())
}

fn write_line(line: &Line<'_>, out: &mut dyn Write) -> Result<(), Failure> {
    serde_json::to_writer(&mut *out, line).map_err(std::io::Error::from)?;
    Ok(out.write_all(b"\n")?)
}
