//! The usual file systems in production, each mounted for the test: overlayfs, a bind mount, tmpfs, ext4, xfs, btrfs.
//!
//! Each is mounted over a directory of the test, and unmounted however the test ends; a loop device goes with its last
//! mount. No test here has its own mount namespace, tidy as that would be: a copy of all mounts would keep the disks of
//! other tests alive, which those tests unmount to cut their power.

use std::collections::BTreeMap;
use std::fs::File;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use cancel_safe_atomic_fs::{self as atomic_fs, AtomicFileWriter, MultiFileTransaction, TargetState};
use tempfile::tempdir;

use crate::child;
use crate::random;
use crate::support::{not_run, temps};

/// The files of a scene, which are in the lower layer of an overlay; each contains its name.
const OLD: [&str; 9] = ["one/a", "one/b", "one/c", "one/secret", "one/twin", "two/a", "two/b", "two/gone", "two/twin"];
/// What a transaction does there: it writes two files anew and one more, removes one, moves one to another directory and
/// one over another, and lets two change places.
const CHANGES: &str = "- put:one/a:new write:two/twin:new put:two/new:new remove:two/gone: rename:one/b:two/moved \
                       rename:one/twin:one/c rename:two/a:two/b rename:two/b:two/a";
/// The files afterwards.
const NEW: [(&str, &str); 8] = [
    ("one/a", "new"),
    ("one/c", "one/twin"),
    ("one/secret", "one/secret"),
    ("two/a", "two/b"),
    ("two/b", "two/a"),
    ("two/moved", "one/b"),
    ("two/new", "new"),
    ("two/twin", "new"),
];

#[tokio::test]
async fn all_holds_on_overlayfs() {
    hold_on(Kind::Overlay).await;
}

#[tokio::test]
async fn all_holds_on_overlayfs_whose_layers_are_on_two_file_systems() {
    hold_on(Kind::OverlayOfTwo).await;
}

#[tokio::test]
async fn all_holds_in_a_bind_mount() {
    hold_on(Kind::Bind).await;
}

#[tokio::test]
async fn all_holds_on_tmpfs() {
    hold_on(Kind::Tmpfs).await;
}

#[tokio::test]
async fn all_holds_on_ext4() {
    hold_on(Kind::Ext4).await;
}

#[tokio::test]
async fn all_holds_on_xfs() {
    hold_on(Kind::Xfs).await;
}

#[tokio::test]
async fn all_holds_on_btrfs() {
    hold_on(Kind::Btrfs).await;
}

/// As on file systems without either way to rename: files are exchanged by links.
#[tokio::test]
async fn all_holds_where_files_cannot_be_exchanged() {
    if child::strace("faults and kills where files cannot be exchanged").is_none() {
        return;
    }
    let scratch = crate::campaign::scratch();
    let by_links = "renameat2:error=EINVAL";
    for call in ["linkat", "renameat", "unlinkat"] {
        let faults = [("signal=SIGKILL", "here"), ("signal=SIGKILL", "by links"), ("error=EIO", "here")];
        // A removal that fails is for the clean-up alone.
        let faults = &faults[..if call == "unlinkat" { 1 } else { 3 }];
        let mut number = 0;
        let mut is_over = false;
        while !is_over {
            number += 1;
            for (fault, recovery) in faults {
                let when = format!("{call} {number} {fault}, recovered {recovery}");
                let scene = scratch.path().join(&when);
                set(&scene);
                let inject = [by_links.to_owned(), format!("{call}:{fault}:when={number}")];
                let said = child::outcome(tampered(&inject, &random_task(), &scene));
                match said.as_deref() {
                    None if *recovery == "by links" => {
                        let said = child::outcome(tampered(&inject[..1], "recover", &scene.join("one")));
                        assert_eq!(said.as_deref(), Some("Ok"), "{when}");
                    }
                    None => {}
                    Some("Ok") => {
                        is_over |= *fault == "signal=SIGKILL";
                        assert_eq!(files(&scene), new(), "{when}");
                    }
                    Some(said) if said.starts_with("Unchanged") => assert_eq!(files(&scene), old(), "{when}: {said}"),
                    Some(said) => assert!(said.starts_with("Undecided"), "{when}: {said}"),
                }
                recover(&scene, &when).await;
            }
        }
        assert!(number > 6, "{call}: {number}");
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Overlay,
    OverlayOfTwo,
    Bind,
    Tmpfs,
    Ext4,
    Xfs,
    Btrfs,
}

impl Kind {
    fn is_overlay(self) -> bool {
        matches!(self, Self::Overlay | Self::OverlayOfTwo)
    }

    /// How it is made on an image, and the minimal size of the image, which is sparse.
    fn make(self) -> Option<(&'static [&'static str], u64)> {
        match self {
            Self::Ext4 => Some((&["mkfs.ext4", "-q", "-F"], 64 << 20)),
            Self::Xfs => Some((&["mkfs.xfs", "-q", "-f"], 320 << 20)),
            Self::Btrfs => Some((&["mkfs.btrfs", "-q", "-f"], 128 << 20)),
            Self::Overlay | Self::OverlayOfTwo | Self::Bind | Self::Tmpfs => None,
        }
    }
}

