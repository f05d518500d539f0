//! All operations, in the order of the page.
//!
//! Invariant: an operation and the way it is called stand here once.

mod channels;
mod codec;
mod fs;
mod futures;
mod locks;
mod net;
mod process;
mod reading;
mod streams;
mod time;
mod writing;

use crate::row::{Group, Row};

pub(crate) fn all() -> Vec<Group> {
    let group = |title, rows: [Vec<Row>; 2]| Group { title, rows: rows.into_iter().flatten().collect() };
    vec![
        group("Reading", [reading::unbuffered(), reading::buffered()]),
        group("Writing and copying", [writing::pieces(), writing::copies()]),
        group("Channels", [channels::mpsc(), channels::others()]),
        group("Locks and meetings", [locks::in_turn(), locks::together()]),
        group("Time and tasks", [time::timers(), time::tasks()]),
        group(
            "Sockets, processes and signals",
            [net::tcp(), net::others().into_iter().chain(process::rows()).collect()],
        ),
        group("Files", [fs::open_files(), fs::paths()]),
        group("Frames and bridges", [codec::frames(), codec::bridges()]),
        group("Streams", [streams::adaptors(), streams::consumers()]),
        group("Sinks and combinators", [futures::sinks(), futures::combinators()]),
    ]
}
