//! Whether the crates compile for Windows and macOS, on a Debian machine that is neither.
//!
//! Invariant: nothing is installed. Debian's compiler for web browsers comes with the source of its own standard
//! library, which rustup's may lack; both are unpacked below the target directory, and are used only for this.

use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::command::{Failure, cargo};
use crate::workspace::Workspace;

/// One of each: Windows needs no linker for a check, and macOS has one architecture that matters.
const TARGETS: [&str; 2] = ["x86_64-pc-windows-gnu", "aarch64-apple-darwin"];
/// The crates whose dependencies contain no C, which would need a C compiler and headers for each system. The weekly
/// workflow builds all crates on the systems themselves.
const CRATES: [&str; 5] = ["atomic-fs", "guard", "resumable", "shutdown", "testing"];

/// A feature that is left out: sqlx takes as long as everything else together, and has its own checks for these
/// systems.
const LEFT_OUT: &str = "postgres";

/// A small dependency of all of them.
const STRANGER: &str = "pin-project-lite";

/// Checks the crates. If that is not possible, it says why and passes, because the weekly workflow checks them on the
/// systems themselves.
pub(crate) fn run(workspace: &Workspace) -> Result<(), Failure> {
    let compiler = match Compiler::unpack(&workspace.target_directory.join("foreign")) {
        Ok(compiler) => compiler,
        Err(why) => {
            println!("not run here: {why}. The weekly workflow builds the crates on Windows and macOS.");
            return Ok(());
        }
    };
    for target in TARGETS {
        println!("{target}");
        let check = || compiler.equip(cargo(["check", "--quiet", "--target", target, "-Zbuild-std=std,panic_unwind"]));
        // If not even the standard library and a small crate can be built, the fault is not ours.
        if let Err(why) = check().args(["--package", STRANGER]).run() {
            println!(
                "not run here: cargo and this compiler do not get on ({}). The weekly workflow does it.",
                why.what
            );
            return Ok(());
        }
        let check = CRATES.iter().fold(check(), |check, name| {
            check.args(["--package", &format!("cancel-safe-{name}"), "--features"]).arg(features(workspace, name))
        });
        let check = check.args(["-Zwarnings", "--config", "build.warnings='deny'"]);
        // The command would be half a page, so the failure names the section to repeat.
        check.run().map_err(|_| format!("the crates do not compile for {target} without a warning"))?;
    }
    Ok(())
}

/// The features of a crate, by the name of its package, since one command checks several.
fn features(workspace: &Workspace, name: &str) -> String {
    let package = workspace.packages.iter().find(|package| package.short_name() == name);
    let features = package.into_iter().flat_map(|package| package.single_features());
    let features = features.filter(|feature| *feature != LEFT_OUT);
    features.map(|feature| format!("cancel-safe-{name}/{feature}")).collect::<Vec<_>>().join(",")
}

/// An unpacked compiler with the source of its standard library.
struct Compiler {
    /// The content of `usr/` of a Debian system.
    usr: PathBuf,
    /// The directory for cargo's output with it.
    target: PathBuf,
    libraries: PathBuf,
}

impl Compiler {
    /// Downloads and unpacks it below `place`, unless that was done before.
    fn unpack(place: &Path) -> Result<Self, String> {
        if !Path::new("/usr/bin/apt-get").exists() || !Path::new("/usr/bin/dpkg").exists() {
            return Err("it needs the packages of Debian".to_owned());
        }
        let version = available()?;
        let series = version.splitn(3, '.').take(2).collect::<Vec<_>>().join(".");
        let root = place.join(&series);
        let usr = root.join("usr");
        if !root.exists() {
            let fresh = place.join("fresh");
            // The rest of an interrupted run is incomplete.
            drop(fs::remove_dir_all(&fresh));
            fs::create_dir_all(&fresh).map_err(|error| format!("{} cannot be made: {error}", fresh.display()))?;
            download(&fresh, &series)?;
            let source = format!("../../../src/rustc-{}", version.split('+').next().unwrap_or(&version));
            let named = fresh.join("usr/lib/rustlib/src/rust");
            if !named.join("library").exists() {
                return Err(format!("{} does not lead to {source}", named.display()));
            }
            fs::rename(&fresh, &root).map_err(|error| format!("{} cannot be made: {error}", root.display()))?;
        }
        let libraries = env::join_paths(library_folders(&usr)).map_err(|error| error.to_string())?.into();
        let compiler = Self { usr, target: place.join("target"), libraries };
        let version =
            Command::new(compiler.rustc()).arg("--version").env("LD_LIBRARY_PATH", &compiler.libraries).output();
        match version {
            Ok(output) if output.status.success() => Ok(compiler),
            Ok(output) => Err(String::from_utf8_lossy(&output.stderr).trim().to_owned()),
            Err(error) => Err(format!("{} cannot be run: {error}", compiler.rustc().display())),
        }
    }

