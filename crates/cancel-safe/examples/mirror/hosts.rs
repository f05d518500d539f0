//! The state of each host during a run: how many fetches it may have at once, and whether it answers.
//!
//! Invariant: every other answer counts as a success. Only failed connections, time-outs, and 502, 503 and 504 from
//! different URLs count against a host; a host that has answered since is never given up.

use std::collections::{BTreeMap, HashSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use cancel_safe::http_timeout::Class;
use reqwest::{Response, StatusCode};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use url::Url;

/// How long a host may give no answer at all before its URLs fail.
pub(crate) const MAX_OUTAGE: Duration = Duration::from_secs(60);
/// The most failing URLs of a host that are counted separately; a host with this many in a row has opened its breaker
/// long ago.
const MAX_STORM: usize = 1024;

/// How many URLs of one host may wait for another try before no new URL of that host is begun.
const MAX_WAITING: usize = 256;

/// The name of a host as everything shows it: with its port, if that is not the scheme's own.
pub(crate) fn name_of(url: &Url) -> String {
    match (url.host_str(), url.port()) {
        (Some(host), Some(port)) => format!("{host}:{port}"),
        (host, _) => host.unwrap_or_default().to_owned(),
    }
}

/// A URL's place at its host, held until its body has arrived; what happens to the file afterwards does not concern the
/// host. When it is dropped, the next URL may have it.
#[derive(Debug)]
pub(crate) struct Seat {
    hosts: Arc<Hosts>,
    host: String,
    /// That of the host and that of the run; none before there are both.
    permits: Option<[OwnedSemaphorePermit; 2]>,
}

impl Seat {
    /// Waits until the host, and the run, take one request more.
    pub(crate) async fn sit_down(&mut self) {
        let gate = self.hosts.gate(&self.host);
        // That of the host first: a host that has all it may have holds up no other. Neither gate is ever closed.
        let Ok(of_host) = gate.acquire_owned().await else { return };
        let of_run = Arc::clone(&self.hosts.gate).acquire_owned().await;
        self.permits = of_run.ok().map(|of_run| [of_host, of_run]);
    }

    /// A part of a body has come.
    pub(crate) fn heard(&self) {
        self.hosts.with(&self.host, |host| host.silent_since = None);
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        self.hosts.with(&self.host, |host| host.begun = host.begun.saturating_sub(1));
    }
}

/// The hosts of one run.
#[derive(Debug)]
pub(crate) struct Hosts {
    per_host: usize,
    /// Requests in flight to all of them.
    gate: Arc<Semaphore>,
    table: Mutex<BTreeMap<String, Host>>,
}

#[derive(Debug)]
struct Host {
    /// Requests in flight. A permit is taken before the client is called, so that a fetch that waits for one has not
    /// begun: a stop sends it back to the queue, and neither `--max-time` nor `cut` counts it.
    gate: Arc<Semaphore>,
    /// When it stopped answering.
    silent_since: Option<Instant>,
    /// The URLs that it refused as a gateway or as overloaded since it last gave another answer.
    storm: HashSet<String>,
    /// When its breaker lets the next request in.
    next_try: Option<Instant>,
    /// Fetches that have begun.
    begun: usize,
    /// The URLs that wait to be tried again.
    waiting: HashSet<String>,
}

impl Hosts {
    /// So many requests may be in flight in all, and so many to each host.
    pub(crate) fn new(concurrency: usize, per_host: usize) -> Self {
        Self { per_host, gate: Arc::new(Semaphore::new(concurrency)), table: Mutex::default() }
    }

    fn table(&self) -> MutexGuard<'_, BTreeMap<String, Host>> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn with<T>(&self, host: &str, look: impl FnOnce(&mut Host) -> T) -> T {
        let mut table = self.table();
        if let Some(host) = table.get_mut(host) {
            return look(host);
        }
        let gate = Arc::new(Semaphore::new(self.per_host));
        let (storm, waiting) = (HashSet::new(), HashSet::new());
        let new = Host { gate, silent_since: None, storm, next_try: None, begun: 0, waiting };
        look(table.entry(host.to_owned()).or_insert(new))
    }

    /// The permits for requests to a host.
    fn gate(&self, host: &str) -> Arc<Semaphore> {
        self.with(host, |host| Arc::clone(&host.gate))
    }

    /// Whether one more URL of a host is to be begun: there are permits left, its breaker is not known to be open, and not
    /// too many of its URLs wait.
    pub(crate) fn may_begin(&self, host: &str) -> bool {
        // Whoever has begun has its permit at once, if there is one.
        if self.gate.available_permits() == 0 {
            return false;
        }
        let most = self.per_host;
        self.with(host, |host| {
            let is_open = host.next_try.is_some_and(|next_try| next_try > Instant::now());
            // A host that is given up need not wait.
            let is_lost = host.silent_since.is_some_and(|since| since.elapsed() > MAX_OUTAGE);
            is_lost || (host.begun < most && host.waiting.len() < MAX_WAITING && !is_open)
        })
    }

    /// A URL's fetch begins.
    pub(crate) fn begin(self: &Arc<Self>, host: &str, url: &str) -> Seat {
        self.with(host, |host| {
            host.begun += 1;
            host.waiting.remove(url);
        });
        Seat { hosts: Arc::clone(self), host: host.to_owned(), permits: None }
    }

    /// A URL waits to be tried again.
    pub(crate) fn pause(&self, host: &str, url: &str) {
        self.with(host, |host| host.waiting.insert(url.to_owned()));
    }

    /// A URL has come to its end.
    pub(crate) fn end(&self, host: &str, url: &str) {
        self.with(host, |host| host.waiting.remove(url));
    }

    /// It gave an answer, whatever it was.
    pub(crate) fn answered(&self, host: &str) {
        self.with(host, |host| (host.silent_since, host.next_try) = (None, None));
    }

    /// A connection failed, or no answer came in time.
    pub(crate) fn silent(&self, host: &str) {
        self.with(host, |host| {
            host.silent_since.get_or_insert_with(Instant::now);
        });
    }

    /// Its breaker is open for this long.
    pub(crate) fn blocked(&self, host: &str, retry_after: Duration) {
        self.with(host, |host| host.next_try = Instant::now().checked_add(retry_after));
    }

    /// Whether a host has been silent for too long to wait for it any more.
    pub(crate) fn is_lost(&self, host: &str) -> bool {
        self.with(host, |host| host.silent_since.is_some_and(|since| since.elapsed() > MAX_OUTAGE))
    }

    /// What an answer says about its host.
    pub(crate) fn class_of(&self, response: &Response) -> Class {
        let url = response.url();
        self.with(&name_of(url), |host| {
            host.silent_since = None;
            match response.status() {
                StatusCode::BAD_GATEWAY | StatusCode::SERVICE_UNAVAILABLE | StatusCode::GATEWAY_TIMEOUT => {
                    // The same URL again says nothing new: it may be that URL which is broken.
                    let is_new = host.storm.len() >= MAX_STORM || host.storm.insert(url.path().to_owned());
                    if is_new { Class::Failure } else { Class::Ignore }
                }
                StatusCode::REQUEST_TIMEOUT | StatusCode::TOO_MANY_REQUESTS => Class::Ignore,
                _ => {
                    host.storm.clear();
                    Class::Success
                }
            }
        })
    }

    /// What the run waits for, one line each: hosts whose breaker is open, and when the next request is let in.
    pub(crate) fn waits(&self) -> Vec<String> {
        let now = Instant::now();
        let open = |(name, host): (&String, &Host)| {
            let wait = host.next_try?.saturating_duration_since(now).as_millis().div_ceil(1000);
            Some(format!("{name}: circuit open, next try in {wait} s"))
        };
        self.table().iter().filter_map(open).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answer(path: &str, status: u16) -> Response {
        use reqwest::ResponseBuilderExt;
        let url = Url::parse(&format!("http://h{path}")).unwrap();
        hyper::Response::builder().status(status).url(url).body("").unwrap().into()
    }

    #[test]
    fn only_a_storm_over_different_urls_counts_against_a_host() {
        let hosts = Hosts::new(9, 1);
        for status in [200, 302, 404, 500, 501, 505, 507] {
            assert_eq!(hosts.class_of(&answer("/a", status)), Class::Success, "{status}");
        }
        for (path, class) in [("/a", Class::Failure), ("/a", Class::Ignore), ("/b", Class::Failure)] {
            assert_eq!(hosts.class_of(&answer(path, 503)), class, "{path}");
        }
        hosts.class_of(&answer("/c", 500));
        assert_eq!(hosts.class_of(&answer("/a", 502)), Class::Failure, "another answer ends the storm");
    }

    #[test]
    fn a_host_that_answers_is_not_lost() {
        let hosts = Hosts::new(9, 1);
        hosts.with("h", |host| host.silent_since = Instant::now().checked_sub(MAX_OUTAGE * 2));
        hosts.silent("h");
        assert!(hosts.is_lost("h"));
        hosts.answered("h");
        hosts.silent("h");
        assert!(!hosts.is_lost("h") && !hosts.is_lost("i"));
    }

    #[test]
    fn a_host_is_not_lost_while_a_body_comes_from_it() {
        let hosts = Arc::new(Hosts::new(9, 1));
        let seat = hosts.begin("h", "a");
        let long_ago = Instant::now().checked_sub(MAX_OUTAGE * 2);
        hosts.with("h", |host| host.silent_since = long_ago);
        assert!(hosts.is_lost("h"));
        seat.heard();
        assert!(!hosts.is_lost("h"));
    }

    #[test]
    fn a_host_begins_no_more_than_it_may() {
        let hosts = Arc::new(Hosts::new(9, 2));
        let seats = ["a", "b"].map(|url| {
            assert!(hosts.may_begin("h"));
            hosts.begin("h", url)
        });
        assert!(!hosts.may_begin("h") && hosts.may_begin("i"));
        drop(seats);
        hosts.pause("h", "a");
        for url in 1..MAX_WAITING {
            assert!(hosts.may_begin("h"), "{url}");
            drop(hosts.begin("h", &url.to_string()));
            hosts.pause("h", &url.to_string());
        }
        assert!(!hosts.may_begin("h"), "{MAX_WAITING} wait");
        hosts.end("h", "a");
        assert!(hosts.may_begin("h"));
        hosts.blocked("h", Duration::from_secs(60));
        assert!(!hosts.may_begin("h"));
        hosts.answered("h");
        assert!(hosts.may_begin("h"));
    }

    #[test]
    fn an_open_circuit_is_told_with_its_next_try_until_the_host_answers() {
        let hosts = Hosts::new(9, 3);
        assert_eq!(hosts.gate("h:81").available_permits(), 3);
        hosts.blocked("h:81", Duration::from_millis(2900));
        assert_eq!(hosts.waits(), ["h:81: circuit open, next try in 3 s"]);
        hosts.answered("h:81");
        assert_eq!(hosts.waits(), [""; 0]);
    }
}
