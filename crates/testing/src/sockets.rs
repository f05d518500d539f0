//! How many sockets (and pipes, and child processes) the runtime waits for: only these, and threads that tokio does not
//! know, can cause a wake-up when no task, timer or blocking job can.
//!
//! Invariant: it says "none" only if that is known. Tokio does not tell, so this reads what Linux reports about the
//! epoll instance in which one of our sockets appears; on other systems it is never known.

use std::sync::OnceLock;

/// Whether it is known that the current runtime waits for no socket. Must be called on the runtime.
pub(crate) fn are_none() -> bool {
    count() == Some(0)
}

/// How many sockets the current runtime waits for, if that is known. Must be called on the runtime.
pub(crate) fn count() -> Option<usize> {
    /// How many descriptors a runtime watches by itself.
    static OWN: OnceLock<Option<usize>> = OnceLock::new();
    let own = *OWN.get_or_init(|| {
        // A runtime cannot be entered from within another one on the same thread.
        let count = || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().ok()?;
            runtime.block_on(async { watched() })
        };
        std::thread::scope(|scope| scope.spawn(count).join().ok().flatten())
    });
    Some(watched()?.saturating_sub(own?))
}

/// How many descriptors the runtime watches, besides the pair that finds this out.
#[cfg(target_os = "linux")]
fn watched() -> Option<usize> {
    use std::os::fd::AsRawFd as _;

    let (ours, _other) = tokio::net::UnixStream::pair().ok()?;
    let ours = ours.as_raw_fd();
    for entry in std::fs::read_dir("/proc/self/fdinfo").ok()?.flatten() {
        // A descriptor of another thread may be gone by now.
        let Ok(text) = std::fs::read_to_string(entry.path()) else { continue };
        let watched: Vec<i32> = text
            .lines()
            .filter_map(|line| line.strip_prefix("tfd:")?.split_whitespace().next()?.parse().ok())
            .collect();
        if watched.contains(&ours) {
            return Some(watched.len());
        }
    }
    None
}

#[cfg(not(target_os = "linux"))]
fn watched() -> Option<usize> {
    None
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use super::*;

    #[test]
    fn a_socket_is_seen_and_a_timer_is_none() {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
        runtime.block_on(async {
            let timer = tokio::time::sleep(std::time::Duration::from_secs(60));
            assert!(are_none());
            let pair = tokio::net::UnixStream::pair().expect("two sockets");
            assert!(!are_none());
            drop(pair);
            assert!(are_none());
            drop(timer);
        });
    }
}
