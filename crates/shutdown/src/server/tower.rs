//! One door for every tower service, tonic's among them: a server whose connections end with their worker, and a token for
//! each request.

pub use crate::server::request::{CancellationLayer, CancellationService, WatchedBody, WatchedResponse};
pub use crate::server::{Listener, serve};
