//! A client that can be cut where no library would allow it: half-way through a request, or before the answer.
//! Invariant: it returns only complete answers.

use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use serde_json::Value;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::time::timeout;

/// Longer than any answer of the bank takes.
const PATIENCE: Duration = Duration::from_secs(60);

/// Where a request is cut.
#[derive(Debug, Clone, Copy)]
pub(super) enum Cut {
    Never,
    /// After this percentage of its bytes was sent.
    At(usize),
    /// This long after it was sent.
    After(Duration),
}

/// Sends a request on its own connection, and returns the status and the body; `None` if it was cut.
pub(super) async fn call(addr: SocketAddr, line: &str, body: &str, cut: Cut) -> io::Result<Option<(u16, Value)>> {
    let head = "host: bank\r\nconnection: close\r\ncontent-type: application/json\r\ncontent-length";
    let request = format!("{line} HTTP/1.1\r\n{head}: {}\r\n\r\n{body}", body.len());
    let (sent, wait) = match cut {
        Cut::Never => (request.len(), PATIENCE),
        Cut::At(percent) => (request.len() * percent / 100, Duration::ZERO),
        Cut::After(wait) => (request.len(), wait),
    };
    let mut stream = timeout(PATIENCE, TcpStream::connect(addr)).await??;
    stream.write_all_buf(&mut &request.as_bytes()[..sent]).await?;
    let mut answer = Vec::new();
    match timeout(wait, stream.read_to_end(&mut answer)).await {
        Ok(read) => read.map(|_| ())?,
        Err(_) if matches!(cut, Cut::Never) => return Err(io::ErrorKind::TimedOut.into()),
        Err(_) => return Ok(None),
    }
    parse(&answer).map(Some).ok_or_else(|| io::ErrorKind::UnexpectedEof.into())
}

fn parse(answer: &[u8]) -> Option<(u16, Value)> {
    let (head, body) = std::str::from_utf8(answer).ok()?.split_once("\r\n\r\n")?;
    let status = head.split(' ').nth(1)?.parse().ok()?;
    // Half a document does not count.
    Some((status, serde_json::from_str(body).ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn half_an_answer_is_none() {
        let whole = b"HTTP/1.1 200 OK\r\ncontent-length: 12\r\n\r\n{\"key\":\"a1\"}";
        assert_eq!(parse(whole), Some((200, serde_json::json!({ "key": "a1" }))));
        for length in 0..whole.len() {
            assert_eq!(parse(&whole[..length]), None, "{length}");
        }
    }
}
