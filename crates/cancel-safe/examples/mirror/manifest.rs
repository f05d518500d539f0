//! Reads a list of URLs. Nothing starts until the whole list is understood, and every bad line is named by its number.

use std::io::BufRead;

use url::Url;

use super::list::{Line, List};
use super::paths;

/// The longest line that is read, in bytes. Browsers and servers give up on longer URLs too.
pub(crate) const MAX_LINE: usize = 8 * 1024;
/// The most bad lines that one error names.
const MAX_NAMED: usize = 20;

/// A list of distinct URLs, normalised.
#[derive(Debug)]
pub(crate) struct Manifest {
    pub(crate) list: List,
    /// How many lines repeated an earlier URL.
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
    /// Reads one URL per line, with its requirements. Blank lines and lines that begin with `#` are skipped; LF and
    /// CRLF both end a line. `told` is called with the number of lines so far.
    pub(crate) fn read(mut source: impl BufRead, mut told: impl FnMut(usize)) -> Result<Self, ManifestError> {
        let mut list = List::new()?;
        let (mut bad, mut count) = (Vec::new(), 0);
        let mut line = Vec::new();
        for number in 1.. {
            line.clear();
            if read_line(&mut source, &mut line)? == 0 {
                break;
            }
            match parse_line(&line, number == 1) {
                Ok(None) => {}
                Ok(Some(line)) => list.push(&line)?,
                Err(why) => {
                    count += 1;
                    if bad.len() < MAX_NAMED {
                        bad.push((number, why));
                    }
                }
            }
            told(number);
        }
        if count > 0 {
            return Err(ManifestError::Lines { count, lines: bad });
        }
        let duplicates = list.sort()?;
        Ok(Self { list, duplicates })
    }
}

/// Reads up to and including the next LF, keeps at most `MAX_LINE + 1` bytes, and returns how many there were.
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

fn parse_line(line: &[u8], first: bool) -> Result<Option<Line>, String> {
    let line = if first { line.strip_prefix(b"\xef\xbb\xbf").unwrap_or(line) } else { line };
    let line = line.trim_ascii();
    if line.is_empty() || line.starts_with(b"#") {
        return Ok(None);
    }
    if line.len() > MAX_LINE {
        return Err(format!("longer than {MAX_LINE} bytes"));
    }
    let text = std::str::from_utf8(line).map_err(|_| "not UTF-8".to_owned())?;
    // As `sha256sum` writes it: the digest, a blank, a blank or a star, and the name.
    if let Some((digest, rest)) = text.split_once(' ')
        && is_digest(digest)
    {
        let url = key(rest.strip_prefix(['*', ' ']).unwrap_or(rest))?.into();
        return Ok(Some(Line { url, sha256: Some(digest.to_ascii_lowercase()), ..Line::default() }));
    }
    let mut fields = text.split('\t');
    let mut line = Line { url: key(fields.next().unwrap_or_default())?.into(), ..Line::default() };
    for field in fields.map(str::trim).filter(|field| !field.is_empty()) {
        match field.split_once('=') {
            Some(("sha256", digest)) if is_digest(digest) => line.sha256 = Some(digest.to_ascii_lowercase()),
            Some(("sha256", _)) => return Err("sha256= takes 64 hexadecimal digits".to_owned()),
            Some(("size", size)) => {
                line.size = Some(size.parse().map_err(|_| "size= takes a number of bytes".to_owned())?);
            }
            Some(("out", out)) if paths::is_output(out) => line.out = Some(out.to_owned()),
            Some(("out", _)) => {
                return Err("out= takes a path of two names or more below files/, none of them reserved".to_owned());
            }
            _ => return Err(format!("unknown field {field:?}: sha256=, size= and out= are known")),
        }
    }
    Ok(Some(line))
}

fn is_digest(text: &str) -> bool {
    text.len() == 64 && text.bytes().all(|byte| byte.is_ascii_hexdigit())
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
        Manifest::read(text.as_bytes(), |_| {})
    }

    fn urls(manifest: &Manifest) -> Vec<String> {
        let mut urls: Vec<_> =
            (0..manifest.list.len() as u32).map(|slot| manifest.list.line(slot).unwrap().url).collect();
        urls.sort();
        urls
    }

    #[test]
    fn a_line_says_what_its_file_must_be() {
        let digest = "AB".repeat(32);
        let text = format!("http://h/a\tsha256={digest}\tsize=5\tout=x/y\n{digest} *http://h/b\n{digest}  http://h/c");
        let manifest = read(&text).unwrap();
        for (url, size, out) in
            [("http://h/a", Some(5), Some("x/y")), ("http://h/b", None, None), ("http://h/c", None, None)]
        {
            let line = manifest.list.line(manifest.list.find(url).unwrap().unwrap()).unwrap();
            let wanted = (Some("ab".repeat(32)), size, out.map(str::to_owned));
            assert_eq!((line.sha256, line.size, line.out), wanted, "{url}");
        }
        for field in ["sha256=12", "size=-1", "out=../x", "out=x", "colour=red"] {
            assert!(read(&format!("http://h/a\t{field}")).is_err(), "{field}");
        }
    }

    #[test]
    fn comments_blank_lines_crlf_and_a_byte_order_mark_are_understood() {
        let manifest = read("\u{feff}# list\r\n\r\nhttp://A.example/x y#frag\r\n  https://b.example  \n").unwrap();
        assert_eq!(urls(&manifest), ["http://a.example/x%20y", "https://b.example/"]);
    }

    #[test]
    fn duplicates_collapse_after_normalisation() {
        let manifest = read("http://a.example:80/%7e\nHTTP://A.example/%7e#b\nhttp://a.example/./%7e").unwrap();
        assert_eq!((manifest.list.len(), manifest.duplicates), (1, 2));
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
        let error = Manifest::read(&b"http://a/\n\xff\xfe\n"[..], |_| {}).unwrap_err().to_string();
        assert!(error.contains("line 2: not UTF-8"), "{error}");
    }
}
