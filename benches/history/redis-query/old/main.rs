//! The connection of 0.20, which reads its replies itself.

#[path = "../case.rs"]
mod case;

use redis::IntoConnectionInfo;
use redis::aio::Connection;

fn main() {
    case::explore(async |pipe| {
        let info = "redis://127.0.0.1".into_connection_info()?;
        Connection::new(&info, pipe).await
    });
}
