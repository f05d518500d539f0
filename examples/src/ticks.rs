//! A gRPC service of one streaming call, written by hand as `tonic-prost-build` would generate it, which asks for `protoc`.
//! Invariant: nothing here knows about cancellation; handlers learn of it only through their requests.
//!
//! ```proto
//! service Ticks {
//!   rpc Watch(WatchRequest) returns (stream Tick);
//! }
//! ```

use std::convert::Infallible;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use futures_core::Stream;
use http::uri::PathAndQuery;
use tonic::body::Body;
use tonic::client::Grpc as Client;
use tonic::server::{Grpc as Server, NamedService, ServerStreamingService};
use tonic::transport::Channel;
use tonic::{Request, Response, Status, Streaming};
use tonic_prost::ProstCodec;
use tower_service::Service;

const WATCH: &str = "/ticks.Ticks/Watch";

/// The request: how often to tick.
#[derive(Clone, Copy, PartialEq, Eq, prost::Message)]
#[expect(clippy::exhaustive_structs, reason = "messages are written as literals")]
pub struct WatchRequest {
    /// The time between two ticks, in milliseconds.
    #[prost(uint64, tag = "1")]
    pub period_ms: u64,
}

/// One tick.
#[derive(Clone, Copy, PartialEq, Eq, prost::Message)]
#[expect(clippy::exhaustive_structs, reason = "messages are written as literals")]
pub struct Tick {
    /// Counted from zero.
    #[prost(uint64, tag = "1")]
    pub number: u64,
}

/// The stream that a server sends.
pub type TickStream = Pin<Box<dyn Stream<Item = Result<Tick, Status>> + Send>>;

/// A boxed future, because its own type has no name.
type Boxed<T> = Pin<Box<dyn Future<Output = T> + Send>>;

/// The service as a server implements it.
pub trait Ticks: Send + Sync + 'static {
    /// Answers with a stream.
    fn watch(
        &self,
        request: Request<WatchRequest>,
    ) -> impl Future<Output = Result<Response<TickStream>, Status>> + Send;
}

/// The service as it goes into tonic's `Routes`.
#[derive(Debug)]
pub struct TicksServer<T>(Arc<T>);

impl<T> TicksServer<T> {
    /// Serves what `ticks` answers.
    pub fn new(ticks: T) -> Self {
        Self(Arc::new(ticks))
    }
}

impl<T> Clone for TicksServer<T> {
    fn clone(&self) -> Self {
        Self(Arc::clone(&self.0))
    }
}

impl<T> NamedService for TicksServer<T> {
    const NAME: &'static str = "ticks.Ticks";
}

impl<T, B> Service<http::Request<B>> for TicksServer<T>
where
    T: Ticks,
    B: http_body::Body + Send + 'static,
    B::Error: Into<Box<dyn std::error::Error + Send + Sync>> + Send + 'static,
{
    type Response = http::Response<Body>;
    type Error = Infallible;
    type Future = Boxed<Result<Self::Response, Infallible>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: http::Request<B>) -> Self::Future {
        let watch = Watch(Arc::clone(&self.0));
        Box::pin(async move {
            if request.uri().path() != WATCH {
                return Ok(Status::unimplemented("there is one call").into_http());
            }
            Ok(Server::new(ProstCodec::<Tick, WatchRequest>::default()).server_streaming(watch, request).await)
        })
    }
}

struct Watch<T>(Arc<T>);

impl<T: Ticks> ServerStreamingService<WatchRequest> for Watch<T> {
    type Response = Tick;
    type ResponseStream = TickStream;
    type Future = Boxed<Result<Response<TickStream>, Status>>;

    fn call(&mut self, request: Request<WatchRequest>) -> Self::Future {
        let ticks = Arc::clone(&self.0);
        Box::pin(async move { ticks.watch(request).await })
    }
}

/// Calls the service.
///
/// # Errors
///
/// The server's status, or a status that says that it cannot be reached.
pub async fn watch(channel: Channel, request: Request<WatchRequest>) -> Result<Streaming<Tick>, Status> {
    let mut client = Client::new(channel);
    client.ready().await.map_err(|error| Status::unavailable(error.to_string()))?;
    let codec = ProstCodec::<WatchRequest, Tick>::default();
    client.server_streaming(request, PathAndQuery::from_static(WATCH), codec).await.map(Response::into_inner)
}

#[cfg(test)]
mod tests {
    use prost::Message as _;

    use super::*;

    #[test]
    fn the_messages_are_those_of_the_proto_file() {
        // Field 1, a varint: what any other implementation writes.
        assert_eq!(WatchRequest { period_ms: 300 }.encode_to_vec(), [0x08, 0xac, 0x02]);
        assert_eq!(Tick::decode(&[0x08, 0x07][..]), Ok(Tick { number: 7 }));
    }
}
