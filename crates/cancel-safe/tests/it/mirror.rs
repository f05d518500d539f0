//! The main job from outside: the disk, the catalogue and the exit code after everything that can happen.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use cancel_safe_campaign::{publish_campaign, publish_not_run};
use hyper::StatusCode;
use sha2::{Digest, Sha256};
use sqlx::{ConnectOptions, Connection};
use tempfile::TempDir;

use super::origin::Server;

/// A source directory behind a server, its manifest, and a target directory.
struct Scene {
    dir: TempDir,
    server: Server,
}

impl Scene {
    /// `count` files of 0 to 40 KiB in a few directories, some of them with difficult names.
    fn new(count: usize) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let source = dir.path().join("source");
        let mut random = fastrand::Rng::with_seed(count as u64);
        for number in 0..count {
            let name = match number % 5 {
                0 => format!("top {number}.bin"),
                1 => format!("a/b/c/{number}"),
                2 => format!("naïve/{number}.txt"),
                3 => format!("a/{number}~"),
                _ => format!("x.y/{number}.tar.gz"),
            };
            let mut content = vec![0; if number == 0 { 0 } else { random.usize(..40_960) }];
            random.fill(&mut content);
            let path = source.join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, content).unwrap();
        }
        // The server's directory has the names as they are in a URL.
        let served = dir.path().join("served");
        fs::create_dir_all(&served).unwrap();
        let mut manifest = String::new();
        let server = Server::over(&served);
        for (name, content) in tree(&source) {
            let url = url::Url::parse(&format!("{}/{name}", server.base)).unwrap();
            let path = served.join(&url.path()[1..]);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, content).unwrap();
            manifest += &format!("{url}\r\n");
        }
        fs::write(dir.path().join("urls.txt"), manifest).unwrap();
        Self { dir, server }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn out(&self) -> PathBuf {
        self.path("out")
    }

    /// The paths as they are in a URL.
    fn served(&self) -> Vec<String> {
        tree(&self.path("served")).into_keys().map(|name| format!("/{name}")).collect()
    }

    fn command(&self, options: &[&str]) -> Command {
        // This binary is in target/<profile>/deps, examples are in target/<profile>/examples.
        let binary = std::env::current_exe().unwrap().parent().unwrap().parent().unwrap().join("examples/mirror");
        let mut command = Command::new(binary);
        command.arg("--manifest").arg(self.path("urls.txt")).arg("--out").arg(self.out()).args(options);
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        command
    }

    fn start(&self, options: &[&str]) -> Child {
        self.command(options).spawn().expect("the example `mirror` is built by `cargo test`")
    }

    #[track_caller]
    fn run(&self, options: &[&str], code: i32) -> String {
        expect(self.start(options).wait_with_output().unwrap(), code)
    }

    /// Asserts that the mirror is the source, byte for byte, and that the catalogue equals the disk.
    #[track_caller]
    fn assert_complete(&self) {
        let authority = self.server.base.strip_prefix("http://").unwrap();
        let found = tree(&self.out().join("files").join(authority));
        let wanted = tree(&self.path("source"));
        assert!(found == wanted, "not the source: {:?} for {:?}", found.keys(), wanted.keys());
        self.assert_consistent();
    }

    /// Asserts that each row has its file, each file its row, and that nothing else is there.
    #[track_caller]
    fn assert_consistent(&self) {
        let disk: BTreeMap<String, String> =
            tree(&self.out().join("files")).into_iter().map(|(path, content)| (path, hex(&content))).collect();
        assert_eq!(catalogue(&self.out()), disk);
        for name in fs::read_dir(self.out()).unwrap() {
            let name = name.unwrap().file_name().into_string().unwrap();
            assert!(name == "files" || name.starts_with("catalog.db") || name.starts_with("mirror."), "litter: {name}");
        }
    }
}

#[track_caller]
fn expect(output: Output, code: i32) -> String {
    let text = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(code), "{text}");
    text
}

/// Every file below a directory by its relative path.
fn tree(root: &Path) -> BTreeMap<String, Vec<u8>> {
    let name = |path: &Path| path.strip_prefix(root).unwrap().to_str().unwrap().to_owned();
    files_below(root).into_iter().map(|path| (name(&path), fs::read(path).unwrap())).collect()
}

/// Every file below a directory, and some of those that come and go meanwhile.
fn files_below(root: &Path) -> Vec<PathBuf> {
    let (mut found, mut directories) = (Vec::new(), vec![root.to_owned()]);
    while let Some(directory) = directories.pop() {
        for entry in fs::read_dir(&directory).into_iter().flatten() {
            let path = entry.unwrap().path();
            if path.is_dir() { directories.push(path) } else { found.push(path) }
        }
    }
    found
}

fn hex(content: &[u8]) -> String {
    Sha256::digest(content).iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Path and digest of every row.
fn catalogue(out: &Path) -> BTreeMap<String, String> {
    let options = sqlx::sqlite::SqliteConnectOptions::new().filename(out.join("catalog.db"));
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let mut connection = options.connect().await.unwrap();
        let rows: Vec<(String, String)> =
            sqlx::query_as("SELECT path, sha256 FROM files").fetch_all(&mut connection).await.unwrap();
        connection.close().await.unwrap();
        rows.into_iter().collect()
    })
}

/// Waits until `condition` holds; a minute is far more than needed.
#[track_caller]
fn wait_for(what: &str, mut condition: impl FnMut() -> bool) {
    let started = Instant::now();
    while !condition() {
        assert!(started.elapsed() < Duration::from_secs(60), "waited in vain for {what}");
        std::thread::park_timeout(Duration::from_millis(2));
    }
}

fn signal(child: &Child, name: &str) {
    let killed = Command::new("sh").args(["-c", &format!("kill -{name} {}", child.id())]).output().unwrap();
    assert!(killed.status.success());
}

#[test]
fn an_ordinary_directory_is_mirrored_byte_for_byte_and_a_second_run_has_nothing_to_do() {
    let scene = Scene::new(60);
    scene.run(&[], 0);
    scene.assert_complete();
    let asked = scene.server.requests();
    assert!(scene.run(&[], 0).contains("nothing to do"));
    assert_eq!(scene.server.requests(), asked);
}

