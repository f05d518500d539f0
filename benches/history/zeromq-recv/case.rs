//! zeromq's `ReqSocket::recv`, dropped while the reply is under way: can it still be received?

#[path = "../verdict.rs"]
mod verdict;

use std::time::Duration;

use cancel_safe_testing::{Explore, Outcome, Way};
use tokio::sync::Mutex;
use tokio::time::{sleep, timeout};
use zeromq::{RepSocket, ReqSocket, Socket, SocketRecv, SocketSend, ZmqResult};

/// A socket that has sent its request to a server, which waits a moment and returns every request.
async fn asked() -> ZmqResult<Mutex<ReqSocket>> {
    let mut server = RepSocket::new();
    let address = server.bind("tcp://127.0.0.1:0").await?;
    tokio::spawn(async move {
        while let Ok(request) = server.recv().await {
            sleep(Duration::from_millis(10)).await;
            if server.send(request).await.is_err() {
                break;
            }
        }
    });
    let mut client = ReqSocket::new();
    client.connect(&address.to_string()).await?;
    client.send("a question".into()).await?;
    Ok(Mutex::new(client))
}

fn main() {
    // Not `Shutdown`: the server is a task of the setup.
    let report = Explore::new().ways([Way::Eager, Way::Settled]).run(
        async || asked().await.expect("it is all in this process"),
        async |client| client.lock().await.recv().await.is_ok(),
        async |client, outcome| match outcome {
            Outcome::Completed(true) => Ok(()),
            Outcome::Completed(false) => Err("the reply was not received".to_owned()),
            Outcome::Dropped { .. } => match timeout(Duration::from_secs(5), client.lock().await.recv()).await {
                Ok(Ok(_reply)) => Ok(()),
                Ok(Err(error)) => Err(error.to_string()),
                Err(_) => Err("the reply never came".to_owned()),
            },
        },
    );
    verdict::tell(&report);
}
