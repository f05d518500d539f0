//! Every state in which a power cut may leave the disk, replayed from the calls of a real transaction.
//!
//! The power cuts of the campaigns are real, but ext4 and xfs log names in order, so that they cannot reveal a missing
//! or late sync. Here the disk is the weakest possible: each rename, link, unlink and exchange is atomic; any of those
//! that no sync has made durable may have reached the disk, whatever came before them; and of any unsynced content
//! none, a part or all may have reached it. Each such state is created, recovered and judged.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::path::{Path, PathBuf};

use crate::child;
use crate::support::LOCKS;

/// A name: the number of its directory, and the file name in it.
type Name = (usize, String);
/// The number of a file.
type Node = usize;

/// What a disk keeps of one call.
#[derive(Clone, Debug)]
enum Effect {
    /// These names now lead to these files, or to none; all of them or none of them.
    Names(Vec<(Name, Option<Node>)>),
    /// The file now has this content.
    Content(Node, Vec<u8>),
    SyncFile(Node),
    SyncDir(usize),
}

/// Something on the disk: a file or a symlink.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
enum Thing {
    File(Vec<u8>),
    Symlink(String),
}

/// A traced transaction.
#[derive(Debug)]
pub(crate) struct Trace {
    dirs: Vec<PathBuf>,
    effects: Vec<Effect>,
    names: BTreeMap<Name, Node>,
    nodes: Vec<Thing>,
    /// The numbers of the files that existed before.
    numbers: HashMap<u64, Node>,
}

/// A disk after a cut: which file has which names, and the content of each.
type State = BTreeMap<Name, (Node, Thing)>;

impl Trace {
    /// Runs `task` on `path`, with faults if there are any, one per line, until its message begins with `wanted`;
    /// records what it does in `dirs`, the first of which is the journal's.
    pub(crate) fn of(task: &str, path: &Path, dirs: &[PathBuf], inject: Option<&str>, wanted: &str) -> Self {
        use std::os::unix::fs::MetadataExt;
        let (names, nodes, numbers) = (BTreeMap::new(), Vec::new(), HashMap::new());
        let mut trace = Self { dirs: dirs.to_vec(), effects: Vec::new(), names, nodes, numbers };
        for (number, dir) in dirs.iter().enumerate() {
            for entry in std::fs::read_dir(dir).unwrap().map(Result::unwrap) {
                let (meta, path) = (entry.path().symlink_metadata().unwrap(), entry.path());
                let thing = match meta.file_type() {
                    kind if kind.is_dir() => continue,
                    kind if kind.is_symlink() => Thing::Symlink(path.read_link().unwrap().to_str().unwrap().to_owned()),
                    _ => Thing::File(std::fs::read(path).unwrap()),
                };
                let node = *trace.numbers.entry(meta.ino()).or_insert_with(|| {
                    trace.nodes.push(thing);
                    trace.nodes.len() - 1
                });
                trace.names.insert((number, entry.file_name().into_string().unwrap()), node);
            }
        }
        let scratch = tempfile::tempdir().unwrap();
        let (log, other) = (scratch.path().join("calls"), scratch.path().join("other"));
        let traced = ["-f", "-qq", "-xx", "-s", "1000000", "-e", "trace=%file,%desc", "-o", log.to_str().unwrap()];
        let inject: Vec<_> =
            inject.iter().flat_map(|inject| inject.lines()).map(|inject| format!("inject={inject}")).collect();
        let inject = inject.iter().flat_map(|inject| ["-e", inject]);
        let wrapper: Vec<_> = ["strace"].into_iter().chain(traced).chain(inject).collect();
        let output = child::command(&wrapper, task, path).env(child::OTHER, other).output().unwrap();
        let said = child::last_word(&output.stdout).unwrap();
        assert!(said.starts_with(wanted), "{task}: {said}");
        trace.read(&std::fs::read_to_string(log).unwrap());
        trace
    }

