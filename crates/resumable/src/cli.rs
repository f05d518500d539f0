//! The command `resumable`: looks at checkpoint files, and compacts them.
//!
//! Invariant: only `compact` writes, and every failure is one line that says what to do, with the exit code that the
//! help promises.

use std::{
    fs::{self, File, TryLockError},
    io::{self, Write},
    path::{Path, PathBuf},
    process::ExitCode,
    time::Duration,
};

use clap::{Parser, Subcommand};

use crate::{
    checkpoint::Checkpoint,
    error::TaskError,
    log::FOREIGN,
    store::{Compacted, FileStore},
};

mod export;
mod follow;
mod inspect;
mod json;

const EXIT_CODES: &str = "\
Exit codes:
  0  all is well
  1  a file is damaged
  2  the command was called wrongly
  3  a file could not be read or written, is not a checkpoint, or needs a newer program
  4  a run holds the file
  5  the results cannot be exported";

#[derive(Debug, Parser)]
#[command(name = "resumable", version, about = "Looks at the checkpoints of long computations, and compacts them.", after_help = EXIT_CODES)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Says what a checkpoint belongs to and how far it has come
    Inspect {
        /// The checkpoint
        file: PathBuf,
    },
    /// Reads whole checkpoints and checks every byte
    Verify {
        /// The checkpoints
        #[arg(required = true)]
        files: Vec<PathBuf>,
    },
    /// Writes the finished items as JSON lines, in the order of the input, or of the file if the job has keys
    Export {
        /// The checkpoint
        file: PathBuf,
    },
    /// Rewrites a checkpoint with only what counts. If killed at any point, it leaves the old file or the new one
    Compact {
        /// The checkpoint; no run may hold it
        file: PathBuf,
    },
    /// Shows the progress of a checkpoint that another process writes, until it is complete. If the run stops, it waits
    /// for the run to go on
    Follow {
        /// The checkpoint
        file: PathBuf,
        /// The total number of items, for the percentage and the time left
        #[arg(long, value_name = "ITEMS")]
        total: Option<usize>,
        /// Seconds between two looks at the file; without a terminal, between two lines
        #[arg(long, default_value_t = 1.0, value_parser = seconds, value_name = "SECONDS")]
        every: f64,
    },
}

/// Parses an interval: from a hundred looks a second to one a day.
fn seconds(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(seconds) if (0.01..=86_400.0).contains(&seconds) => Ok(seconds),
        _ => Err("give a number of seconds from 0.01 to 86400".to_owned()),
    }
}

/// Why a command failed. It determines the exit code.
#[derive(Debug, thiserror::Error)]
enum Failure {
    #[error(transparent)]
    Task(#[from] TaskError),
    #[error("checkpoint {} cannot be exported: {why}", path.display())]
    NotExported { path: PathBuf, why: String },
    #[error("cannot write the output: {0}")]
    Output(#[from] io::Error),
}

impl Failure {
    fn exit_code(&self) -> u8 {
        match self {
            Self::Task(TaskError::Corrupt { detail: FOREIGN, .. }) => 3,
            Self::Task(TaskError::Corrupt { .. }) => 1,
            Self::Task(TaskError::Busy { .. }) => 4,
            Self::Task(_) | Self::Output(_) => 3,
            Self::NotExported { .. } => 5,
        }
    }
}

/// Runs the command that the arguments of the process ask for.
#[must_use]
pub fn main() -> ExitCode {
    let arguments = match Arguments::try_parse() {
        Ok(arguments) => arguments,
        Err(usage) => {
            // If this cannot be printed, there is nowhere left to say so.
            drop(usage.print());
            return if usage.use_stderr() { ExitCode::from(2) } else { ExitCode::SUCCESS };
        }
    };
    let mut out = io::BufWriter::new(io::stdout().lock());
    let ended = run(&arguments.command, &mut out).and_then(|code| Ok(out.flush().map(|()| code)?));
    match ended {
        Ok(code) => ExitCode::from(code),
        // The reader has seen enough, as `head` does.
        Err(Failure::Output(error)) if error.kind() == io::ErrorKind::BrokenPipe => ExitCode::SUCCESS,
        Err(failure) => {
            tell(&failure);
            ExitCode::from(failure.exit_code())
        }
    }
}

fn run(command: &Command, out: &mut dyn Write) -> Result<u8, Failure> {
    match command {
        Command::Inspect { file } => inspect::inspect(file, out)?,
        Command::Verify { files } => return verify(files, out),
        Command::Export { file } => export::export(file, out)?,
        Command::Compact { file } => compact(file, out)?,
        Command::Follow { file, total, every } => {
            follow::follow(file, *total, Duration::from_secs_f64(*every), out)?;
        }
    }
    Ok(0)
}

/// Checks all files, even after one has failed, and returns the first exit code that is not 0.
fn verify(files: &[PathBuf], out: &mut dyn Write) -> Result<u8, Failure> {
    let mut code = 0;
    for file in files {
        let verified = match inspect::verify(file, out) {
            Err(Failure::Output(error)) => return Err(error.into()),
            verified => verified,
        };
        if let Err(failure) = verified {
            out.flush()?;
            tell(&failure);
            code = if code == 0 { failure.exit_code() } else { code };
        }
    }
    Ok(code)
}

fn compact(path: &Path, out: &mut dyn Write) -> Result<(), Failure> {
    must_be_file(path)?;
    let Compacted { before_bytes, after_bytes } = FileStore::at(path).compact()?;
    Ok(writeln!(out, "{}: {before_bytes} bytes before, {after_bytes} bytes now", path.display())?)
}

#[expect(clippy::print_stderr, reason = "a command speaks through its output")]
fn tell(failure: &Failure) {
    eprintln!("resumable: {failure}");
}

/// Reads a checkpoint, and changes nothing.
fn open(path: &Path) -> Result<Checkpoint<()>, TaskError> {
    must_be_file(path)?;
    Checkpoint::read(path)
}

/// Opening a pipe would block.
fn must_be_file(path: &Path) -> Result<(), TaskError> {
    if fs::metadata(path).map_err(|error| TaskError::io("open checkpoint", path, error))?.is_file() {
        return Ok(());
    }
    let error = io::Error::new(io::ErrorKind::InvalidInput, "it is not a regular file");
    Err(TaskError::io("read checkpoint", path, error))
}

/// Whether a run holds the file. Tries to take the lock, shared, and releases it at once.
fn is_held(path: &Path) -> bool {
    match File::open(path) {
        Ok(file) => matches!(file.try_lock_shared(), Err(TryLockError::WouldBlock)),
        Err(_) => false,
    }
}
