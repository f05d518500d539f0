//! Async Rust that survives being dropped.

#[cfg(feature = "atomic-fs")]
pub use cancel_safe_atomic_fs as atomic_fs;
#[cfg(feature = "guard")]
pub use cancel_safe_guard as guard;
#[cfg(feature = "http-timeout")]
pub use cancel_safe_http_timeout as http_timeout;
#[cfg(feature = "resumable")]
pub use cancel_safe_resumable as resumable;
#[cfg(feature = "shutdown")]
pub use cancel_safe_shutdown as shutdown;
#[cfg(feature = "testing")]
pub use cancel_safe_testing as testing;
#[cfg(feature = "tx-guard")]
pub use cancel_safe_tx_guard as tx_guard;
