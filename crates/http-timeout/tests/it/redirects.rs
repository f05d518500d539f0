//! Redirects, hop by hop: where they lead, what is sent there, and whose breaker counts the result.

use std::{collections::BTreeMap, time::Duration};

use cancel_safe_http_timeout::{
    Attempts, BreakerConfig, RequestError, Retry, State, TimeoutClient, TimeoutClientBuilder,
};
use futures_util::future::join_all;
use http::{HeaderMap, HeaderValue, Method, Request};
use http_body_util::BodyExt as _;
use hyper::body::Incoming;

use crate::server::{Reply, Server, drip, refused_url, reply, with_header};

fn client(change: impl FnOnce(TimeoutClientBuilder) -> TimeoutClientBuilder) -> TimeoutClient {
    change(TimeoutClient::builder().timeout(Duration::from_secs(60))).build().unwrap()
}

fn quick(attempts: u32) -> Retry {
    Retry::attempts(attempts).backoff(Duration::from_millis(1), Duration::from_millis(2))
}

/// An answer that leads to `location`.
fn to(status: u16, location: &str) -> Reply {
    with_header(reply(status, "elsewhere"), "location", location)
}

/// A server that redirects every request to `location`.
fn sends_to(status: u16, location: String) -> Server {
    Server::start(move |request, _| {
        let reply = to(status, &location);
        async move {
            // A server that hangs up during an upload may not be heard.
            assert!(request.into_body().collect().await.is_ok());
            reply
        }
    })
}

/// Everything that the server received.
async fn told(request: Request<Incoming>) -> String {
    let (head, body) = request.into_parts();
    let body = body.collect().await.unwrap().to_bytes();
    let headers: BTreeMap<_, _> = head.headers.iter().map(|(name, value)| (name.as_str(), value)).collect();
    format!("{} {}\n{headers:?}\n{}", head.method, head.uri, String::from_utf8_lossy(&body))
}

fn echo() -> Server {
    Server::start(|request, _| async move { reply(200, told(request).await) })
}

#[tokio::test]
async fn methods_bodies_and_places_are_those_of_reqwest() {
    let server = Server::start(|request, _| async move {
        let asked =
            request.headers().get("x-redirect").map(|value| String::from_utf8_lossy(value.as_bytes()).into_owned());
        match (request.uri().path_and_query().map_or("", |asked| asked.as_str()), asked) {
            ("/a/start", Some(asked)) => {
                let (status, location) = asked.split_once(' ').unwrap_or((&asked, ""));
                if location.is_empty() {
                    reply(status.parse().unwrap(), "nowhere")
                } else {
                    to(status.parse().unwrap(), location)
                }
            }
            _ => reply(200, told(request).await),
        }
    });
    let (ours, plain) = (client(|b| b), reqwest::Client::new());
    let locations = [
        "/end",
        "end",
        "../end?q=1#part",
        "?only=query",
        "//LOCALHOST_PORT/end",
        "",
        "http://[",
        "http://h\u{e4}st:x/",
        "/\u{e4}nd",
    ];
    let cases = [301, 302, 303, 307, 308].into_iter().flat_map(|status| {
        [Method::GET, Method::HEAD, Method::POST, Method::PUT, Method::PATCH, Method::DELETE]
            .map(|method| (status, method, "/end"))
    });
    let cases = cases.chain(locations.map(|location| (302, Method::GET, location)));
    let cases = cases.chain([300, 304, 305].map(|status| (status, Method::GET, "/end")));
    for (status, method, location) in cases {
        let port = server.url("").trim_start_matches("http://").to_owned();
        let asked = format!("{status} {}", location.replace("LOCALHOST_PORT", &port));
        let url = server.url("/a/start#there");
        let seen = |response: reqwest::Response| async move {
            let head = (response.status(), response.url().clone());
            (head, response.text().await.unwrap())
        };
        let asked = HeaderValue::from_bytes(asked.as_bytes()).unwrap();
        let one = ours.request(method.clone(), &url).header("x-redirect", &asked).json("body").send().await.unwrap();
        let other = plain.request(method.clone(), &url).header("x-redirect", &asked).json("body").send().await.unwrap();
        assert_eq!(seen(one).await, seen(other).await, "{status} {method} {location}");
    }
}