    /// The same trace without one of its syncs, for each sync, together with the name of the sync.
    pub(crate) fn without_each_sync(&self) -> impl Iterator<Item = (String, Self)> {
        let is_sync = |effect: &Effect| matches!(effect, Effect::SyncFile(_) | Effect::SyncDir(_));
        (0..self.effects.len()).filter(move |&position| is_sync(&self.effects[position])).map(|position| {
            let mut effects = self.effects.clone();
            let skipped = effects.remove(position);
            let (dirs, names) = (self.dirs.clone(), self.names.clone());
            let (nodes, numbers) = (self.nodes.clone(), self.numbers.clone());
            (format!("{skipped:?} at {position}"), Self { dirs, effects, names, nodes, numbers })
        })
    }

    /// Reads the log, in the order in which the calls returned.
    fn read(&mut self, log: &str) {
        let mut reader = Reader { now: self.names.clone(), open: HashMap::new() };
        let mut cut = HashMap::<&str, String>::new();
        for line in log.lines() {
            let Some((thread, text)) = line.split_once(char::is_whitespace) else { continue };
            let text = text.trim_start();
            let whole = if let Some(begun) = text.strip_suffix("<unfinished ...>") {
                // A closed number may be reused before this call returns.
                match begun.trim_end().strip_prefix("close(").map(|number| number.trim_end_matches(')').parse()) {
                    Some(Ok(number)) => drop(reader.open.remove(&number)),
                    _ => drop(cut.insert(thread, begun.to_owned())),
                }
                continue;
            } else if let Some((_, rest)) = text.strip_prefix("<... ").and_then(|text| text.split_once(" resumed>")) {
                cut.remove(thread).unwrap_or_default() + rest
            } else {
                text.to_owned()
            };
            if let Some(call) = Call::parse(&whole) {
                reader.take(self, &call);
            }
        }
    }

    /// The disk if the power is cut after the first `cut` effects, and if of the non-durable effects only those at the
    /// positions `kept` reached it; `contents` says how much of each unsynced content did.
    fn state(&self, cut: usize, kept: &BTreeSet<usize>, contents: &HashMap<Node, Share>) -> State {
        let mut names = self.names.clone();
        for (position, effect) in self.effects[..cut].iter().enumerate() {
            if let Effect::Names(changes) = effect
                && (kept.contains(&position) || self.is_durable(position, cut))
            {
                for (name, node) in changes {
                    match node {
                        Some(node) => names.insert(name.clone(), *node),
                        None => names.remove(name),
                    };
                }
            }
        }
        let thing = |node: Node| {
            let (durable, last) = self.content(node, cut);
            match (contents.get(&node), last) {
                (Some(Share::Nothing), Thing::File(_)) => durable,
                (Some(Share::Half), Thing::File(last)) => Thing::File(last[..last.len() / 2].to_vec()),
                (_, last) => last,
            }
        };
        names.into_iter().map(|(name, node)| (name, (node, thing(node)))).collect()
    }

    /// Whether a sync before `cut` made the change of names at `position` durable.
    fn is_durable(&self, position: usize, cut: usize) -> bool {
        let Effect::Names(changes) = &self.effects[position] else { return false };
        self.effects[position..cut].iter().any(|effect| match effect {
            Effect::SyncDir(dir) => changes.iter().any(|((changed, _), _)| changed == dir),
            _ => false,
        })
    }

    /// The content of the file at its last sync before `cut`, and after its last write.
    fn content(&self, node: Node, cut: usize) -> (Thing, Thing) {
        let mut last = self.nodes[node].clone();
        let mut durable = last.clone();
        for effect in &self.effects[..cut] {
            match effect {
                Effect::Content(written, bytes) if *written == node => last = Thing::File(bytes.clone()),
                Effect::SyncFile(synced) if *synced == node => durable = last.clone(),
                _ => {}
            }
        }
        (durable, last)
    }

    /// The changes of names, and the files, that a cut there may lose.
    fn at_risk(&self, cut: usize) -> (Vec<usize>, Vec<Node>) {
        let is_loose =
            |position: &usize| matches!(self.effects[*position], Effect::Names(_)) && !self.is_durable(*position, cut);
        let is_unsynced = |node: &Node| {
            let (durable, last) = self.content(*node, cut);
            durable != last
        };
        ((0..cut).filter(is_loose).collect(), (0..self.nodes.len()).filter(is_unsynced).collect())
    }
}

/// How much of an unsynced content reached the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Share {
    Nothing,
    Half,
    All,
}

const SHARES: [Share; 3] = [Share::Nothing, Share::Half, Share::All];

