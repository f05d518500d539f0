//! The contestants: how each crate replaces a file, or several at once, in async code.
//!
//! The peers that block the thread are called in `spawn_blocking`, as their users must.

use std::io::Write;
use std::path::{Path, PathBuf};

use cancel_safe_atomic_fs::{self as atomic_fs, MultiFileTransaction};
use futures_util::future::BoxFuture;
use tokio::io::AsyncWriteExt;
use tokio::task::spawn_blocking;

/// Names and their new contents.
type Files = Vec<(String, Vec<u8>)>;
type Worked = BoxFuture<'static, Result<(), String>>;

/// How one file is replaced.
pub(crate) struct Way {
    pub(crate) name: &'static str,
    pub(crate) replace: fn(PathBuf, Vec<u8>) -> Worked,
}

pub(crate) const WAYS: [Way; 5] = [
    Way { name: "atomic-fs", replace: |path, content| Box::pin(told(atomic_fs::write(path, content))) },
    Way { name: "tokio::fs", replace: |path, content| Box::pin(told(by_steps(path, content))) },
    Way { name: "tempfile", replace: |path, content| blocking(move || by_tempfile(&path, &content)) },
    Way { name: "atomic-write-file", replace: |path, content| blocking(move || by_atomic_write_file(&path, &content)) },
    Way { name: "atomicwrites", replace: |path, content| blocking(move || by_atomicwrites(&path, &content)) },
];

/// How several files of one directory are replaced at once, and what is called after a crash.
pub(crate) struct Transactions {
    pub(crate) name: &'static str,
    pub(crate) replace: fn(PathBuf, Files) -> Worked,
    pub(crate) recover: fn(PathBuf) -> Worked,
}

pub(crate) const TRANSACTIONS: [Transactions; 3] = [
    Transactions {
        name: "atomic-fs",
        replace: |dir, files| {
            Box::pin(told(async move {
                let mut tx = MultiFileTransaction::begin(&dir);
                for (name, content) in files {
                    tx.add_file(dir.join(name), content).await?;
                }
                tx.commit().await
            }))
        },
        recover: |dir| Box::pin(told(async move { atomic_fs::recover(dir).await.map(drop) })),
    },
    Transactions {
        name: "fstx",
        replace: |dir, files| {
            blocking(move || {
                let mut tx = fstx::Transaction::begin(dir)?;
                files.into_iter().try_for_each(|(name, content)| tx.write(name, content))?;
                tx.commit()
            })
        },
        recover: |dir| blocking(move || fstx::recover(dir).map(drop)),
    },
    Transactions {
        name: "fs-transaction",
        replace: |dir, files| {
            blocking(move || {
                let mut change = fs_transaction::ChangeSet::new();
                for (name, content) in files {
                    change.write(name, content);
                }
                fs_transaction::exec::block_on(change.apply(&fs_transaction::StdFs, &dir))
            })
        },
        recover: |dir| {
            blocking(move || {
                let recovery = fs_transaction::journal::recover(&fs_transaction::StdFs, &dir);
                fs_transaction::exec::block_on(recovery).map(drop)
            })
        },
    },
];

async fn told<E: ToString>(work: impl Future<Output = Result<(), E>>) -> Result<(), String> {
    work.await.map_err(|error| error.to_string())
}

fn blocking<E: ToString>(work: impl FnOnce() -> Result<(), E> + Send + 'static) -> Worked {
    Box::pin(async {
        let job = spawn_blocking(move || work().map_err(|error| error.to_string()));
        job.await.unwrap_or_else(|error| Err(error.to_string()))
    })
}

/// The usual way in many programs: one await for each step, and one name for the temporary file.
async fn by_steps(path: PathBuf, content: Vec<u8>) -> std::io::Result<()> {
    let temp = path.with_extension("tmp");
    let mut file = tokio::fs::File::create(&temp).await?;
    file.write_all(&content).await?;
    file.sync_all().await?;
    drop(file);
    tokio::fs::rename(&temp, &path).await
}

fn by_tempfile(path: &Path, content: &[u8]) -> std::io::Result<()> {
    let mut file = tempfile::NamedTempFile::new_in(path.parent().unwrap())?;
    file.write_all(content)?;
    file.persist(path).map(drop).map_err(|error| error.error)
}

fn by_atomic_write_file(path: &Path, content: &[u8]) -> std::io::Result<()> {
    let mut file = atomic_write_file::AtomicWriteFile::open(path)?;
    file.write_all(content)?;
    file.commit()
}

fn by_atomicwrites(path: &Path, content: &[u8]) -> std::io::Result<()> {
    let file = atomicwrites::AtomicFile::new(path, atomicwrites::AllowOverwrite);
    file.write(|file| file.write_all(content)).map_err(std::io::Error::from)
}
