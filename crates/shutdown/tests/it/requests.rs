//! The token of a request under the layer: what cancels it, and what does not.

use std::time::Duration;

use axum::Router;
use axum::body::Body;
use axum::extract::Request;
use axum::http::StatusCode;
use axum::response::Response;
use axum::routing::get;
use bytes::Bytes;
use cancel_safe_shutdown::axum::Cancelled;
use cancel_safe_shutdown::tower::CancellationLayer;
use futures_util::{FutureExt as _, StreamExt as _};
use http_body_util::BodyExt as _;
use tokio::sync::mpsc;
use tokio::time::{Instant, timeout};
use tokio_util::sync::CancellationToken;
use tower_service::Service as _;

const SECOND: Duration = Duration::from_secs(1);

/// A router that hands out the token of each request; and those tokens.
fn router() -> (Router, mpsc::UnboundedReceiver<CancellationToken>) {
    let (send, tokens) = mpsc::unbounded_channel();
    let (one, two) = (send.clone(), send);
    let waits = async move |Cancelled(token): Cancelled| {
        one.send(token.clone()).unwrap();
        token.cancelled().await;
        "told"
    };
    let streams = async move |Cancelled(token): Cancelled| {
        two.send(token).unwrap();
        Body::from_stream(futures_util::stream::repeat(Ok::<_, std::convert::Infallible>(Bytes::from("more"))).take(3))
    };
    (Router::new().route("/waits", get(waits)).route("/streams", get(streams)), tokens)
}

fn request(path: &str) -> Request {
    Request::get(path).body(Body::empty()).unwrap()
}

async fn call(router: &mut Router, request: Request) -> Response {
    router.call(request).await.unwrap()
}

#[tokio::test(start_paused = true)]
async fn a_request_is_told_at_the_earlier_of_its_deadlines() {
    let (router, _tokens) = router();
    let mut router = router.layer(CancellationLayer::new(CancellationToken::new()).timeout(5 * SECOND));
    for (own, expected) in
        [(None, 5 * SECOND), (Some("2S"), 2 * SECOND), (Some("1H"), 5 * SECOND), (Some("?"), 5 * SECOND)]
    {
        let mut request = request("/waits");
        if let Some(own) = own {
            request.headers_mut().insert("grpc-timeout", own.parse().unwrap());
        }
        let begun = Instant::now();
        let response = call(&mut router, request).await;
        assert_eq!((response.status(), begun.elapsed()), (StatusCode::OK, expected), "{own:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_deadline_comes_to_a_response_that_nobody_reads() {
    let (router, mut tokens) = router();
    let mut router = router.layer(CancellationLayer::new(CancellationToken::new()).timeout(SECOND));
    let response = call(&mut router, request("/streams")).await;
    let token = tokens.recv().await.unwrap();
    assert!(!token.is_cancelled());
    timeout(2 * SECOND, token.cancelled()).await.expect("nobody told it");
    drop(response);
}

#[tokio::test(start_paused = true)]
async fn a_stop_reaches_every_request_and_layers_add_up() {
    let (router, mut tokens) = router();
    let (outer, inner) = (CancellationToken::new(), CancellationToken::new());
    let mut router = router
        .layer(CancellationLayer::new(inner.clone()).timeout(60 * SECOND))
        .layer(CancellationLayer::new(outer.clone()));
    let response = tokio::spawn(async move { call(&mut router, request("/waits")).await });
    let token = tokens.recv().await.unwrap();
    assert!(!token.is_cancelled());
    outer.cancel();
    assert!(token.is_cancelled());
    assert_eq!(response.await.unwrap().into_body().collect().await.unwrap().to_bytes(), "told");
}

#[tokio::test(start_paused = true)]
async fn a_dropped_response_cancels_its_token_at_every_stage() {
    let (router, mut tokens) = router();
    let mut router = router.layer(CancellationLayer::new(CancellationToken::new()));
    // In the handler.
    assert!(call(&mut router, request("/waits")).now_or_never().is_none());
    assert!(tokens.recv().await.unwrap().is_cancelled());
    // Before the body, and in the middle of it.
    drop(call(&mut router, request("/streams")).await);
    assert!(tokens.recv().await.unwrap().is_cancelled());
    let mut body = call(&mut router, request("/streams")).await.into_body();
    body.frame().await.unwrap().unwrap();
    let token = tokens.recv().await.unwrap();
    assert!(!token.is_cancelled());
    drop(body);
    assert!(token.is_cancelled());
}

#[tokio::test(start_paused = true)]
async fn a_response_that_was_read_to_its_end_leaves_its_token_alone_also_at_the_deadline() {
    let (router, mut tokens) = router();
    let mut router = router.layer(CancellationLayer::new(CancellationToken::new()).timeout(SECOND));
    let body = call(&mut router, request("/streams")).await.into_body();
    assert_eq!(body.collect().await.unwrap().to_bytes(), "moremoremore");
    let token = tokens.recv().await.unwrap();
    tokio::time::sleep(2 * SECOND).await;
    assert!(!token.is_cancelled());
}

#[tokio::test]
async fn without_the_layer_the_extractor_says_so() {
    let (mut router, _tokens) = router();
    assert_eq!(call(&mut router, request("/waits")).await.status(), StatusCode::INTERNAL_SERVER_ERROR);
}