/// One call: its name, its arguments and its result.
struct Call<'a> {
    name: &'a str,
    arguments: Vec<&'a str>,
    result: i64,
}

impl<'a> Call<'a> {
    /// `None` if it failed, or is not a call.
    fn parse(text: &'a str) -> Option<Self> {
        let (call, result) = text.rsplit_once(" = ")?;
        let result = result.split_whitespace().next()?.parse().ok().filter(|result| *result >= 0)?;
        let (name, arguments) = call.trim_end().strip_suffix(')')?.split_once('(')?;
        Some(Self { name, arguments: arguments.split(", ").map(str::trim).collect(), result })
    }

    /// The text of a quoted argument, all of which is written in hexadecimal digits.
    fn bytes(&self, position: usize) -> Vec<u8> {
        let text = self.arguments[position].trim_matches('"');
        text.split("\\x").skip(1).map(|digits| u8::from_str_radix(digits, 16).unwrap()).collect()
    }

    fn text(&self, position: usize) -> String {
        String::from_utf8(self.bytes(position)).unwrap()
    }

    fn number(&self, position: usize) -> Option<i64> {
        self.arguments.get(position)?.parse().ok()
    }
}

/// The meaning of a file descriptor.
#[derive(Clone, Copy)]
enum Open {
    Dir(usize),
    File(Node),
}

/// Follows the calls, as if each took effect at once.
struct Reader {
    now: BTreeMap<Name, Node>,
    open: HashMap<i64, Open>,
}

impl Reader {
    fn take(&mut self, trace: &mut Trace, call: &Call<'_>) {
        match call.name {
            "openat" => self.open(trace, call),
            "close" => drop(call.number(0).and_then(|number| self.open.remove(&number))),
            "write" => {
                if let Some(node) = self.file(call) {
                    let (_, last) = trace.content(node, trace.effects.len());
                    let Thing::File(mut bytes) = last else { return };
                    let written = usize::try_from(call.result).unwrap();
                    bytes.extend_from_slice(&call.bytes(1)[..written]);
                    trace.effects.push(Effect::Content(node, bytes));
                }
            }
            "fsync" | "fdatasync" => match call.number(0).and_then(|number| self.open.get(&number)) {
                Some(Open::Dir(dir)) => trace.effects.push(Effect::SyncDir(*dir)),
                Some(Open::File(node)) => trace.effects.push(Effect::SyncFile(*node)),
                None => {}
            },
            "renameat" | "renameat2" => {
                let (Some(from), Some(to)) = (self.name(call, 0), self.name(call, 2)) else { return };
                let is_exchange = call.arguments.get(4).is_some_and(|flags| flags.contains("RENAME_EXCHANGE"));
                let (moved, replaced) = (self.now[&from], self.now.get(&to).copied());
                let left = replaced.filter(|_| is_exchange);
                self.change(trace, vec![(from, left), (to, Some(moved))]);
            }
            "linkat" => {
                let (Some(from), Some(to)) = (self.name(call, 0), self.name(call, 2)) else { return };
                let node = self.now[&from];
                self.change(trace, vec![(to, Some(node))]);
            }
            "symlinkat" => {
                let Some(to) = self.name(call, 1) else { return };
                trace.nodes.push(Thing::Symlink(call.text(0)));
                self.change(trace, vec![(to, Some(trace.nodes.len() - 1))]);
            }
            "unlinkat" => {
                let Some(name) = self.name(call, 0).filter(|name| !LOCKS.contains(&&*name.1)) else { return };
                self.change(trace, vec![(name, None)]);
            }
            "pwrite64" => self.rewrite(trace, call, |bytes| {
                let begin = usize::try_from(call.number(3).unwrap()).unwrap();
                let end = begin + usize::try_from(call.result).unwrap();
                bytes.resize(bytes.len().max(end), 0);
                bytes[begin..end].copy_from_slice(&call.bytes(1)[..end - begin]);
            }),
            "ftruncate" => {
                let length = call.number(1).unwrap().try_into().unwrap();
                self.rewrite(trace, call, |bytes| bytes.resize(length, 0));
            }
            "pwritev2" | "rename" | "link" | "symlink" | "unlink" => {
                assert!(self.file(call).is_none(), "the replay does not know {}", call.name);
            }
            _ => {}
        }
    }

