//! The judge of the demo: compares what a client left, files and records, with what the origin serves.
//!
//! Invariant: it reads the disk and the records by itself, and uses nothing of either client.

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};

use bytes::Bytes;
use sha2::{Digest, Sha256};
use sqlx::sqlite::SqliteConnectOptions;
use sqlx::{ConnectOptions, Connection};
use url::Url;

/// One file, as it ought to be at the client.
#[derive(Debug, Clone)]
pub(crate) struct Served {
    pub(crate) url: Url,
    /// SHA-256 in hexadecimal.
    pub(crate) digest: String,
    pub(crate) content: Bytes,
}

impl Served {
    pub(crate) fn new(url: Url, content: Bytes) -> Self {
        Self { url, digest: sha256(&content), content }
    }

    /// Where both clients put it: by host and path.
    fn path(&self, files: &Path) -> PathBuf {
        files.join(self.url.host_str().unwrap_or_default()).join(self.url.path().trim_start_matches('/'))
    }
}

fn sha256(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect()
}

/// What a client says of a file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Record {
    pub(crate) bytes: u64,
    /// SHA-256 in hexadecimal, if the client keeps one.
    pub(crate) digest: Option<String>,
}

/// By URL.
pub(crate) type Records = BTreeMap<String, Record>;

/// What is wrong in one directory. A file is counted once.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Faults {
    /// Files that have their final name but end too early.
    pub(crate) truncated: usize,
    /// Files that are long enough but have other bytes.
    pub(crate) wrong: usize,
    /// Files that are not there.
    pub(crate) missing: usize,
    /// Files that are there without a record.
    pub(crate) unrecorded: usize,
    /// Records of files that are not there, or not as the record or the origin says.
    pub(crate) misrecorded: usize,
}

impl Faults {
    pub(crate) fn sum(&self) -> usize {
        self.truncated + self.wrong + self.missing + self.unrecorded + self.misrecorded
    }
}

/// Judges the files below `files` and their records. Reads every file, and blocks.
pub(crate) fn judge(all: &[Served], files: &Path, records: &Records) -> io::Result<Faults> {
    let mut faults = Faults::default();
    for served in all {
        let found = read(&served.path(files))?;
        let whole = found.as_ref().is_some_and(|found| sha256(found) == served.digest);
        match &found {
            None => faults.missing += 1,
            Some(_) if whole => {}
            Some(found) if found.len() < served.content.len() => faults.truncated += 1,
            Some(_) => faults.wrong += 1,
        }
        match records.get(served.url.as_str()) {
            None => faults.unrecorded += usize::from(found.is_some()),
            Some(record) => faults.misrecorded += usize::from(!whole || !is_right(record, served)),
        }
    }
    let known = |url: &String| all.iter().any(|served| served.url.as_str() == url);
    faults.misrecorded += records.keys().filter(|url| !known(url)).count();
    Ok(faults)
}

fn is_right(record: &Record, served: &Served) -> bool {
    record.bytes == served.content.len() as u64 && record.digest.as_ref().is_none_or(|known| *known == served.digest)
}

/// The files below `files` that end too early at this moment. Looks only at sizes, because the client waits meanwhile.
pub(crate) fn truncated<'a>(all: &'a [Served], files: &Path) -> Vec<&'a Url> {
    let is_short = |served: &&Served| {
        std::fs::metadata(served.path(files)).is_ok_and(|file| file.len() < served.content.len() as u64)
    };
    all.iter().filter(is_short).map(|served| &served.url).collect()
}