#[tokio::test]
async fn a_large_upload_follows_to_another_origin_and_arrives_whole() {
    let target = Server::start(|request, _| async move {
        let body = request.into_body().collect().await.unwrap().to_bytes();
        let intact = body.iter().enumerate().all(|(i, byte)| *byte == (i % 251) as u8);
        reply(200, format!("{} {intact}", body.len()))
    });
    let body: Vec<u8> = (0..300_000_usize).map(|i| (i % 251) as u8).collect();
    for status in [307, 308] {
        let first = sends_to(status, target.url("/"));
        let text = client(|b| b).put(first.url("/")).body(body.clone()).send().await.unwrap().text().await.unwrap();
        assert_eq!(text, "300000 true");
    }
}

#[tokio::test]
async fn a_stream_cannot_be_sent_twice_so_a_307_of_it_is_an_error_that_says_why() {
    let target = echo();
    let client = client(|b| b.breaker(BreakerConfig::default()).retry(Retry::attempts(3)));
    let stream = || {
        let pieces = futures_util::stream::iter([Ok::<_, std::io::Error>("once ".repeat(3))]);
        reqwest::Body::wrap_stream(pieces)
    };
    let first = sends_to(307, target.url("/?token=SECRET"));
    for _ in 0..6 {
        let error = client.put(first.url("/")).body(stream()).send().await.unwrap_err();
        let text = error.to_string();
        assert!(error.is_redirect(), "{error:?}");
        assert!(text.contains("a stream") && text.contains(&target.url("/")) && !text.contains("SECRET"), "{text}");
    }
    assert_eq!((first.hits(), target.hits()), (6, 0));
    assert!(client.open_origins().is_empty());
    // A 303 does not ask for the body again.
    let first = sends_to(303, target.url("/"));
    let text = client.put(first.url("/")).body(stream()).send().await.unwrap().text().await.unwrap();
    assert!(text.starts_with("GET /") && !text.contains("once"), "{text}");
}

#[tokio::test]
async fn another_origin_is_told_no_secret_not_even_when_the_way_leads_back() {
    let last = echo();
    let back = last.url("/back");
    let other = Server::start(move |request, _| {
        let back = back.clone();
        async move {
            let told = told(request).await;
            assert!(!told.contains("SECRET"), "{told}");
            if told.starts_with("GET /again") { to(302, &back) } else { to(302, "/again?of=mine") }
        }
    });
    let away = other.url("/");
    let first = Server::start(move |request, _| {
        let away = away.clone();
        async move {
            let told = told(request).await;
            let all = (1..=9).all(|secret| told.contains(&format!("SECRET{secret}")));
            if told.starts_with("GET /a") && !all { reply(500, told) } else { to(302, if all { &away } else { "/" }) }
        }
    });
    let mut marked = HeaderValue::from_static("SECRET7");
    marked.set_sensitive(true);
    let client = client(|b| {
        b.sensitive_headers(["X-Mine"]).default_headers(HeaderMap::from_iter([
            ("x-api-key".parse().unwrap(), HeaderValue::from_static("SECRET9")),
            ("x-harmless".parse().unwrap(), HeaderValue::from_static("harmless")),
        ]))
    });
    let request = client
        .get(first.url("/a?token=SECRET1"))
        .bearer_auth("SECRET2")
        .header("cookie", "s=SECRET3")
        .header("proxy-authorization", "SECRET4")
        .header("private-token", "SECRET5")
        .header("x-mine", "SECRET6")
        .header("x-marked", marked)
        .header("cookie2", "SECRET8");
    let told = request.send().await.unwrap().text().await.unwrap();
    assert!(!told.contains("SECRET"), "{told}");
    assert!(told.contains("harmless"), "{told}");
    // The query of an intermediate URL goes only to its own origin.
    assert!(told.contains(&format!("\"referer\": \"{}\"", other.url("/again"))), "{told}");
}