async fn hold_on(kind: Kind) {
    let what = format!("mounts/{kind:?}");
    if child::strace(&what).is_none() {
        return;
    }
    let scratch = tempdir().unwrap();
    let mut ground = match Ground::new(kind, scratch.path()) {
        Ok(ground) => ground,
        Err(why) => return not_run(&what, &why),
    };
    single_files(&ground.scene("single")).await;
    streams(&ground.scene("stream")).await;
    transactions(&ground.scene("transaction")).await;
    locks(&ground.scene("lock")).await;
    failures(&ground.scene("failure"));
    of_others(&ground.scene("others"), kind.is_overlay());
    sweeps(&ground.scene("sweep")).await;
    crashes(&mut ground).await;
    match kind {
        Kind::Bind => beside_a_bind_mount(&ground).await,
        Kind::Overlay | Kind::OverlayOfTwo => ground.lower_is_as_it_was(),
        _ => {}
    }
}

/// Where a file system is mounted.
struct Ground {
    kind: Kind,
    scratch: PathBuf,
    point: PathBuf,
    /// How often it was mounted.
    mounts: usize,
    /// Keeps the previous device numbers from being reused.
    held: Vec<File>,
    /// The mounts, with the latest one last.
    mounted: Vec<PathBuf>,
}

impl Drop for Ground {
    fn drop(&mut self) {
        for point in self.mounted.iter().rev() {
            // Should somebody still be there, it goes when they do.
            let is_gone = ["-q", "-l"]
                .iter()
                .any(|how| Command::new("umount").arg(how).arg(point).status().is_ok_and(|status| status.success()));
            if !is_gone {
                println!("{point:?} stays mounted");
            }
        }
    }
}

/// The scenes; those of crashes are numbered.
const SCENES: [&str; 7] = ["single", "stream", "transaction", "lock", "failure", "others", "sweep"];
/// At which calls a transaction is killed, and how often at most.
const KILLS: [(&str, usize); 2] = [("renameat2", 24), ("unlinkat", 3)];

fn crash_scene(call: &str, number: usize) -> String {
    format!("crash-{call}-{number}")
}

impl Ground {
    /// The error says why it is not available here.
    fn new(kind: Kind, scratch: &Path) -> Result<Self, String> {
        if !rustix::process::geteuid().is_root() {
            return Err("it needs root".to_owned());
        }
        let scratch = scratch.canonicalize().unwrap();
        // Nobody comes here, too.
        std::fs::set_permissions(&scratch, PermissionsExt::from_mode(0o755)).unwrap();
        let (point, held, mounted) = (scratch.join("point"), Vec::new(), Vec::new());
        let mut ground = Self { kind, scratch, point, mounts: 0, held, mounted };
        std::fs::create_dir(&ground.point).unwrap();
        if let Some((make, size_bytes)) = kind.make() {
            let image = ground.image();
            File::create(&image).unwrap().set_len(size_bytes).unwrap();
            tool(Command::new(make[0]).args(&make[1..]).arg(image))?;
        }
        if kind.is_overlay() {
            // On tmpfs: the directory for temporary files may be on an overlay itself, where none can be made.
            for layer in ["upper", "lower"] {
                ground.mount_tmpfs(layer)?;
            }
            for dir in [ground.upper(), ground.scratch.join("upper/work"), ground.lower()] {
                std::fs::create_dir(dir).unwrap();
            }
            ground.set_all(&ground.lower());
        }
        ground.mount()?;
        if !kind.is_overlay() {
            ground.set_all(&ground.point);
        }
        Ok(ground)
    }

