//! Clients that cut their requests while the server is killed again and again; then the final check. Invariant: the
//! outcome of a cut request is asked for only after the last request, from a server that was started for that.

use std::net::SocketAddr;
use std::process::Stdio;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use futures_util::{StreamExt as _, stream};
use serde_json::{Value, json};
use sqlx::{MySql, Postgres, Sqlite};
use tokio::io::{AsyncBufReadExt as _, BufReader};
use tokio::process::{Child, Command};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, timeout};

use super::check::{Heard, History, Report, judge};
use super::store::{Kind, Place, read_rows};
use super::wire::{Cut, call};
use super::{ACCOUNTS, Order, Outcome};

type Failure = Box<dyn std::error::Error + Send + Sync>;

const CLIENTS: u64 = 8;
/// Longer than the server takes to start, or to stop.
const PATIENCE: Duration = Duration::from_secs(60);

/// How it is tried.
#[derive(Debug, Clone, clap::Args)]
#[expect(clippy::exhaustive_structs, reason = "tests write it as a literal")]
pub struct Plan {
    /// How long to try it
    #[arg(long, default_value_t = 60)]
    pub seconds: u64,
    /// Repeats the random choices of another run, but not its timing
    #[arg(long)]
    pub seed: Option<u64>,
    /// `sqlite://…`, `postgres://…` or `mysql://…` [default: an SQLite file that is removed at the end]
    #[arg(long, value_name = "URL")]
    pub database: Option<String>,
    /// Try a server with a mistake built in
    #[arg(long)]
    pub broken: bool,
}

/// Sends transfers, cuts them, kills the server and starts it again; then checks the books. `program` returns the
/// command that starts the server with the given arguments.
///
/// # Errors
///
/// If the server does not start, or the database cannot be read. Faults of the bank are in the report.
pub async fn chaos(plan: Plan, program: impl Fn(&[String]) -> Command) -> Result<Report, Failure> {
    let seed = plan.seed.unwrap_or_else(|| fastrand::u64(..));
    let place = Place::of(plan.database)?;
    let mut arguments = vec!["--listen".to_owned(), "127.0.0.1:0".to_owned()];
    arguments.extend(["--database".to_owned(), place.url().to_owned()]);
    arguments.extend(plan.broken.then(|| "--broken".to_owned()));
    let program = || program(&arguments);

    let mut report = Report { seed, ..Report::default() };
    let mut server = Server::start(program()).await?;
    let (moved, addr) = watch::channel(server.addr);
    let until = Instant::now() + Duration::from_secs(plan.seconds);
    let history = Arc::new(Mutex::new(History::new()));
    let mut clients = JoinSet::new();
    for number in 0..CLIENTS {
        let random = fastrand::Rng::with_seed(seed.wrapping_add(number));
        let client = Client { number, seed, random, addr: addr.clone(), history: Arc::clone(&history) };
        clients.spawn(client.work(until));
    }
    let mut random = fastrand::Rng::with_seed(!seed);
    while Instant::now() < until {
        sleep(Duration::from_millis(random.u64(200..900))).await;
        if let Some(status) = server.child.try_wait()? {
            report.findings.push(format!("the server ended by itself, with {status}"));
        } else if random.u8(..3) > 0 {
            server.child.kill().await?;
            report.kills += 1;
        } else {
            report.findings.extend(server.stop().await?);
            report.stops += 1;
        }
        server = Server::start(program()).await?;
        moved.send_replace(server.addr);
    }
    while let Some(sent) = clients.join_next().await {
        report.sent += sent?;
    }
    report.findings.extend(server.stop().await?);

    let mut server = Server::start(program()).await?;
    let mut history = std::mem::take(&mut *history.lock().unwrap_or_else(PoisonError::into_inner));
    report.asked_committed = ask(server.addr, &mut history, &mut report.asked).await;
    let balances = answer(server.addr, "GET /accounts").await.ok_or("the accounts are not answered")?.1;
    let balances: Vec<(i64, i64)> = serde_json::from_value(balances)?;
    report.findings.extend(server.stop().await?);
    let rows = match place.kind() {
        Kind::Sqlite => read_rows::<Sqlite>(place.url()).await?,
        Kind::Postgres => read_rows::<Postgres>(place.url()).await?,
        Kind::MySql => read_rows::<MySql>(place.url()).await?,
    };
    report.sum = balances.iter().map(|(_, balance)| balance).sum();
    for heard in history.values() {
        match heard.outcome {
            Outcome::Completed => report.completed += 1,
            Outcome::Refused => report.refused += 1,
            Outcome::NotCommitted => report.not_committed += 1,
            Outcome::Unknown => {}
        }
    }
    report.findings.extend(judge(&history, &rows, &balances));
    Ok(report)
}

