//! The text of an error: the place, the database's message and its code, and no row data.

use cancel_safe_tx_guard::{Options, TxError, TxPool};
use sqlx::mysql::MySqlConnectOptions;
use sqlx::postgres::PgConnectOptions;
use sqlx::{Connection, MySql, Postgres, Sqlite};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;

use crate::on_all;
use crate::world::{Server, TestDb, World};

on_all!(a_duplicate_key_is_told_with_its_number_and_without_its_value);

async fn a_duplicate_key_is_told_with_its_number_and_without_its_value<D: TestDb>() {
    let world = World::<D>::new().await;
    let db = world.pool(1).await;
    let run = db.tx().run(async |tx| {
        world.insert(tx, 4711).await?;
        world.insert(tx, 4711).await?;
        Ok::<_, TxError>(())
    });
    let said = run.await.unwrap_err().to_string();
    let code = match D::TITLE {
        "PostgreSQL" => "(SQLSTATE 23505)",
        "MySQL" => "(error 1062, SQLSTATE 23000)",
        _ => "(code 1555)",
    };
    assert!(said.contains(code) && !said.contains("4711"), "{said}");
    world.end(db).await;
}

#[tokio::test]
async fn a_value_that_does_not_fit_is_not_told() {
    let world = World::<Postgres>::new().await;
    let db = world.pool(1).await;
    let mut tx = db.begin().await.unwrap();
    let wrong = sqlx::query("SELECT CAST($1 AS int)").bind("s3cret \"quoted\" s3cret").execute(&mut *tx).await;
    let said = TxError::from(wrong.unwrap_err()).to_string();
    assert!(said.contains("invalid input syntax for type integer") && said.contains("22P02"), "{said}");
    assert!(!said.contains("s3cret") && !said.contains("quoted"), "{said}");
    // Committing an aborted transaction reports the abort and its error code.
    let said = tx.commit().await.unwrap_err().to_string();
    assert!(said.contains("aborted") && said.contains("25P02"), "{said}");
    world.end(db).await;
}

async fn refused<D: TestDb>(options: Options<D>) -> TxError {
    let error = TxPool::<D>::builder().connect_with(options).await.unwrap_err();
    assert!(error.is_connect(), "{error:?}");
    error
}

async fn what_is_wrong_is_told_with_its_place_and_number<D: Server>(missing: &str) {
    let world = World::<D>::new().await;
    let dead = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap().port();
    let (_, options) = D::way(&world.options, dead);
    let error = refused::<D>(D::database(options, "orders")).await;
    let said = error.to_string();
    assert!(matches!(error, TxError::Unreachable { .. }) && error.is_unavailable(), "{error:?}");
    assert!(said.contains(&format!("\"orders\" at 127.0.0.1:{dead}")) && said.contains("refused"), "{said}");

    let error = refused::<D>(D::database(world.options.clone(), "no_such")).await;
    let said = error.to_string();
    assert!(matches!(error, TxError::MissingDatabase { .. }) && !error.is_unavailable(), "{error:?}");
    assert!(said.contains("\"no_such\" at ") && said.contains(missing), "{said}");
    world.run(format!("DROP TABLE {}", world.table)).await;
}

#[tokio::test]
async fn what_is_wrong_is_told_with_its_place_and_number_on_postgres() {
    what_is_wrong_is_told_with_its_place_and_number::<Postgres>("SQLSTATE 3D000").await;
}

#[tokio::test]
async fn what_is_wrong_is_told_with_its_place_and_number_on_mysql() {
    what_is_wrong_is_told_with_its_place_and_number::<MySql>("error 1049").await;
}

#[tokio::test]
async fn a_role_of_postgres_without_a_session_left_is_told_apart() {
    let world = World::<Postgres>::new().await;
    let role = format!("few_{}", world.table);
    world.run(format!("CREATE ROLE {role} LOGIN CONNECTION LIMIT 1")).await;
    let options = Postgres::account(world.options.clone(), &role, "");
    let mut only: sqlx::PgConnection = sqlx::ConnectOptions::connect(&options).await.unwrap();
    let error = refused::<Postgres>(options).await;
    assert!(matches!(error, TxError::TooManySessions { .. }) && error.is_unavailable(), "{error:?}");
    assert!(error.to_string().contains("SQLSTATE 53300"), "{error}");
    only.ping().await.unwrap();
    only.close().await.unwrap();
    world.run(format!("DROP ROLE {role}")).await;
    world.run(format!("DROP TABLE {}", world.table)).await;
}

#[tokio::test]
async fn an_account_of_mysql_without_a_session_left_is_told_apart() {
    let world = World::<MySql>::new().await;
    let user = format!("few{}", std::process::id());
    world.run(format!("CREATE USER '{user}'@'%' IDENTIFIED BY 'right' WITH MAX_USER_CONNECTIONS 1")).await;
    world.run(format!("GRANT ALL ON *.* TO '{user}'@'%'")).await;
    let options = MySql::account(world.options.clone(), &user, "right");
    let only: sqlx::MySqlConnection = sqlx::ConnectOptions::connect(&options).await.unwrap();
    let error = refused::<MySql>(options).await;
    assert!(matches!(error, TxError::TooManySessions { .. }) && error.is_unavailable(), "{error:?}");
    assert!(error.to_string().contains("error 1226"), "{error}");
    only.close().await.unwrap();
    world.run(format!("DROP USER '{user}'@'%'")).await;
    world.run(format!("DROP TABLE {}", world.table)).await;
}

