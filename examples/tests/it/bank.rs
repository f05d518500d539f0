//! The bank as a process: its answers, the fate of cut transfers, and chaos on each database.
#![cfg(unix)]

use std::process::{ExitCode, Stdio};

use cancel_safe_campaign::publish_campaign;
use cancel_safe_examples::bank::{Plan, Report, Settings, chaos, serve};
use serde_json::{Value, json};
use sqlx::{AssertSqlSafe, Connection, MySqlConnection, PgConnection};
use tokio::io::AsyncReadExt as _;
use tokio::process::Command;
use tokio::time::timeout;

use crate::wire::Server;

/// The variable that turns this test binary into the server, with these arguments.
const ARGUMENTS: &str = "BANK_TEST_ARGUMENTS";

/// Does nothing as a test. If [`ARGUMENTS`] is set, this process is the server.
#[test]
fn server_program() {
    let Ok(arguments) = std::env::var(ARGUMENTS) else { return };
    let arguments: Vec<String> = serde_json::from_str(&arguments).unwrap();
    let behind = |name: &str| arguments.iter().skip_while(|argument| *argument != name).nth(1).cloned();
    let code = serve(Settings {
        database: behind("--database"),
        listen: behind("--listen").unwrap().parse().unwrap(),
        broken: arguments.iter().any(|argument| argument == "--broken"),
    });
    std::process::exit(i32::from(code != ExitCode::SUCCESS));
}

pub(crate) fn program(arguments: &[String]) -> Command {
    let mut program = Command::new(std::env::current_exe().unwrap());
    program.args(["bank::server_program", "--exact", "--nocapture"]).stderr(Stdio::null());
    program.env(ARGUMENTS, json!(arguments).to_string());
    program
}

async fn start_on(database: Option<&str>) -> Server {
    let database = database.map(|url| ["--database", url]);
    let arguments = ["--listen", "127.0.0.1:0"].into_iter().chain(database.into_iter().flatten());
    Server::start(program(&arguments.map(str::to_owned).collect::<Vec<_>>())).await
}

pub(crate) async fn start() -> Server {
    start_on(None).await
}

fn order(key: &str, amount: i64) -> Value {
    json!({ "key": key, "from": 1, "to": 2, "amount": amount })
}

impl Server {
    async fn post(&self, order: &Value) -> (u16, Value) {
        self.ask("POST /transfers", &order.to_string()).await
    }

    async fn outcome(&self, key: &str) -> (u16, Value) {
        let (status, body) = self.ask(&format!("GET /transfers/{key}"), "").await;
        (status, body["outcome"].clone())
    }

    async fn first_balance(&self) -> Value {
        self.ask("GET /accounts", "").await.1[0][1].clone()
    }
}

#[tokio::test]
async fn a_key_that_is_sent_twice_is_one_transfer_with_one_outcome() {
    let bank = start().await;
    for _ in 0..2 {
        let completed = (200, json!({ "key": "rent-may", "outcome": "completed" }));
        assert_eq!(bank.post(&order("rent-may", 30)).await, completed);
        assert_eq!(bank.outcome("rent-may").await, (200, json!("completed")));
        let refused = (409, json!({ "key": "yacht", "outcome": "refused" }));
        assert_eq!(bank.post(&order("yacht", 5_000)).await, refused);
        assert_eq!(bank.outcome("yacht").await, (200, json!("refused")));
        assert_eq!(bank.first_balance().await, 970);
    }
    // The key of one transfer is not that of another.
    assert_eq!(bank.post(&order("rent-may", 31)).await.0, 422);
    assert_eq!(bank.outcome("rent-june").await, (404, json!("not_committed")));
    for fault in [order("Rent", 1), order("", 1), order("a", 0), json!({ "key": "a", "from": 1, "to": 1, "amount": 1 })]
    {
        assert_eq!(bank.post(&fault).await.0, 400, "{fault}");
    }
    assert_eq!(bank.first_balance().await, 970);
    bank.tell_to_stop();
    assert!(bank.ends().await.success());
}