/// Kills it at random moments, and lets it continue each time.
#[expect(clippy::print_stdout, reason = "the seed of a run that fails")]
fn killed_at_random_moments(options: &[&str], campaign: &str) {
    // `cargo xtask crash cancel-safe` asks for the whole campaign.
    let kills =
        if std::env::var_os("CANCEL_SAFE_CAMPAIGN").is_some_and(|campaign| campaign == "full") { 30 } else { 5 };
    const CONCURRENCY: usize = 8;
    let options = [&["--concurrency", "8"], options].concat();
    let scene = Scene::new(300);
    scene.server.state().pause = Duration::from_millis(4);
    let seed = fastrand::u64(..);
    println!("seed {seed}");
    let mut random = fastrand::Rng::with_seed(seed);
    for _ in 0..kills {
        let before = scene.server.requests();
        let mut child = scene.start(&options);
        let more = random.usize(1..60);
        wait_for("some requests", || scene.server.requests() >= before + more || child.try_wait().unwrap().is_some());
        let fine = Duration::from_micros(random.u64(..4000));
        std::thread::park_timeout(fine);
        child.kill().unwrap();
        child.wait().unwrap();
    }
    scene.run(&options, 0);
    scene.assert_complete();
    // The fetches in flight, and one batch of the catalogue, which holds no more than were in flight.
    let most = 300 + kills * 2 * CONCURRENCY;
    assert!(scene.server.requests() <= most, "{} requests for 300 files", scene.server.requests());
    publish_campaign("cancel-safe", campaign, kills, 0);
}

#[test]
fn killed_at_random_moments_it_goes_on_and_refetches_no_more_than_was_in_flight() {
    killed_at_random_moments(&[], "mirror/kills");
}

#[test]
fn killed_before_its_files_are_durable_it_reads_them_again_and_refetches_no_more_than_was_in_flight() {
    killed_at_random_moments(&["--durability", "end"], "mirror/late-kills");
}

#[test]
fn files_that_become_durable_at_the_end_have_no_row_before() {
    let scene = Scene::new(30);
    scene.server.state().hang.push(scene.served()[4].clone());
    let mut child = scene.start(&["--durability", "end"]);
    let files = scene.out().join("files");
    let is_there = |path: &PathBuf| !path.file_name().unwrap().to_str().unwrap().starts_with(".afs-");
    wait_for("all files but one", || files_below(&files).iter().filter(|path| is_there(path)).count() == 29);
    child.kill().unwrap();
    child.wait().unwrap();
    assert_eq!(catalogue(&scene.out()), BTreeMap::new());
    scene.server.state().hang.clear();
    // A power cut leaves only the name of a file that was not durable.
    let torn = tree(&files).into_iter().find(|(_, content)| !content.is_empty()).unwrap().0;
    fs::write(files.join(torn), "").unwrap();
    scene.run(&["--durability", "end"], 0);
    scene.assert_complete();
    assert_eq!(scene.server.requests(), 30 + 2, "the one that hung, and the one that was torn");
    // A replaced file is durable at once.
    fs::write(scene.path("served/a/b/c/1"), "new").unwrap();
    fs::write(scene.path("source/a/b/c/1"), "new").unwrap();
    scene.run(&["--durability", "end", "--refresh"], 0);
    scene.assert_complete();
}

#[test]
fn a_bad_manifest_names_its_lines_and_nothing_is_started() {
    let scene = Scene::new(2);
    fs::write(scene.path("urls.txt"), format!("{}/a\nftp://b/\n\nhttp://me:secret@c/\n", scene.server.base)).unwrap();
    let text = scene.run(&[], 64);
    assert!(text.contains("line 2") && text.contains("line 4") && !text.contains("secret"), "{text}");
    assert!(!scene.out().exists());
    assert_eq!(scene.server.requests(), 0);
}

#[test]
fn failures_are_listed_stored_and_tried_again_only_on_request() {
    let scene = Scene::new(20);
    let served = scene.served();
    let (gone, broken, flaky) = (&served[1], &served[2], &served[3]);
    scene.server.state().refuse.insert(gone.clone(), (StatusCode::NOT_FOUND, usize::MAX));
    scene.server.state().refuse.insert(broken.clone(), (StatusCode::INTERNAL_SERVER_ERROR, usize::MAX));
    scene.server.state().refuse.insert(flaky.clone(), (StatusCode::BAD_GATEWAY, 2));
    let text = scene.run(&["--retries", "2"], 2);
    assert!(text.contains(gone) && text.contains(broken) && !text.contains(flaky), "{text}");
    assert!(text.contains("404") && text.contains("status, 3 attempts"), "{text}");
    {
        let state = scene.server.state();
        assert_eq!((state.asked[gone], state.asked[broken]), (1, 3));
    }
    scene.assert_consistent();
    let asked = scene.server.requests();
    let again = scene.run(&[], 2);
    assert!(again.contains(gone) && again.contains(broken), "{again}");
    assert_eq!(scene.server.requests(), asked, "stored failures are not tried again");
    scene.server.state().refuse.clear();
    scene.run(&["--retry-failed"], 0);
    scene.assert_complete();
}

#[test]
fn a_corrupt_checkpoint_is_refused_untouched_with_the_command_that_helps() {
    let scene = Scene::new(30);
    scene.run(&[], 0);
    let checkpoint = scene.out().join("mirror.ckpt");
    let mut bytes = fs::read(&checkpoint).unwrap();
    bytes[10] ^= 0x40;
    fs::write(&checkpoint, &bytes).unwrap();
    let text = scene.run(&[], 65);
    assert!(text.contains("mv '") && text.contains("mirror.ckpt.corrupt'"), "{text}");
    assert_eq!(fs::read(&checkpoint).unwrap(), bytes);
    fs::rename(&checkpoint, scene.path("aside")).unwrap();
    let asked = scene.server.requests();
    scene.run(&[], 0);
    assert_eq!(scene.server.requests(), asked, "the catalogue knows what is complete");
}

#[test]
fn a_signal_lets_fetches_finish_and_the_next_run_goes_on() {
    let scene = Scene::new(80);
    // Two seconds for all of them, so that neither run has ended when its signal comes.
    scene.server.state().pause = Duration::from_millis(100);
    for (name, code) in [("TERM", 143), ("INT", 130)] {
        let before = scene.server.requests();
        let child = scene.start(&["--concurrency", "4"]);
        wait_for("the first requests", || scene.server.requests() >= before + 8);
        signal(&child, name);
        expect(child.wait_with_output().unwrap(), code);
        scene.assert_consistent();
    }
    scene.server.state().pause = Duration::ZERO;
    scene.run(&[], 0);
    scene.assert_complete();
    assert_eq!(scene.server.requests(), 80, "nothing that was in flight was cut");
}

