//! Why a package cannot be scanned, or its coverage be read.
//!
//! Invariant: each message names the file, package or command that was wrong.

use std::io;
use std::path::PathBuf;

/// Why a package cannot be scanned, or its coverage be read.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// `cargo metadata` failed.
    #[error("cargo metadata failed: {stderr}")]
    Metadata {
        /// What it printed.
        stderr: String,
    },
    /// A program could not be started.
    #[error("`{command}` cannot be run: {source}")]
    Command {
        /// The program with its arguments.
        command: String,
        /// Why.
        source: io::Error,
    },
    /// A package was asked for that is not in the workspace.
    #[error("there is no package `{spec}` in this workspace; it has {known}")]
    NoPackage {
        /// As it was asked for.
        spec: String,
        /// The names of the packages.
        known: String,
    },
    /// A file cannot be read or written.
    #[error("{}: {source}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A source file is not understood.
    #[error("{}:{line}:{column}: cannot be parsed: {message}", path.display())]
    Syntax {
        /// The file.
        path: PathBuf,
        /// From 1.
        line: usize,
        /// From 1.
        column: usize,
        /// What was expected.
        message: String,
    },
    /// A module has no file.
    #[error("{}: `mod {module};` has no file; looked for {looked_for}", path.display())]
    NoModule {
        /// The file that declares it.
        path: PathBuf,
        /// Its name.
        module: String,
        /// The files that it could have.
        looked_for: String,
    },
}

impl Error {
    pub(crate) fn file(path: impl Into<PathBuf>) -> impl FnOnce(io::Error) -> Self {
        let path = path.into();
        |source| Self::File { path, source }
    }
}