#[tokio::test]
async fn a_transfer_that_is_cut_by_its_limit_or_its_client_is_not_committed_and_says_so() {
    let bank = start().await;
    assert_eq!(bank.ask("POST /slow", r#"{"ms":3600000}"#).await.0, 204);
    let mut hasty = order("hasty", 30);
    hasty["limit_ms"] = 300.into();
    assert_eq!(bank.post(&hasty).await, (504, json!({ "key": "hasty", "outcome": "not_committed" })));
    assert_eq!(bank.outcome("hasty").await, (404, json!("not_committed")));

    let mut connection = bank.send("POST /transfers", &order("lost", 30).to_string()).await;
    let mut byte = [0];
    let answered = timeout(std::time::Duration::from_millis(300), connection.read(&mut byte)).await;
    assert!(answered.is_err(), "{answered:?}");
    drop(connection);
    // The query waits for a transfer under way, and there is none any more.
    assert_eq!(bank.outcome("lost").await, (404, json!("not_committed")));
    assert_eq!(bank.ask("POST /slow", r#"{"ms":0}"#).await.0, 204);
    // A key that has committed nothing may be sent again.
    assert_eq!(bank.post(&order("lost", 30)).await.0, 200);
    assert_eq!(bank.first_balance().await, 970);
}

async fn a_question_waits(bank: Server) {
    assert_eq!(bank.ask("POST /slow", r#"{"ms":1500}"#).await.0, 204);
    let mut events = bank.events().await;
    let transfer = bank.send("POST /transfers", &order("rent-may", 30).to_string()).await;
    events.until(|event| event["workers"][0]["state"].as_str().unwrap().contains("1 transactions in use")).await;
    assert_eq!(bank.outcome("rent-may").await, (200, json!("completed")));
    drop(transfer);
    bank.tell_to_stop();
    assert!(bank.ends().await.success());
}

#[tokio::test]
async fn a_question_waits_for_a_transfer_that_is_on_its_way_on_sqlite() {
    a_question_waits(start().await).await;
}

#[tokio::test]
async fn a_question_waits_for_a_transfer_that_is_on_its_way_on_postgres() {
    let schema = Schema::create().await;
    a_question_waits(start_on(Some(&schema.url)).await).await;
    schema.drop().await;
}

#[tokio::test]
async fn an_event_stream_tells_how_the_bank_is_and_ends_with_it() {
    let bank = start().await;
    assert_eq!(bank.post(&order("rent-may", 30)).await.0, 200);
    let mut events = bank.events().await;
    // It listens before it is ready.
    let event = events.until(|event| event["workers"][1] == json!({ "name": "http", "state": "ready" })).await;
    assert_eq!((&event["sum"], &event["ends"]["completed"]), (&json!(10_000), &json!(1)));
    assert_eq!(bank.ask("GET /healthz", "").await.0, 200);
    bank.tell_to_stop();
    events.ends().await;
    assert!(bank.ends().await.success());
}

async fn try_it(name: &str, database: Option<String>, broken: bool) -> Report {
    let plan = Plan { seconds: 3, seed: None, database, broken };
    let report = chaos(plan, program).await.unwrap();
    if !broken {
        publish_campaign("examples", &format!("bank/{name}"), report.sent, report.findings.len());
        assert!(report.is_right(), "{report}");
        assert_eq!(report.sum, 10_000);
    }
    assert!(report.completed > 0 && report.kills + report.stops > 0, "{report}");
    report
}

fn url(variable: &str) -> String {
    std::env::var(variable).unwrap_or_else(|_| panic!("set {variable} or run cargo xtask test examples"))
}

#[tokio::test]
async fn chaos_conserves_the_money_on_sqlite() {
    try_it("chaos-sqlite", None, false).await;
}

/// A separate schema, as in other tests.
struct Schema {
    conn: PgConnection,
    name: String,
    url: String,
}

impl Schema {
    async fn create() -> Self {
        let url = url("CANCEL_SAFE_TEST_POSTGRES_URL");
        let name = format!("bank_{}_{:x}", std::process::id(), fastrand::u32(..));
        let mut conn = PgConnection::connect(&url).await.unwrap();
        sqlx::raw_sql(AssertSqlSafe(format!("CREATE SCHEMA {name}"))).execute(&mut conn).await.unwrap();
        let sign = if url.contains('?') { '&' } else { '?' };
        Self { conn, url: format!("{url}{sign}options[search_path]={name}"), name }
    }

    async fn drop(mut self) {
        let sql = format!("DROP SCHEMA {} CASCADE", self.name);
        sqlx::raw_sql(AssertSqlSafe(sql)).execute(&mut self.conn).await.unwrap();
    }
}

#[tokio::test]
async fn chaos_conserves_the_money_on_postgres() {
    let schema = Schema::create().await;
    try_it("chaos-postgres", Some(schema.url.clone()), false).await;
    schema.drop().await;
}

#[tokio::test]
async fn chaos_conserves_the_money_on_mysql() {
    let url = url("CANCEL_SAFE_TEST_MYSQL_URL");
    let name = format!("bank_{}_{:x}", std::process::id(), fastrand::u32(..));
    let mut conn = MySqlConnection::connect(&url).await.unwrap();
    sqlx::raw_sql(AssertSqlSafe(format!("CREATE DATABASE {name}"))).execute(&mut conn).await.unwrap();
    let (address, options) = url.split_once('?').map_or((&*url, None), |(address, options)| (address, Some(options)));
    let (server, _) = address.rsplit_once('/').unwrap();
    let options = options.map(|options| format!("?{options}")).unwrap_or_default();
    try_it("chaos-mysql", Some(format!("{server}/{name}{options}")), false).await;
    sqlx::raw_sql(AssertSqlSafe(format!("DROP DATABASE {name}"))).execute(&mut conn).await.unwrap();
}

#[tokio::test]
async fn chaos_finds_a_row_that_is_written_in_a_transaction_of_its_own() {
    let report = try_it("broken", None, true).await;
    assert!(report.findings.iter().any(|finding| finding.contains("by its transfers")), "{report}");
}
