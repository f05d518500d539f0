//! Bodies that were cut: the part that arrived is kept, so that a later attempt asks only for the rest.
//!
//! Invariant: a part is the beginning of one representation, and is stored with its strong validator. It is used only
//! with an answer that has the same validator, and only until the system restarts, because a power cut may have left
//! holes in it. The file itself is always written as a whole, from the part and the rest.

use std::collections::HashSet;
use std::fs::{File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use reqwest::header::{self, HeaderMap, HeaderName, HeaderValue};
use reqwest::{Response, StatusCode};
use sha2::{Digest, Sha256};
use url::Url;

/// The shortest body, in bytes, whose beginning is worth keeping.
const LEAST: u64 = 256 * 1024;
/// How much is written, or read back, at once.
pub(crate) const PIECE: usize = 256 * 1024;

/// The beginning of a body.
#[derive(Debug)]
pub(crate) struct Part {
    place: PathBuf,
    /// An ETag or a date, as it stands in `If-Range`.
    validator: String,
    /// The length of the whole, in bytes.
    total: u64,
    /// How many bytes there are.
    pub(crate) have: u64,
    buffer: Vec<u8>,
}

/// The parts of one directory.
#[derive(Debug)]
pub(crate) struct Parts {
    dir: PathBuf,
    /// The names of those that may be there: most URLs have none, and the disk is not asked for them.
    names: Mutex<HashSet<String>>,
}

fn name(url: &str) -> String {
    Sha256::digest(url)[..16].iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Identifies the present boot of the system. Without it, no other process uses a part.
fn boot() -> String {
    let id = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
    if id.is_empty() { format!("process {}", std::process::id()) } else { id.trim().to_owned() }
}

/// The validator with which a later request can ask for the rest: a strong ETag, or a date that is older than the
/// answer.
fn validator(headers: &HeaderMap) -> Option<String> {
    let text = |name: HeaderName| headers.get(name).and_then(|value| value.to_str().ok());
    if let Some(etag) = text(header::ETAG) {
        return etag.starts_with('"').then(|| etag.to_owned());
    }
    let modified = text(header::LAST_MODIFIED)?;
    let date = |text| httpdate::parse_http_date(text).ok();
    let age = date(text(header::DATE)?)?.duration_since(date(modified)?).ok()?;
    // Within one second a file may change twice and keep one date.
    (age >= Duration::from_secs(1)).then(|| modified.to_owned())
}

impl Parts {
    /// Those below `dir`; none is known before [`clear`](Self::clear) has looked.
    pub(crate) fn below(dir: PathBuf) -> Self {
        Self { dir, names: Mutex::default() }
    }

    /// Where they are.
    pub(crate) fn dir(&self) -> &Path {
        &self.dir
    }

    fn names(&self) -> MutexGuard<'_, HashSet<String>> {
        self.names.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The part of `url`, if one was kept that can be used. Blocks, if there may be one.
    pub(crate) fn find(&self, url: &Url) -> Option<Part> {
        if self.names().is_empty() {
            return None;
        }
        let name = name(url.as_str());
        if !self.names().contains(&name) {
            return None;
        }
        let place = self.dir.join(name);
        let text = std::fs::read_to_string(place.with_extension("txt")).ok()?;
        let fields: Vec<&str> = text.lines().collect();
        let &[asked, validator, total, started] = &fields[..] else { return None };
        let total = total.parse().ok()?;
        // If the part is the whole body, the last byte is requested again, because a range cannot be empty.
        let have = place.metadata().ok()?.len().min(u64::checked_sub(total, 1)?);
        let is_usable = asked == url.as_str() && started == boot() && have > 0;
        is_usable.then(|| Part { place, validator: validator.to_owned(), total, have, buffer: Vec::new() })
    }

    /// Begins a part for what `response` brings, if that could be asked for in parts. Blocks.
    pub(crate) fn begin(&self, url: &Url, response: &Response) -> io::Result<Option<Part>> {
        let headers = response.headers();
        let refuses = headers.get(header::ACCEPT_RANGES).is_some_and(|units| units == "none");
        // From the head, because a wrapped body does not know its length.
        let total = headers.get(header::CONTENT_LENGTH).and_then(|length| length.to_str().ok()?.parse().ok());
        // What is not worth it is not asked for a validator.
        let Some(total) = total.filter(|total: &u64| *total >= LEAST && !refuses) else { return Ok(None) };
        let Some(validator) = validator(headers) else { return Ok(None) };
        std::fs::create_dir_all(&self.dir)?;
        let name = name(url.as_str());
        let place = self.dir.join(&name);
        self.names().insert(name);
        // Never beside bytes of another representation.
        File::create(&place)?;
        std::fs::write(place.with_extension("txt"), format!("{url}\n{validator}\n{total}\n{}\n", boot()))?;
        Ok(Some(Part { place, validator, total, have: 0, buffer: Vec::new() }))
    }

    /// Removes one that is of no more use. Blocks for a moment.
    pub(crate) fn remove(&self, part: Part) {
        // What cannot be removed is not used either, once the file is there.
        let _left = (std::fs::remove_file(part.place.with_extension("txt")), std::fs::remove_file(&part.place));
        if let Some(name) = part.place.file_name().and_then(|name| name.to_str()) {
            self.names().remove(name);
        }
    }

    /// Removes those whose URL is not `wanted` any more, and notes the others. Blocks.
    pub(crate) fn clear(&self, wanted: impl Fn(&str) -> bool) -> io::Result<()> {
        for entry in std::fs::read_dir(&self.dir).into_iter().flatten() {
            let path = entry?.path();
            let text = std::fs::read_to_string(path.with_extension("txt")).unwrap_or_default();
            match text.lines().next() {
                Some(url) if wanted(url) => drop(self.names().insert(name(url))),
                _ => std::fs::remove_file(&path)?,
            }
        }
        Ok(())
    }
}

impl Part {
    /// The headers that ask for the rest.
    pub(crate) fn headers(&self) -> Option<[(HeaderName, HeaderValue); 2]> {
        let range = HeaderValue::from_str(&format!("bytes={}-", self.have)).ok()?;
        Some([(header::RANGE, range), (header::IF_RANGE, HeaderValue::from_str(&self.validator).ok()?)])
    }

    /// Whether `response` is the rest of what there is.
    pub(crate) fn is_continued_by(&self, response: &Response) -> bool {
        let text = |name| response.headers().get(name).and_then(|value: &HeaderValue| value.to_str().ok());
        let range = format!("bytes {}-{}/{}", self.have, self.total - 1, self.total);
        // A 206 need not repeat the date, but must not have another one; it has to repeat an ETag.
        let is_same = match self.validator.starts_with('"') {
            true => text(header::ETAG) == Some(&self.validator),
            false => text(header::LAST_MODIFIED).is_none_or(|date| date == self.validator),
        };
        response.status() == StatusCode::PARTIAL_CONTENT && text(header::CONTENT_RANGE) == Some(&range) && is_same
    }

    /// The length of the whole, in bytes.
    pub(crate) fn total(&self) -> u64 {
        self.total
    }

    /// The bytes from `at` on, at most [`PIECE`] of them. Blocks.
    pub(crate) fn read(&self, at: u64) -> io::Result<Vec<u8>> {
        let mut file = File::open(&self.place)?;
        file.seek(SeekFrom::Start(at))?;
        let mut piece = vec![0; usize::try_from(self.have - at).unwrap_or(PIECE).min(PIECE)];
        file.read_exact(&mut piece)?;
        Ok(piece)
    }

    /// Takes more of the body; returns whether it is time to [`write`](Self::write).
    pub(crate) fn take(&mut self, chunk: &[u8]) -> bool {
        self.buffer.extend_from_slice(chunk);
        self.buffer.len() >= PIECE
    }

    /// Writes down what was taken. Blocks.
    pub(crate) fn write(&mut self) -> io::Result<()> {
        let mut file = OpenOptions::new().write(true).open(&self.place)?;
        // Bytes after this are from an earlier attempt; they have the same content, but may be half written.
        file.set_len(self.have)?;
        file.seek(SeekFrom::Start(self.have))?;
        file.write_all(&self.buffer)?;
        self.have += self.buffer.len() as u64;
        self.buffer.clear();
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answer(status: u16, headers: &[(HeaderName, &str)], length: usize) -> Response {
        let mut response = hyper::Response::builder().status(status).header(header::CONTENT_LENGTH, length);
        for (name, value) in headers {
            response = response.header(name, *value);
        }
        response.body(vec![0; length]).unwrap().into()
    }

    #[test]
    fn only_the_rest_of_the_same_representation_continues_a_part() {
        let dir = tempfile::tempdir().unwrap();
        let url = Url::parse("http://h/a").unwrap();
        let first = answer(200, &[(header::ETAG, "\"1\"")], 300_000);
        let parts = Parts::below(dir.path().to_owned());
        let mut part = parts.begin(&url, &first).unwrap().unwrap();
        assert!(parts.find(&url).is_none(), "nothing is there yet");
        part.take(&[7; 1000]);
        part.write().unwrap();
        let part = parts.find(&url).unwrap();
        assert_eq!((part.have, part.total(), part.read(990).unwrap()), (1000, 300_000, vec![7; 10]));
        let [(_, asked), (_, same)] = part.headers().unwrap();
        assert_eq!((asked.to_str().unwrap(), same.to_str().unwrap()), ("bytes=1000-", "\"1\""));
        let (range, etag) = ((header::CONTENT_RANGE, "bytes 1000-299999/300000"), (header::ETAG, "\"1\""));
        assert!(part.is_continued_by(&answer(206, &[range.clone(), etag.clone()], 9)));
        for (status, headers) in [
            (200, vec![range.clone(), etag.clone()]),
            (206, vec![range.clone()]),
            (206, vec![range.clone(), (header::ETAG, "\"2\"")]),
            (206, vec![range, (header::ETAG, "W/\"1\"")]),
            (206, vec![(header::CONTENT_RANGE, "bytes 999-299999/300000"), etag.clone()]),
            (206, vec![(header::CONTENT_RANGE, "bytes 1000-300000/300001"), etag.clone()]),
            (206, vec![(header::CONTENT_RANGE, "bytes 1000-2000/300000"), etag]),
        ] {
            assert!(!part.is_continued_by(&answer(status, &headers, 9)), "{status} {headers:?}");
        }
        // Of an earlier run.
        let parts = Parts::below(dir.path().to_owned());
        parts.clear(|name| name == url.as_str()).unwrap();
        assert!(parts.find(&url).is_some());
        parts.remove(parts.find(&url).unwrap());
        assert!(parts.find(&url).is_none());
        let part = parts.begin(&url, &first).unwrap();
        assert!(part.is_some());
        parts.clear(|_| false).unwrap();
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
    }

    #[test]
    fn a_weak_or_young_validator_keeps_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let url = Url::parse("http://h/a").unwrap();
        let parts = Parts::below(dir.path().to_owned());
        let (old, now) = ("Sun, 06 Nov 1994 08:49:36 GMT", "Sun, 06 Nov 1994 08:49:37 GMT");
        for (headers, is_kept) in [
            (vec![], false),
            (vec![(header::ETAG, "W/\"1\"")], false),
            (vec![(header::ETAG, "\"1\""), (header::ACCEPT_RANGES, "none")], false),
            (vec![(header::LAST_MODIFIED, old)], false),
            (vec![(header::LAST_MODIFIED, now), (header::DATE, now)], false),
            (vec![(header::LAST_MODIFIED, old), (header::DATE, now)], true),
            (vec![(header::ETAG, "\"1\"")], true),
        ] {
            let part = parts.begin(&url, &answer(200, &headers, 300_000)).unwrap();
            assert_eq!(part.is_some(), is_kept, "{headers:?}");
        }
        assert!(parts.begin(&url, &answer(200, &[(header::ETAG, "\"1\"")], 9)).unwrap().is_none());
    }
}
