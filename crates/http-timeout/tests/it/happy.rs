//! What works when nothing goes wrong.

use std::time::Duration;

use cancel_safe_http_timeout::{
    Attempts, BreakerConfig, CircuitBreaker, Fetched, Limit, RequestError, TimeoutClient, TimeoutClientBuilder,
};
use futures_util::StreamExt as _;
use http::{HeaderMap, HeaderName, HeaderValue, Request};
use http_body_util::BodyExt as _;
use hyper::body::Incoming;

use crate::server::{Reply, Server, reply, with_header};

fn client() -> TimeoutClient {
    TimeoutClient::new(Duration::from_secs(10), 100)
}

#[test]
fn what_is_shared_is_send_and_sync() {
    fn check<T: Send + Sync + 'static>() {}
    check::<TimeoutClient>();
    check::<TimeoutClientBuilder>();
    check::<CircuitBreaker>();
    check::<BreakerConfig>();
    check::<RequestError>();
    fn check_send<T: Send + 'static>(_: &T) {}
    let client = client();
    check_send(&client.get("http://localhost/").send());
    check_send(&client.get_many(vec![String::new()], None));
}

#[tokio::test]
async fn send_takes_any_status_for_a_response() {
    let server = Server::start(|_, _| async { reply(404, "nothing here") });
    let response = client().get(server.url("/")).send().await.unwrap();
    assert_eq!(response.status(), 404);
    assert_eq!(response.text().await.unwrap(), "nothing here");
    let response = client().get(server.url("/?secret")).send().await.unwrap();
    let error = RequestError::from(response.error_for_status().unwrap_err());
    assert_eq!(error.status().map(|status| status.as_u16()), Some(404));
    assert!(!error.to_string().contains("secret"), "{error}");
}

#[tokio::test]
async fn get_with_timeout_takes_4xx_and_5xx_for_errors() {
    let server =
        Server::start(
            |_, hit| async move { with_header(reply([404, 503, 200][hit.min(2)], "body"), "retry-after", "7") },
        );
    let client = client();
    let url = server.url("/page?key=secret");
    for status in [404, 503] {
        match client.get_with_timeout(&url, None).await.unwrap_err() {
            RequestError::Http { status: seen, retry_after, report, .. } => {
                assert_eq!((seen.as_u16(), retry_after, report.attempts), (status, Some(Duration::from_secs(7)), 1));
                assert!(report.url.ends_with("/page"), "the query is shown: {}", report.url);
            }
            other => panic!("{other:?}"),
        }
    }
    let response = client.get_with_timeout(&url, Some(Duration::from_secs(5))).await.unwrap();
    assert_eq!(response.text().await.unwrap(), "body");
    assert_eq!(client.metrics().in_flight, 0);
}

#[tokio::test]
async fn the_response_keeps_its_url_headers_length_and_peer() {
    let server = Server::start(|_, _| async { with_header(reply(200, "12345"), "x-kept", "yes") });
    let response = client().get(server.url("/path")).send().await.unwrap();
    assert_eq!(response.url().as_str(), server.url("/path"));
    assert_eq!(response.headers()["x-kept"], "yes");
    assert_eq!(response.content_length(), Some(5));
    assert!(response.remote_addr().is_some());
    assert_eq!(response.extensions().get(), Some(&Attempts(1)));
}

