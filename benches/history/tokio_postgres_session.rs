//! A tokio-postgres client that is connected to the stub, for every version.

use cancel_safe_testing::Outcome;
use tokio::sync::Mutex;
use tokio_postgres::{Client, Config, NoTls};

use crate::stub_postgres::{Inside, serve};

pub struct Session {
    pub client: Mutex<Client>,
    inside: Inside,
}

impl Session {
    pub async fn new() -> Self {
        let (near, far) = tokio::io::duplex(4096);
        let inside = Inside::default();
        tokio::spawn(serve(far, inside.clone()));
        let mut config = Config::new();
        config.user("anybody");
        let (client, connection) = config.connect_raw(near, NoTls).await.expect("the stub lets everybody in");
        tokio::spawn(connection);
        Self { client: Mutex::new(client), inside }
    }

    pub async fn must_be_outside<T>(&self, _outcome: Outcome<T>) -> Result<(), String> {
        let round_trip = self.client.lock().await.batch_execute("SELECT").await;
        round_trip.map_err(|error| error.to_string())?;
        self.inside.must_be_over()
    }
}
