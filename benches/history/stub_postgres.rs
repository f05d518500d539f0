//! As much of a PostgreSQL server as a transaction needs, on the other end of a pipe in this process.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use cancel_safe_testing::Outcome;
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream};
use tokio_postgres::{Client, Config, NoTls};

/// A connected client, and whether its session is inside a transaction.
pub struct Session {
    pub client: tokio::sync::Mutex<Client>,
    inside: Arc<AtomicBool>,
}

impl Session {
    pub async fn new() -> Self {
        let (near, far) = tokio::io::duplex(4096);
        let inside = Arc::new(AtomicBool::new(false));
        tokio::spawn(serve(far, Arc::clone(&inside)));
        let mut config = Config::new();
        config.user("anybody");
        let (client, connection) = config.connect_raw(near, NoTls).await.expect("the stub accepts everybody");
        tokio::spawn(connection);
        Self { client: tokio::sync::Mutex::new(client), inside }
    }

    /// Whatever was sent before this round trip has been carried out after it.
    pub async fn must_be_outside<T>(&self, _outcome: Outcome<T>) -> Result<(), String> {
        let ping = self.client.lock().await.batch_execute("SELECT").await;
        ping.map_err(|error| error.to_string())?;
        match self.inside.load(Ordering::SeqCst) {
            false => Ok(()),
            true => Err("nobody has a transaction, and the session is inside of one".to_owned()),
        }
    }
}

/// Answers each query, and remembers whether it opened or closed a transaction.
async fn serve(mut pipe: DuplexStream, inside: Arc<AtomicBool>) -> io::Result<()> {
    let length = pipe.read_u32().await?;
    pipe.read_exact(&mut vec![0; length as usize - 4]).await?;
    pipe.write_all(b"R\0\0\0\x08\0\0\0\0Z\0\0\0\x05I").await?;
    loop {
        let kind = pipe.read_u8().await?;
        let mut body = vec![0; pipe.read_u32().await? as usize - 4];
        pipe.read_exact(&mut body).await?;
        if kind != b'Q' {
            continue;
        }
        if body.starts_with(b"BEGIN") || body.starts_with(b"START TRANSACTION") {
            inside.store(true, Ordering::SeqCst);
        } else if body.starts_with(b"ROLLBACK") || body.starts_with(b"COMMIT") {
            inside.store(false, Ordering::SeqCst);
        }
        let status = if inside.load(Ordering::SeqCst) { b'T' } else { b'I' };
        pipe.write_all(&[b'C', 0, 0, 0, 7, b'O', b'K', 0, b'Z', 0, 0, 0, 5, status]).await?;
    }
}
