//! redis' `query_async`, dropped after its command was sent: whose reply does the next query get?

#[path = "../verdict.rs"]
mod verdict;

use std::io;

use cancel_safe_testing::{Explore, Way};
use redis::RedisResult;
use redis::aio::ConnectionLike;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader, DuplexStream};
use tokio::sync::Mutex;

/// Explores with the connection type of the version at hand: 1.0 no longer has the one of 0.20.
pub fn explore<C: ConnectionLike>(connect: impl AsyncFn(DuplexStream) -> RedisResult<C>) {
    // Not `Shutdown`: the server is a task of the setup.
    let report = Explore::new().paused_time(true).ways([Way::Eager, Way::Settled]).run(
        async || {
            let (near, far) = tokio::io::duplex(4096);
            tokio::spawn(serve(far));
            Mutex::new(connect(near).await.expect("the stub accepts everybody"))
        },
        async |connection| echo(connection, "first").await.is_ok(),
        async |connection, _outcome| match echo(connection, "second").await {
            Ok(reply) if reply == "second" => Ok(()),
            Ok(reply) => Err(format!("ECHO second was answered {reply}")),
            Err(error) => Err(error.to_string()),
        },
    );
    verdict::tell(&report);
}

async fn echo<C: ConnectionLike>(connection: &Mutex<C>, text: &str) -> RedisResult<String> {
    redis::cmd("ECHO").arg(text).query_async(&mut *connection.lock().await).await
}

/// Answers ECHO with its text and everything else with OK.
async fn serve(pipe: DuplexStream) -> io::Result<()> {
    let mut pipe = BufReader::new(pipe);
    loop {
        let mut words = Vec::new();
        for _ in 0..number(&mut pipe).await? {
            let mut word = vec![0; number(&mut pipe).await? + b"\r\n".len()];
            pipe.read_exact(&mut word).await?;
            words.push(word);
        }
        let reply = match words.as_slice() {
            [command, text] if command == b"ECHO\r\n" => [b"+", text.as_slice()].concat(),
            _ => b"+OK\r\n".to_vec(),
        };
        pipe.write_all(&reply).await?;
    }
}

/// Reads a line such as `*2` or `$4`.
async fn number(pipe: &mut BufReader<DuplexStream>) -> io::Result<usize> {
    let mut line = String::new();
    pipe.read_line(&mut line).await?;
    line.trim().get(1..).and_then(|number| number.parse().ok()).ok_or_else(|| io::ErrorKind::UnexpectedEof.into())
}