#[test]
fn a_stop_while_urls_wait_is_not_taken_for_the_end() {
    let scene = Scene::new(12);
    let busy = scene.served()[3].clone();
    {
        let mut state = scene.server.state();
        state.refuse.insert(busy.clone(), (StatusCode::SERVICE_UNAVAILABLE, 1));
        state.retry_after = Some("3");
        state.pause = Duration::from_millis(700);
    }
    let child = scene.start(&[]);
    wait_for("all requests", || scene.server.requests() >= 12);
    // Now all have been requested, one of them waits in the queue, and the others are still in flight.
    signal(&child, "TERM");
    let text = expect(child.wait_with_output().unwrap(), 143);
    assert!(!text.contains("all files are there"), "{text}");
    scene.run(&[], 0);
    scene.assert_complete();
    assert_eq!(scene.server.requests(), 13);
}

#[test]
fn a_retry_after_is_waited_for_and_uses_up_nothing() {
    let scene = Scene::new(6);
    let busy = scene.served()[2].clone();
    {
        let mut state = scene.server.state();
        state.refuse.insert(busy.clone(), (StatusCode::TOO_MANY_REQUESTS, 2));
        state.retry_after = Some("1");
    }
    let started = Instant::now();
    scene.run(&["--retries", "0"], 0);
    assert!(started.elapsed() >= Duration::from_secs(2));
    assert_eq!(scene.server.state().asked[&busy], 3);
    scene.assert_complete();
}

#[test]
fn a_fetch_that_has_not_begun_is_neither_started_nor_cut_by_a_stop() {
    let scene = Scene::new(40);
    scene.server.state().pause = Duration::from_secs(1);
    let child = scene.start(&["--concurrency", "32", "--per-host", "2"]);
    wait_for("two requests", || scene.server.requests() >= 2);
    signal(&child, "TERM");
    let text = expect(child.wait_with_output().unwrap(), 143);
    assert!(!text.contains("cut"), "{text}");
    assert!(scene.server.requests() <= 6, "{} requests", scene.server.requests());
    scene.assert_consistent();
}

#[test]
fn standard_input_is_a_manifest_too_and_a_stop_does_not_wait_for_its_end() {
    let scene = Scene::new(8);
    let list = fs::File::open(scene.path("urls.txt")).unwrap();
    let output = scene.command(&["--manifest", "-"]).stdin(list).output().unwrap();
    expect(output, 0);
    scene.assert_complete();
    let child = scene.command(&["--manifest", "-"]).stdin(Stdio::piped()).spawn().unwrap();
    // It reads from a pipe that nobody closes. Its handlers are installed before its threads exist.
    let threads = format!("/proc/{}/task", child.id());
    wait_for("its threads", || fs::read_dir(&threads).is_ok_and(|threads| threads.count() > 3));
    let started = Instant::now();
    signal(&child, "TERM");
    // `wait_with_output` would close the pipe first.
    let mut child = child;
    let stdin = child.stdin.take();
    let output = child.wait_with_output().unwrap();
    drop(stdin);
    expect(output, 143);
    // A wait for the reader would have held it for the grace and the margin, 20 s.
    assert!(started.elapsed() < Duration::from_secs(18), "{:?}", started.elapsed());
}

#[test]
fn a_new_catalogue_over_old_files_is_refused_and_deletes_nothing() {
    let scene = Scene::new(10);
    scene.run(&[], 0);
    let before = tree(&scene.out().join("files"));
    let other = format!("sqlite:{}", scene.path("other.db").display());
    for _ in 0..2 {
        let text = scene.run(&["--database", &other], 64);
        assert!(text.contains("the catalogue is new"), "{text}");
        assert!(tree(&scene.out().join("files")) == before);
    }
    scene.run(&[], 0);
    scene.assert_complete();
}

#[test]
fn a_fetch_that_outlives_the_grace_is_cut_and_named() {
    let scene = Scene::new(20);
    let hung = scene.served()[4].clone();
    scene.server.state().hang.push(hung.clone());
    let child = scene.start(&["--grace", "300ms"]);
    wait_for("all requests", || scene.server.requests() >= 20);
    signal(&child, "TERM");
    let text = expect(child.wait_with_output().unwrap(), 70);
    assert!(text.contains(&hung), "{text}");
    scene.assert_consistent();
}

#[test]
fn a_second_signal_ends_it_at_once() {
    let scene = Scene::new(5);
    let hung = scene.served()[4].clone();
    scene.server.state().hang.push(hung);
    let child = scene.start(&["--grace", "5m"]);
    wait_for("all requests", || scene.server.requests() >= 5);
    signal(&child, "INT");
    // Signals within a second count as one stop: terminals and supervisors send several at once.
    std::thread::park_timeout(Duration::from_millis(1200));
    let second = Instant::now();
    signal(&child, "TERM");
    let output = child.wait_with_output().unwrap();
    assert!(matches!(output.status.code(), Some(130 | 143)), "{output:?}");
    // Its grace is five minutes.
    assert!(second.elapsed() < Duration::from_secs(20), "{:?}", second.elapsed());
}

#[test]
fn a_second_run_is_told_that_the_directory_is_held() {
    let scene = Scene::new(5);
    scene.server.state().hang = scene.served();
    let mut first = scene.start(&[]);
    wait_for("a request", || scene.server.requests() > 0);
    assert!(scene.run(&[], 75).contains("another run holds"));
    first.kill().unwrap();
    first.wait().unwrap();
}

#[test]
fn verify_finds_a_changed_file_and_refresh_asks_with_its_etag() {
    let scene = Scene::new(25);
    scene.run(&[], 0);
    let authority = scene.server.base.strip_prefix("http://").unwrap().to_owned();
    let victim = scene.out().join("files").join(authority).join("a/b/c/1");
    let mut content = fs::read(&victim).unwrap();
    content[0] ^= 1;
    fs::write(&victim, content).unwrap();
    assert!(scene.run(&[], 0).contains("nothing to do"), "the size alone does not tell");
    scene.run(&["--verify"], 0);
    scene.assert_complete();
    assert_eq!(scene.server.requests(), 26);
    let new = scene.path("served/a/b/c/6");
    fs::write(&new, "new").unwrap();
    fs::write(scene.path("source/a/b/c/6"), "new").unwrap();
    let text = scene.run(&["--refresh", "--json"], 0);
    assert_eq!(scene.server.requests(), 26 + 25);
    assert_eq!((text.matches("\"unchanged\"").count(), text.matches("\"fetched\"").count()), (24, 1), "{text}");
    scene.assert_complete();
}

