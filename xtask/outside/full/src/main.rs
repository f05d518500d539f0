//! Something from each crate, through the umbrella alone.

use cancel_safe::{atomic_fs, guard, http_timeout, resumable, shutdown, testing, tx_guard};

fn main() {
    drop(guard::Guard::new(|| ()));
    let _write = atomic_fs::write("settings.toml", "colour = 7");
    let _client = http_timeout::TimeoutClient::builder();
    let _retry = resumable::Retry::none();
    let _group = shutdown::TaskGroup::new();
    let _explore = testing::Explore::new();
    let _retry = tx_guard::Retry::none();
}
