//! A tonic gRPC server as a worker: its streams end with it, and with their callers.
//!
//! ```text
//! cargo run -p cancel-safe-examples --example grpc
//! ```
//!
//! Stop it with Ctrl-C: streams that check their token end in order, and the others at the deadline.

use std::process::ExitCode;
use std::time::Duration;

use cancel_safe_examples::ticks::{Tick, TickStream, Ticks, TicksServer, WatchRequest};
use cancel_safe_shutdown::{Application, WorkerContext};
use futures_util::stream;
use tokio::net::TcpListener;
use tokio::time::sleep;
use tokio_util::sync::CancellationToken;
use tonic::service::Routes;
use tonic::{Request, Response, Status};

struct Clock;

impl Ticks for Clock {
    async fn watch(&self, request: Request<WatchRequest>) -> Result<Response<TickStream>, Status> {
        // Cancelled when the caller goes away, at the `grpc-timeout`, and on shutdown.
        let token = request.extensions().get::<CancellationToken>().cloned();
        let token = token.ok_or_else(|| Status::internal("the server gives each request a token"))?;
        let period = Duration::from_millis(request.into_inner().period_ms.max(1));
        let ticks = stream::unfold((0, token), move |(number, token)| async move {
            token.run_until_cancelled(sleep(period)).await?;
            Some((Ok(Tick { number }), (number + 1, token)))
        });
        Ok(Response::new(Box::pin(ticks)))
    }
}

async fn grpc(cx: WorkerContext) -> Result<(), std::io::Error> {
    let listener = TcpListener::bind("127.0.0.1:50051").await?;
    let service = Routes::new(TicksServer::new(Clock)).prepare();
    cancel_safe_shutdown::tower::serve(listener, service, cx).await
}

fn main() -> ExitCode {
    Application::new("clock").worker("grpc", grpc).shutdown_timeout(Duration::from_secs(10)).run()
}
