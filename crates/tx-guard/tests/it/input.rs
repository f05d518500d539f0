//! Bad input: the variant says what is wrong, in time, and without credentials.

use std::error::Error;
use std::time::{Duration, Instant};

use cancel_safe_tx_guard::{Options, Retry, TxError, TxPool};
use sqlx::pool::PoolOptions;
use sqlx::postgres::PgConnectOptions;
use sqlx::{ConnectOptions, Connection, MySql, Postgres, Sqlite};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;

use crate::on_all;
use crate::world::{PATIENCE, Server, TestDb, World};

on_all!(
    an_exhausted_pool_is_told_within_the_deadline_of_a_closure,
    an_exhausted_wrapped_pool_says_so,
    a_url_of_another_database_is_not_valid,
);

/// A part of every password here. It must not appear in an error's text, nor in its sources.
const SECRET: &str = "s3cret";

const SHORT: Duration = Duration::from_millis(100);

/// Checks the common properties of all errors.
fn seen(error: TxError) -> TxError {
    let mut said = format!("{error} {error:?}");
    let mut source = error.source();
    while let Some(error) = source {
        said.push_str(&format!(" {error} {error:?}"));
        source = error.source();
    }
    assert!(!said.contains(SECRET), "{said}");
    error
}

async fn refused_options<D: TestDb>(options: Options<D>) -> TxError {
    let error = seen(TxPool::<D>::builder().connect_with(options).await.unwrap_err());
    assert!(error.is_connect(), "{error:?}");
    error
}

async fn a_url_of_another_database_is_not_valid<D: TestDb>() {
    let others = ["postgres", "sqlite", "mysql", "http"].into_iter().filter(|scheme| !D::URL_SCHEMES.contains(scheme));
    for scheme in others {
        let error = TxPool::<D>::connect(&format!("{scheme}://user:{SECRET}@host/db")).await.unwrap_err();
        let error = seen(error);
        assert!(matches!(&error, TxError::InvalidUrl { reason, .. } if reason.contains(scheme)), "{error:?}");
        assert!(error.is_connect());
    }
}

async fn an_exhausted_pool_is_told_within_the_deadline_of_a_closure<D: TestDb>() {
    let world = World::<D>::new().await;
    let db = world.pool(1).await;
    let held = db.begin().await.unwrap();
    let start = Instant::now();
    let run = db.tx().timeout(SHORT).retry(Retry::default()).run(async |tx| Ok(world.insert(tx, 1).await?));
    let error = seen(run.await.unwrap_err());
    assert!(matches!(error, TxError::PoolExhausted { max_connections: 1, .. }), "{error:?}");
    assert!(error.is_timeout());
    assert!(start.elapsed() < PATIENCE);
    drop(held);
    world.end(db).await;
}

async fn an_exhausted_wrapped_pool_says_so<D: TestDb>() {
    let world = World::<D>::new().await;
    let pool = PoolOptions::<D>::new().max_connections(1).acquire_timeout(SHORT);
    let pool = pool.connect_with(world.options.clone()).await.unwrap();
    let db = TxPool::wrap(pool.clone());
    let held = db.begin().await.unwrap();
    let error = db.begin().await.unwrap_err();
    assert!(
        matches!(error, TxError::PoolExhausted { max_connections: 1, timeout, .. } if timeout == SHORT),
        "{error:?}"
    );
    drop(held);
    world.end(db).await;
    pool.close().await;
}

#[tokio::test]
async fn a_missing_file_is_a_missing_database() {
    let error = seen(TxPool::<Sqlite>::connect("sqlite:///no/such/directory/file.db").await.unwrap_err());
    assert!(matches!(&error, TxError::MissingDatabase { target, .. } if target.contains("file.db")), "{error:?}");
    assert!(error.is_connect());
}

#[tokio::test]
async fn a_file_that_is_no_database_is_refused() {
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), "this is a text, and long enough to have the header of a database".repeat(20)).unwrap();
    // SQLite checks the file at its first read.
    let db = TxPool::<Sqlite>::connect(&format!("sqlite://{}", file.path().display())).await;
    let error = match db {
        Ok(db) => {
            let mut tx = db.begin().await.unwrap();
            Sqlite::numbers(&mut tx, "SELECT count(*) FROM sqlite_master".to_owned()).await.unwrap_err().into()
        }
        Err(error) => error,
    };
    assert!(error.as_sqlx().is_some_and(|error| error.to_string().contains("not a database")), "{error:?}");
}

/// A port without a listener, because its listener has gone.
async fn dead_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap().port()
}

