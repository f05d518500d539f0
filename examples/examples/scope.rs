//! Structured concurrency compared with async-scoped: borrowing tasks and owning tasks count the same words.
//!
//! ```text
//! cargo run -p cancel-safe-examples --example scope
//! ```
//!
//! | | async-scoped, `scope_and_block` | `TaskGroup::scope` |
//! |---|---|---|
//! | tasks borrow from the caller | yes | no: they own, or share by an `Arc` |
//! | while it waits | its thread is blocked | other tasks run on its thread |
//! | on a runtime with one thread | it panics | it works |
//! | under a timeout, in a `select!` | it cannot be dropped, so neither has any effect | its tasks are dropped with it |
//! | a task that fails | is one result among others | may end the others |
//!
//! No scope can have both: a future that lends to its tasks may be leaked, and then they outlive what they borrow. So a
//! safe scope either blocks or owns its data. To borrow without tasks, join the futures: `guard::join_then_try`.
#![expect(clippy::print_stdout, reason = "an example speaks through its output")]

use cancel_safe_examples::scope::{borrowing, owning};
use cancel_safe_shutdown::BoxError;

#[tokio::main]
async fn main() -> Result<(), BoxError> {
    let texts: Vec<String> = ["to be or not", "not to be", "or to be"].map(String::from).into();
    println!("borrowed: {:?}", borrowing(&texts));
    println!("owned:    {:?}", owning(texts).await?);
    Ok(())
}