    fn open(&mut self, trace: &mut Trace, call: &Call<'_>) {
        let path = call.text(1);
        let (known, below) = match call.number(0).and_then(|number| self.open.get(&number)) {
            Some(Open::Dir(dir)) if path == "." => (Some(*dir), None),
            Some(Open::Dir(dir)) => (None, Some((*dir, path))),
            _ => {
                // By any path; a file that is gone by now is not one of ours.
                let path = Path::new(&path).canonicalize().unwrap_or_default();
                (trace.dirs.iter().position(|dir| *dir == path), None)
            }
        };
        // A lock is empty and tells a recovery nothing; each would double the states.
        let node = below.filter(|name| !LOCKS.contains(&&*name.1)).and_then(|name| {
            let is_new = call.arguments[2].contains("O_CREAT") && !self.now.contains_key(&name);
            if is_new {
                trace.nodes.push(Thing::File(Vec::new()));
                self.change(trace, vec![(name.clone(), Some(trace.nodes.len() - 1))]);
            }
            self.now.get(&name).copied()
        });
        match (known, node) {
            (Some(dir), _) => drop(self.open.insert(call.result, Open::Dir(dir))),
            (_, Some(node)) => drop(self.open.insert(call.result, Open::File(node))),
            // The number may have belonged to a file before.
            _ => drop(self.open.remove(&call.result)),
        }
    }

    /// The change of a file's content by a call; files elsewhere are ignored.
    fn rewrite(&self, trace: &mut Trace, call: &Call<'_>, change: impl FnOnce(&mut Vec<u8>)) {
        let Some(node) = self.file(call) else { return };
        let (_, Thing::File(mut bytes)) = trace.content(node, trace.effects.len()) else { return };
        change(&mut bytes);
        trace.effects.push(Effect::Content(node, bytes));
    }

    fn file(&self, call: &Call<'_>) -> Option<Node> {
        match self.open.get(&call.number(0)?)? {
            Open::File(node) => Some(*node),
            Open::Dir(_) => None,
        }
    }

    /// The name that the two arguments at `position` give.
    fn name(&self, call: &Call<'_>, position: usize) -> Option<Name> {
        match self.open.get(&call.number(position)?)? {
            Open::Dir(dir) => Some((*dir, call.text(position + 1))),
            Open::File(_) => None,
        }
    }

    fn change(&mut self, trace: &mut Trace, changes: Vec<(Name, Option<Node>)>) {
        for (name, node) in &changes {
            match node {
                Some(node) => self.now.insert(name.clone(), *node),
                None => self.now.remove(name),
            };
        }
        trace.effects.push(Effect::Names(changes));
    }
}

impl Trace {
    /// The file to which a journal refers by this number and name: an existing one, or else the first one that came
    /// there.
    fn recorded(&self, number: u64, name: &Name) -> Option<Node> {
        if let Some(node) = self.numbers.get(&number) {
            return Some(*node);
        }
        let created = self.effects.iter().find_map(|effect| match effect {
            Effect::Names(changes) => changes.iter().find(|(changed, _)| changed == name).and_then(|(_, node)| *node),
            _ => None,
        });
        self.names.get(name).copied().or(created)
    }

    /// Creates a state in these empty directories, and makes the journal refer to the created files.
    fn make(&self, state: &State, dirs: &[PathBuf]) {
        use std::os::unix::fs::MetadataExt;
        let mut made = HashMap::<Node, PathBuf>::new();
        for ((dir, name), (node, thing)) in state {
            let path = dirs[*dir].join(name);
            match (made.get(node), thing) {
                (Some(first), _) => std::fs::hard_link(first, &path).unwrap(),
                (None, Thing::File(bytes)) => std::fs::write(&path, bytes).unwrap(),
                (None, Thing::Symlink(to)) => std::os::unix::fs::symlink(to, &path).unwrap(),
            }
            made.entry(*node).or_insert(path);
        }
        // A file without a name has no number.
        let number = |node: Option<Node>| {
            let path = node.and_then(|node| made.get(&node));
            path.map_or(u64::MAX, |path| std::fs::symlink_metadata(path).unwrap().ino())
        };
        for (node, thing) in state.values() {
            let Thing::File(bytes) = thing else { continue };
            let mut journal = Journal { bytes: bytes.clone(), at: 0 };
            if journal
                .renumber(&dirs[0], dirs, number(Some(*node)), |recorded, name| number(self.recorded(recorded, name)))
                .is_some()
            {
                std::fs::write(&made[node], journal.bytes).unwrap();
            }
        }
    }

