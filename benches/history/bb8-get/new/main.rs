//! The pool of 0.7, on the tokio of the exploration.

#[path = "../case.rs"]
mod case;

fn main() {
    case::explore();
}
