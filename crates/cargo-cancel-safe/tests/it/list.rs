//! `cargo cancel-safe list`.
//!
//! Invariant: every file that cargo would compile is read, or named in an error.

use crate::Project;

#[test]
fn the_awaits_are_listed_along_the_modules_of_the_library_and_the_binaries() {
    let project = Project::new(&[
        ("src/lib.rs", "mod a;\n#[path = \"other/b.rs\"]\nmod b;\npub mod c { mod d; }\n#[cfg(test)]\nmod tests;\n"),
        ("src/a.rs", "mod inner;\npub async fn a() { x().await }\n"),
        (
            "src/a/inner.rs",
            "impl super::S {\n    async fn go(&self) {\n        self\n            .x().await;\n    }\n}\n",
        ),
        ("src/other/b.rs", "mod e;\n"),
        ("src/other/e/mod.rs", "async fn e() { tokio::join!(a, b.await); }\n"),
        ("src/c/d.rs", "async fn d() { x.await }\n"),
        ("src/tests.rs", "this is not read"),
        ("src/main.rs", "mod a;\nfn main() { async { y.await }; }\n"),
        ("src/bin/extra.rs", "static S: F = async { y.await };\nfn main() {}\n"),
        ("src/unused.rs", "neither is this"),
        ("tests/it.rs", "async fn t() { y.await }\n"),
        ("examples/e.rs", "fn main() { async { y.await }; }\n"),
        ("build.rs", "fn main() { async { y.await }; }\n"),
    ]);
    let ran = project.run("list").expect(0).says("    Scanning bank\n").says("       Found 7 awaits\n");
    let expected = "\
src/a/inner.rs:4:18    S::go
src/a.rs:2:24          pub a
src/bin/extra.rs:1:25  (no function)
src/c/d.rs:1:18        d
src/main.rs:2:23       main
src/other/e/mod.rs:1:16  e (join!)
src/other/e/mod.rs:1:34  e
";
    let squeezed =
        |text: &str| text.lines().map(|line| line.split_whitespace().collect::<Vec<_>>().join(" ")).collect::<Vec<_>>();
    assert_eq!(squeezed(&ran.out), squeezed(expected));
}

#[test]
fn json_has_the_same() {
    let project = Project::new(&[("src/lib.rs", "pub async fn f() {\n    select! { x = a => x };\n}\n")]);
    let ran = project.run("list --json").expect(0);
    let path = project.root().join("src/lib.rs");
    let found = serde_json::json!({
        "line": 2, "column": 5, "kind": "select!", "function": "f", "public": true,
    });
    let package = serde_json::json!({ "name": "bank", "awaits": 1, "files": [{ "path": path, "awaits": [found] }] });
    assert_eq!(ran.json(), serde_json::json!({ "packages": [package], "awaits": 1 }));
}

#[test]
fn the_packages_are_those_that_cargo_chooses() {
    let project = Project::new(&[("src/lib.rs", "async fn root() { x.await }\n")]);
    let root = "[package]\nname = \"root\"\nedition = \"2024\"\n[workspace]\nmembers = [\"a\", \"b\"]\n";
    project.write("Cargo.toml", root);
    for name in ["a", "b"] {
        project.write(&format!("{name}/Cargo.toml"), &format!("[package]\nname = \"{name}\"\nedition = \"2024\"\n"));
        project.write(&format!("{name}/src/lib.rs"), &format!("async fn {name}() {{ x.await }}\n"));
    }
    let listed = |directory: &str, arguments: &str| {
        let ran = project.run_in(directory, arguments).expect(0);
        ran.out.lines().map(|line| line.rsplit(' ').next().unwrap().to_owned()).collect::<Vec<_>>().join(" ")
    };
    assert_eq!(listed("", "list"), "root");
    assert_eq!(listed("a/src", "list"), "a");
    assert_eq!(listed("", "list --manifest-path b/Cargo.toml"), "b");
    assert_eq!(listed("a", "list -p b -p root"), "b root");
    assert_eq!(listed("a", "list --workspace --exclude ro*"), "a b");
    // Paths are relative to the workspace.
    assert!(project.run_in("a", "list").out.starts_with("a/src/lib.rs:1:"));
    project.run("list -p c").expect(101).says("there is no package `c` in this workspace; it has a, b, root\n");
    project.write("Cargo.toml", &root.replace("[package]\nname = \"root\"\nedition = \"2024\"\n", ""));
    assert_eq!(listed("", "list"), "a b");
}

#[test]
fn a_file_that_cannot_be_read_is_named() {
    let project = Project::new(&[
        ("src/lib.rs", "mod a;\n#[cfg(any())]\nmod gone;\n"),
        ("src/a.rs", "fn f() {\n  let = 1;\n}\n"),
    ]);
    let ran = project.run("list").expect(101);
    assert!(ran.err.contains("src/a.rs:2:7: cannot be parsed: "), "{}", ran.err);
    assert_eq!(ran.out, "");
    project.write("src/a.rs", "mod b;\n");
    project.run("list").expect(101).says("src/a.rs: `mod b;` has no file; looked for ").says("a/b.rs and ");
    project.write("src/a/b.rs", "#[path = \"none.rs\"] mod c;\n");
    project.run("list").expect(101).says("none.rs: ");
}

#[test]
fn without_a_project_or_with_a_wrong_option_it_says_what_is_wrong() {
    let project = Project::new(&[]);
    std::fs::remove_file(project.root().join("Cargo.toml")).unwrap();
    project.run("list").expect(101).says("error: cargo metadata failed: could not find `Cargo.toml`");
    project.run("list --jsn").expect(2).says("unexpected argument '--jsn'");
    project.run("lists").expect(2).says("unrecognized subcommand 'lists'");
    project.run("").expect(2).says("Usage: cargo cancel-safe <COMMAND>");
    let ran = crate::run(project.command("").arg("list").env("CARGO", "/no/such/cargo"));
    ran.expect(101).says("`/no/such/cargo metadata` cannot be run: ");
}
