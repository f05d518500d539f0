//! Files whose place has changed, because the list gives them another one, or because other URLs came or went.
//!
//! Invariant: no file is overwritten, whoever owns it. Files move in rounds: every place that a round fills is free, on
//! the disk and in the catalogue, before the round's first intent is recorded. So however the process ends, one look
//! tells where each file with a recorded intent is. If files wait for each other in a circle, one of them steps aside
//! to a place at the top that the mapping gives to no URL.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, ErrorKind};
use std::path::Path;
use std::sync::Arc;

use super::catalogue::{Catalogue, Change, Row};
use super::home::{Home, HomeError, at, blocking, is_of_name};
use super::paths::{self, Rules};

/// A file whose place has changed.
#[derive(Debug)]
pub(crate) struct Move {
    /// The row after the move.
    pub(crate) row: Row,
    /// Where the file is.
    pub(crate) from: String,
}

/// One step of a file, which is known by its number among the moves.
#[derive(Debug, PartialEq, Eq)]
struct Step {
    file: usize,
    to: String,
}

/// A file that could not be moved.
#[derive(Debug)]
pub(crate) struct Refused {
    /// The row after the intended move.
    pub(crate) row: Row,
    /// Where the file is.
    pub(crate) from: String,
    /// Why it stays there; `None` if it is gone.
    pub(crate) cause: Option<String>,
}

/// The outcome of a step.
enum Stepped {
    Done,
    /// Something unknown to the catalogue is in the way, or the file system refuses the name.
    Stays(String),
    /// The file is not where its row says.
    Gone,
}

/// Moves all files, and returns those that it could not move: they stay where they are, and their rows are forgotten.
///
/// Dropped or killed at any point, it leaves every row with its file, at its place or at the pending one.
pub(crate) async fn relocate(
    home: &Arc<Home>,
    catalogue: &Catalogue,
    mut moves: Vec<Move>,
) -> Result<Vec<Refused>, HomeError> {
    // By the number of the move.
    let mut refused: BTreeMap<usize, Option<String>> = BTreeMap::new();
    for round in rounds(&moves, home.rules) {
        let round: Vec<Step> = round.into_iter().filter(|step| !refused.contains_key(&step.file)).collect();
        let row = |step: &Step| Box::new(Row { path: step.to.clone(), ..moves[step.file].row.clone() });
        // All of them before the first file moves.
        catalogue.apply_all(round.iter().map(|step| Change::Intend(row(step))).collect()).await?;
        let mut changes = Vec::new();
        for step in &round {
            let (home, from, to) = (Arc::clone(home), moves[step.file].from.clone(), step.to.clone());
            match blocking(move |_| rename(&home, &from, &to)).await? {
                Stepped::Done => {
                    changes.push(Change::Put(row(step)));
                    continue;
                }
                // Files that wait for its place find it taken, and stay as well.
                Stepped::Stays(cause) => refused.insert(step.file, Some(cause)),
                Stepped::Gone => refused.insert(step.file, None),
            };
            let url = &moves[step.file].row.url;
            changes.extend([Change::Delete(url.clone()), Change::Forget(url.clone())]);
        }
        // Before the next round: a place must be free in the catalogue too when another row takes it.
        catalogue.apply_all(changes).await?;
        for step in round.into_iter().filter(|step| !refused.contains_key(&step.file)) {
            moves[step.file].from = step.to;
        }
    }
    let told = moves.into_iter().enumerate().filter_map(|(file, Move { row, from })| {
        let cause = refused.remove(&file)?;
        Some(Refused { row, from, cause })
    });
    Ok(told.collect())
}

/// The order in which the files move: the files of one round are in no other file's way.
fn rounds(moves: &[Move], rules: Rules) -> Vec<Vec<Step>> {
    let obstacles = obstacles(moves, rules);
    let mut waiting: Vec<Vec<usize>> = vec![Vec::new(); moves.len()];
    for (file, obstacles) in obstacles.iter().enumerate() {
        obstacles.iter().for_each(|obstacle| waiting[*obstacle].push(file));
    }
    let mut left: Vec<usize> = obstacles.iter().map(Vec::len).collect();
    // Whether the place of a file is free.
    let mut is_away = vec![false; moves.len()];
    let mut ready: Vec<usize> = (0..moves.len()).filter(|file| left[*file] == 0).collect();
    let mut rounds = Vec::new();
    loop {
        let mut freed = std::mem::take(&mut ready);
        let mut round: Vec<Step> =
            freed.iter().map(|file| Step { file: *file, to: moves[*file].row.path.clone() }).collect();
        if round.is_empty() {
            freed = in_circles(&obstacles, &is_away, &left);
            round = freed.iter().map(|file| Step { file: *file, to: paths::aside(&moves[*file].row.url) }).collect();
        }
        if round.is_empty() {
            return rounds;
        }
        for file in freed.into_iter().filter(|file| !std::mem::replace(&mut is_away[*file], true)) {
            for next in std::mem::take(&mut waiting[file]) {
                left[next] -= 1;
                if left[next] == 0 {
                    ready.push(next);
                }
            }
        }
        rounds.push(round);
    }
}