#[test]
fn a_refresh_killed_at_random_moments_leaves_each_file_old_or_new_also_when_the_origin_is_gone() {
    let kills =
        if std::env::var_os("CANCEL_SAFE_CAMPAIGN").is_some_and(|campaign| campaign == "full") { 30 } else { 5 };
    let scene = Scene::new(40);
    scene.run(&[], 0);
    let seed = fastrand::u64(..);
    println!("seed {seed}");
    let mut random = fastrand::Rng::with_seed(seed);
    for round in 0..kills {
        let old = tree(&scene.out().join("files"));
        // The same size as before, so that only the digest differs.
        for name in tree(&scene.path("served")).keys() {
            let path = scene.path("served").join(name);
            let content: Vec<u8> = fs::read(&path).unwrap().iter().map(|byte| byte ^ (round as u8 % 250 + 1)).collect();
            fs::write(path, content).unwrap();
        }
        let before = scene.server.requests();
        let mut child = scene.start(&["--refresh", "--concurrency", "4"]);
        let more = random.usize(1..36);
        wait_for("some requests", || scene.server.requests() >= before + more || child.try_wait().unwrap().is_some());
        std::thread::park_timeout(Duration::from_micros(random.u64(..4000)));
        child.kill().unwrap();
        child.wait().unwrap();
        // The server no longer answers: the files on disk must be enough.
        for path in scene.served() {
            scene.server.state().refuse.insert(path, (StatusCode::NOT_FOUND, usize::MAX));
        }
        scene.run(&[], 0);
        scene.server.state().refuse.clear();
        scene.assert_consistent();
        let authority = scene.server.base.strip_prefix("http://").unwrap();
        for (path, content) in tree(&scene.out().join("files")) {
            let name = path.strip_prefix(authority).and_then(|path| path.strip_prefix('/')).unwrap();
            let url = url::Url::parse(&format!("{}/{name}", scene.server.base)).unwrap();
            let new = fs::read(scene.path("served").join(&url.path()[1..])).unwrap();
            assert!(content == new || old.get(&path) == Some(&content), "{path} is neither old nor new");
        }
        assert_eq!(tree(&scene.out().join("files")).len(), 40, "a file is gone");
    }
    publish_campaign("cancel-safe", "mirror/refresh-kills", kills, 0);
}

#[test]
fn rows_without_files_and_files_without_rows_are_mended() {
    let scene = Scene::new(12);
    scene.run(&[], 0);
    let files = scene.out().join("files").join(scene.server.base.strip_prefix("http://").unwrap());
    fs::remove_file(files.join("a/b/c/1")).unwrap();
    fs::write(files.join("a/b/c/6"), "of another size").unwrap();
    fs::write(files.join("stranger"), "not ours").unwrap();
    let text = scene.run(&[], 0);
    assert!(text.contains("2 file(s) were not as the catalogue says") && text.contains("not ours"), "{text}");
    fs::remove_file(files.join("stranger")).unwrap();
    scene.assert_complete();
}

#[test]
fn urls_that_left_the_manifest_are_told_and_their_files_kept() {
    let scene = Scene::new(12);
    scene.run(&[], 0);
    let manifest = fs::read_to_string(scene.path("urls.txt")).unwrap();
    fs::write(scene.path("urls.txt"), manifest.lines().skip(1).collect::<Vec<_>>().join("\n")).unwrap();
    assert!(scene.run(&[], 0).contains("1 URL(s) in the catalogue have left the manifest"));
    scene.assert_complete();
}

#[test]
fn a_file_whose_url_has_left_the_manifest_is_not_removed_when_somebody_edits_it() {
    let scene = Scene::new(2);
    scene.serve("notes", b"theirs");
    scene.run(&[], 0);
    let list = fs::read_to_string(scene.path("urls.txt")).unwrap();
    fs::write(scene.path("urls.txt"), list.replace(&format!("{}/notes\n", scene.server.base), "")).unwrap();
    let authority = scene.server.base.strip_prefix("http://").unwrap().to_owned();
    let own = scene.out().join("files").join(&authority).join("notes");
    fs::write(&own, "mine by now").unwrap();
    for _ in 0..2 {
        scene.run(&["--verify"], 0);
        assert_eq!(fs::read_to_string(&own).unwrap(), "mine by now");
    }
    assert!(!catalogue(&scene.out()).keys().any(|path| path.ends_with("/notes")));
}

#[test]
fn a_directory_in_the_place_of_a_file_is_the_failure_of_its_url_alone() {
    let scene = Scene::new(2);
    scene.serve("notes", b"theirs");
    scene.run(&[], 0);
    let authority = scene.server.base.strip_prefix("http://").unwrap().to_owned();
    let place = scene.out().join("files").join(&authority).join("notes");
    fs::remove_file(&place).unwrap();
    fs::create_dir(&place).unwrap();
    fs::write(place.join("mine"), "mine").unwrap();
    let text = scene.run(&[], 2);
    assert!(text.contains("/notes"), "{text}");
    assert_eq!(fs::read_to_string(place.join("mine")).unwrap(), "mine");
}

#[test]
fn a_file_that_becomes_a_directory_makes_room() {
    let scene = Scene::new(3);
    // The server has no file below `/plain`; an entry in the manifest is enough.
    fs::write(scene.path("served/plain"), "plain").unwrap();
    fs::write(scene.path("urls.txt"), format!("{0}/plain\n", scene.server.base)).unwrap();
    scene.run(&[], 0);
    fs::write(scene.path("urls.txt"), format!("{0}/plain\n{0}/plain/inner\n", scene.server.base)).unwrap();
    let text = scene.run(&[], 2);
    assert!(text.contains("/plain/inner"), "{text}");
    scene.assert_consistent();
    let paths = catalogue(&scene.out());
    assert_eq!(paths.len(), 1);
    assert!(paths.keys().all(|path| path.contains("/plain~")), "{paths:?}");
}

#[test]
fn an_unreachable_database_and_a_wrong_one_are_told_apart() {
    let scene = Scene::new(3);
    let text = scene.run(&["--database", "postgres://somebody:secret@127.0.0.1:1/none"], 69);
    assert!(!text.contains("secret"), "{text}");
    assert_eq!(scene.server.requests(), 0);
    scene.run(&[], 0);
    let other = Scene::new(3);
    let database = format!("sqlite:{}", scene.out().join("catalog.db").display());
    let text = other.run(&["--database", &database], 64);
    assert!(text.contains("another directory"), "{text}");
    scene.assert_complete();
}

