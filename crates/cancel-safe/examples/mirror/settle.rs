//! Puts in order what an earlier run left, before a new one starts.
//!
//! After [`settle`] the catalogue equals the disk: each row has its file, with its size, at the path of the present
//! mapping, and nothing is pending. It removes only temporary files of dead writers, and files that do not fit their
//! row; a file without a row belongs to somebody else, so it is left alone and reported. Dropped or killed at any
//! point, it leaves a state that the next call puts in order.

use std::collections::HashSet;
use std::io;
use std::path::{Component, Path};
use std::sync::Arc;

use cancel_safe::atomic_fs;
use tokio_util::sync::CancellationToken;
use url::Url;

use super::catalogue::{Catalogue, Change, Row};
use super::home::{Home, HomeError, at, blocking, digest};
use super::list::List;
use super::moves::{Move, Refused, prune, relocate};
use super::paths::{kept_place, short_hash};
use super::report::{Event, Reporter, host_of};

/// What the new run wants from the directory.
pub(crate) struct Wanted<'a> {
    pub(crate) home: &'a Arc<Home>,
    pub(crate) catalogue: &'a Catalogue,
    /// The catalogue has no mark yet, so existing files are not ours.
    pub(crate) is_new: bool,
    pub(crate) verify: bool,
    pub(crate) adopt: bool,
    /// Whether to ask for files that are there as well.
    pub(crate) refresh: bool,
    pub(crate) report: &'a Reporter,
}

/// What [`settle`] found and did.
#[derive(Debug, Default)]
pub(crate) struct Settled {
    /// Rows whose file was missing or had another size or, with `--verify`, another digest.
    pub(crate) lost: usize,
    /// Temporary files of dead writers.
    pub(crate) removed: usize,
    /// Files below `files` that have no row, and directories that cannot be read.
    pub(crate) strangers: usize,
    /// Rows whose URL has left the manifest; their files are kept.
    pub(crate) left: usize,
    /// URLs whose file is there.
    pub(crate) complete: usize,
}

/// Makes catalogue and disk equal, gives each slot of the list its name, and marks those whose file is there.
pub(crate) async fn settle(wanted: &Wanted<'_>, list: List) -> Result<(List, Settled), HomeError> {
    let Wanted { home, catalogue, report, .. } = *wanted;
    let mut settled = Settled::default();
    resolve(home, catalogue).await?;
    let list = add_left(wanted, list, &mut settled).await?;
    let rules = home.rules;
    let mut list = blocking(move |stop| {
        let mut list = list;
        list.give_names(rules, || !stop.is_cancelled()).map_err(at(Path::new("the list")))?;
        Ok(list)
    })
    .await?;
    let (mut lost, mut strange, mut moves, mut places) = (Vec::new(), Vec::new(), Vec::new(), HashSet::new());
    let mut last = None;
    loop {
        let rows = catalogue.after(last).await?;
        let Some(end) = rows.last() else { break };
        last = Some(end.url.clone());
        let (place, verify) = (Arc::clone(home), wanted.verify);
        let (kept, gone) = blocking(move |stop| inspect(&place, rows, verify, stop)).await?;
        for row in gone {
            // Nobody would fetch it again, so whatever is there now is somebody else's.
            let slot = list.find(&row.url).map_err(listed)?;
            if slot.is_some_and(|slot| list.is_left(slot)) { strange.push(row) } else { lost.push(row) }
        }
        for row in kept {
            let Some(slot) = list.find(&row.url).map_err(listed)? else { continue };
            let (line, _, path) = list.entry(slot).map_err(listed)?;
            let is_other_size = line.size.is_some_and(|size| i64::try_from(size) != Ok(row.bytes));
            if is_other_size || line.sha256.is_some_and(|digest| digest != row.sha256) {
                list.stale(slot);
            } else {
                list.complete(slot);
            }
            if list.is_complete(slot) && !list.is_left(slot) && !wanted.refresh {
                settled.complete += 1;
                report.count(host_of(&row.url), |host| host.restored += 1);
            }
            places.insert(short_hash(&path));
            if path != row.path {
                let from = row.path.clone();
                moves.push(Move { row: Row { path, ..row }, from });
            }
        }
    }
    settled.lost = lost.len();
    settled.left = settled.left.saturating_sub(strange.len());
    let place = Arc::clone(home);
    let lost = blocking(move |_| {
        // Before the rows: a file without a row would count as somebody else's.
        lost.iter().filter(|row| is_inside(&row.path)).try_for_each(|row| remove(&place.file(&row.path)))?;
        // An empty directory may stand where a file belongs now.
        prune(&place.files());
        Ok(lost)
    })
    .await?;
    let gone = lost.into_iter().chain(strange);
    catalogue.apply_all(gone.map(|row| Change::Delete(row.url)).collect()).await?;
    for refused in relocate(home, catalogue, moves).await? {
        forget(wanted, refused, &mut list, &mut places, &mut settled)?;
    }
    clear(wanted, &list, &places, &mut settled).await?;
    let is_wanted = |url: &str| {
        let slot = list.find(url).ok().flatten();
        slot.is_some_and(|slot| !list.is_left(slot) && (wanted.refresh || !list.is_complete(slot)))
    };
    home.parts.clear(is_wanted).map_err(at(home.parts.dir()))?;
    if wanted.is_new {
        // Only now, because a refused catalogue must still count as new the next time.
        catalogue.apply(Change::Mark(home.mark.clone())).await?;
    }
    Ok((list, settled))
}