    /// Creates the states that a cut at any place may leave, each once. If one place has more than `limit` states, a
    /// random sample is drawn. Calls `judge` with the expectation and counts its verdicts.
    pub(crate) fn replay(
        &self,
        limit: usize,
        mut judge: impl FnMut(&[PathBuf], bool) -> Result<(), String>,
    ) -> Verdicts {
        let seed = fastrand::u64(..);
        println!("seed {seed}");
        let mut random = fastrand::Rng::with_seed(seed);
        let mut seen = std::collections::HashSet::new();
        let mut verdicts = Verdicts::default();
        let scratch = super::campaign::scratch();
        for cut in 0..=self.effects.len() {
            let is_told = cut == self.effects.len();
            for (kept, contents) in self.choices(cut, limit, &mut random) {
                let state = self.state(cut, &kept, &contents);
                let key: Vec<_> =
                    state.iter().map(|(name, (node, thing))| (name.clone(), *node, thing.clone())).collect();
                if !seen.insert((key, is_told)) {
                    continue;
                }
                let place = tempfile::tempdir_in(scratch.path()).unwrap();
                let dirs: Vec<_> = self.dirs.iter().map(|dir| self.place(dir, place.path())).collect();
                dirs.iter().for_each(|dir| std::fs::create_dir_all(dir).unwrap());
                self.make(&state, &dirs);
                verdicts.states += 1;
                if let Err(violation) = judge(&dirs, is_told) {
                    let last = self.effects[..cut].last();
                    let lost: Vec<_> =
                        self.at_risk(cut).0.into_iter().filter(|position| !kept.contains(position)).collect();
                    let lost: Vec<_> = lost.iter().map(|&position| &self.effects[position]).collect();
                    verdicts
                        .violations
                        .push(format!("{violation}\n  after {last:?}\n  without {lost:?}, with {contents:?}"));
                }
            }
        }
        verdicts
    }

    /// Where the directory `dir` is, in relation to the others as it was.
    fn place(&self, dir: &Path, place: &Path) -> PathBuf {
        place.join(dir.strip_prefix(self.dirs[0].parent().unwrap()).unwrap())
    }

    /// What may have been kept at a cut.
    fn choices(
        &self,
        cut: usize,
        limit: usize,
        random: &mut fastrand::Rng,
    ) -> Vec<(BTreeSet<usize>, HashMap<Node, Share>)> {
        let (names, files) = self.at_risk(cut);
        let count = 1_usize.checked_shl(names.len().try_into().unwrap()).unwrap_or(usize::MAX);
        let all = files.iter().try_fold(count, |count, _| count.checked_mul(SHARES.len())).unwrap_or(usize::MAX);
        let mut pick = |number: usize, is_drawn: bool| {
            let mut rest = number;
            let kept = names.iter().enumerate().filter(
                |(bit, _)| {
                    if is_drawn { random.bool() } else { number >> bit & 1 == 1 }
                },
            );
            let kept = kept.map(|(_, position)| *position).collect();
            rest >>= if is_drawn { 0 } else { names.len() };
            let share = |node: &Node| {
                let share = if is_drawn { random.usize(..SHARES.len()) } else { rest % SHARES.len() };
                rest /= SHARES.len();
                (*node, SHARES[share])
            };
            (kept, files.iter().map(share).collect::<HashMap<_, _>>())
        };
        if all <= limit {
            return (0..all).map(|number| pick(number, false)).collect();
        }
        let mut choices: Vec<_> = (0..limit).map(|_| pick(0, true)).collect();
        // And the most revealing choices: a single change that was kept, or lost.
        let whole: HashMap<_, _> = files.iter().map(|node| (*node, Share::All)).collect();
        for &position in &names {
            choices.push((BTreeSet::from([position]), whole.clone()));
            choices.push((names.iter().copied().filter(|other| *other != position).collect(), whole.clone()));
        }
        choices
    }
}