    fn set_all(&self, home: &Path) {
        let crashes = KILLS.iter().flat_map(|(call, most)| (1..=*most).map(|number| crash_scene(call, number)));
        SCENES.map(String::from).into_iter().chain(crashes).for_each(|name| set(&home.join(name)));
        set_others(&home.join("others"));
    }

    fn image(&self) -> PathBuf {
        self.scratch.join(format!("image{}", self.mounts))
    }

    fn upper(&self) -> PathBuf {
        self.scratch.join("upper/upper")
    }

    fn lower(&self) -> PathBuf {
        self.scratch.join(if self.kind == Kind::Overlay { "upper/lower" } else { "lower/lower" })
    }

    fn mount_tmpfs(&mut self, name: &str) -> Result<(), String> {
        let point = self.scratch.join(name);
        std::fs::create_dir(&point).unwrap();
        tool(Command::new("mount").args(["-t", "tmpfs", "tmpfs"]).arg(&point))?;
        self.mounted.push(point);
        Ok(())
    }

    fn mount(&mut self) -> Result<(), String> {
        let mut mount = Command::new("mount");
        match self.kind {
            Kind::Overlay | Kind::OverlayOfTwo => {
                let (lower, upper) = (self.lower(), self.upper());
                let work = upper.with_file_name("work");
                let layers =
                    format!("lowerdir={},upperdir={},workdir={}", lower.display(), upper.display(), work.display());
                mount.args(["-t", "overlay", "-o", &layers, "overlay"])
            }
            Kind::Bind => {
                let source = self.scratch.join("source");
                std::fs::create_dir_all(&source).unwrap();
                mount.arg("--bind").arg(source)
            }
            Kind::Tmpfs => mount.args(["-t", "tmpfs", "tmpfs"]),
            Kind::Ext4 => mount.args(["-t", "ext4", "-o", "loop"]).arg(self.image()),
            Kind::Xfs => mount.args(["-t", "xfs", "-o", "loop,nouuid"]).arg(self.image()),
            Kind::Btrfs => mount.args(["-t", "btrfs", "-o", "loop"]).arg(self.image()),
        };
        tool(mount.arg(&self.point))?;
        self.mounted.push(self.point.clone());
        Ok(())
    }

    fn device(&self) -> u64 {
        std::fs::metadata(&self.point).unwrap().dev()
    }

    /// Like a restarted machine: the device number changes.
    async fn mount_again(&mut self) {
        let before = self.device();
        loop {
            if self.kind.make().is_some() {
                // As long as it is open, the loop device is not given anew.
                let device = Command::new("findmnt").args(["-n", "-o", "SOURCE"]).arg(&self.point).output().unwrap();
                self.held.push(File::open(String::from_utf8(device.stdout).unwrap().trim()).unwrap());
            }
            // To be unmounted need not do that: in another mount namespace, which has a copy of all mounts, it may live on.
            rustix::fs::syncfs(File::open(&self.point).unwrap()).unwrap();
            // The blocking pool may still be closing files, and a child that is being started has a copy of each handle.
            let is_gone = || tool(Command::new("umount").arg(&self.point)).is_ok();
            crate::support::eventually("nobody uses the file system any more", is_gone).await;
            self.mounted.retain(|point| *point != self.point);
            let image = self.image();
            self.mounts += 1;
            assert!(self.mounts < 10, "the device number is always the same");
            if self.kind.make().is_some() {
                // One that is still held by a loop device would get that.
                tool(Command::new("cp").arg("--sparse=always").args([image, self.image()])).unwrap();
            }
            // Takes the number that the file system had, if that was none of a device.
            self.mount_tmpfs(&format!("occupied{}", self.mounts)).unwrap();
            self.mount().unwrap();
            if self.kind == Kind::Bind || self.device() != before {
                return;
            }
        }
    }

