//! The command `resumable`.
//!
//! Invariant: all it does is in the library's room `cli`; here are only the arguments, the streams and the exit code.

use std::process::ExitCode;

fn main() -> ExitCode {
    cancel_safe_resumable::cli::main()
}