#[tokio::test]
async fn the_same_origin_is_told_everything() {
    let server = Server::start(|request, hit| async move {
        if hit == 0 { to(302, "/next") } else { reply(200, told(request).await) }
    });
    let request = client(|b| b).get(server.url("/a?q=1")).bearer_auth("SECRET1").header("x-api-key", "SECRET2");
    let told = request.send().await.unwrap().text().await.unwrap();
    assert!(told.contains("SECRET1") && told.contains("SECRET2"), "{told}");
    assert!(told.contains(&server.url("/a?q=1")), "{told}");
}

#[tokio::test]
async fn what_reqwest_adds_by_itself_is_no_way_out_for_a_secret() {
    let target = echo();
    let first = sends_to(302, target.url("/"));
    let mut marked = HeaderValue::from_static("SECRET1");
    marked.set_sensitive(true);
    let secrets = HeaderMap::from_iter([
        ("x-marked".parse().unwrap(), marked),
        ("authorization".parse().unwrap(), HeaderValue::from_static("SECRET2")),
        ("x-api-key".parse().unwrap(), HeaderValue::from_static("SECRET3")),
    ]);
    let client = client(|b| b.configure(|b| b.default_headers(secrets).user_agent("known/1").referer(false)));
    let straight = client.get(target.url("/")).send().await.unwrap().text().await.unwrap();
    assert!((1..=3).all(|secret| straight.contains(&format!("SECRET{secret}"))), "{straight}");
    let told = client.get(first.url("/")).send().await.unwrap().text().await.unwrap();
    assert!(!told.contains("SECRET"), "{told}");
    assert!(told.contains("known/1") && !told.contains("referer"), "{told}");
}

#[tokio::test]
async fn a_proxy_is_asked_for_every_hop_and_told_its_own_credentials() {
    // As a proxy it gets whole URLs.
    let proxy = Server::start(|request, hit| async move {
        let told = told(request).await;
        assert!(told.contains("proxy-authorization"), "{told}");
        if hit == 0 { to(302, "http://second.test/") } else { reply(200, told) }
    });
    let through = reqwest::Proxy::http(proxy.url("")).unwrap().basic_auth("me", "pw");
    let client = client(|b| b.configure(|b| b.proxy(through)));
    let response = client.get("http://first.test/").send().await.unwrap();
    assert_eq!(response.url().as_str(), "http://second.test/");
    assert!(response.text().await.unwrap().starts_with("GET http://second.test/"));
    assert_eq!(proxy.hits(), 2);
}

#[tokio::test]
async fn a_redirect_into_an_open_circuit_is_refused_there_and_costs_its_origin_nothing() {
    let sick = Server::start(|_, _| async { reply(503, "") });
    let first = sends_to(302, sick.url("/"));
    let client = client(|b| b.breaker(BreakerConfig::default()).concurrency_per_host(2));
    for _ in 0..5 {
        assert_eq!(client.get(sick.url("/")).send().await.unwrap().status(), 503);
    }
    for _ in 0..20 {
        match client.get(first.url("/")).send().await.unwrap_err() {
            RequestError::CircuitOpen { origin, report, .. } => {
                assert_eq!((origin, &report.url), (sick.url(""), &sick.url("/")));
            }
            other => panic!("{other:?}"),
        }
    }
    assert_eq!(sick.hits(), 5);
    let metrics = client.breaker(first.url("/")).unwrap().metrics();
    assert_eq!((metrics.state, metrics.calls, metrics.failures), (State::Closed, 20, 0));
    assert_eq!(client.metrics().in_flight, 0);
}