    fn scene(&self, name: &str) -> PathBuf {
        self.point.join(name)
    }

    /// Asserts that nothing has changed in the lower layer for its other readers.
    fn lower_is_as_it_was(&self) {
        for scene in std::fs::read_dir(self.lower()).unwrap() {
            let scene = scene.unwrap().path();
            assert_eq!(files(&scene), old(), "{scene:?}");
            assert_eq!(temps(&scene.join("one")), [""; 0]);
        }
    }
}

/// Runs a tool; the error is its output.
fn tool(command: &mut Command) -> Result<(), String> {
    let name = command.get_program().to_string_lossy().into_owned();
    match command.output() {
        Ok(output) if output.status.success() => Ok(()),
        Ok(output) => Err(format!("{name} failed: {}", String::from_utf8_lossy(&output.stderr).trim())),
        Err(error) => Err(format!("{name} cannot be run: {error}")),
    }
}

type Files = BTreeMap<String, String>;

/// Makes a scene.
fn set(scene: &Path) {
    for dir in ["one", "two"] {
        std::fs::create_dir_all(scene.join(dir)).unwrap();
    }
    for (number, name) in (0..).zip(OLD) {
        std::fs::write(scene.join(name), name).unwrap();
        // Or a copy of them could not be told apart: they would all have been made within one tick of the clock.
        let made = std::time::UNIX_EPOCH + Duration::from_secs(1_000_000_000 + number);
        File::options().write(true).open(scene.join(name)).unwrap().set_modified(made).unwrap();
    }
    std::fs::set_permissions(scene.join("one/secret"), PermissionsExt::from_mode(0o600)).unwrap();
    // As images of containers have them: one file under two names, which an overlay makes two.
    std::fs::hard_link(scene.join("one/twin"), scene.join("one/other")).unwrap();
}

/// Makes directories that belong to nobody, with files that belong to root.
fn set_others(scene: &Path) {
    for dir in ["theirs", "linked"] {
        std::fs::create_dir(scene.join(dir)).unwrap();
        std::os::unix::fs::chown(scene.join(dir), Some(65534), Some(65534)).unwrap();
        for name in ["f", "over", "replaced"] {
            std::fs::write(scene.join(dir).join(name), name).unwrap();
        }
    }
    std::fs::hard_link(scene.join("linked/f"), scene.join("linked/too")).unwrap();
}

fn old() -> Files {
    let other = ("one/other", "one/twin");
    OLD.map(|name| (name, name)).into_iter().chain([other]).map(|(name, file)| (name.into(), file.into())).collect()
}

fn new() -> Files {
    let other = ("one/other", "one/twin");
    NEW.into_iter().chain([other]).map(|(name, file)| (name.into(), file.into())).collect()
}

/// The visible files.
fn files(scene: &Path) -> Files {
    everything(scene).into_iter().filter(|(name, _)| !name.contains("/.")).collect()
}

/// All files, including hidden ones and links.
fn everything(scene: &Path) -> Files {
    let mut files = Files::new();
    for dir in ["one", "two"] {
        for entry in std::fs::read_dir(scene.join(dir)).unwrap().map(Result::unwrap) {
            let path = entry.path();
            let content = match path.read_link() {
                Ok(link) => link.into_os_string().into_string().unwrap(),
                Err(_) => String::from_utf8_lossy(&std::fs::read(&path).unwrap()).into_owned(),
            };
            files.insert(format!("{dir}/{}", entry.file_name().to_str().unwrap()), content);
        }
    }
    files
}

fn assert_clean(scene: &Path, when: &str) {
    for dir in ["one", "two"] {
        assert_eq!(temps(&scene.join(dir)), [""; 0], "{when}: in {dir}");
    }
}

