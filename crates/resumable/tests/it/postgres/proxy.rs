//! A proxy in front of the server that cuts a connection off, or goes silent, at a chosen statement.
//!
//! It gets its orders over the connection itself, by a statement of the item whose transaction it must strike: so it
//! strikes that transaction, and no other.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use sqlx::postgres::{PgConnectOptions, PgPoolOptions, PgSslMode};
use sqlx::{AssertSqlSafe, PgConnection};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::{JoinHandle, JoinSet};

use super::world::{POSTGRES, url};

/// What happens to a statement.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Fault {
    /// It never reaches the server, and the client is cut off.
    CutBefore,
    /// It reaches the server, and the client is cut off at once.
    CutBehind,
    /// The server has answered, and the client is cut off.
    CutAnswer,
    /// It never reaches the server, and no answer comes.
    SilentBefore,
    /// It reaches the server, and no answer comes.
    SilentBehind,
}

pub(crate) const FAULTS: [Fault; 5] =
    [Fault::CutBefore, Fault::CutBehind, Fault::CutAnswer, Fault::SilentBefore, Fault::SilentBehind];

/// The prefix of an order: the number of the fault, the words, and a colon follow.
const MARK: &str = "strike:";

/// Strikes the next statement of this connection that contains these words.
pub(crate) async fn strike(conn: &mut PgConnection, fault: Fault, words: &str) {
    let number = FAULTS.iter().position(|known| *known == fault).unwrap();
    let told = format!("SELECT '{MARK}{number}:{words}:'");
    sqlx::raw_sql(AssertSqlSafe(told)).execute(conn).await.unwrap();
}

/// Its drop closes all its connections.
#[derive(Debug)]
pub(crate) struct Proxy {
    options: PgConnectOptions,
    state: Arc<State>,
    task: JoinHandle<()>,
}

#[derive(Debug, Default)]
struct State {
    is_silent: AtomicBool,
    struck: AtomicUsize,
}

impl Proxy {
    pub(crate) async fn open() -> Self {
        let options: PgConnectOptions = url(POSTGRES).parse().unwrap();
        let server = (options.get_host().to_owned(), options.get_port());
        let door = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = door.local_addr().unwrap().port();
        let state = Arc::<State>::default();
        let seen = Arc::clone(&state);
        let task = tokio::spawn(async move {
            let mut connections = JoinSet::new();
            while let Ok((client, _)) = door.accept().await {
                let server = TcpStream::connect(server.clone()).await.unwrap();
                connections.spawn(serve(client, server, Arc::clone(&seen)));
            }
        });
        Self { options: options.host("127.0.0.1").port(port).ssl_mode(PgSslMode::Disable), state, task }
    }

    /// A pool of sessions through it.
    pub(crate) fn pool(&self, options: PgPoolOptions) -> sqlx::PgPool {
        options.connect_lazy_with(self.options.clone())
    }

    /// From now on nothing is passed on, in either direction.
    pub(crate) fn fall_silent(&self) {
        self.state.is_silent.store(true, Ordering::SeqCst);
    }

    /// How many statements have been struck.
    pub(crate) fn struck(&self) -> usize {
        self.state.struck.load(Ordering::SeqCst)
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.task.abort();
    }
}

#[expect(clippy::disallowed_methods, reason = "nobody drops the proxy's tasks halfway")]
async fn serve(client: TcpStream, server: TcpStream, state: Arc<State>) {
    drop((client.set_nodelay(true), server.set_nodelay(true)));
    let ((mut from_client, mut to_client), (mut from_server, mut to_server)) =
        (client.into_split(), server.into_split());
    let (mut ask, mut answer) = ([0; 8192], [0; 8192]);
    let mut armed: Option<(Fault, String)> = None;
    let mut is_silent = false;
    loop {
        tokio::select! {
            read = from_client.read(&mut ask) => {
                let Ok(size @ 1..) = read else { return };
                if is_silent || state.is_silent.load(Ordering::SeqCst) {
                    continue;
                }
                let text = String::from_utf8_lossy(&ask[..size]).into_owned();
                let fault = match armed.take_if(|(_, words)| text.contains(&**words)) {
                    Some((fault, _)) => {
                        state.struck.fetch_add(1, Ordering::SeqCst);
                        Some(fault)
                    }
                    None => {
                        armed = told(&text).or(armed);
                        None
                    }
                };
                match fault {
                    Some(Fault::CutBefore) => return,
                    Some(Fault::SilentBefore) => {
                        is_silent = true;
                        continue;
                    }
                    _ => {}
                }
                if to_server.write_all(&ask[..size]).await.is_err() {
                    return;
                }
                match fault {
                    Some(Fault::CutBehind) => return,
                    Some(Fault::CutAnswer) => {
                        drop(from_server.read(&mut answer).await);
                        return;
                    }
                    Some(Fault::SilentBehind) => is_silent = true,
                    _ => {}
                }
            }
            read = from_server.read(&mut answer) => {
                let Ok(size @ 1..) = read else { return };
                if is_silent || state.is_silent.load(Ordering::SeqCst) {
                    continue;
                }
                if to_client.write_all(&answer[..size]).await.is_err() {
                    return;
                }
            }
        }
    }
}

fn told(text: &str) -> Option<(Fault, String)> {
    let (_, told) = text.split_once(MARK)?;
    let mut words = told.split(':');
    let fault = FAULTS.get(words.next()?.parse::<usize>().ok()?)?;
    Some((*fault, words.next()?.to_owned()))
}
