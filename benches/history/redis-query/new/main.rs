//! The only connection of 1.8, whose replies are read by a driver.

#[path = "../case.rs"]
mod case;

use std::sync::LazyLock;

use redis::RedisConnectionInfo;
use redis::aio::MultiplexedConnection;

/// The driver borrows it.
static INFO: LazyLock<RedisConnectionInfo> = LazyLock::new(RedisConnectionInfo::default);

fn main() {
    case::explore(async |pipe| {
        let (connection, driver) = MultiplexedConnection::new(&INFO, pipe).await?;
        tokio::spawn(driver);
        Ok(connection)
    });
}