#[tokio::test]
async fn the_limit_per_host_holds_for_those_who_come_by_redirect() {
    let target = Server::start(|_, _| async { drip(3, 100, Duration::from_millis(5)) });
    // Through a single origin, that origin's own limit would be enough.
    let firsts: Vec<_> = (0..6).map(|_| sends_to(302, target.url("/"))).collect();
    let client = client(|b| b.concurrency_per_host(2));
    join_all(firsts.iter().chain(&firsts).map(|first| async {
        assert_eq!(client.get(first.url("/")).send().await.unwrap().bytes().await.unwrap().len(), 300);
    }))
    .await;
    assert_eq!((target.hits(), target.most_bodies()), (12, 2));
    let metrics = client.metrics();
    assert_eq!((metrics.in_flight, metrics.waiting), (0, 0));
}

#[tokio::test]
async fn a_chain_of_redirects_is_no_silence() {
    let server = Server::start(|_, hit| async move {
        tokio::time::sleep(Duration::from_millis(400)).await;
        if hit < 4 { to(302, "/") } else { reply(200, "there") }
    });
    // Longer than each answer takes, shorter than all together.
    let client = client(|b| b.idle_timeout(Duration::from_millis(1_500)).attempt_timeout(Duration::from_millis(1_500)));
    assert_eq!(client.get(server.url("/")).send().await.unwrap().text().await.unwrap(), "there");
}

#[tokio::test]
async fn redirects_are_bounded_as_asked() {
    let server = Server::start(|_, hit| async move { to(302, &format!("/{hit}")) });
    let none = client(|b| b.redirects(0)).get(server.url("/")).send().await.unwrap();
    assert_eq!((none.status().as_u16(), none.text().await.unwrap().as_str()), (302, "elsewhere"));
    let before = server.hits();
    let error = client(|b| b.redirects(2)).get(server.url("/")).send().await.unwrap_err();
    assert!(error.is_redirect() && error.to_string().contains("too many"), "{error}");
    assert_eq!(server.hits() - before, 3);
}

#[tokio::test]
async fn a_redirect_to_another_scheme_is_an_error() {
    let server = sends_to(302, "file:///etc/passwd".to_owned());
    let error = client(|b| b).get(server.url("/")).send().await.unwrap_err();
    assert!(error.is_redirect() && error.to_string().contains("file:///etc/passwd"), "{error}");
}

#[tokio::test]
async fn another_attempt_goes_the_whole_way_again() {
    // A balancer that sends each call to the next node; the first node is dead.
    let (dead, well) = (refused_url(), echo());
    let nodes = [dead, well.url("/")];
    let balancer = Server::start(move |_, hit| {
        let reply = to(302, &nodes[hit.min(1)]);
        async move { reply }
    });
    let client = client(|b| b.retry(quick(3)));
    let response = client.get(balancer.url("/")).send().await.unwrap();
    assert_eq!(response.extensions().get(), Some(&Attempts(2)));
    assert_eq!((balancer.hits(), well.hits()), (2, 1));
}

#[tokio::test]
async fn what_a_post_has_led_to_is_asked_for_again_but_the_post_is_not_sent_twice() {
    let server = Server::start(|request, hit| async move {
        match (request.method().clone(), hit) {
            (Method::POST, _) => to(303, "/result"),
            (_, 1 | 2) => reply(503, ""),
            _ => reply(200, "done"),
        }
    });
    let client = client(|b| b.retry(quick(3)));
    let response = client.post(server.url("/")).body("pay").send().await.unwrap();
    assert_eq!(response.extensions().get(), Some(&Attempts(3)));
    assert_eq!(response.text().await.unwrap(), "done");
    assert_eq!(server.hits(), 4);
}

