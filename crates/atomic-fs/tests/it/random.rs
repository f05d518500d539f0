//! Random transactions over two directories, killed at random, and again in their recoveries; judged by a model.

use std::collections::BTreeMap;
use std::path::Path;

use cancel_safe_atomic_fs::{self as atomic_fs, Error, MultiFileTransaction, TargetState};

use crate::child;
use crate::support::temps;

/// The prefix of the child's task; the changes follow.
pub(crate) const TASK: &str = "random ";
const NAMES: [&str; 5] = ["a", "b", "c", "d", "e"];
/// The last one is a symlink to the first.
const DIRS: [&str; 3] = ["one", "two", "alias"];
/// The calls at which a process is killed.
const CALLS: &str = "renameat2,renameat,unlinkat,symlinkat,fsync,openat";

/// The files of the two directories: `one/a` and its content.
type Tree = BTreeMap<String, String>;

#[derive(Clone, Debug)]
enum Change {
    Put(String, String),
    Write(String, String),
    Remove(String),
    Rename(String, String),
}

impl Change {
    fn random(random: &mut fastrand::Rng, number: usize) -> Self {
        let mut path = || format!("{}/{}", DIRS[random.usize(..DIRS.len())], NAMES[random.usize(..NAMES.len())]);
        let (path, other) = (path(), path());
        match random.usize(..6) {
            0 | 1 => Self::Put(path, format!("new{number}")),
            2 => Self::Write(path, format!("written{number}")),
            3 => Self::Remove(path),
            _ => Self::Rename(path, other),
        }
    }

    fn encode(&self) -> String {
        match self {
            Self::Put(path, content) => format!("put:{path}:{content}"),
            Self::Write(path, content) => format!("write:{path}:{content}"),
            Self::Remove(path) => format!("remove:{path}:"),
            Self::Rename(from, to) => format!("rename:{from}:{to}"),
        }
    }

    fn decode(text: &str) -> Self {
        let [kind, first, second] = text.split(':').collect::<Vec<_>>()[..] else { panic!("no change: {text}") };
        let (first, second) = (first.to_owned(), second.to_owned());
        match kind {
            "put" => Self::Put(first, second),
            "write" => Self::Write(first, second),
            "remove" => Self::Remove(first),
            _ => Self::Rename(first, second),
        }
    }

    async fn add(&self, tx: &mut MultiFileTransaction, home: &Path) -> Result<(), Error> {
        match self {
            Self::Put(path, content) => tx.add_file(home.join(path), content).await,
            Self::Write(path, content) => tx.writer(home.join(path)).await?.write_all(content.as_bytes()).await,
            Self::Remove(path) => tx.remove_file(home.join(path)),
            Self::Rename(from, to) => tx.rename(home.join(from), home.join(to)),
        }
    }
}

/// Makes all changes that the transaction accepts; the first word is the journal's directory, or a hyphen.
pub(crate) async fn run(home: &Path, changes: &str) -> Result<(), Error> {
    let (mut tx, changes) = begin(home, changes);
    for change in changes {
        // A refused change is not part of it.
        let _refused = change.add(&mut tx, home).await;
    }
    tx.commit().await
}

fn begin(home: &Path, changes: &str) -> (MultiFileTransaction, Vec<Change>) {
    let mut words = changes.split(' ');
    let tx = match words.next() {
        Some("-") => MultiFileTransaction::new(),
        Some(dir) => MultiFileTransaction::begin(home.join(dir)),
        None => panic!("no journal's directory"),
    };
    (tx, words.map(Change::decode).collect())
}

/// The path without the alias.
fn real(path: &str) -> String {
    path.replace("alias/", "one/")
}

/// The tree after the changes: each change refers to the files from before.
fn model(old: &Tree, changes: &[Change]) -> Tree {
    let mut new = old.clone();
    for change in changes {
        match change {
            Change::Remove(path) | Change::Rename(path, _) => drop(new.remove(&real(path))),
            Change::Put(..) | Change::Write(..) => {}
        }
    }
    for change in changes {
        match change {
            Change::Put(path, content) | Change::Write(path, content) => drop(new.insert(real(path), content.clone())),
            Change::Rename(from, to) => drop(new.insert(real(to), old[&real(from)].clone())),
            Change::Remove(_) => {}
        }
    }
    new
}

fn make(home: &Path, tree: &Tree) {
    for dir in &DIRS[..2] {
        std::fs::create_dir_all(home.join(dir)).unwrap();
    }
    std::os::unix::fs::symlink("one", home.join("alias")).unwrap();
    for (path, content) in tree {
        std::fs::write(home.join(path), content).unwrap();
    }
}

fn look(home: &Path) -> Tree {
    let mut tree = Tree::new();
    for dir in &DIRS[..2] {
        for name in NAMES {
            if let Ok(content) = std::fs::read_to_string(home.join(dir).join(name)) {
                tree.insert(format!("{dir}/{name}"), content);
            }
        }
    }
    tree
}

