//! The same tests on an sqlx other than the locked one: a checkout, or the locked one with one fix.
//!
//! Invariant: this workspace stays as it is. The build uses a second workspace below the target directory, whose crates
//! are links to ours, with its own manifest, lock file and target directory; and a run that would not test the other
//! sqlx fails.

use std::fs;
use std::io::ErrorKind;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde::Deserialize;

use crate::command::{Cargo, Failure};
use crate::workspace::{self, Workspace};

/// The word on the command line for the locked sqlx with the fix below.
const MENDED: &str = "mended";

/// The crates of sqlx that our crates name, and where they are in a checkout.
const IN_A_CHECKOUT: [(&str, &str); 2] = [("sqlx", "."), ("sqlx-core", "sqlx-core")];

/// The PostgreSQL driver, which is fixed.
const DRIVER: &str = "sqlx-postgres";

/// sqlx's fix after 0.9.0, for its issue 4393: a `begin` that is dropped while it waits ends what it has queued,
/// because the transaction, or the savepoint, counts as soon as it is on its way. The code is our own, because the
/// tests are about the behaviour.
const BEGIN: &str = "        rollback.conn.wait_until_ready().await?;
        if !rollback.conn.in_transaction() {
            return Err(Error::BeginFailed);
        }
        rollback.conn.inner.transaction_depth += 1;
        rollback.defuse();
";
const MENDED_BEGIN: &str = "        rollback.conn.inner.transaction_depth = depth + 1;
        let begun = rollback.conn.wait_until_ready().await;
        if begun.is_ok() && !rollback.conn.in_transaction() {
            rollback.conn.inner.transaction_depth = depth;
            return Err(Error::BeginFailed);
        }
        begun?;
        rollback.defuse();
";

/// A workspace that uses another sqlx.
pub(crate) struct OtherSqlx {
    place: PathBuf,
}

impl OtherSqlx {
    /// Creates the workspace for the name on the command line: the directory of a checkout, or `mended`.
    pub(crate) fn prepare(workspace: &Workspace, named: &str) -> Result<Self, Failure> {
        let place = workspace.target_directory.join("sqlx").join(directory_name(named));
        let manifest = read(&workspace::root().join("Cargo.toml"))?;
        let manifest = if named == MENDED {
            let driver = mend(&place)?;
            format!(
                "{}\n[patch.crates-io]\n{DRIVER} = {{ path = {:?} }}\n",
                members_of_ours(&manifest)?,
                text(&driver)?
            )
        } else {
            let checkout = fs::canonicalize(named).map_err(|error| format!("{named}: {error}"))?;
            instead_of_the_registry(&members_of_ours(&manifest)?, &checkout)?
        };
        for folder in ["crates", "xtask"] {
            let link = place.join(folder);
            made(&link, fs::create_dir_all(&place))?;
            match symlink(workspace::root().join(folder), &link) {
                Err(error) if error.kind() == ErrorKind::AlreadyExists => {}
                linked => made(&link, linked)?,
            }
        }
        write_if_new(&place.join("Cargo.toml"), &manifest)?;
        // Copied again each time, so that only what must be newer differs from our own runs.
        let lock = place.join("Cargo.lock");
        made(&lock, fs::copy(workspace::root().join("Cargo.lock"), &lock))?;
        Ok(Self { place })
    }

    /// Lets a run of cargo build this workspace.
    pub(crate) fn tell(&self, run: Cargo) -> Cargo {
        let manifest = self.place.join("Cargo.toml");
        run.arg("--manifest-path").arg(manifest).arg("--target-dir").arg(self.place.join("target"))
    }

    /// Checks in cargo's lock file that the other sqlx was used.
    pub(crate) fn was_used(&self) -> Result<(), Failure> {
        let lock = self.place.join("Cargo.lock");
        if is_from_the_registry(&read(&lock)?, DRIVER) {
            let what =
                format!("the other sqlx was not used: its version is not one that our crates ask for ({lock:?})");
            return Err(Failure::from(what));
        }
        Ok(())
    }
}

