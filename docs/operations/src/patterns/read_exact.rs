//! Progress that only the future knew
//!
//! When `read_exact` is dropped, the bytes it has read are lost. When `write_all` is dropped, an unknown part has been
//! sent. In a loop with `select!`, every lost race does that. Keep what was read outside the future: use a buffer that
//! outlives the call, and an operation that takes what is there or nothing. [The table](operations.md) says which ones do.

use std::time::Duration;

use cancel_safe_testing::{Explore, Report};
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream, duplex};
use tokio::time::sleep;

// Broken:
async fn next_bad(socket: &mut DuplexStream) -> std::io::Result<[u8; 4]> {
    let mut frame = [0; 4];
    socket.read_exact(&mut frame).await?;
    Ok(frame)
}

// Mended:
struct Reader {
    socket: DuplexStream,
    buffer: Vec<u8>,
}

async fn next_good(reader: &mut Reader) -> std::io::Result<[u8; 4]> {
    loop {
        if let Some((frame, rest)) = reader.buffer.split_first_chunk() {
            let (frame, rest) = (*frame, rest.to_vec());
            reader.buffer = rest;
            return Ok(frame);
        }
        if reader.socket.read_buf(&mut reader.buffer).await? == 0 {
            return Err(std::io::ErrorKind::UnexpectedEof.into());
        }
    }
}

// Judged:
/// A peer whose bytes come two at a time.
fn peer() -> DuplexStream {
    let (mut peer, here) = duplex(64);
    tokio::spawn(async move {
        for part in ["al", "ph", "be", "ta", "ga", "mm", "de", "lt"] {
            sleep(Duration::from_millis(10)).await;
            peer.write_all(part.as_bytes()).await.unwrap();
        }
    });
    here
}

fn text(frame: std::io::Result<[u8; 4]>) -> String {
    frame.map_or_else(|error| error.to_string(), |frame| String::from_utf8_lossy(&frame).into_owned())
}

pub(super) fn broken() -> Report {
    Explore::new().paused_time(true).calls(3).cancel_safe(
        async || peer(),
        async |socket| text(next_bad(socket).await),
        async |_| (),
    )
}

pub(super) fn mended() -> Report {
    Explore::new().paused_time(true).calls(3).cancel_safe(
        async || Reader { socket: peer(), buffer: Vec::new() },
        async |reader| text(next_good(reader).await),
        async |_| (),
    )
}
