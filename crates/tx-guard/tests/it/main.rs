//! The integration tests of `cancel-safe-tx-guard`, one binary: real SQLite files, a real PostgreSQL
//! server and a real MariaDB or MySQL server.
#![expect(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

mod attempts;
mod between;
mod bounded;
mod cancel;
mod cancel_doors;
mod cancel_ends;
mod cancel_hooks;
mod cancel_less;
mod cancel_pool;
mod commit;
mod contract;
mod ends;
mod errors;
mod example;
mod executor;
mod faults;
mod full;
mod fuzz;
mod happy;
mod hostile;
mod in_hand;
mod injected;
mod input;
mod kept;
mod known;
mod late;
mod limits;
mod log;
mod metrics;
mod mysql;
mod neighbours;
mod nested;
mod network;
mod orders;
mod outage;
mod pooler;
mod prop;
mod proxy;
mod reader;
mod records;
mod relied;
mod reset;
mod run;
mod service;
mod silence;
mod stuck;
#[cfg(feature = "tracing")]
mod tell;
mod timeout;
mod torn;
mod transient;
mod upkeep;
mod world;

/// Makes a test on each database out of one generic function.
macro_rules! on_all {
    ($($name:ident),+ $(,)?) => {
        mod sqlite {
            $(#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            async fn $name() { super::$name::<sqlx::Sqlite>().await; })+
        }
        mod postgres {
            $(#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            async fn $name() { super::$name::<sqlx::Postgres>().await; })+
        }
        mod mysql {
            $(#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            async fn $name() { super::$name::<sqlx::MySql>().await; })+
        }
    };
}
use on_all;