fn directory_name(named: &str) -> String {
    let plain = |c: char| if c.is_ascii_alphanumeric() || c == '.' || c == '-' { c } else { '_' };
    let name: String = named.trim_start_matches('/').chars().map(plain).collect();
    // Directory names such as `..` would lead elsewhere.
    if named == MENDED { name } else { format!("at_{name}") }
}

/// Our manifest for the crates and their test dependencies; other packages bring peers that need their own sqlx.
fn members_of_ours(manifest: &str) -> Result<String, Failure> {
    let line = manifest.lines().find(|line| line.starts_with("members = ["));
    let line = line.ok_or_else(|| Failure::from("Cargo.toml has no line of members".to_owned()))?;
    Ok(manifest.replacen(line, r#"members = ["crates/*", "xtask/campaign"]"#, 1))
}

/// Our manifest with the crates of the checkout, whatever versions they have.
fn instead_of_the_registry(manifest: &str, checkout: &Path) -> Result<String, Failure> {
    let mut manifest = manifest.to_owned();
    for (name, folder) in IN_A_CHECKOUT {
        let package: PathBuf = checkout.join(folder).components().collect();
        if !package.join("Cargo.toml").exists() {
            return Err(Failure::from(format!(
                "{} is no checkout of sqlx: there is no {package:?}",
                checkout.display()
            )));
        }
        let start = format!("{name} = {{ version = \"");
        let line = manifest.lines().find(|line| line.starts_with(&start)).map(str::to_owned);
        let line = line.ok_or_else(|| format!("Cargo.toml has no line that begins with {start}"))?;
        let (_, rest) = line[start.len()..].split_once('"').unwrap_or_default();
        manifest = manifest.replacen(&line, &format!("{name} = {{ path = {:?}{rest}", text(&package)?), 1);
    }
    Ok(manifest)
}

/// Copies the locked driver and fixes the copy, which is named after its version.
fn mend(place: &Path) -> Result<PathBuf, Failure> {
    let from = source_of(DRIVER)?;
    let copy = place.join(from.file_name().unwrap_or(DRIVER.as_ref()));
    copy_tree(&from, &copy)?;
    let file = copy.join("src/transaction.rs");
    let mended = mended(&read(&from.join("src/transaction.rs"))?)?;
    write_if_new(&file, &mended)?;
    Ok(copy)
}

fn mended(source: &str) -> Result<String, Failure> {
    if source.matches(BEGIN).count() != 1 {
        let what = format!("{DRIVER} is not the one that the mend is for: src/transaction.rs has not once:\n{BEGIN}");
        return Err(Failure::from(what));
    }
    Ok(source.replacen(BEGIN, MENDED_BEGIN, 1))
}

/// Where cargo keeps the source of a dependency.
fn source_of(name: &str) -> Result<PathBuf, Failure> {
    #[derive(Deserialize)]
    struct Metadata {
        packages: Vec<Package>,
    }
    #[derive(Deserialize)]
    struct Package {
        name: String,
        manifest_path: PathBuf,
    }
    let output = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()))
        .args(["metadata", "--format-version", "1", "--locked"])
        .current_dir(workspace::root())
        .output()
        .map_err(|error| format!("cargo metadata could not be started: {error}"))?;
    if !output.status.success() {
        return Err(Failure::from(format!("cargo metadata: {}", String::from_utf8_lossy(&output.stderr))));
    }
    let metadata: Metadata = serde_json::from_slice(&output.stdout)
        .map_err(|error| format!("cargo metadata is not what it was: {error}"))?;
    let package = metadata.packages.into_iter().find(|package| package.name == name);
    let manifest = package.ok_or_else(|| format!("no crate of ours depends on {name}"))?.manifest_path;
    Ok(manifest.parent().unwrap_or(&manifest).to_owned())
}