#[test]
fn a_postgresql_catalogue_equals_the_disk() {
    let url = std::env::var("CANCEL_SAFE_TEST_POSTGRES_URL").expect(
        "CANCEL_SAFE_TEST_POSTGRES_URL names a PostgreSQL for tests; `cargo xtask test cancel-safe` starts one",
    );
    let schema = format!("mirror_{:016x}", fastrand::u64(..));
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let options: sqlx::postgres::PgConnectOptions = url.parse().unwrap();
    let sql = |text: String| {
        runtime.block_on(async {
            let mut connection = options.connect().await.unwrap();
            sqlx::raw_sql(sqlx::AssertSqlSafe(text)).execute(&mut connection).await.unwrap();
            connection.close().await.unwrap();
        })
    };
    sql(format!("CREATE SCHEMA {schema}"));
    let scene = Scene::new(40);
    let mut database = url::Url::parse(&url).unwrap();
    database.query_pairs_mut().append_pair("options[search_path]", &schema);
    let database = String::from(database);
    scene.run(&["--database", &database], 0);
    let rows: Vec<(String, String)> = runtime.block_on(async {
        let mut connection = options.connect().await.unwrap();
        let select = sqlx::AssertSqlSafe(format!("SELECT path, sha256 FROM {schema}.files"));
        sqlx::query_as(select).fetch_all(&mut connection).await.unwrap()
    });
    let disk: BTreeMap<String, String> =
        tree(&scene.out().join("files")).into_iter().map(|(path, content)| (path, hex(&content))).collect();
    assert_eq!(rows.into_iter().collect::<BTreeMap<_, _>>(), disk);
    assert!(scene.run(&["--database", &database], 0).contains("nothing to do"));
    sql(format!("DROP SCHEMA {schema} CASCADE"));
}

#[test]
fn bad_usage_is_64() {
    let scene = Scene::new(1);
    for options in
        [&["--concurrency", "0"][..], &["--timeout", "5 parsecs"], &["--database", "oracle:x"], &["--nonsense"]]
    {
        scene.run(options, 64);
    }
    assert!(!scene.out().exists());
}

#[test]
fn a_refused_option_is_named_and_its_secret_is_not() {
    let scene = Scene::new(1);
    for (options, name) in [
        (&["--header", "Authorization Bearer hunter2"][..], "--header"),
        (&["--header", "Hunter2 s: value"], "--header"),
        (&["--header", "X-Token: hunter2\u{1}"], "--header"),
        (&["--header=If-Range: hunter2"], "--header"),
        (&["--header", "X-Token:", "hunter2"], "--manifest"),
        (&["--database", "oracle://me:hunter2@host/"], "--database"),
        (&["--database", "//me:hunter2@host/"], "--database"),
        (&["--database", "postgres://me:hunter2@host:99999/"], "database"),
        (&["--database", "postgres://me:hunter2@[host/"], "database"),
        (&["http://me:hunter2@host/"], "--manifest"),
        (&["--headers=X-Token: hunter2"], "--headers"),
        (&["-HX-Token: hunter2"], "-H"),
    ] {
        let text = scene.run(options, 64);
        assert!(text.contains(name) && !text.to_lowercase().contains("hunter2"), "{options:?}: {text}");
    }
    // It is checked before anything else, except for the parts that only the driver understands.
    assert_eq!(scene.server.requests(), 0);
}

/// Runs with a log of every sync of the process, if strace is available: one line for each, with its file.
fn synced(scene: &Scene, options: &[&str], code: i32) -> Option<Vec<String>> {
    traced(scene, options, "fsync,fdatasync", code)
}

/// The same with these calls.
fn traced(scene: &Scene, options: &[&str], calls: &str, code: i32) -> Option<Vec<String>> {
    let log = scene.path("syncs");
    let command = scene.command(options);
    let mut traced = Command::new("strace");
    traced.args(["-f", "-qq", "-y", "-e", &format!("trace={calls}"), "-o"]).arg(&log);
    let output = traced.arg(command.get_program()).args(command.get_args()).output().ok()?;
    expect(output, code);
    Some(fs::read_to_string(log).ok()?.lines().map(str::to_owned).collect())
}

#[test]
fn what_is_adopted_is_durable_before_its_row_is() {
    let scene = Scene::new(3);
    scene.run(&[], 0);
    for from_server in [false, true] {
        for name in ["catalog.db", "catalog.db-wal", "catalog.db-shm"] {
            let _absent = fs::remove_file(scene.out().join(name));
        }
        if from_server {
            fs::remove_file(scene.out().join("mirror.ckpt")).unwrap();
        }
        let Some(syncs) = synced(&scene, &["--adopt"], 0) else {
            return publish_not_run("cancel-safe", "mirror/adopt-syncs", "strace cannot trace here");
        };
        let last = |end: &str| syncs.iter().rposition(|line| line.contains(end));
        let row = last("/catalog.db-wal>").unwrap();
        // Other names are escaped in the log.
        for path in tree(&scene.out().join("files")).keys().filter(|path| path.is_ascii()) {
            let (directory, _) = path.rsplit_once('/').unwrap();
            for end in [format!("/{path}>"), format!("/{directory}>")] {
                assert!(last(&end).is_some_and(|sync| sync < row), "{end}: {syncs:#?}");
            }
        }
    }
}

/// Where the first line is that has all of these.
#[track_caller]
fn line_with(log: &[String], parts: &[&str]) -> usize {
    let found = log.iter().position(|line| parts.iter().all(|part| line.contains(part)));
    found.unwrap_or_else(|| panic!("no line with {parts:?}: {log:#?}"))
}

#[test]
fn a_new_file_and_its_name_are_durable_before_its_row_is() {
    let scene = Scene::new(1);
    let Some(log) = traced(&scene, &[], "fsync,fdatasync,renameat2", 0) else {
        return publish_not_run("cancel-safe", "mirror/new-syncs", "strace cannot trace here");
    };
    let directory = scene.out().join("files").join(scene.server.base.strip_prefix("http://").unwrap());
    let directory = directory.display();
    let written = line_with(&log, &["fsync(", &format!("{directory}/.afs-file-")]);
    let renamed = line_with(&log, &["renameat2(", &format!("{directory}>")]);
    let named = renamed + line_with(&log[renamed..], &["fsync(", &format!("{directory}>")]);
    let rows: Vec<usize> = (0..log.len()).filter(|line| log[*line].contains("/catalog.db-wal>")).collect();
    let last_before = |line: usize| rows.iter().rposition(|row| *row < line).unwrap();
    // The row that is pending, then the file, then its name, then its row.
    assert!(written < renamed && rows.iter().any(|row| *row < renamed), "{log:#?}");
    assert_eq!(last_before(renamed), last_before(named), "no row between the file and its name: {log:#?}");
    assert!(rows.iter().any(|row| *row > named), "{log:#?}");
}

