//! The server's warnings: however a transaction ends, no ROLLBACK comes without a transaction.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use cancel_safe_tx_guard::{Reset, TxPool};
use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use sqlx::postgres::{PgConnectOptions, PgSslMode};
use sqlx::{ConnectOptions, Connection, PgConnection, Postgres};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

use crate::relied::takes_dropped_begins_back;
use crate::world::{PATIENCE, TestDb, World};

/// Everything that the server has sent to its clients, including the warnings that it writes into its log.
type Said = Arc<Mutex<Vec<u8>>>;

const COMPLAINT: &[u8] = b"no transaction in progress";

fn complained(said: &Said) -> bool {
    said.lock().unwrap().windows(COMPLAINT.len()).any(|text| text == COMPLAINT)
}

/// A proxy in front of the server that records its messages.
async fn listening_door(options: &PgConnectOptions) -> (PgConnectOptions, Said) {
    let door = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let through = options.clone().host("127.0.0.1").port(door.local_addr().unwrap().port());
    let server = (options.get_host().to_owned(), options.get_port());
    let said = Said::default();
    let notes = Arc::clone(&said);
    tokio::spawn(async move {
        while let Ok((client, _)) = door.accept().await {
            let server = TcpStream::connect(server.clone()).await.unwrap();
            tokio::spawn(carry(client, server, Arc::clone(&notes)));
        }
    });
    (through.ssl_mode(PgSslMode::Disable), said)
}

#[expect(clippy::disallowed_methods, reason = "nobody drops the door's tasks halfway")]
async fn carry(client: TcpStream, server: TcpStream, said: Said) {
    let ((mut from_client, mut to_client), (mut from_server, mut to_server)) =
        (client.into_split(), server.into_split());
    tokio::spawn(async move {
        drop(tokio::io::copy(&mut from_client, &mut to_server).await);
        drop(to_server.shutdown().await);
    });
    let mut buffer = [0; 8192];
    while let Ok(size @ 1..) = from_server.read(&mut buffer).await {
        said.lock().unwrap().extend_from_slice(&buffer[..size]);
        if to_client.write_all(&buffer[..size]).await.is_err() {
            return;
        }
    }
}

#[tokio::test]
async fn no_transaction_ends_twice() {
    let world = World::<Postgres>::new().await;
    let (options, said) = listening_door(&world.options).await;
    let db = TxPool::<Postgres>::builder().max_connections(1).connect_with(options).await.unwrap();
    let wrong = "INSERT INTO no_such_table VALUES (1)";

    db.begin().await.unwrap().commit().await.unwrap();
    db.begin().await.unwrap().rollback().await.unwrap();
    drop(db.begin().await.unwrap());
    drop(db.begin().now_or_never());
    drop(db.begin().await.unwrap().commit().now_or_never());

    // A reader that follows a transaction, and may begin one of its own.
    for _ in 0..2 {
        db.begin().await.unwrap().commit().await.unwrap();
        let mut reader = db.reader().await.unwrap();
        assert!(!reader.is_in_transaction());
        let tx = Connection::begin(&mut *reader).await.unwrap();
        tx.commit().await.unwrap();
    }

    // Aborted by an error, and then committed, rolled back or dropped.
    for way in 0..3 {
        let mut tx = db.begin().await.unwrap();
        assert!(Postgres::execute(&mut tx, wrong.to_owned()).await.is_err());
        match way {
            0 => assert!(tx.commit().await.is_err()),
            1 => tx.rollback().await.unwrap(),
            _ => drop(tx),
        }
    }
    // Ended by its SQL, and then committed.
    let mut tx = db.begin().await.unwrap();
    Postgres::execute(&mut tx, "COMMIT".to_owned()).await.unwrap();
    assert!(tx.commit().await.is_err());
    // A nested begin that is cancelled, unless sqlx itself ends it twice, and a statement that is cancelled.
    if !takes_dropped_begins_back().await {
        let mut tx = db.begin().await.unwrap();
        // The server may be so fast that there is nothing to cancel.
        let is_cut = Connection::begin(&mut *tx).now_or_never().is_none();
        assert_eq!(tx.commit().await.is_err(), is_cut);
    }
    let naps = (0..20).map(|round| format!("SELECT pg_sleep({})", 0.0005 * f64::from(round)));
    for nap in naps.chain([Postgres::SLOW.to_owned()]) {
        let mut tx = db.begin().await.unwrap();
        drop(tokio::time::timeout(Duration::from_millis(3), Postgres::execute(&mut tx, nap)).await);
        drop(tx);
    }
    world.end(db).await;
    assert!(!complained(&said), "{}", String::from_utf8_lossy(&said.lock().unwrap()));
}

/// For sqlx, too, a hook is outside any transaction, and may have one of its own.
#[tokio::test]
async fn a_hook_may_begin_and_end_a_transaction() {
    fn uses(conn: &mut PgConnection) -> BoxFuture<'_, Result<bool, sqlx::Error>> {
        Box::pin(async move {
            assert!(!conn.is_in_transaction());
            Connection::begin(conn).await?.commit().await?;
            Ok(true)
        })
    }
    let world = World::<Postgres>::new().await;
    let (options, said) = listening_door(&world.options).await;
    for (before, after, again) in [(true, false, false), (false, true, false), (false, false, true), (true, true, true)]
    {
        let mut builder = TxPool::<Postgres>::builder().max_connections(1);
        if again {
            builder = builder.reset(Reset::Discard);
            builder = builder.after_connect(|conn| Box::pin(async move { uses(conn).await.map(drop) }));
        }
        if before {
            builder = builder.before_begin(|conn| Box::pin(async move { uses(conn).await.map(drop) }));
        }
        if after {
            builder = builder.after_release(|conn| uses(conn));
        }
        let db = builder.connect_with(options.clone()).await.unwrap();
        for n in 0..3 {
            let tx = db.begin().await.unwrap();
            if n == 1 { tx.rollback().await.unwrap() } else { tx.commit().await.unwrap() }
        }
        assert_eq!(db.metrics().opened, 1);
        assert!(db.close(PATIENCE).await.is_clean());
    }
    world.run(format!("DROP TABLE {}", world.table)).await;
    assert!(!complained(&said), "{}", String::from_utf8_lossy(&said.lock().unwrap()));
}

#[tokio::test]
async fn a_rollback_too_many_is_noticed() {
    let world = World::<Postgres>::new().await;
    let (options, said) = listening_door(&world.options).await;
    let mut conn = options.connect().await.unwrap();
    Postgres::execute(&mut conn, "ROLLBACK".to_owned()).await.unwrap();
    assert!(complained(&said));
    conn.close().await.unwrap();
    world.run(format!("DROP TABLE {}", world.table)).await;
}
