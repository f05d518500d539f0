//! A real tonic server, and a stream that is cancelled in every possible way: its handler's token fires each time.

use std::future::pending;
use std::net::SocketAddr;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use cancel_safe_examples::ticks::{Tick, TickStream, Ticks, TicksServer, WatchRequest, watch};
use cancel_safe_shutdown::{Application, Report, StragglerState, WorkerContext};
use futures_util::{StreamExt as _, stream};
use tokio::net::TcpListener;
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};
use tokio::task::JoinHandle;
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;
use tonic::service::Routes;
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Request, Response, Status};

const MINUTE: Duration = Duration::from_secs(60);
/// Longer than any drain that works.
const NEVER: Duration = Duration::from_secs(30);
/// The time of the server's phase, and the deadline of a request, when something is in the way.
const SOON: Duration = Duration::from_millis(300);

/// What a handler does when its token fires.
#[derive(Clone, Copy, PartialEq)]
enum Manners {
    /// Ends its stream.
    Orderly,
    /// Continues.
    Deaf,
    /// Never even answers.
    Stuck,
}

/// A service that hands out the token of each request, and reports when one of its streams is dropped.
struct Watched {
    manners: Manners,
    tokens: UnboundedSender<CancellationToken>,
    dropped: CancellationToken,
}

impl Ticks for Watched {
    async fn watch(&self, request: Request<WatchRequest>) -> Result<Response<TickStream>, Status> {
        let token = request.extensions().get::<CancellationToken>().cloned();
        let token = token.ok_or_else(|| Status::internal("no token"))?;
        self.tokens.send(token.clone()).unwrap();
        let (guard, manners) = (self.dropped.clone().drop_guard(), self.manners);
        if manners == Manners::Stuck {
            pending::<()>().await;
        }
        let period = Duration::from_millis(request.into_inner().period_ms);
        let ticks = stream::unfold((0, token, guard), move |(number, token, guard)| async move {
            if manners == Manners::Orderly {
                token.run_until_cancelled(sleep(period)).await?;
            } else {
                sleep(period).await;
            }
            Some((Ok(Tick { number }), (number + 1, token, guard)))
        });
        Ok(Response::new(Box::pin(ticks)))
    }
}

/// A tonic server in the last phase of an application.
struct Site {
    addr: SocketAddr,
    stop: CancellationToken,
    running: JoinHandle<Report>,
    tokens: Mutex<UnboundedReceiver<CancellationToken>>,
    dropped: CancellationToken,
}

impl Site {
    async fn open(manners: Manners, limit: Duration) -> Self {
        let (tokens, received) = unbounded_channel();
        let dropped = CancellationToken::new();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let addr = listener.local_addr().unwrap();
        let service = TicksServer::new(Watched { manners, tokens, dropped: dropped.clone() });
        let routes = Routes::new(service).prepare();
        let grpc = |cx: WorkerContext| async move { cancel_safe_shutdown::tower::serve(listener, routes, cx).await };
        let app = Application::new("site")
            .shutdown_timeout(MINUTE)
            .phase("ingress", |phase| phase.worker_once("grpc", grpc).timeout(limit).ready_within(MINUTE));
        let stop = app.shutdown_handle();
        let running = tokio::spawn(async move { app.serve().await.unwrap() });
        Self { addr, stop, running, tokens: Mutex::new(received), dropped }
    }

    async fn channel(&self) -> Channel {
        Endpoint::from_shared(format!("http://{}", self.addr)).unwrap().connect().await.unwrap()
    }

    /// The token of the next request.
    fn token(&self) -> CancellationToken {
        self.tokens.lock().unwrap().try_recv().unwrap()
    }

    async fn report(self) -> Report {
        timeout(MINUTE, self.running).await.expect("it does not end").unwrap()
    }
}

async fn fires(token: &CancellationToken) {
    timeout(MINUTE, token.cancelled()).await.expect("nobody fires the token");
}

fn request() -> Request<WatchRequest> {
    Request::new(WatchRequest { period_ms: 5 })
}

#[tokio::test]
async fn a_stream_that_its_client_drops_is_dropped_and_its_token_fires() {
    let site = Site::open(Manners::Deaf, NEVER).await;
    let mut ticks = watch(site.channel().await, request()).await.unwrap();
    assert_eq!(ticks.next().await.unwrap().unwrap(), Tick { number: 0 });
    assert_eq!(ticks.next().await.unwrap().unwrap(), Tick { number: 1 });
    let token = site.token();
    assert!(!token.is_cancelled());
    drop(ticks);
    fires(&token).await;
    fires(&site.dropped).await;
    site.stop.cancel();
    let report = site.report().await;
    assert!(report.is_clean() && report.elapsed() < NEVER / 2, "{report}");
}