#[tokio::test]
async fn a_client_of_the_caller_s_that_follows_nothing_is_followed_for() {
    let target = echo();
    let first = sends_to(302, target.url("/there"));
    let own = reqwest::Client::builder().redirect(reqwest::redirect::Policy::none()).build().unwrap();
    let response = client(|b| b.reqwest(own)).get(first.url("/")).send().await.unwrap();
    assert_eq!(response.url().as_str(), target.url("/there"));
}

#[tokio::test]
async fn a_post_that_was_redirected_to_a_dead_host_is_not_sent_again() {
    let dead = refused_url();
    let server = Server::start(move |_, _| {
        let reply = with_header(reply(303, ""), "location", &dead);
        async move { reply }
    });
    let url = server.url("/");
    let ours = client(|b| b.retry(quick(4)));
    let own = client(|b| b.retry(quick(4)).reqwest(reqwest::Client::new()));
    for (calls, client) in [ours, own].into_iter().enumerate() {
        assert!(client.post(&url).body("pay").send().await.unwrap_err().is_connect());
        assert_eq!(server.hits(), calls + 1);
    }
}

#[tokio::test]
async fn a_redirect_across_origins_charges_the_one_that_answered() {
    let sick = Server::start(|_, _| async { reply(500, "sick") });
    let target = sick.url("/");
    let healthy = Server::start(move |_, _| {
        let reply = with_header(reply(302, ""), "location", &target);
        async move { reply }
    });
    let client = TimeoutClient::builder().breaker(BreakerConfig::default()).build().unwrap();
    for _ in 0..5 {
        assert_eq!(client.get(healthy.url("/")).send().await.unwrap().status(), 500);
    }
    let origin = sick.url("");
    assert_eq!(client.trips(), [(origin.clone(), 1)]);
    assert_eq!(client.open_origins(), [origin]);
    assert_eq!(client.breaker(healthy.url("/")).unwrap().metrics().failures, 0);
}

#[tokio::test]
async fn the_time_a_consumer_takes_is_no_slow_call_of_the_origin_it_was_redirected_to() {
    let target = Server::start(|_, _| async { reply(200, "well") });
    let url = target.url("/");
    let first = Server::start(move |_, _| {
        let reply = with_header(reply(302, ""), "location", &url);
        async move { reply }
    });
    let threshold = Duration::from_secs(1);
    let config = BreakerConfig::builder().slow_call(threshold, 1.0).build().unwrap();
    let client = TimeoutClient::builder().breaker(config).build().unwrap();
    let response = client.get(first.url("/")).send().await.unwrap();
    tokio::time::sleep(threshold).await;
    assert_eq!(response.text().await.unwrap(), "well");
    let metrics = client.breaker(target.url("/")).unwrap().metrics();
    assert_eq!((metrics.calls, metrics.slow_calls), (1, 0));
}

#[tokio::test]
async fn a_redirect_to_a_dead_origin_charges_that_one() {
    let dead = refused_url();
    let target = dead.clone();
    let healthy = Server::start(move |_, _| {
        let reply = with_header(reply(302, ""), "location", &target);
        async move { reply }
    });
    let client = TimeoutClient::builder().breaker(BreakerConfig::default()).build().unwrap();
    for _ in 0..5 {
        assert!(client.get(healthy.url("/")).send().await.unwrap_err().is_connect());
    }
    assert_eq!(client.open_origins(), [dead.trim_end_matches('/')]);
    assert_eq!(client.breaker(healthy.url("/")).unwrap().metrics().failures, 0);
}

#[tokio::test]
async fn an_endless_redirect_is_an_error_and_blames_nobody() {
    let server = Server::start(|_, _| async { with_header(reply(302, ""), "location", "/again") });
    let client = TimeoutClient::builder().breaker(BreakerConfig::default()).build().unwrap();
    for _ in 0..6 {
        let error = client.get(server.url("/")).send().await.unwrap_err();
        assert!(error.is_redirect(), "{error:?}");
    }
    assert_eq!(server.hits(), 6 * 11);
    assert!(client.open_origins().is_empty());
}
