//! Where a run keeps its results.
//!
//! Invariant: only this file knows which stores exist; no signature shows it.

#[cfg(feature = "postgres")]
use crate::postgres::PgStore;
use crate::store::FileStore;

/// Where a run keeps its results: made from a [`FileStore`], or with feature `postgres` from a `PgStore`.
#[derive(Clone, Debug)]
pub struct Store(pub(crate) Kind);

#[derive(Clone, Debug)]
pub(crate) enum Kind {
    File(FileStore),
    #[cfg(feature = "postgres")]
    Postgres(Box<PgStore>),
}

impl From<FileStore> for Store {
    fn from(store: FileStore) -> Self {
        Self(Kind::File(store))
    }
}

#[cfg(feature = "postgres")]
impl From<PgStore> for Store {
    fn from(store: PgStore) -> Self {
        Self(Kind::Postgres(Box::new(store)))
    }
}