/// Handles a file that could not be moved to its place and has lost its row: from now on it counts as somebody else's.
fn forget(
    wanted: &Wanted<'_>,
    Refused { row, from, cause }: Refused,
    list: &mut List,
    places: &mut HashSet<u64>,
    settled: &mut Settled,
) -> Result<(), HomeError> {
    places.remove(&short_hash(&row.path));
    settled.lost += 1;
    let (url, place) = (&row.url, wanted.home.file(&row.path));
    let text = match cause {
        Some(cause) => {
            let from = wanted.home.file(&from);
            format!("{url}: its file belongs at {} now; {cause}, so it stays at {}", place.display(), from.display())
        }
        None => format!("{url}: its file has gone while it was to be moved to {}", place.display()),
    };
    wanted.report.notice(&text);
    let Some(slot) = list.find(url).map_err(listed)? else { return Ok(()) };
    if list.is_complete(slot) && !list.is_left(slot) && !wanted.refresh {
        settled.complete -= 1;
        wanted.report.count(host_of(url), |host| host.restored -= 1);
    }
    list.forget(slot);
    Ok(())
}

fn listed(error: io::Error) -> HomeError {
    at(Path::new("the list"))(error)
}

/// Adds the rows whose URL has left the list: their files keep their places.
async fn add_left(wanted: &Wanted<'_>, mut list: List, settled: &mut Settled) -> Result<List, HomeError> {
    let (mut left, mut last) = (Vec::new(), None);
    loop {
        let rows = wanted.catalogue.after(last).await?;
        let Some(end) = rows.last() else { break };
        last = Some(end.url.clone());
        for row in rows {
            if list.find(&row.url).map_err(listed)?.is_none() {
                wanted.report.event("left", &Event { url: &row.url, ..Event::default() });
                let kept = Url::parse(&row.url).ok().and_then(|url| kept_place(&url, &row.path, wanted.home.rules));
                left.push((row.url, kept));
            }
        }
    }
    settled.left = left.len();
    for (url, place) in left {
        list.push_left(url, place).map_err(listed)?;
    }
    if settled.left > 0 {
        list.sort().map_err(listed)?;
    }
    Ok(list)
}

