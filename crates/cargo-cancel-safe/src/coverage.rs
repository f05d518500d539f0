//! Which awaits were dropped.
//!
//! Invariant: every recorded place in a scanned file belongs to an await or a test, or is listed with the reason why it
//! does not. Places in other files are ignored.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use crate::package::File;
use crate::place::{Await, Owner, Position, Reason};
use crate::record::Record;

/// The awaits of some packages, each with how often it was dropped.
#[derive(Debug)]
pub struct Coverage {
    packages: Vec<Package>,
    unattributed: Vec<Unattributed>,
    in_files: u64,
}

/// The awaits of one package.
#[derive(Debug)]
pub struct Package {
    name: String,
    files: Vec<Counted>,
}

/// The awaits of one file.
#[derive(Debug)]
pub struct Counted {
    file: File,
    /// One count for each await.
    drops: Vec<u64>,
}

/// A recorded place that belongs to no known await.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Unattributed {
    /// The file.
    pub path: PathBuf,
    /// The recorded place.
    pub position: Position,
    /// How often it was recorded.
    pub drops: u64,
    /// Why it is unattributed.
    pub reason: Reason,
}

/// Awaits, and how many of them were dropped.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Figures {
    /// All awaits.
    pub awaits: usize,
    /// The awaits that were dropped at least once.
    pub dropped: usize,
}

impl Figures {
    /// The share of the awaits that were dropped: 100 when there are none.
    #[must_use]
    #[expect(clippy::cast_precision_loss, reason = "no source has 2^52 awaits")]
    pub fn percent(self) -> f64 {
        if self.awaits == 0 { 100.0 } else { self.dropped as f64 * 100.0 / self.awaits as f64 }
    }

    fn add(self, other: Self) -> Self {
        Self { awaits: self.awaits + other.awaits, dropped: self.dropped + other.dropped }
    }
}

impl Coverage {
    /// Gives each recorded place to its await. `root` is where relative paths start.
    #[must_use]
    pub fn new(scanned: Vec<(String, Vec<File>)>, record: &Record, root: &Path) -> Self {
        let mut packages: Vec<Package> = scanned.into_iter().map(|(name, files)| Package::new(name, files)).collect();
        let mut unattributed = Vec::new();
        let mut in_files = 0;
        let mut resolved: BTreeMap<&str, Option<PathBuf>> = BTreeMap::new();
        for (spelt, position, drops) in record.places() {
            // A file that no longer exists was not scanned.
            let path = resolved.entry(spelt).or_insert_with(|| fs::canonicalize(root.join(spelt)).ok());
            let Some(path) = path else { continue };
            let mut reason = None;
            // Two packages may share a file by `#[path]`.
            for counted in packages.iter_mut().flat_map(|package| &mut package.files) {
                if counted.file.path() != path {
                    continue;
                }
                in_files += drops;
                match counted.file.source.owner(position) {
                    Owner::Await(index) => counted.drops[index] += drops,
                    Owner::Test => {}
                    Owner::Unknown(why) => reason = Some(why),
                }
            }
            unattributed.extend(reason.map(|reason| Unattributed { path: path.clone(), position, drops, reason }));
        }
        Self { packages, unattributed, in_files }
    }

    /// The packages, in the order in which they were given.
    #[must_use]
    pub fn packages(&self) -> &[Package] {
        &self.packages
    }

    /// The places recorded in the scanned files that belong to no known await.
    #[must_use]
    pub fn unattributed(&self) -> &[Unattributed] {
        &self.unattributed
    }

    /// Whether anything was recorded in the scanned files.
    #[must_use]
    pub fn has_record(&self) -> bool {
        self.in_files > 0
    }

    /// The sum over all packages.
    #[must_use]
    pub fn figures(&self) -> Figures {
        self.packages.iter().map(Package::figures).fold(Figures::default(), Figures::add)
    }
}

impl Package {
    fn new(name: String, files: Vec<File>) -> Self {
        let counted = |file: File| Counted { drops: vec![0; file.awaits().len()], file };
        Self { name, files: files.into_iter().map(counted).collect() }
    }

    /// Its name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its files, in the order of their paths.
    #[must_use]
    pub fn files(&self) -> &[Counted] {
        &self.files
    }

    /// The sum over its files.
    #[must_use]
    pub fn figures(&self) -> Figures {
        self.files.iter().map(Counted::figures).fold(Figures::default(), Figures::add)
    }
}

impl Counted {
    /// The file.
    #[must_use]
    pub fn path(&self) -> &Path {
        self.file.path()
    }

    /// Its awaits, each with how often it was dropped.
    pub fn awaits(&self) -> impl Iterator<Item = (&Await, u64)> {
        self.file.awaits().iter().zip(self.drops.iter().copied())
    }

    /// The number of its awaits, and of those dropped.
    #[must_use]
    pub fn figures(&self) -> Figures {
        Figures { awaits: self.drops.len(), dropped: self.drops.iter().filter(|&&drops| drops > 0).count() }
    }
}
