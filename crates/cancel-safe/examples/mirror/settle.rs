//! Puts in order what an earlier run left, before a new one starts.
//!
//! After [`settle`] the catalogue equals the disk: each row has its file, with its size, at the path that the mapping gives
//! today, and nothing is pending. No file is removed but temporary ones of dead writers, and those whose row it does not
//! fit; a file without a row is somebody else's, left alone and reported. Dropped or killed at any point, it leaves
//! something that the next call puts in order.

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
    /// Temporary files of dead writers.
    pub(crate) removed: usize,
    /// Files below `files` that have no row, and directories that cannot be read.
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
    let rows = merge(rows, resolve(home, catalogue).await?);
    let wanted: HashSet<&Url> = manifest.iter().collect();
    let known: Vec<Url> = rows.iter().filter_map(|row| Url::parse(&row.url).ok()).collect();
    let assigned = paths::assign(manifest.iter().chain(&known));
    let mut settled = Settled {
        paths: assigned.into_iter().map(|(url, path)| (url.clone(), path)).collect(),
        left: known.iter().filter(|url| !wanted.contains(url)).map(|url| url.as_str().to_owned()).collect(),
        ..Settled::default()
    };
    let place = Arc::clone(home);
    let (kept, lost) = blocking(move |stop| {
        let (kept, lost) = inspect(&place, rows, verify, stop)?;
        // Before the rows are: a file that has lost its row would be somebody else's.
        lost.iter().filter(|row| is_inside(&row.path)).try_for_each(|row| remove(&place.file(&row.path)))?;
        // An empty directory may stand where a file belongs now.
        prune(&place.files());
        Ok((kept, lost))
    })
    .await?;
    settled.lost = lost.len();
    all(catalogue, lost.into_iter().map(|row| Change::Delete(row.url)).collect()).await?;
    relocate(home, kept, &mut settled, catalogue).await?;
    clear(home, &mut settled, is_new).await?;
    if is_new {
        // Only now: a refused catalogue must be as new the next time.
        catalogue.apply(Change::Mark(home.mark.clone())).await?;
    }
    Ok(settled)
}

/// Looks for each pending row whether its file has become what was intended, and returns those of which that is so.
pub(crate) async fn resolve(home: &Arc<Home>, catalogue: &Catalogue) -> Result<Vec<Row>, HomeError> {
    let (place, pending) = (Arc::clone(home), catalogue.pending());
    if pending.is_empty() {
        return Ok(Vec::new());
    }
    let (done, changes) = blocking(move |stop| {
        let (mut done, mut changes) = (Vec::new(), Vec::new());
        for row in pending {
            if is_there(&place, &row, true, stop)? {
                changes.push(Change::Put(Box::new(row.clone())));
                done.push(row);
            } else {
                changes.push(Change::Forget(row.url));
            }
        }
        Ok((done, changes))
    })
    .await?;
    all(catalogue, changes).await?;
    Ok(done)
}

/// The rows, with those that have become true in place of what they were.
fn merge(rows: Vec<Row>, done: Vec<Row>) -> Vec<Row> {
    let mut rows: BTreeMap<String, Row> = rows.into_iter().map(|row| (row.url.clone(), row)).collect();
    rows.extend(done.into_iter().map(|row| (row.url.clone(), row)));
    rows.into_values().collect()
}

/// Whether the file of a row is there, with its size and, where asked for, its digest.
fn is_there(home: &Home, row: &Row, by_digest: bool, stop: &CancellationToken) -> Result<bool, HomeError> {
    if !is_inside(&row.path) {
        return Ok(false);
    }
    let path = home.file(&row.path);
    match std::fs::symlink_metadata(&path) {
        Ok(found) if found.is_file() && i64::try_from(found.len()) == Ok(row.bytes) => {
            Ok(!by_digest || digest(&path, stop).map_err(at(&path))? == row.sha256)
        }
        Ok(_) => Ok(false),
        Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => Ok(false),
        Err(error) => Err(at(&path)(error)),
    }
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
        let whole = is_there(home, &row, verify, stop)?;
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

/// Removes the temporary files of dead writers, and counts what is not ours.
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
            } else if !complete.contains(&path) {
                if is_new && ours.contains(&path) {
                    return Err(HomeError::Unknown(home.files()));
                }
                // A temporary file that the sweep has removed is none.
                settled.strangers += usize::from(path.symlink_metadata().is_ok());
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
fn remove(path: &Path) -> Result<(), HomeError> {
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