/// The result of a replay.
#[derive(Debug, Default)]
pub(crate) struct Verdicts {
    pub(crate) states: usize,
    pub(crate) violations: Vec<String>,
}

/// A journal of version 2, read by code independent of the crate.
struct Journal {
    bytes: Vec<u8>,
    at: usize,
}

impl Journal {
    const MAGIC: &[u8] = b"afs-tx2\n";

    fn take(&mut self, length: usize) -> Option<&mut [u8]> {
        let taken = self.bytes.get_mut(self.at..self.at.checked_add(length)?)?;
        self.at += length;
        Some(taken)
    }

    fn number(&mut self) -> Option<usize> {
        let bytes = self.take(8)?.try_into().ok()?;
        usize::try_from(u64::from_le_bytes(bytes)).ok()
    }

    fn text(&mut self) -> Option<String> {
        let length = self.number()?;
        String::from_utf8(self.take(length)?.to_vec()).ok()
    }

    /// Overwrites a number, and the birth time that follows it, which is then unknown.
    fn put(&mut self, number: u64) -> Option<()> {
        self.take(8)?.copy_from_slice(&number.to_le_bytes());
        self.take(13)?.fill(0);
        Some(())
    }

    /// Makes it refer to other files: `own` for the journal itself, and the result of `number` for each name. `None` if
    /// it is incomplete, or not a journal.
    fn renumber(&mut self, home: &Path, dirs: &[PathBuf], own: u64, number: impl Fn(u64, &Name) -> u64) -> Option<()> {
        let body = self.bytes.len().checked_sub(4)?;
        let sum = u32::from_le_bytes(self.bytes[body..].try_into().ok()?);
        if !self.bytes.starts_with(Self::MAGIC) || crc32c::crc32c(&self.bytes[..body]) != sum {
            return None;
        }
        self.at = Self::MAGIC.len() + 8;
        self.put(own)?;
        // Written in the far future, so that no file seems to have been changed since.
        let mut later = [0; 13];
        later[0] = 1;
        later[1..9].copy_from_slice(&i64::MAX.to_le_bytes());
        self.take(13)?.copy_from_slice(&later);
        let home = home.canonicalize().ok()?;
        let dirs: Vec<_> = dirs.iter().map(|dir| dir.canonicalize()).collect::<Result<_, _>>().ok()?;
        let mut sites = Vec::new();
        for _ in 0..self.number()? {
            let way = home.join(self.text()?).canonicalize().ok()?;
            sites.push(dirs.iter().position(|dir| *dir == way)?);
        }
        for _ in 0..self.number()? {
            let carrier = (sites[self.number()?], self.text()?);
            self.text()?;
            let mut names = vec![carrier];
            for _ in 0..self.number()? {
                names.push((sites[self.number()?], self.text()?));
            }
            for name in &names {
                if self.take(1)?[0] == 1 {
                    let recorded = u64::try_from(self.number()?).ok()?;
                    self.at -= 8;
                    self.put(number(recorded, name))?;
                    self.take(8 + 13)?;
                }
            }
        }
        let sum = crc32c::crc32c(&self.bytes[..body]).to_le_bytes();
        self.bytes[body..].copy_from_slice(&sum);
        (self.at == body).then_some(())
    }
}

/// A transaction to replay: how it begins, and the content of each file before and after.
struct Scenario {
    name: &'static str,
    task: &'static str,
    dirs: &'static [&'static str],
    files: &'static [(&'static str, Option<&'static str>, Option<&'static str>)],
    /// How many calls of `renameat2` it makes; the first is not yet an exchange.
    renames: usize,
}

const SCENARIOS: [Scenario; 3] = [
    Scenario {
        name: "pair",
        task: "pair new new",
        dirs: &[""],
        files: &[("a", Some("old"), Some("new")), ("b", Some("old"), Some("new"))],
        renames: 3,
    },
    Scenario {
        name: "two directories",
        task: "two directories",
        dirs: &["a", "b"],
        files: &[("a/x", Some("old"), Some("new")), ("b/y", Some("old"), Some("new"))],
        renames: 3,
    },
    Scenario {
        name: "rotation",
        task: "rotate and swap",
        dirs: &["", "old"],
        files: &[
            ("log", Some("log"), Some("fresh")),
            ("log.1", Some("log.1"), Some("log")),
            ("old/log.2", None, Some("log.1")),
            ("blue", Some("blue"), Some("green")),
            ("green", Some("green"), Some("blue")),
            ("gone", Some("gone"), None),
        ],
        renames: 6,
    },
];

