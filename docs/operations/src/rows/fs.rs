//! Files, on the blocking threads.
//!
//! Invariant: each run has its own directory.

use std::io::SeekFrom;
use std::path::PathBuf;

use tempfile::TempDir;
use tokio::fs::{self, File};
use tokio::io::{AsyncReadExt as _, AsyncSeekExt as _, AsyncWriteExt as _};

use crate::fixtures::{TEXT, text};
use crate::row::{From, Row, SELECT, Says, on_paused_time};

/// A directory with a file in it.
struct Place {
    file: PathBuf,
    other: PathBuf,
    _directory: TempDir,
}

fn place() -> Place {
    let directory = TempDir::new().unwrap();
    let (file, other) = (directory.path().join("file"), directory.path().join("other"));
    std::fs::write(&file, TEXT).unwrap();
    Place { file, other, _directory: directory }
}

/// The file opened for writing, with a buffer of four bytes.
async fn narrow() -> (File, Place) {
    let place = place();
    let mut file = File::create(&place.file).await.unwrap();
    file.set_max_buf_size(4);
    (file, place)
}

async fn content((file, place): &mut (File, Place)) -> String {
    file.flush().await.unwrap();
    text(&std::fs::read(&place.file).unwrap())
}

/// Reports only the kind of an error, because its text may name the file.
fn kind(result: std::io::Result<()>) -> String {
    result.map_or_else(|error| error.kind().to_string(), |()| "done".to_owned())
}

const LATE: &str = "spawn it, and wait for its `JoinHandle` by reference";

pub(crate) fn open_files() -> Vec<Row> {
    vec![
        Row::tokio("fs::File::read", "io/trait.AsyncReadExt.html#method.read", || {
            on_paused_time(1).cancel_safe(
                async || {
                    let place = place();
                    (File::open(&place.file).await.unwrap(), place, Vec::<u8>::new())
                },
                async |(file, _, read)| {
                    while read.len() < TEXT.len() {
                        let mut buffer = [0; 5];
                        let bytes = file.read(&mut buffer).await.unwrap();
                        read.extend(&buffer[..bytes]);
                    }
                    text(read)
                },
                async |_| (),
            )
        })
        .said_at(Says::Safe, From::Tokio, SELECT),
        Row::tokio("fs::File::write", "io/trait.AsyncWriteExt.html#method.write", || {
            on_paused_time(1).cancel_safe(
                async || (narrow().await, 0),
                async |((file, _), written)| {
                    while *written < TEXT.len() {
                        *written += file.write(&TEXT[*written..]).await.unwrap();
                    }
                },
                async |(open, _)| content(open).await,
            )
        })
        .said_at(Says::Safe, From::Tokio, SELECT),
        Row::tokio("fs::File::write_all", "io/trait.AsyncWriteExt.html#method.write_all", || {
            on_paused_time(1).cancel_safe(narrow, async |(file, _)| file.write_all(TEXT).await.unwrap(), content)
        })
        .says(Says::NotSafe)
        .instead("`write_all_buf` with a buffer that outlives the call; `cancel_safe_atomic_fs` for whole files")
        .note(
            "Up to the size of its buffer (`set_max_buf_size`, 2 MiB by default) a file takes all at once or nothing.",
        ),
        Row::tokio("fs::File::flush", "io/trait.AsyncWriteExt.html#method.flush", || {
            on_paused_time(1).cancel_safe(
                async || {
                    let (mut file, place) = narrow().await;
                    file.write_all(TEXT).await.unwrap();
                    (file, place)
                },
                async |(file, _)| file.flush().await.unwrap(),
                async |(_, place)| text(&std::fs::read(&place.file).unwrap()),
            )
        })
        .says(Says::Safe),
        Row::tokio("fs::File::sync_all", "fs/struct.File.html#method.sync_all", || {
            on_paused_time(1).cancel_safe(narrow, async |(file, _)| file.sync_all().await.unwrap(), content)
        })
        .instead(LATE),
        Row::tokio("AsyncSeekExt::seek", "io/trait.AsyncSeekExt.html#method.seek", || {
            on_paused_time(2).cancel_safe(
                async || {
                    let place = place();
                    (File::open(&place.file).await.unwrap(), place)
                },
                async |(file, _)| file.seek(SeekFrom::Current(3)).await.map_err(|error| error.kind().to_string()),
                async |(file, _)| {
                    let mut rest = Vec::new();
                    file.read_to_end(&mut rest).await.unwrap();
                    text(&rest)
                },
            )
        })
        .how("of a `File`, from where it is")
        .instead("`SeekFrom::Start`"),
        Row::tokio("AsyncSeekExt::seek", "io/trait.AsyncSeekExt.html#method.seek", || {
            on_paused_time(1).cancel_safe(
                async || {
                    let place = place();
                    (File::open(&place.file).await.unwrap(), place)
                },
                async |(file, _)| file.seek(SeekFrom::Start(6)).await.map_err(|error| error.kind().to_string()),
                async |(file, _)| {
                    let mut rest = Vec::new();
                    file.read_to_end(&mut rest).await.unwrap();
                    text(&rest)
                },
            )
        })
        .how("of a `File`, from its start")
        .instead(LATE),
    ]
}

