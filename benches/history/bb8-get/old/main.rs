//! The pool of 0.6, which opens its connections on its own version of tokio.

#[path = "../case.rs"]
mod case;

use tokio_03::runtime::Builder;

fn main() {
    let runtime = Builder::new_multi_thread().worker_threads(1).enable_time().build().expect("threads can be started");
    let _context = runtime.enter();
    case::explore();
}