/// Checks for each pending row whether its file has become what was intended. If so, the row is made final; otherwise
/// it is forgotten.
pub(crate) async fn resolve(home: &Arc<Home>, catalogue: &Catalogue) -> Result<(), HomeError> {
    let (place, mut pending) = (Arc::clone(home), Vec::new());
    for row in catalogue.pending() {
        let old = catalogue.row(&row.url).await?;
        pending.push((row, old));
    }
    if pending.is_empty() {
        return Ok(());
    }
    let changes = blocking(move |stop| {
        let (mut done, mut changes) = (Vec::new(), Vec::new());
        for (row, old) in pending {
            // A file that was to be moved may still be where it was; then the file at the new place is another one.
            let is_moved = old.as_ref().filter(|old| old.path != row.path);
            let stays = is_moved.is_some_and(|old| is_there(&place, old, true, stop).is_ok_and(|is_there| is_there));
            let is_done = !stays && is_there(&place, &row, true, stop)?;
            if !is_done && old.is_none() && row.bytes > 0 {
                remove_empty(&place, &row);
            }
            if is_done { done.push(row) } else { changes.push(Change::Forget(row.url)) }
        }
        // The run that wrote them may have been killed before they were durable.
        place.make_durable(done.iter().map(|row| row.path.as_str()))?;
        changes.extend(done.into_iter().map(|row| Change::Put(Box::new(row))));
        Ok(changes)
    })
    .await?;
    Ok(catalogue.apply_all(changes).await?)
}

/// Removes a new file of which a power cut has left only the name. An empty file cannot hold anybody else's bytes.
fn remove_empty(home: &Home, row: &Row) {
    let path = home.file(&row.path);
    if is_inside(&row.path) && path.symlink_metadata().is_ok_and(|found| found.is_file() && found.len() == 0) {
        // A file that stays is reported as not ours.
        let _stays = std::fs::remove_file(&path);
    }
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

/// Separates the rows whose files are there from the others.
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

/// Removes the temporary files of dead writers, and counts foreign files. `places` are the hashes of the paths with a
/// row.
async fn clear(
    wanted: &Wanted<'_>,
    list: &List,
    places: &HashSet<u64>,
    settled: &mut Settled,
) -> Result<(), HomeError> {
    let root = wanted.home.files();
    let mut directories = vec![root.clone()];
    let mut ours = None;
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
                continue;
            }
            let place = path.strip_prefix(&root).ok().and_then(Path::to_str).map(short_hash);
            if place.is_some_and(|place| places.contains(&place)) {
                continue;
            }
            if wanted.is_new && !wanted.adopt {
                let ours = match &mut ours {
                    Some(ours) => ours,
                    none => none.insert(names(list)?),
                };
                if place.is_some_and(|place| ours.contains(&place)) {
                    return Err(HomeError::Unknown(root));
                }
            }
            // A temporary file that the sweep has removed does not count.
            settled.strangers += usize::from(path.symlink_metadata().is_ok());
        }
    }
    Ok(())
}

/// The hashes of all paths that the list asks for.
fn names(list: &List) -> Result<HashSet<u64>, HomeError> {
    let hash = |slot| Ok(short_hash(&list.path(slot)?));
    (0..u32::try_from(list.len()).unwrap_or(u32::MAX)).map(hash).collect::<io::Result<_>>().map_err(listed)
}

/// Whether a path of the catalogue stays below `files`, whoever wrote it there.
fn is_inside(path: &str) -> bool {
    Path::new(path).components().all(|component| matches!(component, Component::Normal(_)))
}

/// Removes a file. It may be gone already, or a directory may be in its place: then its URL fails, and not the run.
fn remove(path: &Path) -> Result<(), HomeError> {
    use io::ErrorKind::{IsADirectory, NotADirectory, NotFound};
    match std::fs::remove_file(path) {
        Err(error) if !matches!(error.kind(), NotFound | NotADirectory | IsADirectory) => Err(at(path)(error)),
        _ => Ok(()),
    }
}
