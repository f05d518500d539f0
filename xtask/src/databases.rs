//! The servers that a run of the tests needs, and how the tests find them.
//!
//! Invariant: a needed server that is not available is an error, so no test is skipped silently.

use crate::command::Cargo;
use crate::mariadb::MariaDb;
use crate::missing::may_be_installed;
use crate::pgbouncer::PgBouncer;
use crate::postgres::Database as Postgres;

/// Which servers to start.
#[derive(Clone, Copy)]
pub(crate) struct Wanted {
    pub(crate) postgres: bool,
    pub(crate) mysql: bool,
    /// In front of PostgreSQL, which is then wanted as well.
    pub(crate) pgbouncer: bool,
}

/// Dropping them stops the servers that we have started and removes everything that we have created.
pub(crate) struct Databases {
    /// First, because it is stopped before the server behind it.
    pgbouncer: Option<PgBouncer>,
    postgres: Option<Postgres>,
    mysql: Option<MariaDb>,
}

impl Wanted {
    pub(crate) const ALL: Self = Self { postgres: true, mysql: true, pgbouncer: true };

    /// Fails at once, naming everything that would be missing later and that we will not install.
    pub(crate) fn can_be_had(self) -> Result<(), String> {
        let missing = [
            self.postgres.then(Postgres::missing),
            self.mysql.then(MariaDb::missing),
            self.pgbouncer.then(PgBouncer::missing),
        ];
        may_be_installed(&missing.into_iter().flatten().flatten().collect::<Vec<_>>())
    }
}

impl Databases {
    pub(crate) fn for_tests(wanted: Wanted) -> Result<Self, String> {
        wanted.can_be_had()?;
        let postgres = wanted.postgres.then(Postgres::for_tests).transpose()?;
        let in_front = postgres.as_ref().filter(|_| wanted.pgbouncer).map(Postgres::url);
        Ok(Self {
            pgbouncer: in_front.map(PgBouncer::in_front_of).transpose()?,
            mysql: wanted.mysql.then(MariaDb::for_tests).transpose()?,
            postgres,
        })
    }

    /// Tells the tests that `cargo` runs where the servers are.
    pub(crate) fn tell(&self, mut cargo: Cargo) -> Cargo {
        if let Some(postgres) = &self.postgres {
            cargo = cargo.env(Postgres::VARIABLE, postgres.url());
        }
        if let Some(pgbouncer) = &self.pgbouncer {
            cargo = cargo.env(PgBouncer::VARIABLE, pgbouncer.url());
        }
        if let Some(mysql) = &self.mysql {
            cargo = cargo.env(MariaDb::VARIABLE, mysql.url());
        }
        cargo
    }
}
