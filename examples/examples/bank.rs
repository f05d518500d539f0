//! A bank over HTTP, and the chaos that tries it.
//!
//! ```text
//! cargo run -p cancel-safe-examples --example bank
//! cargo run -p cancel-safe-examples --example bank -- --database postgres://postgres@localhost/postgres
//! curl -X POST 127.0.0.1:8080/transfers -H 'content-type: application/json' \
//!     -d '{"key":"rent-may","from":1,"to":2,"amount":30}'
//! curl 127.0.0.1:8080/transfers/rent-may
//! cargo run -p cancel-safe-examples --example bank -- chaos --seconds 60
//! ```
//!
//! A transfer has five seconds, and a key that its client has chosen. Sent twice, it happens once, and the second answer is
//! the first. If the limit, a lost connection or a killed server cuts it, `GET /transfers/KEY` tells whether it was
//! committed, because the transaction that moves the money also writes the row of the key.
//!
//! `chaos` starts the server as a process of its own, sends transfers, drops connections half-way, kills the server and
//! starts it again. At the end it counts the money, and checks that each key has one outcome and none is unknown.
//! Otherwise the exit code is 1, as it is with `--broken`.
#![expect(clippy::print_stdout, clippy::print_stderr, reason = "an example speaks through its output")]

use std::process::ExitCode;

use cancel_safe_examples::bank::{Plan, Settings, chaos, serve};
use clap::{Parser, Subcommand};
use tokio::process::Command;
use tokio::runtime::Runtime;

/// A bank over HTTP
#[derive(Parser)]
#[command(args_conflicts_with_subcommands = true)]
struct Arguments {
    #[command(flatten)]
    settings: Settings,
    #[command(subcommand)]
    chaos: Option<Chaos>,
}

#[derive(Subcommand)]
enum Chaos {
    /// Try the bank: drop connections, cut limits, kill the server, and count the money at the end
    Chaos(Plan),
}

fn main() -> ExitCode {
    match Arguments::parse() {
        Arguments { settings, chaos: None } => serve(settings),
        Arguments { chaos: Some(Chaos::Chaos(plan)), .. } => match attack(plan) {
            Ok(true) => ExitCode::SUCCESS,
            Ok(false) => ExitCode::FAILURE,
            Err(error) => {
                eprintln!("failed: {error}");
                ExitCode::FAILURE
            }
        },
    }
}

fn attack(plan: Plan) -> Result<bool, Box<dyn std::error::Error + Send + Sync>> {
    let program = std::env::current_exe()?;
    let server = |arguments: &[String]| {
        let mut server = Command::new(&program);
        server.args(arguments);
        server
    };
    let report = Runtime::new()?.block_on(chaos(plan, server))?;
    println!("{report}");
    Ok(report.is_right())
}
