//! sqlx' `begin`, dropped while it waits for the reply to BEGIN: is the session left inside?

#[path = "../stub_postgres.rs"]
mod stub_postgres;
#[path = "../verdict.rs"]
mod verdict;

use std::io;

use cancel_safe_testing::{Explore, Way};
use sqlx::postgres::{PgConnectOptions, PgSslMode};
use sqlx::{ConnectOptions, Connection, PgConnection};
use stub_postgres::{Inside, serve};
use tokio::net::TcpListener;
use tokio::sync::Mutex;

async fn session() -> io::Result<(Mutex<PgConnection>, Inside)> {
    let listener = TcpListener::bind("127.0.0.1:0").await?;
    let port = listener.local_addr()?.port();
    let inside = Inside::default();
    let server = inside.clone();
    tokio::spawn(async move { serve(listener.accept().await?.0, server).await });
    let options = PgConnectOptions::new_without_pgpass().host("127.0.0.1").port(port).username("anybody");
    let connection = options.ssl_mode(PgSslMode::Disable).connect().await.map_err(io::Error::other)?;
    Ok((Mutex::new(connection), inside))
}

fn main() {
    // Not `Shutdown`: the server and the connection are of the setup's runtime.
    let report = Explore::new().ways([Way::Eager, Way::Settled]).run(
        async || session().await.expect("the stub lets everybody in"),
        async |(connection, _inside)| connection.lock().await.begin().await.is_ok(),
        async |(connection, inside), _outcome| {
            let round_trip = sqlx::raw_sql("SELECT").execute(&mut *connection.lock().await).await;
            round_trip.map_err(|error| error.to_string())?;
            inside.must_be_over()
        },
    );
    verdict::tell(&report);
}