/// The expectation for a state.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Told {
    Nothing,
    Ok,
    Unchanged,
}

impl Scenario {
    /// Makes the directories with the old files in them; returns the journal's first.
    fn begin(&self, home: &Path) -> Vec<PathBuf> {
        let dirs: Vec<_> = self.dirs.iter().map(|dir| home.join(dir).components().collect()).collect();
        dirs.iter().for_each(|dir: &PathBuf| std::fs::create_dir_all(dir).unwrap());
        for (name, old, _) in self.files {
            if let Some(old) = old {
                std::fs::write(home.join(name), old).unwrap();
            }
        }
        dirs
    }

    /// Recovers the directory, and judges the files before and after.
    async fn verify(&self, journal: &Path, told: Told) -> Result<(), String> {
        let home = if self.dirs[0].is_empty() { journal } else { journal.parent().unwrap() };
        let before = self.look(home)?;
        let report =
            cancel_safe_atomic_fs::recover(journal).await.map_err(|error| format!("{before:?}, then {error}"))?;
        let after = self.look(home)?;
        let context = format!("{before:?}, then {after:?} by {report:?}");
        let is_wanted = match told {
            Told::Nothing => after == [true, false] || after == [false, true],
            Told::Ok => after == [false, true],
            Told::Unchanged => after == [true, false],
        };
        if !is_wanted {
            return Err(format!("a mix, or not what was told: {context}"));
        }
        // Each directory's own recovery handles removed names that came back after a cut.
        for dir in self.dirs {
            cancel_safe_atomic_fs::recover(home.join(dir)).await.map_err(|error| format!("{dir}: {error}"))?;
        }
        if self.look(home)? != after {
            return Err(format!("it was changed again: {context}"));
        }
        let left: Vec<_> = self.dirs.iter().flat_map(|dir| crate::support::temps(&home.join(dir))).collect();
        if left.is_empty() { Ok(()) } else { Err(format!("left {left:?}: {context}")) }
    }

    /// Whether any file is old, and whether any is new; an error if one is neither.
    fn look(&self, home: &Path) -> Result<[bool; 2], String> {
        let (mut any, mut wrong) = ([false; 2], Vec::new());
        for (name, old, new) in self.files {
            let found = std::fs::read_to_string(home.join(name)).ok();
            let is = [found.as_deref() == *old, found.as_deref() == *new];
            if !is[0] && !is[1] {
                wrong.push(format!("{name} is {found:?}"));
            }
            any = [any[0] || is[0], any[1] || is[1]];
        }
        if wrong.is_empty() { Ok(any) } else { Err(wrong.join(", ")) }
    }

    /// Replays a traced transaction on these files; `told` is the expectation if it ends.
    fn replay(&self, trace: &Trace, told: Told, limit: usize) -> Verdicts {
        let runtime = tokio::runtime::Handle::current();
        let verify = |dirs: &[PathBuf], is_told: bool| {
            let told = if is_told { told } else { Told::Nothing };
            tokio::task::block_in_place(|| runtime.block_on(self.verify(&dirs[0], told)))
        };
        trace.replay(limit, verify)
    }
}

/// The limit for scenarios of which every state is created, except for the few cuts that leave more states.
fn limit() -> usize {
    if super::campaign::is_full() { 100_000 } else { 300 }
}

fn close(name: &str, told: &[(String, Verdicts)]) {
    let states = told.iter().map(|(_, verdicts)| verdicts.states).sum();
    let violations: Vec<_> = told
        .iter()
        .flat_map(|(what, verdicts)| verdicts.violations.iter().map(move |violation| format!("{what}: {violation}")))
        .collect();
    cancel_safe_campaign::publish_campaign("atomic-fs", name, states, violations.len());
    let shown: Vec<_> = violations.iter().take(3).collect();
    assert!(violations.is_empty(), "{} violations: {shown:#?}", violations.len());
    assert!(states > 0, "nothing was replayed");
}