async fn single_files(scene: &Path) {
    let at = |name: &str| scene.join(name);
    for name in ["one/created", "one/a", "one/secret", "one/twin"] {
        atomic_fs::write(at(name), "new").await.unwrap();
        assert_eq!(std::fs::read(at(name)).unwrap(), b"new");
    }
    assert_eq!(std::fs::metadata(at("one/secret")).unwrap().mode() & 0o7777, 0o600);
    assert_eq!(std::fs::read(at("one/other")).unwrap(), b"one/twin");
    let path = at("two/fresh");
    let writers: Vec<_> = (0..8)
        .map(|number| {
            let path = path.clone();
            let options = AtomicFileWriter::options().create_new(true);
            tokio::spawn(async move { options.write(path, number.to_string()).await })
        })
        .collect();
    let mut winners = Vec::new();
    for (number, writer) in writers.into_iter().enumerate() {
        match writer.await.unwrap() {
            Ok(()) => winners.push(number.to_string()),
            Err(error) => assert!(error.is_already_exists() && error.target() == TargetState::Unchanged, "{error}"),
        }
    }
    assert_eq!(winners, [std::fs::read_to_string(&path).unwrap()]);
    let taken = AtomicFileWriter::options().create_new(true).write(at("two/a"), "new").await.unwrap_err();
    assert!(taken.is_already_exists(), "{taken}");
    assert_clean(scene, "single files");
}

async fn streams(scene: &Path) {
    let path = scene.join("one/a");
    let content = vec![b'N'; child::STREAM_BYTES];
    let mut writer = AtomicFileWriter::new(&path).await.unwrap();
    writer.write_all(&content).await.unwrap();
    assert_eq!((std::fs::read(&path).unwrap(), temps(&scene.join("one")).len()), (b"one/a".to_vec(), 1));
    drop(writer);
    crate::support::eventually("a dropped writer's file goes", || temps(&scene.join("one")).is_empty()).await;
    let mut writer = AtomicFileWriter::new(&path).await.unwrap();
    for piece in content.chunks(100_000) {
        writer.write_all(piece).await.unwrap();
    }
    writer.commit().await.unwrap();
    assert!(std::fs::read(&path).unwrap() == content);
    assert_clean(scene, "streams");
}

async fn transactions(scene: &Path) {
    random::run(scene, CHANGES).await.unwrap();
    assert_eq!(files(scene), new());
    assert_clean(scene, "a transaction");
    let mut tx = MultiFileTransaction::new();
    tx.add_files([(scene.join("one/a"), "newer"), (scene.join("two/b"), "newer")]).await.unwrap();
    drop(tx);
    crate::support::eventually("a dropped transaction's files go", || {
        ["one", "two"].iter().all(|dir| temps(&scene.join(dir)).is_empty())
    })
    .await;
    assert_eq!(files(scene), new());
}

async fn locks(scene: &Path) {
    let lock = atomic_fs::read_lock(scene.join("two")).await.unwrap();
    let more = atomic_fs::read_lock(scene.join("two")).await.unwrap();
    let change = async |patience: Duration| {
        let mut tx = MultiFileTransaction::new().patience(patience);
        tx.add_files([(scene.join("one/a"), "new"), (scene.join("two/a"), "new")]).await.unwrap();
        tx.commit().await
    };
    let short = Duration::from_millis(30);
    let error = change(short).await.unwrap_err();
    assert!(error.is_busy() && error.target() == TargetState::Unchanged, "{error}");
    drop((lock, more));
    // Now the directory is one of the upper layer.
    let lock = atomic_fs::read_lock(scene.join("one")).await.unwrap();
    assert!(change(short).await.unwrap_err().is_busy());
    assert_eq!(files(scene), old());
    drop(lock);
    // A child that another test is starting may have a copy of the lock for a moment.
    change(Duration::from_secs(30)).await.unwrap();
    assert_clean(scene, "locks");
}

