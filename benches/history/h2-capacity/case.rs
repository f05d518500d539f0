//! h2's `reserve_capacity`, on a stream that is dropped while it waits: does the next stream get all there is?

#[path = "../verdict.rs"]
mod verdict;

use std::future::poll_fn;
use std::time::Duration;

use bytes::Bytes;
use cancel_safe_testing::{Explore, Way};
use h2::SendStream;
use h2::client::{ResponseFuture, SendRequest};
use http::Request;
use tokio::io::DuplexStream;
use tokio::time::timeout;

/// The initial window that HTTP/2 grants a connection, and also a stream.
const WINDOW: usize = 65_535;

/// Accepts every stream, and reads nothing from it.
async fn serve(pipe: DuplexStream) -> Result<(), h2::Error> {
    let mut connection = h2::server::handshake(pipe).await?;
    let mut streams = Vec::new();
    while let Some(stream) = connection.accept().await {
        streams.push(stream?);
    }
    Ok(())
}

async fn open(client: &SendRequest<Bytes>) -> Result<(ResponseFuture, SendStream<Bytes>), h2::Error> {
    let mut client = client.clone().ready().await?;
    client.send_request(Request::post("http://localhost/").body(()).expect("it is valid"), false)
}

/// Waits until the stream may send a whole window.
async fn all_capacity(stream: &mut SendStream<Bytes>) -> Result<(), h2::Error> {
    stream.reserve_capacity(WINDOW);
    while stream.capacity() < WINDOW {
        poll_fn(|cx| stream.poll_capacity(cx)).await.transpose()?;
    }
    Ok(())
}

fn main() {
    // Not `Shutdown`: both ends of the connection are tasks of the setup.
    let report = Explore::new().paused_time(true).ways([Way::Eager, Way::Settled]).run(
        async || {
            let (near, far) = tokio::io::duplex(1 << 20);
            tokio::spawn(serve(far));
            let (client, connection) = h2::client::handshake(near).await.expect("the stub accepts everybody");
            tokio::spawn(connection);
            client
        },
        async |client| {
            let (_response, mut stream) = open(client).await?;
            all_capacity(&mut stream).await
        },
        async |client, _outcome| {
            let (_response, mut stream) = open(client).await.map_err(|error| error.to_string())?;
            match timeout(Duration::from_secs(60), all_capacity(&mut stream)).await {
                Ok(granted) => granted.map_err(|error| error.to_string()),
                Err(_) => Err(format!("nobody sends, and only {} bytes are granted", stream.capacity())),
            }
        },
    );
    verdict::tell(&report);
}