/// Kills it where it enters a call of the system on this path, which it must; `false` if nothing can do that here.
#[track_caller]
fn killed_on(scene: &Scene, call: &str, path: &Path) -> bool {
    let command = scene.command(&[]);
    let mut traced = Command::new("strace");
    traced
        .args(["-f", "-qq", "-o", "/dev/null", "-P"])
        .arg(path)
        .args(["-e", &format!("inject={call}:signal=SIGKILL")]);
    let Ok(output) = traced.arg(command.get_program()).args(command.get_args()).output() else { return false };
    assert!(!output.status.success(), "it has not called {call} on {}", path.display());
    // The tracer ends as its child did; with a code, it could not trace.
    output.status.code().is_none()
}

#[test]
fn killed_between_a_new_file_and_its_name_it_knows_the_file_for_its_own() {
    let scene = Scene::new(1);
    let directory = scene.out().join("files").join(scene.server.base.strip_prefix("http://").unwrap());
    // It is there before, so that the sync of the directory is the one for the file.
    fs::create_dir_all(&directory).unwrap();
    if !killed_on(&scene, "fsync", &directory) {
        return publish_not_run("cancel-safe", "mirror/killed-before-name", "strace cannot kill here");
    }
    assert_eq!(tree(&directory).len(), 1, "the file has its name");
    assert_eq!(catalogue(&scene.out()), BTreeMap::new(), "and no row");
    assert_eq!(scene.server.requests(), 1);
    scene.run(&[], 0);
    scene.assert_complete();
    assert_eq!(scene.server.requests(), 1, "it is not fetched again");
}

#[test]
fn a_full_disk_is_told_and_what_is_complete_stays() {
    let mount = tempfile::tempdir().unwrap();
    let mounted = Command::new("mount").args(["-t", "tmpfs", "-o", "size=1m", "tmpfs"]).arg(mount.path()).output();
    if !mounted.is_ok_and(|output| output.status.success()) {
        publish_not_run("cancel-safe", "mirror/full-disk", "mounting a small file system takes root, on Linux");
        return;
    }
    let scene = Scene::new(120);
    let out = mount.path().join("out");
    let mut command = scene.command(&[]);
    command.arg("--out").arg(&out);
    let output = command.output();
    let rows = catalogue(&out);
    let disk: BTreeMap<String, String> =
        tree(&out.join("files")).into_iter().map(|(path, content)| (path, hex(&content))).collect();
    let unmounted = Command::new("umount").arg("-l").arg(mount.path()).output();
    let text = expect(output.unwrap(), 73);
    assert!(unmounted.unwrap().status.success());
    assert!(rows.iter().all(|(path, digest)| disk.get(path) == Some(digest)), "{text}");
}

/// A field of the only host in the summary of a run with `--json`.
#[track_caller]
fn summary(text: &str, field: &str) -> u64 {
    let line = text.lines().find(|line| line.contains("\"event\":\"summary\"")).expect("a summary");
    let value: serde_json::Value = serde_json::from_str(line).unwrap();
    value["hosts"].as_object().unwrap().values().map(|host| host[field].as_u64().unwrap()).sum()
}

#[test]
fn broken_pages_hold_up_no_other_page_of_their_host() {
    let scene = Scene::new(60);
    let broken: Vec<String> = scene.served().into_iter().step_by(2).collect();
    for path in &broken {
        scene.server.state().refuse.insert(path.clone(), (StatusCode::INTERNAL_SERVER_ERROR, usize::MAX));
    }
    let text = scene.run(&["--retries", "1", "--json"], 2);
    assert_eq!((summary(&text, "files"), summary(&text, "failures"), summary(&text, "trips")), (30, 30, 0), "{text}");
    scene.assert_consistent();
}

#[test]
fn one_overloaded_page_slows_nobody_and_a_storm_of_them_does() {
    let scene = Scene::new(40);
    let one = scene.served()[7].clone();
    scene.server.state().refuse.insert(one.clone(), (StatusCode::SERVICE_UNAVAILABLE, 12));
    // That means now, not after a pause.
    scene.server.state().retry_after = Some("0");
    let text = scene.run(&["--retries", "0", "--concurrency", "1", "--json"], 0);
    assert_eq!((summary(&text, "files"), summary(&text, "trips")), (40, 0), "{text}");
    scene.server.state().retry_after = None;
    for path in scene.served().into_iter().take(20) {
        scene.server.state().refuse.insert(path, (StatusCode::BAD_GATEWAY, 1));
    }
    let text = scene.run(&["--refresh", "--json"], 0);
    assert!(summary(&text, "trips") > 0, "{text}");
    scene.assert_complete();
}

#[test]
fn only_the_whole_file_is_stored() {
    let scene = Scene::new(12);
    let served = scene.served();
    let statuses = [201, 202, 204, 205, 206, 226].map(|status| StatusCode::from_u16(status).unwrap());
    for (path, status) in served.iter().zip(statuses) {
        scene.server.state().with_status.insert(path.clone(), status);
    }
    scene.server.state().with_status.insert(served[6].clone(), StatusCode::NON_AUTHORITATIVE_INFORMATION);
    let text = scene.run(&["--retries", "1"], 2);
    for (path, status) in served.iter().zip(statuses) {
        assert!(text.contains(&format!("{path} (status")) && text.contains(status.as_str()), "{status}: {text}");
    }
    assert_eq!(tree(&scene.out().join("files")).len(), 6);
    let asked = scene.server.state().asked.clone();
    assert_eq!((asked[&served[1]], asked[&served[4]]), (2, 1));
    scene.assert_consistent();
}

#[test]
fn a_users_own_file_is_reported_and_left_alone() {
    let scene = Scene::new(12);
    scene.run(&[], 0);
    let authority = scene.server.base.strip_prefix("http://").unwrap().to_owned();
    let own = scene.out().join("files").join(&authority).join("notes");
    fs::write(&own, "my own notes").unwrap();
    fs::write(scene.path("served/notes"), "theirs").unwrap();
    let list = fs::read_to_string(scene.path("urls.txt")).unwrap() + &format!("{}/notes\n", scene.server.base);
    fs::write(scene.path("urls.txt"), list).unwrap();
    let text = scene.run(&[], 2);
    assert!(text.contains("notes is not ours and was left alone"), "{text}");
    assert_eq!(fs::read_to_string(&own).unwrap(), "my own notes");
    fs::remove_file(&own).unwrap();
    scene.run(&["--retry-failed"], 0);
    assert_eq!(fs::read_to_string(&own).unwrap(), "theirs");
    scene.assert_consistent();
}