/// For each file, the files that are in its way: at its path, at a path that must be a directory for it, or below it.
fn obstacles(moves: &[Move], rules: Rules) -> Vec<Vec<usize>> {
    let places: BTreeMap<String, usize> =
        moves.iter().enumerate().map(|(file, one)| (rules.folded(&one.from), file)).collect();
    let of = |one: &Move| {
        let to = rules.folded(&one.row.path);
        let above = to.match_indices('/').filter_map(|(end, _)| places.get(&to[..end]));
        let directory = format!("{to}/");
        let below = places.range(directory.clone()..).take_while(|(place, _)| place.starts_with(&directory));
        above.chain(places.get(&to)).chain(below.map(|(_, file)| file)).copied().collect()
    };
    moves.iter().map(of).collect()
}

/// One file of each circle among those that still wait.
fn in_circles(obstacles: &[Vec<usize>], is_away: &[bool], left: &[usize]) -> Vec<usize> {
    let mut seen = vec![None; obstacles.len()];
    let mut found = Vec::new();
    for start in (0..obstacles.len()).filter(|file| left[*file] > 0) {
        let mut file = start;
        while seen[file].is_none() {
            seen[file] = Some(start);
            // A waiting file has an obstacle that is still there, and that is waiting too.
            let Some(next) = obstacles[file].iter().find(|next| !is_away[**next]) else { break };
            file = *next;
            if seen[file] == Some(start) {
                found.push(file);
            }
        }
    }
    found
}

/// Moves a file to a free place. The move is durable when this returns; otherwise a power cut could leave a row that
/// names another file's bytes. Blocks.
fn rename(home: &Home, from: &str, to: &str) -> Result<Stepped, HomeError> {
    let (from, to) = (home.file(from), home.file(to));
    let sync = |path: &Path| path.parent().map_or(Ok(()), |parent| File::open(parent)?.sync_all());
    if to.symlink_metadata().is_ok_and(|found| found.is_dir()) {
        // Empty directories may be removed; one that is not empty refuses, and is then found to be in the way.
        prune(&to);
        let _kept = std::fs::remove_dir(&to);
    }
    let moved = home.make_parents(&to).and_then(|()| rename_new(&from, &to));
    match moved {
        Ok(()) => sync(&to).and_then(|()| sync(&from)).map(|()| Stepped::Done).map_err(at(&to)),
        Err(error) if error.kind() == ErrorKind::NotFound && from.symlink_metadata().is_err() => Ok(Stepped::Gone),
        Err(error) if matches!(error.kind(), ErrorKind::AlreadyExists | ErrorKind::NotADirectory) => {
            Ok(Stepped::Stays("what stands there is not ours".to_owned()))
        }
        Err(error) if is_of_name(&error) => Ok(Stepped::Stays(format!("the file system refuses that: {error}"))),
        Err(error) => Err(at(&to)(error)),
    }
}

/// Renames `from` to `to`, which must not exist.
fn rename_new(from: &Path, to: &Path) -> io::Result<()> {
    #[cfg(any(target_os = "linux", target_os = "android", target_vendor = "apple"))]
    {
        use rustix::fs::{CWD, RenameFlags, renameat_with};
        use rustix::io::Errno;
        match renameat_with(CWD, from, CWD, to, RenameFlags::NOREPLACE) {
            // The kernel or the file system does not know the flag.
            Err(Errno::INVAL | Errno::NOSYS | Errno::NOTSUP) => {}
            other => return Ok(other?),
        }
    }
    // No other run is here, since this one holds the directory.
    match to.symlink_metadata() {
        Ok(_) => Err(ErrorKind::AlreadyExists.into()),
        Err(error) if error.kind() == ErrorKind::NotFound => std::fs::rename(from, to),
        Err(error) => Err(error),
    }
}

