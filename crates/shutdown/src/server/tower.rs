//! The module for every tower service, including tonic's: a server whose connections end with their worker, and a token
//! for each request.

pub use crate::server::request::{CancellationLayer, CancellationService, WatchedBody, WatchedResponse};
pub use crate::server::{Listener, serve};
