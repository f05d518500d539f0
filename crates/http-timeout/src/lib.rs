//! A reqwest client with one deadline and bounded load, and a circuit breaker that cannot stick.

mod body;
mod breaker;
mod circuit;
mod client;
mod config;
mod deadline;
mod error;
mod limit;
mod many;
mod origins;
mod request;
mod retry;
mod window;

pub use breaker::{BreakerError, BreakerMetrics, BreakerPermit, CircuitBreaker, CircuitOpen, Class, State, Transition};
pub use client::{Attempts, ClientMetrics, TimeoutClient, TimeoutClientBuilder};
pub use config::{BreakerConfig, BreakerConfigBuilder, BreakerWindow};
pub use error::{BuildError, Phase, RequestError};
pub use many::{FetchMany, Fetched};
pub use origins::BreakerMap;
pub use request::RequestBuilder;
pub use retry::Retry;