/// A failing step: the previous steps are undone, and that is reported.
fn failures(scene: &Path) {
    // The first one renames the journal.
    for number in 1.. {
        let said = child::outcome(traced("renameat2", "error=EIO", number, &random_task(), scene)).unwrap();
        if said == "Ok" {
            assert!(number > 5, "{number}");
            break;
        }
        assert!(said.starts_with("Unchanged"), "{number}: {said}");
        assert_eq!(files(scene), old(), "{number}");
        assert_clean(scene, &format!("a failure at {number}"));
    }
    assert_eq!(files(scene), new());
    assert_clean(scene, "no failure");
}

/// A user who may rename another user's file but not link it gets a true report of whether the file was renamed.
fn of_others(scene: &Path, is_overlay: bool) {
    let task = "rename as nobody";
    let content = |dir: &str| {
        let read = |name: &String| std::fs::read_to_string(scene.join(dir).join(name)).unwrap();
        let names = crate::support::names(&scene.join(dir));
        names.iter().map(|name| (name.clone(), read(name))).collect::<Vec<_>>()
    };
    let pair = |(name, file): (&str, &str)| (name.to_owned(), file.to_owned());
    let old = [("f", "f"), ("over", "over"), ("replaced", "replaced")].map(pair);
    for number in 2.. {
        let said = child::outcome(traced("renameat2", "error=EIO", number, task, &scene.join("theirs"))).unwrap();
        if said == "Ok" {
            assert!(number > 3, "{number}");
            break;
        }
        assert!(said.starts_with("Unchanged"), "{number}: {said}");
        assert_eq!(content("theirs"), old, "{number}");
    }
    assert_eq!(content("theirs"), [("g", "f"), ("replaced", "over")].map(pair));
    // On an overlay nobody could know again what has several names, and may not be linked.
    let said = child::outcome(child::command(&[], task, &scene.join("linked"))).unwrap();
    let is_restricted = std::fs::read("/proc/sys/fs/protected_hardlinks").is_ok_and(|value| value.starts_with(b"1"));
    if is_overlay && is_restricted {
        assert!(said.starts_with("Unchanged PermissionDenied"), "{said}");
        assert_eq!(content("linked").len(), 4);
    } else {
        assert_eq!(said, "Ok");
    }
}

fn random_task() -> String {
    format!("{}{CHANGES}", random::TASK)
}

fn traced(call: &str, fault: &str, number: usize, task: &str, path: &Path) -> Command {
    tampered(&[format!("{call}:{fault}:when={number}")], task, path)
}

fn tampered(inject: &[String], task: &str, path: &Path) -> Command {
    let inject: Vec<_> = inject.iter().map(|inject| format!("inject={inject}")).collect();
    let inject = inject.iter().flat_map(|inject| ["-e", inject]);
    let wrapper: Vec<_> = ["strace", "-f", "-qq", "-o", "/dev/null"].into_iter().chain(inject).collect();
    child::command(&wrapper, task, path)
}

async fn sweeps(scene: &Path) {
    let path = scene.join("one/a");
    let mut child = child::command(&[], "hold", &path).spawn().unwrap();
    child::await_word(&mut child, "holding");
    let report = atomic_fs::sweep(scene.join("one")).await.unwrap();
    assert_eq!((report.removed, report.live, report.failed), (0, 1, 0));
    child.kill().unwrap();
    child.wait().unwrap();
    let report = atomic_fs::sweep(scene.join("one")).await.unwrap();
    assert_eq!((report.removed, report.live, report.failed), (1, 0, 0));
    assert_eq!(files(scene), old());
    assert_clean(scene, "a sweep");
}

