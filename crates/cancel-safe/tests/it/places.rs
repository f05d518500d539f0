//! Files whose path changes, with the process killed between any two steps, using the example's own functions.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use cancel_safe::testing::{Explore, Way, scratch_dir};

use super::catalogue::{Change, Row};
use super::home::{Home, hex};
use super::list::{Line, List};
use super::report::Reporter;
use super::settle::{Wanted, settle};
use super::store::{self, Opened};

/// How long a commit may take on a busy disk before it counts as a hang.
const SLOW_DISK: Duration = Duration::from_secs(60);

/// Files by number, with their present and their new paths: two circles, one of them with identical files; a path that
/// becomes a directory; and a path with a foreign file, which is identical to the file that belongs there.
const MOVES: [(&str, &str); 6] =
    [("a/1", "a/2"), ("a/2", "a/1"), ("b/1", "c/1"), ("c/1", "b/1"), ("d/1", "d/1/x"), ("e/1", "e/2")];
const STRANGER: &str = "e/2";

fn url(number: usize) -> String {
    format!("http://h/{number}")
}

/// The content of a file. The first two are the same.
fn content(number: usize) -> Vec<u8> {
    vec![number.max(1) as u8; 10]
}

fn row(number: usize, path: &str) -> Row {
    use sha2::Digest;
    Row {
        url: url(number),
        path: path.to_owned(),
        bytes: 10,
        sha256: hex(&sha2::Sha256::digest(content(number))),
        http_status: 200,
        final_url: url(number),
        etag: None,
        last_modified: None,
        fetched_at: 0,
    }
}

/// A directory with the rows and files from before the list changed.
async fn before(dir: PathBuf) -> PathBuf {
    // This runs again after the crash, and then finds the state that the crash left.
    if dir.join("mirror.id").exists() {
        return dir;
    }
    let home = Arc::new(Home::open(&dir).unwrap());
    let Opened { catalogue, writer, .. } = store::open(None, &dir, &home.mark).await.unwrap();
    let put = async {
        let catalogue = catalogue;
        let mut changes = vec![Change::Mark(home.mark.clone())];
        for (number, (from, _)) in MOVES.into_iter().enumerate() {
            write(&home.file(from), &content(number));
            changes.push(Change::Put(Box::new(row(number, from))));
        }
        catalogue.apply_all(changes).await.unwrap();
    };
    tokio::join!(put, writer);
    write(&home.file(STRANGER), &content(MOVES.len() - 1));
    dir
}

fn write(path: &Path, content: &[u8]) {
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    fs::write(path, content).unwrap();
}

/// Runs a start up to its first fetch; returns the rows at that time, and how many files are not ours.
async fn start(dir: &Path) -> Result<(BTreeMap<String, String>, usize), String> {
    let home = Arc::new(Home::open(dir).map_err(|error| error.to_string())?);
    let opened = store::open(None, dir, &home.mark).await.map_err(|error| error.to_string())?;
    let Opened { catalogue, writer, is_new } = opened;
    let report = Reporter::new(false);
    let work = async {
        let catalogue = catalogue;
        let mut list = List::new().unwrap();
        for (number, (_, to)) in MOVES.into_iter().enumerate() {
            list.push(&Line { url: url(number), out: Some(to.to_owned()), ..Line::default() }).unwrap();
        }
        list.sort().unwrap();
        let wanted = Wanted {
            home: &home,
            catalogue: &catalogue,
            is_new,
            verify: true,
            adopt: false,
            refresh: false,
            report: &report,
        };
        let (list, settled) = settle(&wanted, list).await.map_err(|error| format!("{error:?}"))?;
        let rows = catalogue.after(None).await.map_err(|error| error.to_string())?;
        for row in &rows {
            let slot = list.find(&row.url).unwrap().unwrap();
            if !list.is_complete(slot) {
                return Err(format!("{} has a row and is not complete", row.url));
            }
        }
        if settled.complete != rows.len() {
            return Err(format!("{} are said to be complete of {}", settled.complete, rows.len()));
        }
        Ok((rows.into_iter().map(|row| (row.url, row.path)).collect(), settled.strangers))
    };
    tokio::join!(work, writer).0
}

#[test]
fn killed_between_any_two_steps_of_a_move_each_file_comes_to_its_place() {
    let report = Explore::new().hang_after(SLOW_DISK).timeout(SLOW_DISK * 10).budgets([]).ways([Way::Crash]).run(
        async || before(scratch_dir()).await,
        async |dir| start(dir).await.map(drop),
        async |dir, outcome| {
            if let Some(Err(error)) = outcome.completed() {
                return Err(error);
            }
            // It continues where the other one was killed. After that the state no longer changes.
            for _ in 0..2 {
                let (rows, strangers) = start(dir).await?;
                for (number, (from, to)) in MOVES.into_iter().enumerate() {
                    let (place, path) = if to == STRANGER { (from, None) } else { (to, Some(to)) };
                    if rows.get(&url(number)).map(String::as_str) != path {
                        return Err(format!("the row of {number} says {:?}, not {path:?}", rows.get(&url(number))));
                    }
                    match fs::read(dir.join("files").join(place)) {
                        Ok(found) if found == content(number) => {}
                        found => return Err(format!("at {place} is {found:?} instead of {number}")),
                    }
                }
                if fs::read(dir.join("files").join(STRANGER)).ok() != Some(content(MOVES.len() - 1)) {
                    return Err("a stranger's file was touched".to_owned());
                }
                // The foreign file, and the file that had to stay.
                if strangers != 2 {
                    return Err(format!("{strangers} files are not ours"));
                }
            }
            Ok(())
        },
    );
    report.publish("cancel-safe", "mirror/places(crash)").assert_clean();
}