#[tokio::test]
async fn the_words_of_the_builder_reach_the_server() {
    let server = Server::start(|request, _| async move {
        let (head, body) = request.into_parts();
        let body = body.collect().await.unwrap().to_bytes();
        let header = |name| head.headers.get(name).map_or("", |value| value.to_str().unwrap()).to_owned();
        let text = format!(
            "{} {} {} {} {} {}",
            head.method,
            head.uri,
            header("authorization"),
            header("content-type"),
            header("x-one"),
            String::from_utf8_lossy(&body)
        );
        reply(200, text)
    });
    let request = client().post(server.url("/")).query(&[("q", "1")]).bearer_auth("t0ken").header("x-one", "1");
    let text = request.json(&["a", "b"]).send().await.unwrap().text().await.unwrap();
    assert_eq!(text, r#"POST /?q=1 Bearer t0ken application/json 1 ["a","b"]"#);
    let request = client().put(server.url("/")).basic_auth("me", Some("pw")).form(&[("k", "v")]);
    let text = request.send().await.unwrap().text().await.unwrap();
    assert_eq!(text, "PUT / Basic bWU6cHc= application/x-www-form-urlencoded  k=v");
    for (request, method) in [(client().delete(server.url("/")), "DELETE"), (client().patch(server.url("/")), "PATCH")]
    {
        assert!(request.body("x").send().await.unwrap().text().await.unwrap().starts_with(method));
    }
    assert_eq!(client().head(server.url("/")).send().await.unwrap().status(), 200);
}

/// What a server sees of a request, in one line.
async fn seen(request: Request<Incoming>) -> Reply {
    let (head, body) = request.into_parts();
    let body = body.collect().await.unwrap().to_bytes();
    let one = head.headers.get("x-one").map_or("", |value| value.to_str().unwrap());
    reply(200, format!("{} {} {one} {}", head.method, head.uri, String::from_utf8_lossy(&body)))
}

#[tokio::test]
async fn a_request_that_was_built_elsewhere_is_sent_as_it_is_and_within_its_own_timeout() {
    let server = Server::start(|request, hit| async move {
        if hit == 1 {
            std::future::pending::<()>().await;
        }
        seen(request).await
    });
    let mut request = reqwest::Client::new().put(server.url("/?q")).header("x-one", "1").body("body").build().unwrap();
    let text = client().execute(request.try_clone().unwrap()).await.unwrap().text().await.unwrap();
    assert_eq!(text, "PUT /?q 1 body");
    *request.timeout_mut() = Some(Duration::from_millis(50));
    let error = client().execute(request).await.unwrap_err();
    assert!(matches!(error, RequestError::Timeout { limit: Limit::Total, .. }), "{error:?}");
}

#[tokio::test]
async fn default_headers_go_with_every_request_that_does_not_have_them_itself() {
    let server = Server::start(|request, _| seen(request));
    let headers = HeaderMap::from_iter([(HeaderName::from_static("x-one"), HeaderValue::from_static("always"))]);
    let client = TimeoutClient::builder().default_headers(headers).build().unwrap();
    let text = client.options(server.url("/")).send().await.unwrap().text().await.unwrap();
    assert_eq!(text, "OPTIONS / always ");
    let text = client.get(server.url("/")).header("x-one", "now").send().await.unwrap().text().await.unwrap();
    assert_eq!(text, "GET / now ");
}

#[cfg(feature = "multipart")]
#[tokio::test]
async fn a_form_of_several_parts_arrives() {
    let server = Server::start(|request, _| seen(request));
    let form = reqwest::multipart::Form::new().text("name", "value").text("other", "word");
    let text = client().post(server.url("/")).multipart(form).send().await.unwrap().text().await.unwrap();
    assert!(text.contains("name=\"name\"") && text.contains("value") && text.contains("word"), "{text}");
}

#[tokio::test]
async fn reqwest_s_own_settings_are_kept_and_so_are_the_limits() {
    let server = Server::start(|request, _| async move {
        let agent = request.headers()["user-agent"].to_str().unwrap().to_owned();
        reply(200, agent)
    });
    let port: u16 = server.url("").rsplit(':').next().unwrap().parse().unwrap();
    // The builder's redirects and retries hold, whatever reqwest's own settings.
    let change = |b: reqwest::ClientBuilder| {
        b.user_agent("mine/1")
            .resolve("known.test", ([127, 0, 0, 1], port).into())
            .redirect(reqwest::redirect::Policy::limited(3))
    };
    let client = TimeoutClient::builder().configure(change).concurrency(1).build().unwrap();
    let held = client.get(format!("http://known.test:{port}/")).send().await.unwrap();
    assert_eq!(client.metrics().in_flight, 1);
    assert_eq!(held.text().await.unwrap(), "mine/1");
    let own = reqwest::Client::new();
    let error = TimeoutClient::builder().configure(change).reqwest(own).build().unwrap_err();
    assert_eq!(error.option(), Some("configure"));
}

#[tokio::test]
async fn an_upload_in_pieces_arrives_whole_and_with_its_length() {
    let server = Server::start(|request, _| async move {
        let length = request.headers().get("content-length").map(|length| length.to_str().unwrap().to_owned());
        let body = request.into_body().collect().await.unwrap().to_bytes();
        let intact = body.iter().enumerate().all(|(i, byte)| *byte == (i % 251) as u8);
        reply(200, format!("{length:?} {} {intact}", body.len()))
    });
    let client = TimeoutClient::builder().build().unwrap();
    let body: Vec<u8> = (0..1_000_000_usize).map(|i| (i % 251) as u8).collect();
    let text = client.put(server.url("/")).body(body).send().await.unwrap().text().await.unwrap();
    assert_eq!(text, r#"Some("1000000") 1000000 true"#);
}

#[tokio::test]
async fn the_rest_of_the_deadline_is_told_to_the_server() {
    let server = Server::start(|request, _| async move {
        reply(200, request.headers()["x-timeout-ms"].to_str().unwrap().to_owned())
    });
    let client =
        TimeoutClient::builder().timeout(Duration::from_secs(20)).propagate_deadline("x-timeout-ms").build().unwrap();
    let left: u64 = client.get(server.url("/")).send().await.unwrap().text().await.unwrap().parse().unwrap();
    assert!((1..=20_000).contains(&left), "{left} ms left of 20,000");
}

#[tokio::test]
async fn get_many_answers_every_url_also_when_it_comes_twice() {
    let server = Server::start(|request, _| async move {
        let path = request.uri().path().to_owned();
        reply(if path == "/missing" { 404 } else { 200 }, path)
    });
    let urls: Vec<String> =
        ["/a", "/b", "/a", "/missing", "/a"].iter().map(|path| server.url(path)).chain(["no url".into()]).collect();
    let mut seen = vec![None; urls.len()];
    let mut answers = client().get_many(&urls, Duration::from_secs(10));
    while let Some(Fetched { index, url, result }) = answers.next().await {
        assert_eq!(url, urls[index]);
        let text = match result {
            Ok(response) => response.text().await.unwrap(),
            Err(RequestError::Http { status, .. }) => status.as_str().to_owned(),
            Err(error) if error.is_invalid_request() => "invalid".to_owned(),
            Err(error) => panic!("{error:?}"),
        };
        assert_eq!(seen[index].replace(text), None, "{index} was yielded twice");
    }
    let seen: Vec<_> = seen.into_iter().map(Option::unwrap).collect();
    assert_eq!(seen, ["/a", "/b", "/a", "404", "/a", "invalid"]);
}

#[tokio::test]
async fn ordered_yields_in_the_order_of_the_urls_with_bounded_load() {
    // The first of each three is the slowest.
    let server = Server::start(|_, hit| async move {
        tokio::time::sleep(Duration::from_millis(if hit % 3 == 0 { 30 } else { 1 })).await;
        reply(200, "ok")
    });
    let client = TimeoutClient::builder().concurrency(3).build().unwrap();
    let urls: Vec<_> = (0..12).map(|_| server.url("/")).collect();
    let answers: Vec<usize> = client
        .get_many(urls, None)
        .ordered()
        .then(|fetched| async move {
            fetched.result.unwrap().text().await.unwrap();
            fetched.index
        })
        .collect()
        .await;
    assert_eq!(answers, Vec::from_iter(0..12));
    assert!(server.most_bodies() <= 3, "{} at a time", server.most_bodies());
    assert_eq!(client.metrics().in_flight, 0);
}
