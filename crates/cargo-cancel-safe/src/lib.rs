//! The awaits of a crate, and which of them were ever dropped: the parts of the command `cargo cancel-safe`.
//!
//! **This library has no stable API.** It exists so that the command and the tasks of its own workspace can share code;
//! any version may change all of it. Use the command; its `--json` output is for programs.
//!
//! A future can be dropped at each of its awaits. `cancel-safe-testing` drops it there and records the dropped awaits
//! in the file named by `CANCEL_SAFE_COVERAGE`. This library finds all awaits in the source, and reports which were
//! never dropped.
//!
//! ```no_run
//! use cargo_cancel_safe::{Coverage, Record, Selection, Workspace, report};
//!
//! # fn main() -> Result<(), cargo_cancel_safe::Error> {
//! let selection = Selection::default();
//! let workspace = Workspace::load(&selection)?;
//! let mut scanned = Vec::new();
//! for package in workspace.choose(&selection)? {
//!     scanned.push((package.name().to_owned(), package.scan()?));
//! }
//! let record = Record::read("target/cancel-safe/coverage.txt".as_ref())?;
//! let coverage = Coverage::new(scanned, &record, workspace.root());
//! println!("{}", report::table(&coverage, workspace.root()));
//! # Ok(())
//! # }
//! ```
//!
//! It has the limitations of the command; see the README and `cargo cancel-safe --help`.

mod coverage;
mod error;
mod macros;
mod package;
mod place;
mod record;
pub mod report;
mod scanner;
mod workspace;

pub use crate::coverage::{Counted, Coverage, Figures, Package as PackageCoverage, Unattributed};
pub use crate::error::Error;
pub use crate::package::File;
pub use crate::place::{Await, AwaitKind, Position, Reason};
pub use crate::record::{COVERAGE_VARIABLE, Record};
pub use crate::workspace::{Package, Selection, Workspace, cargo};
