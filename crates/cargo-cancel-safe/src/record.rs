//! The file in which explorations record the awaits that they have dropped.
//!
//! Invariant: a line that is not understood is counted, never taken for something else.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, BufRead, BufReader, BufWriter, Write};
use std::path::Path;

use crate::error::Error;
use crate::place::Position;

/// The environment variable that names the file for `cancel-safe-testing`.
pub const COVERAGE_VARIABLE: &str = "CANCEL_SAFE_COVERAGE";

/// What was dropped, and how often.
///
/// The file has a line `await <path> <line> <column>` for each await, separated by tabs. Many processes append to it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Record {
    places: BTreeMap<(String, Position), u64>,
    malformed: u64,
}

impl Record {
    /// Reads the file; one that does not exist has recorded nothing.
    ///
    /// # Errors
    /// When the file cannot be read.
    pub fn read(path: &Path) -> Result<Self, Error> {
        let file = match File::open(path) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Self::default()),
            Err(error) => return Err(Error::file(path)(error)),
        };
        let mut record = Self::default();
        for line in BufReader::new(file).split(b'\n') {
            let line = line.map_err(Error::file(path))?;
            match std::str::from_utf8(&line).ok().and_then(place) {
                Some(place) => *record.places.entry(place).or_default() += 1,
                None if line.is_empty() => {}
                None => record.malformed += 1,
            }
        }
        Ok(record)
    }

    /// Adds the record of another run.
    pub fn add(&mut self, other: Self) {
        for (place, count) in other.places {
            *self.places.entry(place).or_default() += count;
        }
        self.malformed += other.malformed;
    }

    /// Writes it in the same format, each place once.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn write(&self, path: &Path) -> Result<(), Error> {
        let write = || {
            let mut file = BufWriter::new(File::create(path)?);
            for (path, Position { line, column }) in self.places.keys() {
                writeln!(file, "await\t{path}\t{line}\t{column}")?;
            }
            file.flush()
        };
        write().map_err(Error::file(path))
    }

    /// Whether nothing was recorded.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.places.is_empty()
    }

    /// The number of lines that were not understood: torn by a process that was killed while it wrote, or of a newer
    /// version.
    #[must_use]
    pub fn malformed(&self) -> u64 {
        self.malformed
    }

    /// The places by file, as the line tables spell it.
    pub(crate) fn places(&self) -> impl Iterator<Item = (&str, Position, u64)> {
        self.places.iter().map(|((path, position), count)| (path.as_str(), *position, *count))
    }
}

fn place(line: &str) -> Option<(String, Position)> {
    let mut parts = line.trim_end_matches('\r').split('\t');
    let ("await", Some(path), Some(line), Some(column), None) =
        (parts.next()?, parts.next(), parts.next(), parts.next(), parts.next())
    else {
        return None;
    };
    let position = Position::new(line.parse().ok().filter(|&line| line > 0)?, column.parse().ok()?);
    (!path.is_empty()).then(|| (path.to_owned(), position))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_that_are_torn_or_unknown_are_counted() {
        for line in
            ["", "await", "await\t/a.rs\t1", "await\t/a.rs\t1\t2\t3", "await\t/a.rs\tx\t2", "point\t/a.rs\t1\t2"]
        {
            assert_eq!(place(line), None, "{line}");
        }
        assert_eq!(place("await\t\t1\t2"), None);
        assert_eq!(place("await\t/a.rs\t0\t2"), None);
        assert_eq!(place("await\t/a b.rs\t1\t2"), Some(("/a b.rs".to_owned(), Position::new(1, 2))));
    }

    #[test]
    fn what_is_written_is_read_again() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("record");
        std::fs::write(
            &path,
            b"await\t/a.rs\t1\t2\nawait\t/a.rs\t1\t2\nawa\nawait\t/\xff.rs\t1\t2\n\nawait\t/b.rs\t3\t0",
        )
        .unwrap();
        let record = Record::read(&path).unwrap();
        assert_eq!(record.malformed(), 2);
        let places: Vec<_> = record.places().collect();
        assert_eq!(places, [("/a.rs", Position::new(1, 2), 2), ("/b.rs", Position::new(3, 0), 1)]);
        record.write(&path).unwrap();
        let again = Record::read(&path).unwrap();
        assert_eq!(again.malformed(), 0);
        assert_eq!(again.places().map(|(_, _, count)| count).collect::<Vec<_>>(), [1, 1]);
        assert!(Record::read(&directory.path().join("none")).unwrap().is_empty());
    }
}
