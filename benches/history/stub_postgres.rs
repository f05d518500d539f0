//! As much of a PostgreSQL server as a transaction needs, in this process.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

/// Whether a session is inside a transaction.
#[derive(Clone, Default)]
pub struct Inside(Arc<AtomicBool>);

impl Inside {
    /// Call it after a round trip, when everything that was sent before has been carried out.
    pub fn must_be_over(&self) -> Result<(), String> {
        match self.0.load(Ordering::SeqCst) {
            false => Ok(()),
            true => Err("nobody has a transaction, and the session is inside of one".to_owned()),
        }
    }

    fn learn_from(&self, query: &[u8]) {
        if query.starts_with(b"BEGIN") || query.starts_with(b"START TRANSACTION") {
            self.0.store(true, Ordering::SeqCst);
        } else if query.starts_with(b"ROLLBACK") || query.starts_with(b"COMMIT") {
            self.0.store(false, Ordering::SeqCst);
        }
    }
}

/// Accepts every login and answers each query with success.
pub async fn serve(mut pipe: impl AsyncRead + AsyncWrite + Unpin, inside: Inside) -> io::Result<()> {
    let length = pipe.read_u32().await?;
    pipe.read_exact(&mut vec![0; length as usize - 4]).await?;
    pipe.write_all(b"R\0\0\0\x08\0\0\0\0Z\0\0\0\x05I").await?;
    loop {
        let kind = pipe.read_u8().await?;
        let mut body = vec![0; pipe.read_u32().await? as usize - 4];
        pipe.read_exact(&mut body).await?;
        if kind == b'Q' {
            inside.learn_from(&body);
            let status = if inside.0.load(Ordering::SeqCst) { b'T' } else { b'I' };
            pipe.write_all(&[b'C', 0, 0, 0, 7, b'O', b'K', 0, b'Z', 0, 0, 0, 5, status]).await?;
        }
    }
}