/// A server that sends one message to every client: to PostgreSQL's clients after their first message, to MySQL's
/// before that.
async fn says(first: bool, line: Vec<u8>) -> u16 {
    let server = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = server.local_addr().unwrap().port();
    tokio::spawn(async move {
        while let Ok((mut client, _)) = server.accept().await {
            let mut asked = [0; 1024];
            if !first {
                drop(client.read(&mut asked).await);
            }
            #[expect(clippy::disallowed_methods, reason = "nobody drops the server's task halfway")]
            drop(client.write_all(&line).await);
            // Waits until the client has read it and gone.
            while let Ok(1..) = client.read(&mut asked).await {}
        }
    });
    port
}

async fn postgres_that_says(code: &str, message: &str) -> TxError {
    let fields = format!("SFATAL\0VFATAL\0C{code}\0M{message}\0Dthe detail\0\0");
    let length = u32::try_from(4 + fields.len()).unwrap().to_be_bytes();
    let port = says(false, [b"E", &length[..], fields.as_bytes()].concat()).await;
    let (_, options) = Postgres::way(&PgConnectOptions::new_without_pgpass(), port);
    refused::<Postgres>(Postgres::account(options, "user", "s3cret")).await
}

async fn mysql_that_says(number: u16, state: &str, message: &str) -> TxError {
    let body = [&[0xff][..], &number.to_le_bytes(), b"#", state.as_bytes(), message.as_bytes()].concat();
    let header = u32::try_from(body.len()).unwrap().to_le_bytes();
    let port = says(true, [&header[..], &body].concat()).await;
    let (_, options) = MySql::way(&MySqlConnectOptions::new(), port);
    refused::<MySql>(MySql::account(options, "user", "s3cret")).await
}

#[tokio::test]
async fn a_server_that_is_not_ready_or_full_or_strict_is_told_apart() {
    for (code, message) in [
        ("57P03", "the database system is starting up"),
        ("57P01", "terminating connection due to administrator command"),
        ("57P02", "the database system is in recovery"),
    ] {
        let error = postgres_that_says(code, message).await;
        let said = error.to_string();
        assert!(matches!(error, TxError::NotReady { .. }) && error.is_unavailable(), "{error:?}");
        assert!(said.contains(message) && said.contains(code) && !said.contains("detail"), "{said}");
    }
    let error = postgres_that_says("53300", "sorry, too many clients already").await;
    assert!(matches!(error, TxError::TooManySessions { .. }), "{error:?}");
    let error = postgres_that_says("28P01", "password authentication failed for user \"user\"").await;
    assert!(matches!(error, TxError::Refused { .. }) && !error.is_unavailable(), "{error:?}");
    assert!(error.to_string().contains("28P01"), "{error}");
    assert!(!format!("{error} {error:?}").contains("s3cret"), "{error:?}");

    for number in [1040, 1203, 1226] {
        let error = mysql_that_says(number, "08004", "Too many connections").await;
        assert!(matches!(error, TxError::TooManySessions { .. }) && error.is_unavailable(), "{error:?}");
        assert!(error.to_string().contains(&number.to_string()), "{error}");
    }
    let error = mysql_that_says(1053, "08S01", "Server shutdown in progress").await;
    assert!(matches!(error, TxError::NotReady { .. }) && error.is_unavailable(), "{error:?}");
    let error = mysql_that_says(1045, "28000", "Access denied for user 'user'@'host'").await;
    assert!(matches!(error, TxError::Refused { .. }) && !error.is_unavailable(), "{error:?}");
    assert!(error.to_string().contains("Access denied for user 'user'@'host' (error 1045"), "{error}");
}

/// The right host, and the port of something else.
#[tokio::test]
async fn what_listens_on_the_port_of_a_database_and_is_none_is_told_apart() {
    let server = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = server.local_addr().unwrap().port();
    tokio::spawn(async move {
        let (mut client, _) = server.accept().await.unwrap();
        let mut asked = [0; 1024];
        drop(client.read(&mut asked).await);
        #[expect(clippy::disallowed_methods, reason = "nobody drops the server's task halfway")]
        client.write_all(b"HTTP/1.1 400 Bad Request\r\n\r\n").await.unwrap();
    });
    let (_, options) = Postgres::way(&PgConnectOptions::new_without_pgpass(), port);
    let error = refused::<Postgres>(options).await;
    assert!(matches!(error, TxError::Unreachable { .. }), "{error:?}");
    let said = error.to_string();
    assert!(said.contains(&port.to_string()) && said.contains("closed the connection"), "{said}");
}

#[tokio::test]
async fn a_missing_file_is_told_with_its_name_and_number() {
    let error = refused::<Sqlite>(Options::<Sqlite>::new().filename("/no/such/directory/file.db")).await;
    let said = error.to_string();
    assert!(said.contains("file.db") && said.contains("unable to open") && said.contains("(code 14)"), "{said}");
}
