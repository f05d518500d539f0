//! What this crate relies on in reqwest, hyper and hyper-util without their promise: one test for each habit, which fails
//! with a sentence that names it. `docs/architecture.md` says what relies on it.

use std::{
    convert::Infallible,
    error::Error as StdError,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    task::{Context, Poll},
    time::Duration,
};

use bytes::Bytes;
use http::{Extensions, HeaderValue, Method, Version, header::CONTENT_LENGTH};
use http_body::{Body, Frame};
use hyper_util::client::legacy::{Error as PoolError, connect::HttpInfo};
use reqwest::{Client, Request};

use crate::{
    http2::SlowNames,
    server::{Server, drip, reply},
};

fn find<'a, E: StdError + 'static>(error: &'a (dyn StdError + 'static)) -> Option<&'a E> {
    error.downcast_ref().or_else(|| find(error.source()?))
}

fn local_port(extensions: &Extensions) -> u16 {
    extensions.get::<HttpInfo>().expect("reqwest tells the addresses of a connection").local_addr().port()
}

fn http2(change: impl FnOnce(reqwest::ClientBuilder) -> reqwest::ClientBuilder) -> Client {
    change(Client::builder().http2_prior_knowledge().no_proxy()).build().unwrap()
}

/// An empty body that records whether it was asked if it has ended.
struct Asked(Arc<AtomicBool>);

impl Body for Asked {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        Poll::Ready(None)
    }

    fn is_end_stream(&self) -> bool {
        self.0.store(true, Ordering::SeqCst);
        true
    }
}

#[tokio::test]
async fn a_body_is_asked_whether_it_has_ended_by_the_connection_and_by_nobody_earlier() {
    let server = Server::start(|_, _| async { reply(200, "") });
    let url = format!("http://slow.test:{}/", server.address().port());
    let slow = || Arc::new(SlowNames(server.address(), Duration::from_millis(200)));
    let http1 = Client::builder().no_proxy().dns_resolver(slow()).build().unwrap();
    for client in [http1, http2(|builder| builder.dns_resolver(slow()))] {
        let asked = Arc::new(AtomicBool::new(false));
        let mut call = Box::pin(client.get(&url).body(reqwest::Body::wrap(Asked(Arc::clone(&asked)))).send());
        let early = tokio::time::timeout(Duration::from_millis(50), &mut call).await;
        assert!(early.is_err() && !asked.load(Ordering::SeqCst), "a body was asked before there was a connection");
        assert!(call.await.is_ok());
        assert!(asked.load(Ordering::SeqCst), "a body was not asked before its head was sent");
    }
}

#[tokio::test]
async fn hyper_refuses_connect_with_a_body_on_the_connection_and_without_a_byte() {
    let server = Server::start(|_, _| async { drip(3, 10, Duration::from_millis(50)) });
    let client = http2(|builder| builder);
    let running = client.get(server.url("/")).send().await.unwrap();
    let mut request = Request::new(Method::CONNECT, server.url("/").parse().unwrap());
    request.headers_mut().insert(CONTENT_LENGTH, HeaderValue::from_static("1"));
    let error = client.execute(request).await.expect_err("CONNECT with a body was sent");
    assert!(find::<hyper::Error>(&error).is_some_and(hyper::Error::is_user), "{error:?}");
    let connection = find::<PoolError>(&error).and_then(PoolError::connect_info);
    connection.expect("the error does not name its connection").poison();
    assert!(client.get(server.url("/")).send().await.is_ok());
    assert_eq!(server.connections(), 2, "a poisoned connection was used again");
    assert_eq!(
        (server.hits(), running.bytes().await.unwrap().len()),
        (2, 30),
        "it was more than taken out of the pool"
    );
}

#[tokio::test]
async fn a_connection_of_http1_refuses_http2_without_a_byte_and_stays() {
    let server = Server::start(|_, _| async { reply(200, "answer") });
    let client = Client::builder().no_proxy().build().unwrap();
    assert!(client.get(server.url("/")).send().await.unwrap().bytes().await.is_ok());
    let request = client.request(Method::CONNECT, server.url("/")).version(Version::HTTP_2);
    let error = request.header(CONTENT_LENGTH, "1").send().await.expect_err("HTTP/2 was spoken on HTTP/1");
    assert!(find::<hyper::Error>(&error).is_none(), "it looks like the refusal of a connection of HTTP/2: {error:?}");
    assert!(client.get(server.url("/")).send().await.is_ok());
    assert_eq!((server.connections(), server.hits()), (1, 2));
}

#[tokio::test]
async fn a_call_whose_connection_another_was_making_fails_with_these_words() {
    let server = Server::start(|_, _| async { reply(200, "") });
    let names = Arc::new(SlowNames(server.address(), Duration::from_millis(200)));
    let client = http2(|builder| builder.dns_resolver(names));
    let url = format!("http://slow.test:{}/", server.address().port());
    let mut connecting = Box::pin(client.get(&url).send());
    assert!(futures_util::poll!(&mut connecting).is_pending());
    let mut waiting = Box::pin(client.get(&url).send());
    assert!(futures_util::poll!(&mut waiting).is_pending());
    drop(connecting);
    // When this succeeds, hyper-util has fixed it, and `blame::is_orphaned` can go.
    let error = waiting.await.expect_err("a call waits for its connection, whoever makes it");
    let pool = find::<PoolError>(&error).filter(|error| error.is_connect()).unwrap();
    assert_eq!(pool.source().unwrap().to_string(), "request was canceled");
    assert!(pool.source().unwrap().source().is_none());
}

#[tokio::test]
async fn an_error_names_the_connection_that_a_response_came_on() {
    // Answers once, and hangs up on the next request.
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}/", listener.local_addr().unwrap());
    tokio::spawn(async move {
        use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
        let (mut socket, _) = listener.accept().await.unwrap();
        assert!(socket.read(&mut [0; 1_024]).await.unwrap() > 0);
        let answer = b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n";
        assert_eq!(socket.write(answer).await.unwrap(), answer.len());
        assert!(socket.read(&mut [0; 1_024]).await.unwrap() > 0);
    });
    let client = Client::builder().no_proxy().build().unwrap();
    let response = client.get(&url).send().await.unwrap();
    let port = local_port(response.extensions());
    assert!(response.bytes().await.is_ok());
    let error = client.get(&url).send().await.unwrap_err();
    let mut extras = Extensions::new();
    let info = find::<PoolError>(&error).and_then(PoolError::connect_info);
    info.expect("the error does not name its connection").get_extras(&mut extras);
    assert_eq!(local_port(&extras), port);
}