impl Scene {
    /// Serves one more file, and puts it on the list.
    fn serve(&self, name: &str, content: &[u8]) {
        for directory in ["served", "source"] {
            let path = self.path(directory).join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, content).unwrap();
        }
        let list = fs::read_to_string(self.path("urls.txt")).unwrap() + &format!("{}/{name}\n", self.server.base);
        fs::write(self.path("urls.txt"), list).unwrap();
    }
}

/// A megabyte without any repetition.
fn large() -> Vec<u8> {
    let mut content = vec![0; 1 << 20];
    fastrand::Rng::with_seed(1).fill(&mut content);
    content
}

#[test]
fn a_body_that_was_cut_is_gone_on_with_where_it_ended() {
    let scene = Scene::new(2);
    scene.serve("large", &large());
    scene.server.state().cut.insert("/large".to_owned(), (700_000, 1));
    scene.run(&[], 0);
    scene.assert_complete();
    {
        let mut state = scene.server.state();
        let ranges = std::mem::take(&mut state.ranges);
        assert_eq!((ranges.len(), state.asked["/large"]), (1, 2), "{ranges:?}");
        assert!(ranges.iter().all(|(_, range)| range != "bytes=0-"), "{ranges:?}");
        state.whole_only = true;
        state.cut.insert("/large".to_owned(), (700_000, 1));
    }
    // A server that knows no ranges, or has another file by now, starts again.
    fs::remove_dir_all(scene.out()).unwrap();
    scene.run(&[], 0);
    scene.assert_complete();
    assert_eq!(scene.server.state().ranges.len(), 1);
    scene.server.state().whole_only = false;
    fs::remove_dir_all(scene.out()).unwrap();
    scene.server.state().cut.insert("/large".to_owned(), (700_000, usize::MAX));
    scene.run(&["--retries", "0"], 2);
    let other: Vec<u8> = large().iter().map(|byte| byte ^ 1).collect();
    for directory in ["served", "source"] {
        fs::write(scene.path(directory).join("large"), &other).unwrap();
    }
    scene.server.state().cut.clear();
    scene.run(&["--retry-failed"], 0);
    scene.assert_complete();
    assert_eq!(fs::read_dir(scene.out().join("mirror.parts")).unwrap().count(), 0);
}

#[test]
fn killed_within_a_body_it_asks_for_the_rest() {
    let scene = Scene::new(1);
    scene.serve("large", &large());
    scene.server.state().hang.push("/large".to_owned());
    scene.server.state().cut.insert("/large".to_owned(), (700_000, 1));
    let part = scene.out().join("mirror.parts");
    let mut child = scene.start(&[]);
    // The body hangs before its end, and the received part is on disk.
    wait_for("a part", || {
        let mut parts = fs::read_dir(&part).into_iter().flatten().flatten();
        parts.any(|entry| entry.metadata().is_ok_and(|found| found.len() > 500_000))
    });
    child.kill().unwrap();
    child.wait().unwrap();
    scene.server.state().hang.clear();
    scene.run(&[], 0);
    scene.assert_complete();
    assert_eq!(scene.server.state().ranges.len(), 1);
}

#[test]
fn a_digest_or_size_of_the_list_must_be_so() {
    let scene = Scene::new(3);
    let url = |name: &str| format!("{}/{name}", scene.server.base);
    for name in ["good", "sized", "bad", "short"] {
        scene.serve(name, name.as_bytes());
    }
    let (right, wrong) = (hex(b"good"), hex(b"other"));
    let list = format!(
        "{right}  {}\n{}\tsize=5\tout=elsewhere/here\n{}\tsha256={wrong}\n{}\tsize=9\n",
        url("good"),
        url("sized"),
        url("bad"),
        url("short")
    );
    fs::write(scene.path("urls.txt"), list).unwrap();
    let text = scene.run(&[], 2);
    assert!(text.contains(&wrong) && text.contains("5 bytes came, and the list says 9"), "{text}");
    let files = tree(&scene.out().join("files"));
    assert_eq!(files.len(), 2, "{:?}", files.keys());
    assert_eq!(files["elsewhere/here"], b"sized");
    scene.assert_consistent();
    // The list's data about an existing file counts as well.
    let now = hex(b"GOOD");
    fs::write(scene.path("served/good"), "GOOD").unwrap();
    fs::write(scene.path("urls.txt"), format!("{now} *{}\n", url("good"))).unwrap();
    scene.run(&[], 0);
    scene.assert_consistent();
    assert!(tree(&scene.out().join("files")).values().any(|content| content == b"GOOD"));
}

/// Puts these names on the list, each with the path that its line requests, if any.
fn list_with_places(scene: &Scene, lines: &[(&str, &str)]) {
    let line = |(name, out): &(&str, &str)| match *out {
        "" => format!("{}/{name}\n", scene.server.base),
        out => format!("{}/{name}\tout={out}\n", scene.server.base),
    };
    fs::write(scene.path("urls.txt"), lines.iter().map(line).collect::<String>()).unwrap();
}

/// A scene whose files `one` and `two` are at `x/1` and `x/2`.
fn placed() -> Scene {
    let scene = Scene::new(1);
    for name in ["one", "two"] {
        scene.serve(name, name.as_bytes());
    }
    list_with_places(&scene, &[("one", "x/1"), ("two", "x/2")]);
    scene.run(&[], 0);
    scene
}

/// Every file below `files`, as text.
fn places(scene: &Scene) -> Vec<(String, String)> {
    let text = |(path, content)| (path, String::from_utf8(content).unwrap());
    tree(&scene.out().join("files")).into_iter().map(text).collect()
}

#[track_caller]
fn assert_places(scene: &Scene, wanted: &[(&str, &str)]) {
    let wanted: Vec<_> = wanted.iter().map(|(path, text)| ((*path).to_owned(), (*text).to_owned())).collect();
    assert_eq!(places(scene), wanted);
}

#[test]
fn two_files_change_places_and_neither_is_fetched_again() {
    let scene = placed();
    let asked = scene.server.requests();
    list_with_places(&scene, &[("one", "x/2"), ("two", "x/1")]);
    scene.run(&[], 0);
    assert_places(&scene, &[("x/1", "two"), ("x/2", "one")]);
    scene.assert_consistent();
    // A circle: the path of one file becomes a directory for the other.
    list_with_places(&scene, &[("one", "x/1/a"), ("two", "x/2")]);
    scene.run(&[], 0);
    assert_places(&scene, &[("x/1/a", "one"), ("x/2", "two")]);
    list_with_places(&scene, &[("one", "x/1/a"), ("two", "x/1/b/c")]);
    scene.run(&[], 0);
    list_with_places(&scene, &[("one", "x/2"), ("two", "x/1")]);
    scene.run(&[], 0);
    assert_places(&scene, &[("x/1", "two"), ("x/2", "one")]);
    scene.assert_consistent();
    assert_eq!(scene.server.requests(), asked);
}

