//! The finished items of a checkpoint as JSON lines.
//!
//! Invariant: each line is a whole JSON object, and an item has at most one line.

use std::{io::Write, path::Path};

use serde::Serialize;

use crate::{
    cli::{Failure, json::Value, open},
    codec::Codec,
    item::Quarantined,
};

/// One finished item: its position or key, and its result or the reason for its quarantine.
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
    let checkpoint = open(path)?;
    let refused = |why| Failure::NotExported { path: path.to_owned(), why };
    if checkpoint.codec() != Some(Codec::MessagePack) {
        return Err(refused(format!(
            "its results are in a codec that cannot be read without their type, `{}`: read it with \
             `Checkpoint::read` in a program that has the type",
            checkpoint.result_type()
        )));
    }
    for done in checkpoint.raw() {
        let done = done?;
        let (mut result, mut quarantined) = (None, None);
        match done.result {
            Ok(bytes) => match Codec::MessagePack.decode(&bytes) {
                Ok(value) => result = Some(value),
                Err(cause) => return Err(refused(format!("result {} is not MessagePack ({cause})", done.index))),
            },
            Err(Quarantined { attempts, cause, uncertain }) => {
                quarantined = Some(InQuarantine { attempts, cause, uncertain });
            }
        }
        let key = done.key.as_deref();
        write_line(&Line { index: key.is_none().then_some(done.index), key, result, quarantined }, out)?;
    }
    Ok(())
}

fn write_line(line: &Line<'_>, out: &mut dyn Write) -> Result<(), Failure> {
    serde_json::to_writer(&mut *out, line).map_err(std::io::Error::from)?;
    Ok(out.write_all(b"\n")?)
}