fn read(path: &PathBuf) -> io::Result<Option<Vec<u8>>> {
    match std::fs::read(path) {
        Ok(bytes) => Ok(Some(bytes)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

/// The records of the plain loop: its progress file. An unreadable file has none.
pub(crate) fn progress_file(path: &Path) -> Records {
    let done: BTreeMap<String, u64> =
        std::fs::read(path).ok().and_then(|json| serde_json::from_slice(&json).ok()).unwrap_or_default();
    done.into_iter().map(|(url, bytes)| (url, Record { bytes, digest: None })).collect()
}

/// The records of mirror: the rows of its catalogue.
pub(crate) async fn catalogue(path: &Path) -> Result<Records, sqlx::Error> {
    let mut connection = SqliteConnectOptions::new().filename(path).connect().await?;
    let rows: Vec<(String, i64, String)> =
        sqlx::query_as("SELECT url, bytes, sha256 FROM files").fetch_all(&mut connection).await?;
    connection.close().await?;
    let record = |(url, bytes, digest): (String, i64, String)| {
        (url, Record { bytes: bytes.unsigned_abs(), digest: Some(digest) })
    };
    Ok(rows.into_iter().map(record).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn some_files() -> Vec<Served> {
        let file = |number: u8| {
            let url = Url::parse(&format!("http://host-{}.test/a/b/{number}", number % 2)).unwrap();
            Served::new(url, vec![number; 200 * usize::from(number)].into())
        };
        (0..12).map(file).collect()
    }

    /// A directory in which everything is as it ought to be, with its records.
    fn sound(all: &[Served]) -> (tempfile::TempDir, Records) {
        let dir = tempfile::tempdir().unwrap();
        let mut records = Records::new();
        for served in all {
            let path = served.path(dir.path());
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, &served.content).unwrap();
            let record = Record { bytes: served.content.len() as u64, digest: Some(served.digest.clone()) };
            records.insert(served.url.to_string(), record);
        }
        (dir, records)
    }

    #[test]
    fn a_sound_directory_has_no_faults_and_an_empty_one_misses_everything() {
        let all = some_files();
        let (dir, records) = sound(&all);
        assert_eq!(judge(&all, dir.path(), &records).unwrap(), Faults::default());
        let count = all.len();
        let nothing = judge(&all, &dir.path().join("none"), &Records::new()).unwrap();
        assert_eq!(nothing, Faults { missing: count, ..Faults::default() });
        let boasting = judge(&all, &dir.path().join("none"), &records).unwrap();
        assert_eq!(boasting, Faults { missing: count, misrecorded: count, ..Faults::default() });
    }

    #[test]
    fn each_fault_is_counted_as_what_it_is() {
        let all = some_files();
        let (dir, mut records) = sound(&all);
        // The first of them is empty.
        let large = &all[1..];
        let path = |number: usize| large[number].path(dir.path());
        std::fs::write(path(0), &large[0].content[..99]).unwrap();
        std::fs::write(path(1), []).unwrap();
        assert_eq!(truncated(&all, dir.path()), [&large[0].url, &large[1].url]);
        let mut bytes = large[2].content.to_vec();
        bytes[50] ^= 1;
        std::fs::write(path(2), &bytes).unwrap();
        bytes.push(0);
        std::fs::write(path(3), [&large[3].content[..], b"more"].concat()).unwrap();
        std::fs::remove_file(path(4)).unwrap();
        records.remove(large[4].url.as_str());
        records.remove(large[5].url.as_str());
        records.get_mut(large[6].url.as_str()).unwrap().bytes -= 1;
        records.get_mut(large[7].url.as_str()).unwrap().digest = Some("0".repeat(64));
        records.get_mut(large[8].url.as_str()).unwrap().digest = None;
        records.insert("http://host-0.test/other".to_owned(), Record { bytes: 0, digest: None });
        let found = judge(&all, dir.path(), &records).unwrap();
        // Four records boast of files that are not whole, two are wrong themselves, one is of a file nobody serves.
        let expected = Faults { truncated: 2, wrong: 2, missing: 1, unrecorded: 1, misrecorded: 7 };
        assert_eq!(found, expected);
        assert_eq!(found.sum(), 13);
    }

    #[test]
    fn a_torn_progress_file_has_no_records() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("progress.json");
        std::fs::write(&path, r#"{"http://plain.demo.test/a":7}"#).unwrap();
        assert_eq!(progress_file(&path)["http://plain.demo.test/a"], Record { bytes: 7, digest: None });
        std::fs::write(&path, r#"{"http://plain.demo.test/a":"#).unwrap();
        assert_eq!(progress_file(&path), Records::new());
    }
}
