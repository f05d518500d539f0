//! The HTTP client over TLS, where ALPN chooses HTTP/2, not the caller.
//!
//! These tests are here because the umbrella's tests have reqwest with TLS, and the client's own tests deliberately
//! have none. The certificate is for localhost, signed by itself, and good for a hundred years.

use std::{
    convert::Infallible,
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use cancel_safe::http_timeout::{Attempts, BreakerConfig, TimeoutClient};
use futures_util::future::join_all;
use http_body_util::Full;
use hyper::{Request, Response, Version, body::Incoming, service::service_fn};
use hyper_util::{
    rt::{TokioExecutor, TokioIo},
    server::conn::auto,
};
use tokio::net::TcpListener;
use tokio_rustls::{
    TlsAcceptor,
    rustls::{
        ServerConfig,
        pki_types::{CertificateDer, PrivatePkcs8KeyDer},
    },
};

const CERTIFICATE: &[u8] = include_bytes!("tls/localhost.cert.der");
const KEY: &[u8] = include_bytes!("tls/localhost.key.der");

/// A server of HTTP/2 and HTTP/1 over TLS, which never answers `/slow`, and answers everything else with the path.
async fn serve() -> (SocketAddr, Arc<AtomicUsize>) {
    let mut config = ServerConfig::builder()
        .with_no_client_auth()
        .with_single_cert(vec![CertificateDer::from(CERTIFICATE)], PrivatePkcs8KeyDer::from(KEY).into())
        .unwrap();
    config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    let acceptor = TlsAcceptor::from(Arc::new(config));
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let connections = Arc::new(AtomicUsize::new(0));
    let made = Arc::clone(&connections);
    tokio::spawn(async move {
        while let Ok((socket, _)) = listener.accept().await {
            made.fetch_add(1, Ordering::SeqCst);
            let acceptor = acceptor.clone();
            tokio::spawn(async move {
                // The handshake is slow, so that calls wait for another call's connection.
                tokio::time::sleep(Duration::from_millis(100)).await;
                let Ok(socket) = acceptor.accept(socket).await else { return };
                let service = service_fn(async |request: Request<Incoming>| {
                    if request.uri().path() == "/slow" {
                        std::future::pending::<()>().await;
                    }
                    Ok::<_, Infallible>(Response::new(Full::new(Bytes::from(request.uri().path().to_owned()))))
                });
                // An error is ignored, because the clients of these tests hang up.
                drop(auto::Builder::new(TokioExecutor::new()).serve_connection(TokioIo::new(socket), service).await);
            });
        }
    });
    (address, connections)
}

fn client() -> TimeoutClient {
    let certificate = reqwest::Certificate::from_der(CERTIFICATE).unwrap();
    let reqwest = reqwest::Client::builder().tls_certs_only([certificate]).build().unwrap();
    TimeoutClient::builder().reqwest(reqwest).breaker(BreakerConfig::default()).build().unwrap()
}

#[tokio::test]
async fn calls_that_begin_together_end_on_http2_whichever_of_them_is_dropped_while_connecting() {
    let (address, _) = serve().await;
    let (client, url) = (client(), format!("https://localhost:{}/", address.port()));
    for dropped in [0, 3] {
        let mut calls: Vec<_> = (0..8).map(|n| Box::pin(client.get(format!("{url}{n}")).send())).collect();
        for call in &mut calls {
            assert!(futures_util::poll!(call).is_pending());
        }
        drop(calls.drain(..dropped).collect::<Vec<_>>());
        for response in join_all(calls).await {
            let response = response.unwrap();
            assert_eq!((response.version(), response.extensions().get()), (Version::HTTP_2, Some(&Attempts(1))));
        }
    }
    assert_eq!((client.trips(), client.metrics().in_flight), (Vec::new(), 0));
}

#[tokio::test]
async fn a_silent_connection_over_tls_is_given_up_as_well() {
    let (address, connections) = serve().await;
    let (client, url) = (client(), format!("https://localhost:{}", address.port()));
    assert!(client.get(&url).send().await.is_ok());
    for _ in 0..3 {
        let error = client.get(format!("{url}/slow")).timeout(Duration::from_millis(100)).send().await.unwrap_err();
        assert!(error.is_timeout(), "{error:?}");
    }
    assert_eq!(connections.load(Ordering::SeqCst), 1);
    assert_eq!(client.get(&url).send().await.unwrap().version(), Version::HTTP_2);
    assert_eq!(connections.load(Ordering::SeqCst), 2);
}
