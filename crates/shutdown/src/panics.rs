//! Panics: the message and the place. A panic caught here is never lost, whatever its payload does when it is dropped.

use std::any::Any;
use std::borrow::Cow;
use std::cell::{Cell, RefCell};
use std::fmt;
use std::panic::{AssertUnwindSafe, Location, PanicHookInfo, catch_unwind, set_hook, take_hook};
use std::sync::Once;

/// A place in the source: of a panic, or of the task that panicked.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct PanicLocation(
    // Boxed, because every outcome has room for it, and few are panics.
    Box<Place>,
);

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct Place {
    file: Box<str>,
    line: u32,
    column: u32,
}

impl PanicLocation {
    /// Returns the name of the source file.
    pub fn file(&self) -> &str {
        &self.0.file
    }

    /// Returns the line, counted from one.
    pub fn line(&self) -> u32 {
        self.0.line
    }

    /// Returns the column, counted from one.
    pub fn column(&self) -> u32 {
        self.0.column
    }
}

impl From<&Location<'_>> for PanicLocation {
    fn from(location: &Location<'_>) -> Self {
        let (file, line, column) = (location.file().into(), location.line(), location.column());
        Self(Box::new(Place { file, line, column }))
    }
}

impl fmt::Display for PanicLocation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}:{}", self.file(), self.line(), self.column())
    }
}

/// A panic that was caught. If it is resumed and caught again, it is unchanged.
#[derive(Debug)]
pub(crate) struct Panic {
    pub(crate) message: String,
    /// Unknown if the program has replaced the hook since.
    pub(crate) location: Option<PanicLocation>,
}

thread_local! {
    /// The number of panics that began on this thread. It has no destructor, so reading it is a plain load.
    static COUNT: Cell<u64> = const { Cell::new(0) };
    static LAST: RefCell<Option<PanicLocation>> = const { RefCell::new(None) };
}

/// Sees to it that the places of panics are known from now on: only the hook is told them. The hook of the program is
/// called as before.
#[inline]
pub(crate) fn watch() {
    static WATCHED: Once = Once::new();
    if !WATCHED.is_completed() {
        set_once(&WATCHED);
    }
}

#[cold]
fn set_once(watched: &Once) {
    // A hook cannot be set while its thread panics. The next task is early enough.
    if std::thread::panicking() {
        return;
    }
    watched.call_once(|| {
        let before = take_hook();
        set_hook(Box::new(move |info| {
            note(info);
            before(info);
        }));
    });
}

fn note(info: &PanicHookInfo<'_>) {
    COUNT.set(COUNT.get().wrapping_add(1));
    let location = info.location().map(PanicLocation::from);
    // A thread that is being torn down, or that panics inside this hook, cannot store the place.
    let _kept = LAST.try_with(|last| last.try_borrow_mut().map(|mut last| *last = location));
}

/// Runs `call` and catches its panic.
pub(crate) fn catch<R>(call: impl FnOnce() -> R) -> Result<R, Panic> {
    let before = COUNT.get();
    // The callers drop, unread, whatever state the panic may have broken, so unwinding past it is safe.
    catch_unwind(AssertUnwindSafe(call)).map_err(|payload| {
        // A payload that was merely resumed here panicked elsewhere.
        let is_ours = COUNT.get() != before;
        let location = if is_ours { LAST.try_with(|last| last.take()).ok().flatten() } else { None };
        Panic::read(payload, location)
    })
}

impl Panic {
    fn read(payload: Box<dyn Any + Send>, location: Option<PanicLocation>) -> Self {
        let payload = match payload.downcast::<Self>() {
            Ok(panic) => return *panic,
            Err(payload) => payload,
        };
        // The payload's text may be the user's own, and panic too.
        let message = catch_unwind(AssertUnwindSafe(|| message(&*payload))).unwrap_or_else(|again| {
            std::mem::forget(again);
            "a payload whose text panics".to_owned()
        });
        let panic = Self { message, location };
        if let Err(again) = catch_unwind(AssertUnwindSafe(|| drop(payload))) {
            // The payload's destructor panicked. The new payload is forgotten, because its destructor might panic too.
            std::mem::forget(again);
        }
        panic
    }
}

/// The text of a payload, or what type it has.
fn message(payload: &(dyn Any + Send)) -> String {
    macro_rules! values {
        ($($type:ty),*) => {
            $(if let Some(value) = payload.downcast_ref::<$type>() {
                return format!("a value of type {}: {value}", std::any::type_name::<$type>());
            })*
        };
    }
    if let Some(text) = payload.downcast_ref::<&str>() {
        return (*text).to_owned();
    }
    if let Some(text) = payload.downcast_ref::<String>() {
        return text.clone();
    }
    if let Some(text) = payload.downcast_ref::<Cow<'static, str>>() {
        return text.clone().into_owned();
    }
    if let Some(text) = payload.downcast_ref::<Box<str>>() {
        return text.clone().into_string();
    }
    values!(Box<dyn std::error::Error + Send + Sync>, Box<dyn std::error::Error + Send>, std::io::Error);
    values!(bool, char, i32, i64, u8, u16, u32, u64, usize);
    format!("a payload that is no text: {:?}", payload.type_id())
}

#[cfg(test)]
mod tests {
    use std::panic::{panic_any, resume_unwind};

    use super::*;

    struct Bomb;

    impl Drop for Bomb {
        fn drop(&mut self) {
            panic_any(Self);
        }
    }

    #[test]
    fn a_panic_says_its_message_or_type_and_its_own_place() {
        watch();
        let line = line!() + 1;
        let text = catch(|| panic!("oh {}", "no")).expect_err("it panics");
        assert_eq!((text.message.as_str(), text.location.map(|location| location.line())), ("oh no", Some(line)));

        let number = catch(|| panic_any(7_i32)).expect_err("it panics");
        assert_eq!(number.message, "a value of type i32: 7");
        let error = catch(|| panic_any(std::io::Error::other("disk full"))).expect_err("it panics");
        assert_eq!(error.message, "a value of type std::io::error::Error: disk full");
        let unknown = catch(|| panic_any(Cell::new(7))).expect_err("it panics");
        assert!(unknown.message.starts_with("a payload that is no text: TypeId("), "{}", unknown.message);
    }

    #[test]
    fn a_payload_whose_destructor_panics_for_ever_is_still_one_panic() {
        watch();
        let line = line!() + 1;
        let panic = catch(|| panic_any(Bomb)).expect_err("it panics");
        assert_eq!(panic.location.map(|location| location.line()), Some(line));
    }

    #[test]
    fn a_panic_that_is_handed_on_keeps_its_place_and_another_one_has_none_from_here() {
        watch();
        let line = line!() + 1;
        let first = catch(|| panic!("first")).expect_err("it panics");
        let again = catch(|| resume_unwind(Box::new(first))).expect_err("it panics");
        assert_eq!((again.message.as_str(), again.location.map(|location| location.line())), ("first", Some(line)));

        assert!(catch_unwind(|| panic!("caught by somebody else")).is_err());
        let resumed = catch(|| resume_unwind(Box::new("elsewhere"))).expect_err("it panics");
        assert_eq!((resumed.message.as_str(), resumed.location), ("elsewhere", None));
    }
}