/// Asks for the outcome of each key that no client knows; returns how many were committed.
async fn ask(addr: SocketAddr, history: &mut History, asked: &mut usize) -> usize {
    let unknown: Vec<&mut Heard> = history.values_mut().filter(|heard| heard.outcome == Outcome::Unknown).collect();
    *asked = unknown.len();
    let answers = stream::iter(unknown).map(|heard| async move {
        let answered = answer(addr, &format!("GET /transfers/{}", heard.order.key)).await;
        heard.settle(answered.and_then(|(_, body)| outcome_of(&body)).unwrap_or(Outcome::Unknown));
        usize::from(heard.outcome == Outcome::Completed)
    });
    answers.buffer_unordered(8).fold(0, async |sum, committed| sum + committed).await
}

/// Asks up to five times.
async fn answer(addr: SocketAddr, line: &str) -> Option<(u16, Value)> {
    for _ in 0..5 {
        if let Ok(Some(answered)) = call(addr, line, "", Cut::Never).await {
            return Some(answered);
        }
    }
    None
}

fn outcome_of(body: &Value) -> Option<Outcome> {
    serde_json::from_value(body.get("outcome")?.clone()).ok()
}

struct Client {
    number: u64,
    seed: u64,
    random: fastrand::Rng,
    addr: watch::Receiver<SocketAddr>,
    history: Arc<Mutex<History>>,
}

impl Client {
    /// Returns how many requests it has sent.
    async fn work(mut self, until: Instant) -> usize {
        let (mut sent, mut orders) = (0, Vec::new());
        while Instant::now() < until {
            let order = self.choose(&orders, sent);
            let cut = match self.random.u8(..20) {
                0 => Cut::At(self.random.usize(..100)),
                1..=4 => Cut::After(Duration::from_micros(self.random.u64(..40_000))),
                _ => Cut::Never,
            };
            let addr = *self.addr.borrow_and_update();
            let body = json!(order).to_string();
            let outcome = match call(addr, "POST /transfers", &body, cut).await {
                Ok(Some((_, body))) => outcome_of(&body).unwrap_or(Outcome::Unknown),
                Ok(None) => Outcome::Unknown,
                Err(_) => {
                    // The server may be down. Nobody knows which requests it accepted before.
                    drop(timeout(Duration::from_millis(20), self.addr.changed()).await);
                    Outcome::Unknown
                }
            };
            sent += 1;
            let mut history = self.history.lock().unwrap_or_else(PoisonError::into_inner);
            match history.get_mut(&order.key) {
                Some(heard) => heard.hear(outcome),
                None => {
                    history.insert(order.key.clone(), Heard::new(order.clone(), outcome));
                    orders.push(order);
                }
            }
        }
        sent
    }

    /// A new order, or one time in ten an old one again.
    fn choose(&mut self, orders: &[Order], sent: usize) -> Order {
        let random = &mut self.random;
        if !orders.is_empty() && random.u8(..10) == 0 {
            return Order { limit_ms: None, ..orders[random.usize(..orders.len())].clone() };
        }
        let from = random.i64(1..=ACCOUNTS);
        let to = (from - 1 + random.i64(1..ACCOUNTS)) % ACCOUNTS + 1;
        let key = format!("{:x}-{}-{sent}", self.seed, self.number);
        let limit_ms = (random.u8(..5) == 0).then(|| random.u64(..30));
        Order { key, from, to, amount: random.i64(1..=400), limit_ms }
    }
}

/// The server as a process.
struct Server {
    child: Child,
    addr: SocketAddr,
}

impl Server {
    async fn start(mut program: Command) -> Result<Self, Failure> {
        let mut child = program.stdout(Stdio::piped()).kill_on_drop(true).spawn()?;
        let mut lines = BufReader::new(child.stdout.take().ok_or("no output")?).lines();
        let addr = async {
            while let Some(line) = lines.next_line().await? {
                if let Some((_, addr)) = line.split_once("listening on http://") {
                    return Ok(addr.parse()?);
                }
            }
            Err(Failure::from("the server ends before it listens"))
        };
        let addr = timeout(PATIENCE, addr).await.map_err(|_| "the server does not listen")??;
        Ok(Self { child, addr })
    }

    /// Tells it to stop. A stop that is not clean is a finding.
    async fn stop(&mut self) -> Result<Option<String>, Failure> {
        terminate(&mut self.child)?;
        let status = timeout(PATIENCE, self.child.wait()).await.map_err(|_| "the server does not stop")??;
        Ok((cfg!(unix) && !status.success()).then(|| format!("the server ended its stop with {status}")))
    }
}

#[cfg(unix)]
fn terminate(child: &mut Child) -> Result<(), Failure> {
    use nix::sys::signal::{Signal, kill};
    use nix::unistd::Pid;

    let id = child.id().ok_or("the server has ended by itself")?;
    Ok(kill(Pid::from_raw(i32::try_from(id)?), Signal::SIGTERM)?)
}

/// This system has no signal that asks a process to stop.
#[cfg(not(unix))]
fn terminate(child: &mut Child) -> Result<(), Failure> {
    Ok(child.start_kill()?)
}
