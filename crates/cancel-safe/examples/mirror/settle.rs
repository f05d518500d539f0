//! Puts in order what an earlier run left, before a new one starts.
//!
//! After [`settle`] the catalogue equals the disk: each row has its file, with its size, at the path that the mapping gives
//! today; a file of ours without a row is gone (it is fetched again); a stranger's file is left alone and reported. Dropped
//! or killed at any point, it leaves something that the next call puts in order.

use std::collections::{BTreeMap, HashSet};
use std::fs::File;
use std::io::{self, Read};
use std::path::{Component, Path, PathBuf};
use std::sync::Arc;

use cancel_safe::atomic_fs;
use futures_util::{StreamExt, TryStreamExt};
use sha2::{Digest, Sha256};
use tokio_util::sync::CancellationToken;
use url::Url;

use super::catalogue::{Catalogue, Change, MAX_BATCH, Row};
use super::home::{Home, HomeError, at, hex};
use super::paths;

/// What [`settle`] found and did.
#[derive(Debug, Default)]
pub(crate) struct Settled {
    /// The path of every URL, of the manifest and of the catalogue.
    pub(crate) paths: BTreeMap<Url, String>,
    /// The rows whose files are there.
    pub(crate) complete: BTreeMap<String, Row>,
    /// Rows whose file was missing or had another size or, with `--verify`, another digest.
    pub(crate) lost: usize,
    /// Files of ours that had no row, and temporary files of dead writers.
    pub(crate) removed: usize,
    /// Files below `files` that no URL maps to, and directories that cannot be read.
    pub(crate) strangers: usize,
    /// Rows whose URL has left the manifest; their files are kept.
    pub(crate) left: Vec<String>,
}

/// Makes catalogue and disk equal. `is_new` says that the catalogue has no mark yet: files are then not ours to remove.
pub(crate) async fn settle(
    home: &Arc<Home>,
    manifest: &[Url],
    rows: Vec<Row>,
    is_new: bool,
    catalogue: &Catalogue,
    verify: bool,
) -> Result<Settled, HomeError> {
    let wanted: HashSet<&Url> = manifest.iter().collect();
    let known: Vec<Url> = rows.iter().filter_map(|row| Url::parse(&row.url).ok()).collect();
    let assigned = paths::assign(manifest.iter().chain(&known));
    let mut settled = Settled {
        paths: assigned.into_iter().map(|(url, path)| (url.clone(), path)).collect(),
        left: known.iter().filter(|url| !wanted.contains(url)).map(|url| url.as_str().to_owned()).collect(),
        ..Settled::default()
    };
    let place = Arc::clone(home);
    let (kept, lost) = blocking(move |stop| inspect(&place, rows, verify, stop)).await?;
    settled.lost = lost.len();
    all(catalogue, lost.iter().map(|row| Change::Delete(row.url.clone())).collect()).await?;
    let place = Arc::clone(home);
    // An empty directory may stand where a file belongs now.
    blocking(move |_| {
        lost.iter().filter(|row| is_inside(&row.path)).try_for_each(|row| remove(&place.file(&row.path)))?;
        prune(&place.files());
        Ok(())
    })
    .await?;
    relocate(home, kept, &mut settled, catalogue).await?;
    clear(home, &mut settled, is_new).await?;
    if is_new {
        // Only now: a refused catalogue must be as new the next time.
        catalogue.apply(Change::Mark(home.mark.clone())).await?;
    }
    Ok(settled)
}

/// Tells the rows whose files are there from those whose are not.
fn inspect(
    home: &Home,
    rows: Vec<Row>,
    verify: bool,
    stop: &CancellationToken,
) -> Result<(Vec<Row>, Vec<Row>), HomeError> {
    let (mut kept, mut lost) = (Vec::new(), Vec::new());
    for row in rows {
        if stop.is_cancelled() {
            break;
        }
        let path = home.file(&row.path);
        let whole = match std::fs::symlink_metadata(&path) {
            _ if !is_inside(&row.path) => false,
            Ok(found) if found.is_file() && i64::try_from(found.len()) == Ok(row.bytes) => {
                !verify || digest(&path, stop).map_err(at(&path))? == row.sha256
            }
            Ok(_) => false,
            Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => false,
            Err(error) => return Err(at(&path)(error)),
        };
        if whole { kept.push(row) } else { lost.push(row) }
    }
    Ok((kept, lost))
}