fn place() -> (tempfile::TempDir, PathBuf) {
    let scratch = super::campaign::scratch();
    let home = scratch.path().canonicalize().unwrap().join("home");
    (scratch, home)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn every_state_that_a_cut_in_a_transaction_may_leave_is_recovered() {
    if child::strace("replay/transaction").is_none() {
        return;
    }
    let mut all = Vec::new();
    for scenario in &SCENARIOS {
        let (_scratch, home) = place();
        let dirs = scenario.begin(&home);
        let trace = Trace::of(scenario.task, &home, &dirs, None, "Ok");
        all.push((scenario.name.to_owned(), scenario.replay(&trace, Told::Ok, limit())));
    }
    close("replay/transaction", &all);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn every_state_that_a_cut_in_a_failing_transaction_may_leave_is_recovered_to_all_old() {
    if child::strace("replay/failing-transaction").is_none() {
        return;
    }
    let mut all = Vec::new();
    for scenario in &SCENARIOS {
        // The first plain rename commits; before that the journal is prepared, and then the files are exchanged.
        let exchanges = (1..=scenario.renames).map(|number| format!("renameat2:error=EIO:when={number}"));
        for inject in exchanges.chain(["renameat:error=EIO:when=1".to_owned()]) {
            let (_scratch, home) = place();
            let dirs = scenario.begin(&home);
            let trace = Trace::of(scenario.task, &home, &dirs, Some(&inject), "Unchanged");
            let what = format!("{}, {inject}", scenario.name);
            all.push((what, scenario.replay(&trace, Told::Unchanged, limit())));
        }
    }
    close("replay/failing-transaction", &all);
}

/// A transaction that was killed, or failed and was killed while it was undone; then a cut in its recovery.
#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn every_state_that_a_cut_in_a_recovery_may_leave_is_recovered_by_the_next_one() {
    if child::strace("replay/recovery").is_none() {
        return;
    }
    let mut all = Vec::new();
    for scenario in &SCENARIOS {
        for rename in 1..=scenario.renames {
            for is_failing in [false, true] {
                let (_scratch, home) = place();
                let dirs = scenario.begin(&home);
                let kill = if is_failing {
                    // The third plain rename puts back what was committed; from there on exchanges undo.
                    format!(
                        "inject=renameat2:error=EIO:when={rename} inject=renameat2:signal=SIGKILL:when={}",
                        rename + 1
                    )
                } else {
                    format!("inject=renameat2:signal=SIGKILL:when={rename}")
                };
                let wrapper = ["strace", "-f", "-qq", "-o", "/dev/null"];
                let injects = kill.split(' ').flat_map(|inject| ["-e", inject]);
                let wrapper: Vec<_> = wrapper.into_iter().chain(injects).collect();
                let said = child::outcome(child::command(&wrapper, scenario.task, &home));
                if said.is_some() {
                    // There was nothing to undo.
                    continue;
                }
                let trace = Trace::of("recover", &dirs[0], &dirs, None, "Ok");
                all.push((format!("{}, {kill}", scenario.name), scenario.replay(&trace, Told::Nothing, limit())));
            }
        }
    }
    close("replay/recovery", &all);
}

/// Every kind of change, as in the campaigns: too many states to create all for each cut.
#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn states_that_a_cut_in_a_large_transaction_may_leave_are_recovered() {
    if child::strace("replay/everything").is_none() {
        return;
    }
    let mut all = Vec::new();
    for is_one in [true, false] {
        let (_scratch, home) = place();
        super::campaign::renew(&home, is_one);
        let dirs = if is_one { vec![home.clone()] } else { vec![home.clone(), home.join("sub")] };
        let trace = Trace::of("change all after others", &home, &dirs, None, "Ok");
        let runtime = tokio::runtime::Handle::current();
        let verify = |dirs: &[PathBuf], is_told: bool| {
            let verify = super::campaign::verify(&dirs[0], is_told.then_some("Ok"));
            tokio::task::block_in_place(|| runtime.block_on(verify))
        };
        let limit = if super::campaign::is_full() { 2000 } else { 30 };
        all.push((format!("in one directory: {is_one}"), trace.replay(limit, verify)));
    }
    close("replay/everything", &all);
}