#[tokio::test]
async fn a_call_that_its_client_gives_up_before_the_answer_fires_its_token() {
    let site = Site::open(Manners::Stuck, NEVER).await;
    let channel = site.channel().await;
    let calling = tokio::spawn(watch(channel, request()));
    let token = timeout(MINUTE, async {
        loop {
            let received = site.tokens.lock().unwrap().try_recv();
            match received {
                Ok(token) => break token,
                Err(_) => sleep(Duration::from_millis(1)).await,
            }
        }
    })
    .await
    .expect("it does not arrive");
    calling.abort();
    fires(&token).await;
    fires(&site.dropped).await;
    site.stop.cancel();
    assert!(site.report().await.is_clean());
}

#[tokio::test]
async fn the_token_of_a_stream_fires_at_its_grpc_timeout_and_not_before() {
    let site = Site::open(Manners::Orderly, NEVER).await;
    let mut request = request();
    request.set_timeout(SOON);
    let begun = Instant::now();
    let mut ticks = watch(site.channel().await, request).await.unwrap();
    assert_eq!(ticks.next().await.unwrap().unwrap(), Tick { number: 0 });
    let token = site.token();
    fires(&token).await;
    assert!(begun.elapsed() >= SOON, "it fired after {:?}", begun.elapsed());
    // The stream asks its token, and ends in order.
    let rest: Vec<_> = timeout(MINUTE, ticks.collect()).await.expect("it does not end");
    assert!(rest.iter().all(Result::is_ok), "{rest:?}");
    site.stop.cancel();
    assert!(site.report().await.is_clean());
}

#[tokio::test]
async fn a_stop_fires_the_tokens_and_an_orderly_stream_ends_by_itself() {
    let site = Site::open(Manners::Orderly, NEVER).await;
    let mut ticks = watch(site.channel().await, request()).await.unwrap();
    assert_eq!(ticks.next().await.unwrap().unwrap(), Tick { number: 0 });
    let token = site.token();
    site.stop.cancel();
    fires(&token).await;
    let rest: Vec<_> = timeout(MINUTE, ticks.collect()).await.expect("it does not end");
    assert!(rest.iter().all(Result::is_ok), "the stream was cut: {rest:?}");
    let report = site.report().await;
    assert!(report.is_clean() && report.elapsed() < NEVER / 2, "{report}");
}

#[tokio::test]
async fn a_stream_that_goes_on_is_cut_at_the_deadline_and_named() {
    let site = Site::open(Manners::Deaf, SOON).await;
    let mut ticks = watch(site.channel().await, request()).await.unwrap();
    assert_eq!(ticks.next().await.unwrap().unwrap(), Tick { number: 0 });
    let token = site.token();
    site.stop.cancel();
    fires(&token).await;
    let last = timeout(MINUTE, ticks.by_ref().skip_while(|tick| std::future::ready(tick.is_ok())).next()).await;
    let status = last.expect("it goes on").unwrap().unwrap_err();
    // tonic's status for a lost connection.
    assert!([Code::Unknown, Code::Unavailable, Code::Internal, Code::Cancelled].contains(&status.code()), "{status}");
    fires(&site.dropped).await;
    let report = site.report().await;
    let stream = report.task("POST /ticks.Ticks/Watch").unwrap_or_else(|| panic!("no stream in {report}"));
    assert_eq!(stream.straggling, Some(StragglerState::ParkedAtAwait), "{report}");
    assert_eq!(report.exit_code(), 70, "{report}");
}

#[tokio::test]
async fn an_unknown_call_is_answered_as_grpc_has_it() {
    let site = Site::open(Manners::Orderly, NEVER).await;
    let mut client = tonic::client::Grpc::new(site.channel().await);
    client.ready().await.unwrap();
    let codec = tonic_prost::ProstCodec::<WatchRequest, Tick>::default();
    let path = http::uri::PathAndQuery::from_static("/ticks.Ticks/Other");
    let status = client.server_streaming(request(), path, codec).await.unwrap_err();
    assert_eq!(status.code(), Code::Unimplemented);
    site.stop.cancel();
    assert!(site.report().await.is_clean());
}