    fn rustc(&self) -> PathBuf {
        self.usr.join("bin/rustc")
    }

    fn equip(&self, check: crate::command::Cargo) -> crate::command::Cargo {
        let mut path = vec![self.usr.join("bin")];
        path.extend(env::var_os("PATH").iter().flat_map(env::split_paths));
        let path = env::join_paths(path).unwrap_or_default();
        // A stable compiler builds its own standard library only if this variable allows it.
        check
            .env("RUSTC", self.rustc())
            .env("RUSTC_BOOTSTRAP", "1")
            .env("LD_LIBRARY_PATH", &self.libraries)
            .env("PATH", path)
            .env("CARGO_TARGET_DIR", &self.target)
    }
}

/// The available version of the compiler.
fn available() -> Result<String, String> {
    let show = || {
        let output = Command::new("apt-cache").args(["show", "--no-all-versions", "rustc-web"]).output().ok()?;
        field(&String::from_utf8_lossy(&output.stdout), "Version")
    };
    let found = show().or_else(|| {
        // There may be no package lists yet, and we may be allowed to fetch them.
        drop(Command::new("apt-get").args(["-qq", "update"]).status());
        show()
    });
    found.ok_or_else(|| "there is no package rustc-web; `apt-get update` may find it".to_owned())
}

/// The first line of a package's description that begins with this name.
fn field(description: &str, name: &str) -> Option<String> {
    description.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(": ")).map(str::to_owned)
}

fn download(fresh: &Path, series: &str) -> Result<(), String> {
    let std = format!("libstd-rust-web-{series}");
    let shown = output(Command::new("apt-cache").args(["show", "--no-all-versions", &std]))?;
    let depends = field(&shown, "Depends").unwrap_or_default();
    let llvm = depends.split([',', ' ']).find(|word| word.starts_with("libllvm")).unwrap_or_default().to_owned();
    let packages = ["rustc-web", &std, "libstd-rust-web-dev", "rust-web-src", "binutils-mingw-w64-x86-64", &llvm];
    output(Command::new("apt-get").arg("-qq").arg("download").args(packages).current_dir(fresh))?;
    let entries = fs::read_dir(fresh).map_err(|error| format!("{}: {error}", fresh.display()))?;
    for entry in entries {
        let package = entry.map_err(|error| error.to_string())?.path();
        if package.extension().is_some_and(|extension| extension == "deb") {
            output(Command::new("dpkg").arg("-x").arg(&package).arg(fresh))?;
            fs::remove_file(&package).map_err(|error| format!("{}: {error}", package.display()))?;
        }
    }
    Ok(())
}

/// The folders with the compiler's libraries: its own, and one of LLVM's.
fn library_folders(usr: &Path) -> Vec<PathBuf> {
    let lib = usr.join("lib");
    let folders = fs::read_dir(&lib).into_iter().flatten().flatten().map(|entry| entry.path());
    folders.flat_map(|folder| [folder.join("lib"), folder]).filter(|folder| folder.is_dir()).collect()
}

fn output(command: &mut Command) -> Result<String, String> {
    let name = command.get_program().to_string_lossy().into_owned();
    let output = command.output().map_err(|error| format!("{name} cannot be run: {error}"))?;
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
    }
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    Err(format!("{name} failed: {}", said.lines().last().unwrap_or_default()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_crate_that_is_checked_is_one_of_ours() {
        let workspace = Workspace::load().unwrap();
        for name in CRATES {
            assert!(workspace.packages.iter().any(|package| package.short_name() == name), "{name}");
        }
        assert!(features(&workspace, "atomic-fs").contains("cancel-safe-atomic-fs/json"));
        assert!(!features(&workspace, "resumable").contains(LEFT_OUT));
        assert!(workspace.find("resumable").unwrap().single_features().any(|feature| feature == LEFT_OUT));
    }

    #[test]
    fn a_field_is_found_by_its_whole_name() {
        let description = "Package: rustc-web\nVersion: 1.96.0+dfsg1\nDepends: libc6 (>= 2.34), libllvm22\n";
        assert_eq!(field(description, "Version").as_deref(), Some("1.96.0+dfsg1"));
        assert_eq!(field(description, "Vers"), None);
    }
}
