//! The source files of a package: from the roots of its library and binaries along the `mod` declarations.
//!
//! Invariant: every file that the compiler would read is read or causes an error; a file that belongs to tests is not
//! read.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use crate::error::Error;
use crate::place::{Await, Source};
use crate::scanner::{self, Declaration};

/// A source file and its awaits.
#[derive(Debug)]
pub struct File {
    path: PathBuf,
    pub(crate) source: Source,
}

impl File {
    /// The file, with symbolic links resolved.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Its awaits, in their order.
    #[must_use]
    pub fn awaits(&self) -> &[Await] {
        &self.source.awaits
    }
}

/// A file to read.
struct Room {
    path: PathBuf,
    /// The directory in which the files of its modules are.
    children: PathBuf,
}

impl Room {
    /// A crate's root, or a file that is named by `#[path]`: its modules are beside it.
    fn root(path: PathBuf) -> Self {
        let children = parent(&path).to_owned();
        Self { path, children }
    }

    /// The file of a module that was found by its name: its modules are in a directory of that name.
    fn named(path: PathBuf) -> Self {
        if path.file_name().is_some_and(|name| name == "mod.rs") {
            return Self::root(path);
        }
        let children = path.with_extension("");
        Self { path, children }
    }
}

/// Reads all files that the roots lead to, in the order of their paths.
pub(crate) fn scan(roots: &[PathBuf]) -> Result<Vec<File>, Error> {
    let mut rooms: Vec<Room> = roots.iter().cloned().map(Room::root).collect();
    let mut seen = BTreeSet::new();
    let mut files = Vec::new();
    while let Some(room) = rooms.pop() {
        // Two targets may share a module, and `#[path]` may lead in a circle.
        let path = fs::canonicalize(&room.path).map_err(Error::file(&room.path))?;
        if !seen.insert(path.clone()) {
            continue;
        }
        let text = fs::read_to_string(&path).map_err(Error::file(&path))?;
        let (source, declarations) = scanner::scan(&text).map_err(|error| {
            let at = error.span().start();
            Error::Syntax { path: path.clone(), line: at.line, column: at.column + 1, message: error.to_string() }
        })?;
        for declaration in &declarations {
            rooms.extend(follow(&room, declaration)?);
        }
        files.push(File { path, source });
    }
    files.sort_by(|a, b| a.path.cmp(&b.path));
    Ok(files)
}

/// The files of a module: more than one where `#[cfg_attr(…, path = "…")]` gives each system its own.
fn follow(from: &Room, declaration: &Declaration) -> Result<Vec<Room>, Error> {
    let inside = |base: &Path| declaration.inside.iter().fold(base.to_owned(), |path, part| path.join(part));
    let by_name = inside(&from.children);
    // `#[path]` starts at the directory of the file, or of the inline module around it.
    let by_path = if declaration.inside.is_empty() { parent(&from.path).to_owned() } else { by_name.clone() };
    if let Some(path) = &declaration.path {
        let path = by_path.join(path);
        return match path.is_file() || !declaration.is_conditional {
            true => Ok(vec![Room::root(path)]),
            false => Ok(Vec::new()),
        };
    }
    let named = [by_name.join(format!("{}.rs", declaration.name)), by_name.join(&declaration.name).join("mod.rs")];
    let perhaps = declaration.perhaps.iter().map(|path| by_path.join(path));
    let mut rooms: Vec<Room> = perhaps.filter(|path| path.is_file()).map(Room::root).collect();
    rooms.extend(named.iter().find(|path| path.is_file()).cloned().map(Room::named));
    // A module that is switched off here may be generated elsewhere.
    if rooms.is_empty() && !declaration.is_conditional {
        let looked_for: Vec<String> = named.iter().map(|path| path.display().to_string()).collect();
        return Err(Error::NoModule {
            path: from.path.clone(),
            module: declaration.name.clone(),
            looked_for: looked_for.join(" and "),
        });
    }
    Ok(rooms)
}

fn parent(path: &Path) -> &Path {
    path.parent().unwrap_or(path)
}
