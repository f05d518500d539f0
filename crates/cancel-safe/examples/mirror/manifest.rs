//! Reads a list of URLs. Nothing starts until the whole list is understood, and every bad line is named by its number.

use std::collections::BTreeSet;
use std::io::BufRead;

use url::Url;

/// The longest line that is read, in bytes. Browsers and servers give up on longer URLs too.
pub(crate) const MAX_LINE: usize = 8 * 1024;
/// The most bad lines that one error names.
const MAX_NAMED: usize = 20;

/// A list of distinct URLs, normalised.
#[derive(Debug, Default)]
pub(crate) struct Manifest {
    /// In the order of the list, the first of several equal ones.
    pub(crate) urls: Vec<Url>,
    /// Lines that named a URL that stood there before.
    pub(crate) duplicates: usize,
}

/// Why a manifest is refused.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ManifestError {
    #[error("the manifest cannot be read")]
    Io(#[from] std::io::Error),
    #[error("the manifest has {count} bad line(s); nothing was started{}", listed(.lines))]
    Lines { count: usize, lines: Vec<(usize, String)> },
}

fn listed(lines: &[(usize, String)]) -> String {
    lines.iter().map(|(number, why)| format!("\n  line {number}: {why}")).collect()
}

impl Manifest {
    /// One URL a line; blank lines and lines that begin with `#` are passed over; LF and CRLF both end a line.
    pub(crate) fn read(mut source: impl BufRead) -> Result<Self, ManifestError> {
        let mut manifest = Self::default();
        let mut seen = BTreeSet::new();
        let (mut bad, mut count) = (Vec::new(), 0);
        let mut line = Vec::new();
        for number in 1.. {
            line.clear();
            if read_line(&mut source, &mut line)? == 0 {
                break;
            }
            match parse_line(&line, number == 1) {
                Ok(None) => {}
                Ok(Some(url)) if seen.insert(url.clone()) => manifest.urls.push(url),
                Ok(Some(_)) => manifest.duplicates += 1,
                Err(why) => {
                    count += 1;
                    if bad.len() < MAX_NAMED {
                        bad.push((number, why));
                    }
                }
            }
        }
        if count > 0 { Err(ManifestError::Lines { count, lines: bad }) } else { Ok(manifest) }
    }
}

/// Reads up to and with the next LF, keeps at most `MAX_LINE + 1` bytes of it, and returns how many there were.
fn read_line(source: &mut impl BufRead, line: &mut Vec<u8>) -> std::io::Result<usize> {
    let mut total = 0;
    loop {
        let buffer = source.fill_buf()?;
        if buffer.is_empty() {
            return Ok(total);
        }
        let end = buffer.iter().position(|byte| *byte == b'\n');
        let taken = end.map_or(buffer.len(), |at| at + 1);
        let room = (MAX_LINE + 3).saturating_sub(line.len());
        line.extend_from_slice(&buffer[..taken.min(room)]);
        total += taken;
        source.consume(taken);
        if end.is_some() {
            return Ok(total);
        }
    }
}

fn parse_line(line: &[u8], first: bool) -> Result<Option<Url>, String> {
    let line = if first { line.strip_prefix(b"\xef\xbb\xbf").unwrap_or(line) } else { line };
    let line = line.trim_ascii();
    if line.is_empty() || line.starts_with(b"#") {
        return Ok(None);
    }
    if line.len() > MAX_LINE {
        return Err(format!("longer than {MAX_LINE} bytes"));
    }
    let text = std::str::from_utf8(line).map_err(|_| "not UTF-8".to_owned())?;
    key(text).map(Some)
}

/// The key of a URL: normalised as the WHATWG standard says, without its fragment.
pub(crate) fn key(text: &str) -> Result<Url, String> {
    let mut url = Url::parse(text).map_err(|why| format!("not an absolute URL ({why})"))?;
    if !matches!(url.scheme(), "http" | "https") {
        return Err(format!("the scheme {:?} is neither http nor https", url.scheme()));
    }
    if !url.username().is_empty() || url.password().is_some() {
        // The URL itself stays out of the message: it holds a secret.
        return Err("credentials in a URL are refused: they would be stored in the catalogue".to_owned());
    }
    url.set_fragment(None);
    Ok(url)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Result<Manifest, ManifestError> {
        Manifest::read(text.as_bytes())
    }

    #[test]
    fn comments_blank_lines_crlf_and_a_byte_order_mark_are_understood() {
        let manifest = read("\u{feff}# list\r\n\r\nhttp://A.example/x y#frag\r\n  https://b.example  \n").unwrap();
        let urls: Vec<_> = manifest.urls.iter().map(Url::as_str).collect();
        assert_eq!(urls, ["http://a.example/x%20y", "https://b.example/"]);
    }

    #[test]
    fn duplicates_collapse_after_normalisation() {
        let manifest = read("http://a.example:80/%7e\nHTTP://A.example/%7e#b\nhttp://a.example/./%7e").unwrap();
        assert_eq!((manifest.urls.len(), manifest.duplicates), (1, 2));
    }

    #[test]
    fn every_bad_line_is_named_and_a_secret_is_not() {
        let error = read("http://a/\nftp://b/\nnonsense\nhttp://me:hunter2@c/\n").unwrap_err().to_string();
        assert!(error.contains("line 2") && error.contains("line 3") && error.contains("line 4"), "{error}");
        assert!(!error.contains("hunter2"), "{error}");
    }

    #[test]
    fn an_endless_line_is_refused_without_being_held() {
        let long = format!("http://a/{}\nhttp://b/", "x".repeat(1 << 20));
        let error = read(&long).unwrap_err().to_string();
        assert!(error.contains("line 1: longer than"), "{error}");
    }

    #[test]
    fn bytes_that_are_not_text_are_named() {
        let error = Manifest::read(&b"http://a/\n\xff\xfe\n"[..]).unwrap_err().to_string();
        assert!(error.contains("line 2: not UTF-8"), "{error}");
    }
}
