//! The command `resumable`, on real files.

use std::{
    ffi::{OsStr, OsString},
    fs,
    io::Read,
    os::unix::ffi::OsStringExt,
    path::Path,
    process::{Command, Output, Stdio},
};

use cancel_safe_resumable::{FileStore, ItemError, ResumableTask};
use futures_util::StreamExt;

use crate::support::{checkpoint, complete, double, numbers};

fn command() -> Command {
    Command::new(env!("CARGO_BIN_EXE_resumable"))
}

/// The exit code, the output, and the error output.
fn resumable(arguments: &[&OsStr]) -> (i32, String, String) {
    let Output { status, stdout, stderr } = command().args(arguments).stdin(Stdio::null()).output().unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    (status.code().unwrap(), text(stdout), text(stderr))
}

fn on(subcommand: &str, path: &Path) -> (i32, String, String) {
    resumable(&[OsStr::new(subcommand), path.as_os_str()])
}

/// The value after a name in the output of `inspect`.
fn shown(output: &str, name: &str) -> String {
    let line = output.lines().find_map(|line| line.strip_prefix(name));
    line.unwrap_or_else(|| panic!("no {name} in {output}")).trim().to_owned()
}

/// A crawl by key of four pages, one of which is broken.
async fn crawl(path: &Path) {
    let pages = ["b", "broken", "a", "c"].map(str::to_owned);
    let run = ResumableTask::builder("crawl")
        .version("v2")
        .store(FileStore::at(path))
        .key(|page: &String| page.clone())
        .quarantine(10)
        .stream(pages, |_, page| async move {
            match page.as_str() {
                "broken" => Err(ItemError::permanent("it is \"broken\"")),
                page => Ok((page.len(), vec![Some(f64::NAN), None])),
            }
        });
    run.finish().await.unwrap();
}

#[tokio::test]
async fn inspect_says_what_a_checkpoint_is_and_how_far_it_has_come() {
    let (_dir, path) = checkpoint();
    crawl(&path).await;
    let (code, out, err) = on("inspect", &path);
    assert_eq!((code, err.as_str()), (0, ""));
    for (name, value) in [
        ("job", "crawl"),
        ("version", "v2"),
        ("codec", "MessagePack"),
        ("items by", "key"),
        ("state", "complete"),
        ("sessions", "1"),
        ("results", "3"),
        ("quarantined", "1"),
        ("uncertain", "0"),
    ] {
        assert_eq!(shown(&out, name), value, "{name}");
    }
    assert_eq!(shown(&out, "file"), path.display().to_string());
    assert!(shown(&out, "result type").contains("f64"));
}

#[tokio::test]
async fn export_writes_a_line_for_each_finished_item() {
    let (_dir, path) = checkpoint();
    crawl(&path).await;
    let (code, out, err) = on("export", &path);
    assert_eq!((code, err.as_str()), (0, ""));
    let lines: Vec<&str> = out.lines().collect();
    assert_eq!(
        lines,
        [
            r#"{"key":"b","result":[1,["NaN",null]]}"#,
            r#"{"key":"broken","quarantined":{"attempts":1,"cause":"it is \"broken\"","uncertain":false}}"#,
            r#"{"key":"a","result":[1,["NaN",null]]}"#,
            r#"{"key":"c","result":[1,["NaN",null]]}"#,
        ]
    );
    let (_dir, path) = checkpoint();
    complete(&path, 5).await.unwrap();
    let expected: String = (0..5).map(|x| format!("{{\"index\":{x},\"result\":{}}}\n", x * 2)).collect();
    assert_eq!(on("export", &path), (0, expected, String::new()));
}

#[cfg(feature = "postcard")]
#[tokio::test]
async fn postcard_cannot_be_exported_and_that_is_said() {
    use cancel_safe_resumable::Codec;
    let (_dir, path) = checkpoint();
    numbers(&path).codec(Codec::Postcard).stream(0..3, |_, x| double(x)).finish().await.unwrap();
    let (code, out, err) = on("export", &path);
    assert_eq!((code, out.as_str(), err.lines().count()), (5, "", 1));
    assert!(err.contains("without their type, `u64`"), "{err}");
    assert_eq!(on("verify", &path).0, 0);
}

#[tokio::test]
async fn a_damaged_file_is_named_with_the_place_and_what_to_do() {
    let (_dir, path) = checkpoint();
    complete(&path, 100).await.unwrap();
    complete(&path, 200).await.unwrap();
    let good = fs::read(&path).unwrap();
    let mut bytes = good.clone();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    fs::write(&path, &bytes).unwrap();
    for subcommand in ["verify", "inspect", "export"] {
        let (code, out, err) = on(subcommand, &path);
        assert_eq!((code, out.as_str(), err.lines().count()), (1, "", 1), "{subcommand}");
        assert!(err.contains("damaged at byte") && err.contains("truncate -s"), "{err}");
    }
    assert_eq!(fs::read(&path).unwrap(), bytes, "it was only read");

    // Several files: each is reported, and the first failure gives the exit code.
    let whole = path.with_extension("whole");
    fs::write(&whole, &good).unwrap();
    let (code, out, err) = resumable(&[OsStr::new("verify"), whole.as_os_str(), path.as_os_str(), whole.as_os_str()]);
    assert_eq!((code, out.lines().count(), err.lines().count()), (1, 2, 1), "{out}{err}");
    assert!(out.contains("200 results, complete"));
}