/// Moves files whose path depends on URLs that have come or gone.
async fn relocate(
    home: &Arc<Home>,
    rows: Vec<Row>,
    settled: &mut Settled,
    catalogue: &Catalogue,
) -> Result<(), HomeError> {
    let (mut moved, mut moves) = (Vec::new(), Vec::new());
    for mut row in rows {
        let path = Url::parse(&row.url).ok().and_then(|url| settled.paths.get(&url));
        if let Some(path) = path.filter(|path| **path != row.path) {
            moves.push((row.path.clone(), path.clone()));
            row.path.clone_from(path);
            moved.push(row);
        } else {
            settled.complete.insert(row.url.clone(), row);
        }
    }
    // Plain paths are made free before they are taken; a hashed path is never in anybody's way.
    moves.sort_by_key(|(_, path)| !paths::is_hashed(path));
    moved.sort_by_key(|row| !paths::is_hashed(&row.path));
    let place = Arc::clone(home);
    // A crash before the rows are written leaves rows without files and files without rows: fetched again, never wrong.
    blocking(move |_| moves.iter().try_for_each(|(from, to)| rename(&place, from, to))).await?;
    for row in moved {
        // One by one: a path must be free in the catalogue too before the next row takes it.
        catalogue.apply(Change::Put(Box::new(row.clone()))).await?;
        settled.complete.insert(row.url.clone(), row);
    }
    Ok(())
}

/// Durable when it returns: else a power cut could leave a row that names another file's bytes.
fn rename(home: &Home, from: &str, to: &str) -> Result<(), HomeError> {
    let (from, to) = (home.file(from), home.file(to));
    let sync = |path: &Path| path.parent().map_or(Ok(()), |parent| File::open(parent)?.sync_all());
    home.make_parents(&to)
        .and_then(|()| std::fs::rename(&from, &to))
        .and_then(|()| sync(&to))
        .and_then(|()| sync(&from))
        .map_err(at(&to))
}

/// Removes what is ours and has no row, and counts what is not ours.
async fn clear(home: &Arc<Home>, settled: &mut Settled, is_new: bool) -> Result<(), HomeError> {
    let ours: HashSet<PathBuf> = settled.paths.values().map(|path| home.file(path)).collect();
    let complete: HashSet<PathBuf> = settled.complete.values().map(|row| home.file(&row.path)).collect();
    let mut directories = vec![home.files()];
    while let Some(directory) = directories.pop() {
        let Ok(entries) = std::fs::read_dir(&directory) else {
            settled.strangers += 1;
            continue;
        };
        settled.removed += atomic_fs::sweep(&directory).await.map_err(|error| at(&directory)(error.into()))?.removed;
        for entry in entries {
            let entry = entry.map_err(at(&directory))?;
            let Ok(kind) = entry.file_type() else { continue };
            let path = entry.path();
            if kind.is_dir() {
                directories.push(path);
            } else if ours.contains(&path) && !complete.contains(&path) {
                if is_new {
                    return Err(HomeError::Unknown(home.files()));
                }
                remove(&path)?;
                settled.removed += 1;
            } else if !complete.contains(&path) {
                settled.strangers += 1;
            }
        }
    }
    Ok(())
}

/// Applies many changes; the catalogue takes as many into one transaction as wait.
async fn all(catalogue: &Catalogue, changes: Vec<Change>) -> Result<(), HomeError> {
    let applied = futures_util::stream::iter(changes).map(|change| catalogue.apply(change)).buffer_unordered(MAX_BATCH);
    Ok(applied.try_collect().await?)
}

/// Runs what blocks on a thread for it; when the returned future is dropped, the work is told so.
async fn blocking<T: Send + 'static>(
    work: impl FnOnce(&CancellationToken) -> Result<T, HomeError> + Send + 'static,
) -> Result<T, HomeError> {
    let stop = CancellationToken::new();
    let dropped = stop.clone().drop_guard();
    let done = tokio::task::spawn_blocking(move || work(&stop)).await;
    drop(dropped);
    done.unwrap_or_else(|panicked| Err(at(Path::new("a worker thread"))(io::Error::other(panicked))))
}

/// Whether a path of the catalogue stays below `files`, whoever wrote it there.
fn is_inside(path: &str) -> bool {
    Path::new(path).components().all(|component| matches!(component, Component::Normal(_)))
}

/// Removes a file; that it is gone already is fine.
pub(crate) fn remove(path: &Path) -> Result<(), HomeError> {
    match std::fs::remove_file(path) {
        Err(error) if !matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => {
            Err(at(path)(error))
        }
        _ => Ok(()),
    }
}

/// Removes empty directories below `directory`, deepest first.
fn prune(directory: &Path) {
    for entry in std::fs::read_dir(directory).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            prune(&entry.path());
            // One that is not empty refuses, which is the question.
            let _kept = std::fs::remove_dir(entry.path());
        }
    }
}

/// The SHA-256 of a file, in hexadecimal. Blocks.
fn digest(path: &Path, stop: &CancellationToken) -> io::Result<String> {
    let mut hasher = Sha256::new();
    let mut file = File::open(path)?;
    let mut buffer = vec![0; 256 * 1024];
    loop {
        let count = file.read(&mut buffer)?;
        if count == 0 || stop.is_cancelled() {
            return Ok(hex(&hasher.finalize()));
        }
        hasher.update(&buffer[..count]);
    }
}
