//! Names that are to become durable: one sync of a directory does for all files that have come into it meanwhile.
//!
//! Invariant: whoever asks has its file in place already, and is told of success only by a sync that began after it had
//! asked. After a sync that failed nobody is told of success any more, since the system may have dropped what it could not
//! write.

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

/// The directories of a run into which files have come.
#[derive(Debug, Default)]
pub(crate) struct Directories {
    table: Mutex<HashMap<PathBuf, Arc<Directory>>>,
}

#[derive(Debug)]
struct Directory {
    /// How often somebody has asked.
    asked: AtomicU64,
    /// Up to which of them all is durable; or why nothing is any more.
    synced: Arc<tokio::sync::Mutex<Result<u64, String>>>,
}

impl Directories {
    /// Makes the names in the directory `path` durable. Dropped, it may still do so.
    pub(crate) async fn sync(&self, path: &Path) -> io::Result<()> {
        self.sync_by(path, |directory: &File| directory.sync_all()).await
    }

    async fn sync_by(
        &self,
        path: &Path,
        sync: impl FnOnce(&File) -> io::Result<()> + Send + 'static,
    ) -> io::Result<()> {
        let directory = self.directory(path);
        let mine = directory.asked.fetch_add(1, Ordering::SeqCst) + 1;
        let mut synced = Arc::clone(&directory.synced).lock_owned().await;
        match &*synced {
            Ok(last) if *last >= mine => return Ok(()),
            Ok(_) => {}
            Err(cause) => return Err(io::Error::other(cause.clone())),
        }
        // The outcome is recorded by the job itself, whether anybody waits for it any more or not.
        let path = path.to_owned();
        let done = tokio::task::spawn_blocking(move || {
            let file = File::open(path)?;
            let last = directory.asked.load(Ordering::SeqCst);
            match sync(&file) {
                // Some file systems do not let a directory be synced; there is nothing more that one could do there.
                Err(error) if !matches!(error.kind(), ErrorKind::InvalidInput | ErrorKind::Unsupported) => {
                    *synced = Err(format!("an earlier sync of the directory failed: {error}"));
                    Err(error)
                }
                _ => {
                    *synced = Ok(last);
                    Ok(())
                }
            }
        });
        done.await.map_err(io::Error::other).flatten()
    }

    fn directory(&self, path: &Path) -> Arc<Directory> {
        let mut table = self.table.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(known) = table.get(path) {
            return Arc::clone(known);
        }
        let synced = Arc::new(tokio::sync::Mutex::new(Ok(0)));
        let new = Arc::new(Directory { asked: AtomicU64::new(0), synced });
        table.insert(path.to_owned(), Arc::clone(&new));
        new
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::channel;

    use super::*;

    #[tokio::test]
    async fn whoever_asks_during_a_sync_waits_for_the_next_which_does_for_all() {
        let (dir, directories) = (tempfile::tempdir().unwrap(), Arc::new(Directories::default()));
        let (begin, begun) = channel();
        let (release, released) = channel::<()>();
        let ask = |sync: Box<dyn FnOnce() + Send>| {
            let (directories, path) = (Arc::clone(&directories), dir.path().to_owned());
            tokio::spawn(async move {
                directories
                    .sync_by(&path, move |_| {
                        sync();
                        Ok(())
                    })
                    .await
            })
        };
        let first = ask(Box::new(move || {
            begin.send(()).unwrap();
            released.recv().unwrap();
        }));
        tokio::task::spawn_blocking(move || begun.recv().unwrap()).await.unwrap();
        let count = Arc::new(AtomicU64::new(0));
        let others: Vec<_> = (0..5)
            .map(|_| {
                let count = Arc::clone(&count);
                ask(Box::new(move || {
                    count.fetch_add(1, Ordering::SeqCst);
                }))
            })
            .collect();
        // All of them have asked before the first sync ends.
        while directories.directory(dir.path()).asked.load(Ordering::SeqCst) < 6 {
            tokio::task::yield_now().await;
        }
        release.send(()).unwrap();
        first.await.unwrap().unwrap();
        for other in others {
            other.await.unwrap().unwrap();
        }
        assert_eq!(count.load(Ordering::SeqCst), 1);
    }

    #[tokio::test]
    async fn after_a_sync_that_failed_none_succeeds_even_if_nobody_waited_for_it() {
        let (dir, directories) = (tempfile::tempdir().unwrap(), Directories::default());
        let (begin, begun) = channel();
        let failing = directories.sync_by(dir.path(), move |_| {
            begin.send(()).unwrap();
            Err(io::Error::other("no"))
        });
        // Dropped once its sync has begun.
        let begun = tokio::task::spawn_blocking(move || begun.recv().unwrap());
        tokio::select! {
            biased;
            _ = begun => {}
            failed = failing => assert!(failed.is_err()),
        }
        let error = directories.sync(dir.path()).await.unwrap_err();
        assert!(error.to_string().contains("an earlier sync of the directory failed: no"), "{error}");
        assert!(directories.sync(&dir.path().join("gone")).await.is_err());
        std::fs::create_dir(dir.path().join("gone")).unwrap();
        directories.sync(&dir.path().join("gone")).await.unwrap();
    }
}