/// Removes empty directories below `directory`, deepest first. Blocks.
pub(crate) fn prune(directory: &Path) {
    for entry in std::fs::read_dir(directory).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            prune(&entry.path());
            // One that is not empty refuses, which is the question.
            let _kept = std::fs::remove_dir(entry.path());
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    fn moves(pairs: &[(&str, &str)]) -> Vec<Move> {
        let one = |(from, to): &(&str, &str)| Move {
            row: Row {
                url: format!("http://h/{from}"),
                path: (*to).to_owned(),
                bytes: 0,
                sha256: String::new(),
                http_status: 200,
                final_url: String::new(),
                etag: None,
                last_modified: None,
                fetched_at: 0,
            },
            from: (*from).to_owned(),
        };
        pairs.iter().map(one).collect()
    }

    /// Files and their steps in each round.
    fn steps(pairs: &[(&str, &str)], rules: Rules) -> Vec<Vec<(usize, bool)>> {
        let moves = moves(pairs);
        let step = |step: &Step| (step.file, step.to == moves[step.file].row.path);
        rounds(&moves, rules).iter().map(|round| round.iter().map(step).collect()).collect()
    }

    #[test]
    fn a_place_is_left_before_it_is_taken() {
        let plain = Rules::default();
        assert_eq!(steps(&[("a/a", "b/b"), ("b/b", "c/c")], plain), [[(1, true)], [(0, true)]]);
        assert_eq!(steps(&[("a/a", "b/b/x"), ("b/b", "c/c")], plain), [[(1, true)], [(0, true)]]);
        assert_eq!(steps(&[("a/a", "b/b"), ("b/b/x", "c/c"), ("b/b/y", "c/d")], plain)[1], [(0, true)]);
        assert_eq!(steps(&[("a/a", "b/b"), ("b/b-", "c/c")], plain), [[(0, true), (1, true)]]);
        assert_eq!(steps(&[], plain), [[(0, true); 0]; 0]);
    }

    #[test]
    fn one_file_of_a_circle_steps_aside() {
        let plain = Rules::default();
        assert_eq!(steps(&[("a/a", "b/b"), ("b/b", "a/a")], plain), [[(0, false)], [(1, true)], [(0, true)]]);
        // One that waits for a circle is in none; one whose own place becomes a directory is its own.
        let both = [("x/x", "a/a"), ("a/a", "b/b"), ("b/b", "a/z"), ("c/c", "d/d"), ("d/d", "c/c"), ("e/e", "e/e/e")];
        let steps_of_both = steps(&both, plain);
        assert_eq!(steps_of_both[0], [(2, true)], "{steps_of_both:?}");
        assert_eq!(steps_of_both.concat().iter().filter(|(_, is_home)| !is_home).count(), 2, "{steps_of_both:?}");
        let folds = Rules { folds: true, refuses: false };
        assert_eq!(steps(&[("a/A", "a/a")], folds), [[(0, false)], [(0, true)]]);
        assert_eq!(steps(&[("a/A", "a/a")], plain), [[(0, true)]]);
    }

    proptest! {
        /// Plays the rounds on a set of names: nothing is overwritten, and each file comes to its place.
        #[test]
        fn whatever_changes_places_nothing_is_in_the_way(
            from in prop::collection::btree_set("[ab](/[ab]){1,2}", 1..7),
            order in prop::collection::vec(any::<u64>(), 8),
            to in prop::collection::btree_set("[ab](/[ab]){1,2}", 7..8),
        ) {
            let is_apart = |names: &BTreeSet<String>| !names.iter().any(|a| names.iter().any(|b| b.starts_with(&format!("{a}/"))));
            let from: Vec<String> = from.into_iter().collect();
            let mut to: Vec<(u64, String)> = order.into_iter().zip(to).collect();
            to.sort();
            let pairs: Vec<(&str, &str)> = from.iter().zip(&to).map(|(from, (_, to))| (from.as_str(), to.as_str())).collect();
            let mut names: BTreeSet<String> = from.iter().cloned().collect();
            let wanted: BTreeSet<String> = pairs.iter().map(|(_, to)| (*to).to_owned()).collect();
            prop_assume!(is_apart(&names) && is_apart(&wanted));
            let moves = moves(&pairs);
            let mut places: Vec<String> = from.clone();
            for round in rounds(&moves, Rules::default()) {
                let before = names.clone();
                for Step { file, to } in round {
                    prop_assert!(!before.contains(&to), "{} is taken", to);
                    names.remove(&places[file]);
                    names.insert(to.clone());
                    places[file] = to;
                    prop_assert!(is_apart(&names), "{:?}", names);
                    prop_assert_eq!(names.len(), from.len());
                }
            }
            prop_assert_eq!(names, wanted);
        }
    }
}