#[tokio::test]
async fn a_torn_tail_is_not_damage() {
    let (_dir, path) = checkpoint();
    complete(&path, 100).await.unwrap();
    let bytes = fs::read(&path).unwrap();
    fs::write(&path, &bytes[..bytes.len() - 3]).unwrap();
    let (code, out, _) = on("verify", &path);
    assert_eq!(code, 0);
    assert!(out.contains("not complete") && out.contains("torn tail") && out.contains("cuts off"), "{out}");
}

#[test]
fn what_is_no_checkpoint_is_said_in_one_line() {
    let (dir, path) = checkpoint();
    let foreign = [("empty", &b""[..]), ("text", b"hello"), ("json", b"[1,2,3,4,5,6,7,8,9,10,11,12,13,14,15]")];
    for (name, content) in foreign {
        fs::write(&path, content).unwrap();
        for subcommand in ["inspect", "verify", "export"] {
            let (code, out, err) = on(subcommand, &path);
            assert_eq!((code, out.as_str(), err.lines().count()), (3, "", 1), "{subcommand} {name}: {err}");
            assert!(err.contains("not a checkpoint"), "{err}");
        }
    }
    assert_eq!(on("verify", &dir.path().join("missing")).0, 3);
    assert_eq!(on("verify", dir.path()).0, 3);
}

#[tokio::test]
async fn a_live_file_can_be_looked_at_while_a_run_holds_it() {
    let (_dir, path) = checkpoint();
    let mut run = numbers(&path).concurrency(2).stream(0..10, |_, x| async move {
        if x == 9 {
            std::future::pending::<()>().await;
        }
        Ok(x)
    });
    for _ in 0..9 {
        run.next().await.unwrap();
    }
    let (code, out, err) = on("inspect", &path);
    assert_eq!((code, err.as_str()), (0, ""));
    assert_eq!(shown(&out, "state"), "a run holds it");
    assert_eq!(on("verify", &path).0, 0);
    assert_eq!(on("export", &path).0, 0);
    drop(run);
    assert_eq!(complete(&path, 10).await.unwrap().len(), 10, "it was not disturbed");
}

#[tokio::test]
async fn compact_says_what_it_saved_and_refuses_a_file_that_is_held_or_damaged() {
    let (_dir, path) = checkpoint();
    for generation in 1..3 {
        let builder = numbers(&path).revalidate(move |_, result| *result >= generation * 1000);
        builder.stream(0..1000, move |_, x| async move { Ok(generation * 1000 + x) }).finish().await.unwrap();
    }
    let before = fs::metadata(&path).unwrap().len();
    let held = fs::File::open(&path).unwrap();
    held.lock().unwrap();
    let (code, out, err) = on("compact", &path);
    assert_eq!((code, out.as_str(), err.lines().count()), (4, "", 1), "{err}");
    assert!(err.contains("held by another run"), "{err}");
    drop(held);
    assert_eq!(fs::metadata(&path).unwrap().len(), before);
    let (code, out, err) = on("compact", &path);
    let after = fs::metadata(&path).unwrap().len();
    assert_eq!((code, err.as_str()), (0, ""));
    assert_eq!(out, format!("{}: {before} bytes before, {after} bytes now\n", path.display()));
    assert!(after < before);
    // There is nothing left to save.
    let (code, out, _) = on("compact", &path);
    assert!(code == 0 && out.contains(&format!("{after} bytes before, {after} bytes now")), "{out}");
    assert_eq!(numbers(&path).stream(0..1000, |_, x| double(x)).finish().await.unwrap().restored, 1000);

    let mut bytes = fs::read(&path).unwrap();
    bytes[100] ^= 1;
    fs::write(&path, &bytes).unwrap();
    assert_eq!(on("compact", &path).0, 1);
    assert_eq!(fs::read(&path).unwrap(), bytes);
    fs::write(&path, "hello").unwrap();
    assert_eq!(on("compact", &path).0, 3);
    fs::remove_file(&path).unwrap();
    assert_eq!(on("compact", &path).0, 3);
    assert!(!path.exists());
}

#[tokio::test]
async fn a_name_that_is_no_text_is_a_name_all_the_same() {
    let (dir, path) = checkpoint();
    complete(&path, 3).await.unwrap();
    let odd = dir.path().join(OsString::from_vec(b"j\xffb 'x'.ckpt".to_vec()));
    fs::rename(&path, &odd).unwrap();
    let output = command().arg("verify").arg(&odd).output().unwrap();
    assert!(output.status.success(), "{output:?}");
    assert_eq!(on("export", &odd).1.lines().count(), 3);
}

#[tokio::test]
async fn a_reader_that_has_seen_enough_is_no_failure() {
    let (_dir, path) = checkpoint();
    complete(&path, 20_000).await.unwrap();
    let mut child = command().arg("export").arg(&path).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let mut first = [0; 10];
    child.stdout.take().unwrap().read_exact(&mut first).unwrap();
    assert_eq!(&first, b"{\"index\":0");
    let output = child.wait_with_output().unwrap();
    assert_eq!((output.status.code(), output.stderr), (Some(0), Vec::new()));
}

#[test]
fn a_wrong_call_is_2_and_the_help_tells_the_exit_codes() {
    assert_eq!(resumable(&[]).0, 2);
    assert_eq!(resumable(&[OsStr::new("verify")]).0, 2);
    assert_eq!(resumable(&[OsStr::new("frobnicate"), OsStr::new("x")]).0, 2);
    let (code, out, _) = resumable(&[OsStr::new("--help")]);
    assert_eq!(code, 0);
    for part in ["inspect", "verify", "export", "follow", "compact", "Exit codes:"] {
        assert!(out.contains(part), "{out}");
    }
}
