//! The command `resumable`.
//!
//! Invariant: all its work is done in the library's room `cli`; this file has only the arguments, the streams and the
//! exit code.

use std::process::ExitCode;

fn main() -> ExitCode {
    cancel_safe_resumable::cli::main()
}
