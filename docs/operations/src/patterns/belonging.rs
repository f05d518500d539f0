//! Two files that belong together
//!
//! Each await between the two is a point where one file is new and the other is old, or half written. A crash does the
//! same, but crashes are rare and timeouts are not. Write the files as one: a transaction of files is all or nothing.

use std::path::Path;

use cancel_safe_atomic_fs::MultiFileTransaction;
use cancel_safe_testing::{Explore, Report};

// Broken:
async fn publish_bad(site: &Path) -> std::io::Result<()> {
    tokio::fs::write(site.join("data"), "new").await?;
    tokio::fs::write(site.join("index"), "new").await
}

// Mended:
async fn publish_good(site: &Path) -> Result<(), cancel_safe_atomic_fs::Error> {
    let mut files = MultiFileTransaction::new();
    files.add_file(site.join("data"), "new").await?;
    files.add_file(site.join("index"), "new").await?;
    files.commit().await
}

// Judged:
fn explore(publish: impl AsyncFn(&Path)) -> Report {
    Explore::new().run(
        async || {
            let site = tempfile::tempdir().unwrap();
            std::fs::write(site.path().join("data"), "old").unwrap();
            std::fs::write(site.path().join("index"), "old").unwrap();
            site
        },
        async |site| publish(site.path()).await,
        async |site, _outcome| {
            let read = |name| std::fs::read_to_string(site.path().join(name)).unwrap();
            match (read("data"), read("index")) {
                (data, index) if data == index => Ok(()),
                (data, index) => Err(format!("the data are {data:?}, the index is {index:?}")),
            }
        },
    )
}

pub(super) fn broken() -> Report {
    explore(async |site| publish_bad(site).await.unwrap())
}

pub(super) fn mended() -> Report {
    explore(async |site| publish_good(site).await.unwrap())
}