/// Copies what has changed, so that cargo builds no more than it must. The fixed file is written separately.
fn copy_tree(from: &Path, to: &Path) -> Result<(), Failure> {
    made(to, fs::create_dir_all(to))?;
    let entries = fs::read_dir(from).map_err(|error| format!("{}: {error}", from.display()))?;
    for entry in entries {
        let entry = entry.map_err(|error| format!("{}: {error}", from.display()))?;
        let (from, to) = (entry.path(), to.join(entry.file_name()));
        if from.is_dir() {
            copy_tree(&from, &to)?;
        } else if !to.exists() {
            made(&to, fs::copy(&from, &to))?;
        }
    }
    Ok(())
}

/// Whether a lock file takes the package from a registry.
fn is_from_the_registry(lock: &str, name: &str) -> bool {
    let entry = lock.split("[[package]]").find(|entry| entry.contains(&format!("name = {name:?}\n")));
    entry.is_none_or(|entry| entry.contains("\nsource = "))
}

fn read(path: &Path) -> Result<String, Failure> {
    fs::read_to_string(path).map_err(|error| Failure::from(format!("{}: {error}", path.display())))
}

/// Writes a file only if its content changes, because cargo checks the time of the last change.
fn write_if_new(path: &Path, text: &str) -> Result<(), Failure> {
    if fs::read_to_string(path).is_ok_and(|old| old == text) {
        return Ok(());
    }
    made(path, fs::write(path, text))
}

fn made<T>(path: &Path, result: std::io::Result<T>) -> Result<(), Failure> {
    result.map(drop).map_err(|error| Failure::from(format!("{} cannot be made: {error}", path.display())))
}

fn text(path: &Path) -> Result<&str, Failure> {
    path.to_str().ok_or_else(|| Failure::from(format!("{path:?} cannot be written in a manifest")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_mend_fits_the_driver_that_is_locked() {
        let source = read(&source_of(DRIVER).unwrap().join("src/transaction.rs")).unwrap();
        let mended = mended(&source).unwrap();
        assert!(mended.contains("transaction_depth = depth + 1;"));
        assert!(super::mended(&mended).unwrap_err().what.contains("is not the one that the mend is for"));
    }

    #[test]
    fn a_checkout_takes_the_place_of_the_registry() {
        let checkout = std::env::temp_dir().join(format!("cancel-safe-sqlx-{}", std::process::id()));
        fs::create_dir_all(checkout.join("sqlx-core")).unwrap();
        let manifest = read(&workspace::root().join("Cargo.toml")).unwrap();
        let refused = instead_of_the_registry(&manifest, &checkout).unwrap_err();
        for folder in [".", "sqlx-core"] {
            fs::write(checkout.join(folder).join("Cargo.toml"), "").unwrap();
        }
        let replaced = instead_of_the_registry(&manifest, &checkout);
        fs::remove_dir_all(&checkout).unwrap();
        assert!(refused.what.contains("no checkout of sqlx"), "{refused}");
        let replaced = replaced.unwrap();
        assert!(
            replaced.contains(&format!("\nsqlx = {{ path = {checkout:?}, default-features = false }}")),
            "{replaced}"
        );
        assert!(replaced.contains("/sqlx-core\", default-features = false }"), "{replaced}");
    }

    #[test]
    fn a_lock_file_says_where_a_package_is_from() {
        let lock = "[[package]]\nname = \"sqlx-postgres\"\nversion = \"0.9.0\"\n\n[[package]]\nname = \"syn\"\nversion = \"3\"\n\
                    source = \"registry+https://example.com\"\n";
        assert!(!is_from_the_registry(lock, "sqlx-postgres"));
        assert!(is_from_the_registry(lock, "syn"));
        assert!(is_from_the_registry(lock, "sqlx"));
    }

    #[test]
    fn each_sqlx_has_a_directory_of_its_own() {
        assert_eq!(directory_name(MENDED), "mended");
        assert_eq!(directory_name("../sqlx"), "at_.._sqlx");
        assert_eq!(directory_name("/src/sqlx"), "at_src_sqlx");
    }
}
