//! A foreign row comes before the answer to a rollback, as when a driver has lost its place: it is not mistaken for the
//! answer, and the session is not used again.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use cancel_safe_tx_guard::{Options, TxPool};
use sqlx::{MySql, Postgres};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Mutex;
use tokio::time::timeout;

use crate::world::{PATIENCE, Server, World};

trait Injected: Server {
    /// A part of the message of a proving rollback that no other message contains.
    const ROLLBACK: &'static [u8];
    /// The number of the session.
    const ID: &'static str;
    /// A complete answer with one row, which holds the number 1.
    fn answer() -> Vec<u8>;
}

impl Injected for Postgres {
    const ROLLBACK: &'static [u8] = b"ROLLBACK AND CHAIN; SELECT";
    const ID: &'static str = "SELECT pg_backend_pid()::BIGINT";

    fn answer() -> Vec<u8> {
        let column = [b"?column?\0".as_slice(), &[0; 6], &23_i32.to_be_bytes(), &[0, 4], &[0xff; 4], &[0; 2]].concat();
        let row = [[0, 1].as_slice(), &1_i32.to_be_bytes(), b"1"].concat();
        let parts = [(b'T', [[0, 1].as_slice(), &column].concat()), (b'D', row), (b'C', b"SELECT 1\0".to_vec())];
        let mut answer = Vec::new();
        for (kind, body) in parts.into_iter().chain([(b'Z', b"T".to_vec())]) {
            answer.push(kind);
            answer.extend(u32::try_from(body.len() + 4).unwrap().to_be_bytes());
            answer.extend(body);
        }
        answer
    }
}

impl Injected for MySql {
    /// The rest of the message is the number.
    const ROLLBACK: &'static [u8] = b"\x03SELECT ";
    const ID: &'static str = "SELECT CAST(CONNECTION_ID() AS SIGNED)";

    fn answer() -> Vec<u8> {
        let mut column = b"\x03def\0\0\0\x011\0\x0c".to_vec();
        // The character set, the length, the type for 64 bits, the flags, the decimals and two bytes without meaning.
        column.extend([63, 0, 20, 0, 0, 0, 8, 0, 0, 0, 0, 0]);
        let mut answer = Vec::new();
        for (number, body) in (1..).zip([b"\x01".to_vec(), column, b"\x011".to_vec(), vec![0xfe, 0, 0, 2, 0, 0, 0]]) {
            answer.extend(&u32::try_from(body.len()).unwrap().to_le_bytes()[..3]);
            answer.push(number);
            answer.extend(body);
        }
        answer
    }
}

/// A proxy on the way to the server that answers a number of rollbacks before the server does.
async fn door<D: Injected>(options: &Options<D>, armed: Arc<AtomicUsize>) -> Options<D> {
    let door = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let (server, through) = D::way(options, door.local_addr().unwrap().port());
    tokio::spawn(async move {
        while let Ok((client, _)) = door.accept().await {
            let server = TcpStream::connect(server.clone()).await.unwrap();
            let ((mut from_client, to_client), (mut from_server, mut to_server)) =
                (client.into_split(), server.into_split());
            let to_client = Arc::new(Mutex::new(to_client));
            let (back, armed) = (Arc::clone(&to_client), Arc::clone(&armed));
            tokio::spawn(async move {
                let mut buffer = [0; 8192];
                while let Ok(size @ 1..) = from_client.read(&mut buffer).await {
                    let message = &buffer[..size];
                    let is_rollback = message.windows(D::ROLLBACK.len()).any(|part| part == D::ROLLBACK);
                    let take = |left: usize| left.checked_sub(1);
                    if is_rollback && armed.fetch_update(Ordering::SeqCst, Ordering::SeqCst, take).is_ok() {
                        // Two answers, because with one too many the next BEGIN would find that it has not begun.
                        send(&mut *to_client.lock().await, &D::answer().repeat(2)).await;
                    }
                    send(&mut to_server, message).await;
                }
                drop(to_server.shutdown().await);
            });
            tokio::spawn(async move {
                let mut buffer = [0; 8192];
                while let Ok(size @ 1..) = from_server.read(&mut buffer).await {
                    send(&mut *back.lock().await, &buffer[..size]).await;
                }
                drop(back.lock().await.shutdown().await);
            });
        }
    });
    through
}

#[expect(clippy::disallowed_methods, reason = "nobody drops the door's tasks halfway")]
async fn send(to: &mut (impl AsyncWriteExt + Unpin), bytes: &[u8]) {
    drop(to.write_all(bytes).await);
}

async fn a_row_of_somebody_else_is_no_rollback<D: Injected>() {
    let world = World::<D>::new().await;
    let armed = Arc::<AtomicUsize>::default();
    let through = door::<D>(&world.options, Arc::clone(&armed)).await;
    let db = TxPool::<D>::builder().max_connections(1).connect_with(through).await.unwrap();
    let (mut before, mut ended) = (0, 0);
    for (round, injected) in [false, true, false, true].into_iter().enumerate() {
        let mut tx = timeout(PATIENCE, db.begin()).await.unwrap().unwrap();
        let id = D::numbers(&mut tx, D::ID.to_owned()).await.unwrap()[0];
        // Each round follows one of the other kind.
        if round > 0 {
            assert_eq!(
                id == before,
                injected,
                "round {round}: a session is used again exactly if its rollback was proved"
            );
        }
        before = id;
        world.insert(&mut tx, 1).await.unwrap();
        armed.store(usize::from(injected), Ordering::SeqCst);
        let handle = tx.outcome_handle();
        drop(tx);
        timeout(PATIENCE, handle.outcome()).await.unwrap();
        assert_eq!(armed.load(Ordering::SeqCst), 0, "nothing was injected, so this test shows nothing");
        ended += u64::from(injected);
        assert_eq!(db.metrics().terminated, ended, "a session is ended from outside exactly if it cannot be used");
        // The row is not locked, and was not written.
        let mut other = world.plain().await;
        timeout(PATIENCE, world.insert(&mut other, 1)).await.expect("the row is still locked").unwrap();
        world.run(format!("DELETE FROM {}", world.table)).await;
    }
    world.end(db).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_row_of_somebody_else_is_no_rollback_on_postgres() {
    a_row_of_somebody_else_is_no_rollback::<Postgres>().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_row_of_somebody_else_is_no_rollback_on_mysql() {
    a_row_of_somebody_else_is_no_rollback::<MySql>().await;
}