/// Kills the transaction at each of its calls. A copy of what that leaves recovers, and leaves the original alone; half of
/// the originals recover at once, the others when the file system is mounted again.
async fn crashes(ground: &mut Ground) {
    let mut killed = Vec::new();
    for (call, most) in KILLS {
        for number in 1..=most {
            let name = crash_scene(call, number);
            let said = child::outcome(traced(call, "signal=SIGKILL", number, &random_task(), &ground.scene(&name)));
            match said.as_deref() {
                None => killed.push(name),
                Some("Ok") => break,
                Some(other) => panic!("{name}: {other}"),
            }
            assert!(call == "unlinkat" || number < most, "{call} is made more often");
        }
    }
    for (number, name) in killed.iter().enumerate() {
        let (scene, copy) = (ground.scene(name), ground.scene(&format!("copy-{name}")));
        let before = everything(&scene);
        tool(Command::new("cp").arg("-a").args([&scene, &copy])).unwrap();
        recover(&copy, name).await;
        if number == 0 {
            // What was only staged; the copy of one directory stands beside the original of the other.
            let alone = scene.join("alone");
            tool(Command::new("cp").arg("-a").args([&scene.join("one"), &alone])).unwrap();
            assert!(atomic_fs::recover(&alone).await.unwrap().removed > 0);
            assert_eq!(temps(&alone), [""; 0]);
        }
        assert_eq!(everything(&scene), before, "{name}: the original has been touched");
        if number % 2 == 1 {
            recover(&scene, name).await;
        }
    }
    let is_durable = ground.kind != Kind::Tmpfs;
    if is_durable {
        ground.mount_again().await;
    }
    for (number, name) in killed.iter().enumerate() {
        let scene = ground.scene(name);
        if number % 2 == 0 {
            recover(&scene, &format!("{name}, mounted again")).await;
        } else {
            assert_clean(&scene, name);
        }
    }
    assert!(killed.len() > 10, "{killed:?}");
}

/// Recovers from the journal's directory; afterwards all files are old, or all are new.
async fn recover(scene: &Path, when: &str) {
    let before = everything(scene);
    let report = atomic_fs::recover(scene.join("one")).await;
    let report = report.unwrap_or_else(|error| panic!("{when}: {error}\n{before:#?}"));
    let after = files(scene);
    let is_new = after == new();
    assert!(is_new || after == old(), "{when}: {report:?}\n{before:#?}\n{after:#?}");
    assert_clean(scene, when);
    assert!(report.rolled_forward == 0 || is_new, "{when}: {report:?}");
    assert!(report.rolled_back == 0 || !is_new, "{when}: {report:?}");
}

/// One file system, but nothing can be renamed from one mount to the other.
async fn beside_a_bind_mount(ground: &Ground) {
    let (inside, outside) = (ground.scene("bind"), ground.scratch.join("outside"));
    set(&inside);
    set(&outside);
    let mut tx = MultiFileTransaction::new();
    tx.add_file(inside.join("one/a"), "new").await.unwrap();
    tx.add_file(outside.join("one/a"), "new").await.unwrap();
    tx.rename(inside.join("one/b"), inside.join("two/b")).unwrap();
    tx.commit().await.unwrap();
    for scene in [&inside, &outside] {
        assert_eq!(std::fs::read(scene.join("one/a")).unwrap(), b"new");
        assert_clean(scene, "over two mounts");
    }
    let before = [&inside, &outside].map(|scene| files(scene));
    for to in ["two/a", "two/free"] {
        let mut tx = MultiFileTransaction::new();
        tx.add_file(outside.join("one/a"), "newer").await.unwrap();
        tx.rename(inside.join("one/c"), outside.join(to)).unwrap();
        let error = tx.commit().await.unwrap_err();
        assert!(error.is_not_replaceable() && error.target() == TargetState::Unchanged, "{error}");
        assert_eq!([&inside, &outside].map(|scene| files(scene)), before, "{to}");
        assert_clean(&outside, to);
        assert_clean(&inside, to);
    }
    // The same directory by its other path.
    let source = ground.scratch.join("source/bind/one");
    let mut tx = MultiFileTransaction::new();
    tx.add_file(inside.join("one/a"), "last").await.unwrap();
    assert!(tx.add_file(source.join("a"), "last").await.unwrap_err().is_repeated_target());
    tx.add_file(source.join("c"), "last").await.unwrap();
    tx.commit().await.unwrap();
    assert_eq!(std::fs::read(inside.join("one/c")).unwrap(), b"last");
    assert_clean(&inside, "by two paths");
}