/// One scenario: `Ok` with whether its files came out new.
async fn scenario(random: &mut fastrand::Rng) -> Result<bool, String> {
    let scratch = super::campaign::scratch();
    let [calm, home] = ["calm", "home"].map(|name| scratch.path().join(name));
    let mut old = Tree::new();
    for dir in &DIRS[..2] {
        for name in NAMES {
            if random.usize(..3) > 0 {
                old.insert(format!("{dir}/{name}"), format!("old {dir} {name}"));
            }
        }
    }
    make(&calm, &old);
    make(&home, &old);
    let count = 2 + random.usize(..5);
    let changes: Vec<_> = (0..count).map(|number| Change::random(random, number)).collect();
    let journal = ["-", "one", "two"][random.usize(..3)];
    let words: Vec<_> = std::iter::once(journal.to_owned()).chain(changes.iter().map(Change::encode)).collect();
    let task = words.join(" ");
    let new = undisturbed(&calm, &task, &old).await.map_err(|error| format!("{task}: {error}"))?;

    let mut kill = |task: &str, path: &Path| {
        let inject = format!("inject={CALLS}:signal=SIGKILL:when={}", 1 + random.usize(..60));
        let wrapper = ["strace", "-f", "-qq", "-P", home.to_str().unwrap(), "-o", "/dev/null"];
        let dirs = DIRS[..2].iter().map(|dir| home.join(dir).to_str().unwrap().to_owned()).collect::<Vec<_>>();
        let paths = dirs.iter().flat_map(|dir| ["-P", dir]);
        let wrapper: Vec<_> = wrapper.into_iter().chain(paths).chain(["-e", &inject]).collect();
        (child::outcome(child::command(&wrapper, task, path)), inject)
    };
    let (said, first) = kill(&format!("{TASK}{task}"), &home);
    let mut history = vec![format!("{task}, {first}: {said:?}")];
    // Two rounds of recoveries are killed, before one is not.
    for _ in 0..if said.is_none() { 2 } else { 0 } {
        for dir in &DIRS[..2] {
            let (said, inject) = kill("recover", &home.join(dir));
            history.push(format!("recover {dir}, {inject}: {said:?}"));
        }
    }
    for dir in &DIRS[..2] {
        let report = atomic_fs::recover(home.join(dir)).await.map_err(|error| format!("{history:#?}: {error}"))?;
        history.push(format!("{report:?}"));
    }
    let after = look(&home);
    let is_true = match said.as_deref() {
        Some("Ok") => after == new,
        Some(_) => after == old,
        None => after == old || after == new,
    };
    let left: Vec<_> = DIRS[..2].iter().flat_map(|dir| temps(&home.join(dir))).collect();
    if !is_true || !left.is_empty() {
        return Err(format!("{history:#?}:\nold {old:?}\nnew {new:?}\nis {after:?}, left {left:?}"));
    }
    Ok(after != old)
}

/// The tree after an undisturbed transaction, which must equal the model.
async fn undisturbed(home: &Path, task: &str, old: &Tree) -> Result<Tree, String> {
    let (mut tx, changes) = begin(home, task);
    let mut taken = Vec::new();
    for change in changes {
        match change.add(&mut tx, home).await {
            Ok(()) => taken.push(change),
            Err(error) if error.is_repeated_target() => {}
            Err(error) => return Err(format!("{change:?}: {error}")),
        }
    }
    let is_there = |path: &String| old.contains_key(&real(path));
    let are_there = taken.iter().all(|change| match change {
        Change::Remove(path) | Change::Rename(path, _) => is_there(path),
        Change::Put(..) | Change::Write(..) => true,
    });
    let new = match tx.commit().await {
        Ok(()) if are_there => model(old, &taken),
        // A missing file, or one that is named twice through the alias.
        Err(error) if error.target() == TargetState::Unchanged && (!are_there || error.is_repeated_target()) => {
            old.clone()
        }
        other => return Err(format!("{taken:?}: {other:?}")),
    };
    let found = look(home);
    let left: Vec<_> = DIRS[..2].iter().flat_map(|dir| temps(&home.join(dir))).collect();
    if found != new || !left.is_empty() {
        return Err(format!("{taken:?} made {found:?} of {old:?} instead of {new:?}, and left {left:?}"));
    }
    Ok(new)
}

#[tokio::test]
async fn random_transactions_killed_at_random_come_out_old_or_new() {
    if child::strace("random/kills").is_none() {
        return;
    }
    let rounds = if super::campaign::is_full() { 10_000 } else { 60 };
    let seed = fastrand::u64(..);
    println!("seed {seed}");
    let mut random = fastrand::Rng::with_seed(seed);
    let (mut violations, mut new) = (Vec::new(), 0);
    for round in 1..=rounds {
        if round % 500 == 0 {
            println!("{round} scenarios so far");
        }
        match scenario(&mut random).await {
            Ok(is_new) => new += usize::from(is_new),
            Err(violation) => violations.push(violation),
        }
    }
    cancel_safe_campaign::publish_campaign("atomic-fs", "random/kills", rounds, violations.len());
    println!("{new} of {rounds} came out new");
    assert!(violations.is_empty(), "{} violations, seed {seed}: {}", violations.len(), violations[0]);
    assert!(new > 0 && new < rounds, "{new} of {rounds} came out new");
}
