//! A file that is written in place
//!
//! The old content is gone after the first await, and the new content is there only after the last. A temporary file and a
//! rename by hand are not enough: `tokio::fs` runs on other threads, where the rename of a dropped future may still happen.
//! `atomic_fs::write` leaves the old file or the new one, nothing beside it, and nothing that changes later.

use std::path::Path;

use cancel_safe_atomic_fs::{self as atomic_fs, Error};
use cancel_safe_testing::{Explore, Report};
use tokio::fs::File;
use tokio::io::AsyncWriteExt;

// Broken:
async fn write_user_data(path: &Path, data: &[u8]) -> std::io::Result<()> {
    let mut file = File::create(path).await?;
    file.write_all(b"HEADER:").await?;
    file.write_all(data).await?;
    file.sync_all().await
}

// Mended:
async fn write_user_data_safe(path: &Path, data: &[u8]) -> Result<(), Error> {
    atomic_fs::write(path, [b"HEADER:", data].concat()).await
}

// Judged:
fn explore(write: impl AsyncFn(&Path)) -> Report {
    Explore::new().run(
        async || {
            let dir = tempfile::tempdir().unwrap();
            std::fs::write(dir.path().join("user"), "HEADER:old").unwrap();
            dir
        },
        async |dir| write(&dir.path().join("user")).await,
        async |dir, _outcome| {
            let files = std::fs::read_dir(dir.path()).unwrap().count();
            match std::fs::read_to_string(dir.path().join("user")).unwrap().as_str() {
                "HEADER:old" | "HEADER:new" if files == 1 => Ok(()),
                content => Err(format!("{content:?} in the file")),
            }
        },
    )
}

pub(super) fn broken() -> Report {
    explore(async |path| write_user_data(path, b"new").await.unwrap())
}

pub(super) fn mended() -> Report {
    explore(async |path| write_user_data_safe(path, b"new").await.unwrap())
}