#[test]
fn a_file_is_not_moved_over_one_that_is_not_ours() {
    let scene = placed();
    let own = scene.out().join("files/x/3");
    fs::write(&own, "my own notes").unwrap();
    // Each wants the path of the next, and the last one wants the stranger's path.
    list_with_places(&scene, &[("one", "x/2"), ("two", "x/3")]);
    let text = scene.run(&[], 2);
    assert!(text.contains("so it stays at") && text.contains("x/3 is not ours and was left alone"), "{text}");
    let all = [("x/1", "one"), ("x/2", "two"), ("x/3", "my own notes")];
    assert_places(&scene, &all);
    assert_eq!(catalogue(&scene.out()), BTreeMap::new(), "what had to stay is not ours any more");
    // Nor is it the next time, and it is not touched then.
    let text = scene.run(&["--retry-failed"], 2);
    assert!(text.contains("3 file(s) below files/ are not ours"), "{text}");
    assert_places(&scene, &all);
    // Out of the way, it is.
    for path in ["files/x/2", "files/x/3"] {
        fs::remove_file(scene.out().join(path)).unwrap();
    }
    scene.run(&["--retry-failed"], 0);
    assert_places(&scene, &[("x/1", "one"), ("x/2", "one"), ("x/3", "two")]);
    fs::remove_file(scene.out().join("files/x/1")).unwrap();
    scene.assert_consistent();
}

#[test]
fn a_file_whose_line_has_left_the_list_keeps_the_place_that_it_was_given() {
    let scene = placed();
    let asked = scene.server.requests();
    list_with_places(&scene, &[("two", "x/2")]);
    assert!(scene.run(&[], 0).contains("1 URL(s) in the catalogue have left the manifest"));
    assert_places(&scene, &[("x/1", "one"), ("x/2", "two")]);
    // It makes room for a line that requests its path, and comes back when no line requests it any more.
    list_with_places(&scene, &[("two", "x/1")]);
    scene.run(&[], 0);
    let found = places(&scene);
    assert!(found[0] == ("x/1".to_owned(), "two".to_owned()) && found[1].0.starts_with("x/1~"), "{found:?}");
    list_with_places(&scene, &[("two", "x/2")]);
    scene.run(&[], 0);
    assert_places(&scene, &[("x/1", "one"), ("x/2", "two")]);
    scene.assert_consistent();
    // On the list again, without a path, it moves to the path of its URL.
    list_with_places(&scene, &[("one", ""), ("two", "x/2")]);
    scene.run(&[], 0);
    assert!(places(&scene).iter().any(|(path, text)| path.ends_with("/one") && text == "one"), "{:?}", places(&scene));
    scene.assert_consistent();
    assert_eq!(scene.server.requests(), asked);
}

#[test]
fn adopt_takes_over_what_is_the_same_and_nothing_else() {
    let scene = Scene::new(10);
    scene.run(&[], 0);
    for name in ["catalog.db", "catalog.db-wal", "catalog.db-shm"] {
        let _absent = fs::remove_file(scene.out().join(name));
    }
    let asked = scene.server.requests();
    scene.run(&[], 64);
    scene.run(&["--adopt"], 0);
    assert_eq!(scene.server.requests(), asked, "the checkpoint knows the digests");
    scene.assert_complete();
    // Without a checkpoint the server is asked.
    for name in ["catalog.db", "catalog.db-wal", "catalog.db-shm", "mirror.ckpt"] {
        let _absent = fs::remove_file(scene.out().join(name));
    }
    let files = scene.out().join("files").join(scene.server.base.strip_prefix("http://").unwrap());
    fs::write(files.join("a/b/c/1"), "my own").unwrap();
    let text = scene.run(&["--adopt"], 2);
    assert!(text.contains("a/b/c/1 is not ours"), "{text}");
    assert_eq!(fs::read(files.join("a/b/c/1")).unwrap(), b"my own");
    assert_eq!(scene.server.requests(), asked + 10);
}

#[test]
fn headers_and_a_name_of_ones_own_are_sent() {
    let scene = Scene::new(2);
    scene.run(&["--header", "X-Token: s3cret", "--user-agent", "me/1"], 0);
    let sent = scene.server.state().sent.clone();
    for wanted in [("x-token", "s3cret"), ("user-agent", "me/1")] {
        assert!(sent.iter().any(|(name, value)| (name.as_str(), value.as_str()) == wanted), "{wanted:?}: {sent:?}");
    }
    for options in [["--header", "nonsense"], ["--header", "Range: bytes=1-"], ["--ca", "/nonexistent"]] {
        scene.run(&options, 64);
    }
}

#[test]
fn a_long_list_is_not_held_in_memory_and_a_host_that_is_down_holds_up_no_other() {
    let scene = Scene::new(20);
    let dead = {
        // Bound and closed again, so nothing listens there.
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        listener.local_addr().unwrap()
    };
    let mut list: String = (0..50_000).map(|number| format!("http://{dead}/{number}\n")).collect();
    list += &fs::read_to_string(scene.path("urls.txt")).unwrap();
    fs::write(scene.path("urls.txt"), list).unwrap();
    let mut child = scene.command(&["--retries", "0"]).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    wait_for("the files of the host that answers", || {
        scene.server.requests() >= 20 || child.try_wait().unwrap().is_some()
    });
    #[cfg(target_os = "linux")]
    {
        let status = fs::read_to_string(format!("/proc/{}/status", child.id())).unwrap();
        let peak = status
            .lines()
            .find_map(|line| line.strip_prefix("VmHWM:")?.trim().strip_suffix(" kB")?.parse::<u64>().ok());
        assert!(peak.unwrap() < 96 << 10, "{peak:?} KiB");
    }
    signal(&child, "INT");
    assert_eq!(child.wait().unwrap().code(), Some(130));
    scene.assert_consistent();
}

#[test]
fn a_process_that_may_open_few_files_has_fewer_fetches_in_flight() {
    let scene = Scene::new(60);
    let command = scene.command(&[]);
    let mut limited = Command::new("sh");
    limited.args(["-c", "ulimit -n 40; exec \"$@\"", "sh"]).arg(command.get_program()).args(command.get_args());
    expect(limited.output().unwrap(), 0);
    scene.assert_complete();
}
