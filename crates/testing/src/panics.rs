//! Panics in explored code are printed once.
//!
//! Invariant: a panic is left out only if one from the same line in the same exploration was already printed; every
//! other panic of the program reaches the previous hook.

use std::cell::RefCell;
use std::collections::BTreeSet;
use std::panic::{self, Location};
use std::sync::{Arc, Mutex, Once};

use crate::lock::lock;

/// The lines whose panic has been printed.
pub(crate) type Printed = Arc<Mutex<BTreeSet<(String, u32, u32)>>>;

thread_local! {
    /// The printed lines of this thread's exploration.
    static PRINTED: RefCell<Option<Printed>> = const { RefCell::new(None) };
}

/// The printed lines of the exploration on this thread, for the other threads of its runtimes.
pub(crate) fn printed() -> Option<Printed> {
    PRINTED.with_borrow(Clone::clone)
}

/// Makes this thread part of the exploration.
pub(crate) fn join(printed: Option<&Printed>) {
    PRINTED.set(printed.cloned());
}

/// While this lives, a panic on this thread is printed only the first time: each run of an exploration repeats it, and
/// the report counts them.
#[derive(Debug)]
pub(crate) struct Quietly(());

impl Quietly {
    pub(crate) fn begin() -> Self {
        static HOOK: Once = Once::new();
        HOOK.call_once(|| {
            let before = panic::take_hook();
            panic::set_hook(Box::new(move |info| {
                if info.location().is_none_or(is_news) {
                    before(info);
                }
            }));
        });
        PRINTED.set(Some(Arc::default()));
        Self(())
    }
}

impl Drop for Quietly {
    fn drop(&mut self) {
        PRINTED.set(None);
    }
}

fn is_news(location: &Location<'_>) -> bool {
    let is_news = |printed: &RefCell<Option<Printed>>| match printed.borrow().as_ref() {
        Some(printed) => lock(printed).insert((location.file().to_owned(), location.line(), location.column())),
        None => true,
    };
    PRINTED.try_with(is_news).unwrap_or(true)
}