async fn what_is_wrong_with_a_server_is_told_apart<D: Server>() {
    let world = World::<D>::new().await;
    let right = world.options.clone();
    let missing = refused_options::<D>(D::database(right.clone(), "no_such_database")).await;
    assert!(
        matches!(&missing, TxError::MissingDatabase { target, .. } if target.contains("no_such_database")),
        "{missing:?}"
    );
    let refused = refused_options::<D>(D::account(right.clone(), "no_such_user", SECRET)).await;
    assert!(matches!(refused, TxError::Refused { .. }), "{refused:?}");

    let port = dead_port().await;
    let (_, dead) = D::way(&right, port);
    let error = refused_options::<D>(D::account(dead.clone(), "user", SECRET)).await;
    let target = format!("127.0.0.1:{port}");
    assert!(matches!(&error, TxError::Unreachable { target: said, .. } if said.contains(&target)), "{error:?}");
    // sqlx tries again until the time is over.
    let pool = PoolOptions::<D>::new().acquire_timeout(SHORT).connect_lazy_with(dead);
    let error = seen(TxPool::wrap(pool.clone()).begin().await.unwrap_err());
    assert!(matches!(&error, TxError::ConnectTimeout { target: said, .. } if said.contains(&target)), "{error:?}");
    pool.close().await;

    // A server that accepts, and then says nothing.
    let silent = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let (_, mute) = D::way(&right, silent.local_addr().unwrap().port());
    let start = Instant::now();
    let error = TxPool::<D>::builder().connect_timeout(SHORT).connect_with(mute.clone()).await.unwrap_err();
    assert!(matches!(seen(error), TxError::ConnectTimeout { timeout, .. } if timeout == SHORT));
    // Long enough to be told apart from the closure's limit. sqlx does not close before it has passed.
    let pool = PoolOptions::<D>::new().acquire_timeout(SHORT * 20).connect_lazy_with(mute);
    let run = TxPool::wrap(pool.clone()).tx().timeout(SHORT).run(async |tx| Ok(world.insert(tx, 1).await?)).await;
    let error = seen(run.unwrap_err());
    assert!(matches!(error, TxError::ConnectTimeout { .. }), "{error:?}");
    assert!(start.elapsed() < PATIENCE);
    pool.close().await;
    world.run(format!("DROP TABLE {}", world.table)).await;
}

#[tokio::test]
async fn what_is_wrong_with_a_postgres_server_is_told_apart() {
    what_is_wrong_with_a_server_is_told_apart::<Postgres>().await;
}

#[tokio::test]
async fn what_is_wrong_with_a_mysql_server_is_told_apart() {
    what_is_wrong_with_a_server_is_told_apart::<MySql>().await;
}

async fn a_url_that_cannot_be_read_is_not_quoted<D: Server>() {
    for wrong in [
        format!("user:{SECRET}@host/db?next=http://elsewhere"),
        format!("{}://user:{SECRET}@host:no-port/db", D::URL_SCHEMES[0]),
        format!("{}://user:{SECRET}@host:1/db?sslmode=no-such-mode", D::URL_SCHEMES[0]),
        format!("user:{SECRET}"),
        String::new(),
    ] {
        let error = seen(TxPool::<D>::connect(&wrong).await.unwrap_err());
        assert!(matches!(error, TxError::InvalidUrl { .. }), "{wrong:?}: {error:?}");
    }
    // A URL without a user is no mistake. No server listens on this port.
    let nobody = format!("{}://127.0.0.1:1/db", D::URL_SCHEMES[0]);
    let error = TxPool::<D>::connect(&nobody).await.unwrap_err();
    assert!(matches!(error, TxError::Unreachable { .. }), "{error:?}");
}

#[tokio::test]
async fn a_url_that_cannot_be_read_is_not_quoted_on_postgres() {
    a_url_that_cannot_be_read_is_not_quoted::<Postgres>().await;
}

#[tokio::test]
async fn a_url_that_cannot_be_read_is_not_quoted_on_mysql() {
    a_url_that_cannot_be_read_is_not_quoted::<MySql>().await;
}

#[tokio::test]
async fn a_wrong_password_is_refused_by_mysql() {
    let world = World::<MySql>::new().await;
    let user = format!("u{}", std::process::id());
    let mut admin = world.plain().await;
    MySql::execute(&mut admin, format!("CREATE USER '{user}'@'%' IDENTIFIED BY 'right'")).await.unwrap();
    let error = refused_options::<MySql>(MySql::account(world.options.clone(), &user, SECRET)).await;
    assert!(matches!(error, TxError::Refused { .. }), "{error:?}");
    MySql::execute(&mut admin, format!("DROP USER '{user}'@'%'")).await.unwrap();
    admin.close().await.unwrap();
    world.run(format!("DROP TABLE {}", world.table)).await;
}

/// The servers of the tests trust everyone, so this one is scripted.
#[tokio::test]
async fn a_wrong_password_is_refused_by_postgres() {
    let server = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = server.local_addr().unwrap().port();
    tokio::spawn(async move {
        let (mut client, _) = server.accept().await.unwrap();
        let mut startup = [0; 1024];
        drop(client.read(&mut startup).await);
        let fields = b"SFATAL\0VFATAL\0C28P01\0Mpassword authentication failed for user \"user\"\0\0";
        let length = u32::try_from(4 + fields.len()).unwrap().to_be_bytes();
        #[expect(clippy::disallowed_methods, reason = "nobody drops the server's task halfway")]
        client.write_all(&[b"E", &length[..], fields].concat()).await.unwrap();
    });
    let (_, options) = Postgres::way(&PgConnectOptions::new_without_pgpass(), port);
    let error = refused_options::<Postgres>(Postgres::account(options, "user", SECRET)).await;
    assert!(matches!(error, TxError::Refused { .. }), "{error:?}");
}

/// The twin: sqlx's own options show what they hold, so the check can fail.
#[test]
fn options_of_sqlx_hold_the_secret() {
    let options = Postgres::account(PgConnectOptions::new_without_pgpass(), "user", SECRET);
    assert!(options.to_url_lossy().as_str().contains(SECRET));
}