pub(crate) fn paths() -> Vec<Row> {
    vec![
        Row::tokio("fs::read", "fs/fn.read.html", || {
            on_paused_time(1).cancel_safe(
                async || place(),
                async |place| text(&fs::read(&place.file).await.unwrap()),
                async |_| (),
            )
        })
        .instead(LATE),
        Row::tokio("fs::write", "fs/fn.write.html", || {
            on_paused_time(1).cancel_safe(
                async || place(),
                async |place| fs::write(&place.other, TEXT).await.unwrap(),
                async |place| text(&std::fs::read(&place.other).unwrap()),
            )
        })
        .instead("`cancel_safe_atomic_fs::write`")
        .note(
            "Nothing is lost if it is called again until it completes. If it is not called again, the file may be empty, \
             half written, or written after the drop: see [What breaks](breaking.md).",
        ),
        Row::tokio("fs::rename", "fs/fn.rename.html", || {
            on_paused_time(1).cancel_safe(
                async || place(),
                async |place| kind(fs::rename(&place.file, &place.other).await),
                async |place| if place.other.exists() { "it has moved" } else { "it has not moved" },
            )
        })
        .instead(LATE)
        .note(
            "The dropped call has done its work, and the next one finds no file to rename; the same holds for \
             `remove_file`.",
        ),
        Row::tokio("fs::create_dir", "fs/fn.create_dir.html", || {
            on_paused_time(1).cancel_safe(
                async || place(),
                async |place| kind(fs::create_dir(&place.other).await),
                async |place| if place.other.is_dir() { "it is there" } else { "it is not there" },
            )
        })
        .instead("`create_dir_all`, which does not mind"),
        Row::tokio("fs::remove_file", "fs/fn.remove_file.html", || {
            on_paused_time(1).cancel_safe(
                async || place(),
                async |place| kind(fs::remove_file(&place.file).await),
                async |place| if place.file.exists() { "it is there" } else { "it is gone" },
            )
        })
        .instead("take `NotFound` for done"),
        Row::tokio("fs::File::create_new", "fs/struct.File.html#method.create_new", || {
            on_paused_time(1).cancel_safe(
                async || place(),
                async |place| kind(File::create_new(&place.other).await.map(drop)),
                async |place| if place.other.exists() { "it is there" } else { "it is not there" },
            )
        })
        .instead(LATE),
        Row::tokio("fs::ReadDir::next_entry", "fs/struct.ReadDir.html#method.next_entry", || {
            on_paused_time(1).cancel_safe(
                async || {
                    let place = place();
                    std::fs::write(&place.other, TEXT).unwrap();
                    (fs::read_dir(place.file.parent().unwrap()).await.unwrap(), place, Vec::new())
                },
                async |(entries, _, names)| {
                    while let Some(entry) = entries.next_entry().await.unwrap() {
                        names.push(entry.file_name());
                    }
                    names.sort();
                    names.clone()
                },
                async |_| (),
            )
        })
        .says(Says::Safe),
    ]
}
