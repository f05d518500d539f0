//! The example `orders`: its check, its two sets of handlers against each other, and the page of the book about them.

#[expect(dead_code, reason = "its `main` is for the command line")]
#[path = "../../examples/orders/main.rs"]
mod example;

use std::net::SocketAddr;

use axum::Router;
use cancel_safe_tx_guard::TxPool;
use serde_json::json;
use sqlx::{ConnectOptions, Connection, Sqlite};
use tokio::net::TcpListener;

use self::example::check::{Answer, ask, post};
use self::example::{Settings, guarded, plain, shop, start};
use crate::world::{PATIENCE, World};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whoever_hangs_up_the_books_of_the_example_are_right() {
    let settings = Settings {
        database: None,
        listen: SocketAddr::from(([127, 0, 0, 1], 0)),
        plain: false,
        check: Some(400),
        seed: None,
    };
    assert!(start(settings).await.unwrap(), "see what was printed");
}

/// A service's answers to a fixed list of requests.
async fn answers(router: Router) -> Vec<Answer> {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let server = tokio::spawn(async move { axum::serve(listener, router).await });
    let mut answers = Vec::new();
    for request in [
        post("/orders", &json!({ "item": "book", "count": 2 })),
        post("/orders", &json!({ "item": "book", "count": 9 })),
        post("/orders", &json!({ "item": "none", "count": 1 })),
        post("/transfers", &json!({ "from": 0, "to": 1, "amount": 7 })),
        post("/transfers", &json!({ "from": 0, "to": 1, "amount": 7 })),
        "GET /orders HTTP/1.0\r\n\r\n".to_owned(),
        "DELETE /orders/1 HTTP/1.0\r\n\r\n".to_owned(),
        "DELETE /orders/1 HTTP/1.0\r\n\r\n".to_owned(),
        "GET /orders HTTP/1.0\r\n\r\n".to_owned(),
    ] {
        answers.push(ask(address, request, PATIENCE).await.unwrap().unwrap());
    }
    server.abort();
    drop(server.await);
    answers
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_plain_and_the_guarded_handlers_of_the_example_answer_alike() {
    let mut all = Vec::new();
    for is_plain in [true, false] {
        let world = World::<Sqlite>::new().await;
        let mut conn = world.options.connect().await.unwrap();
        shop::open(&mut conn, "book", 10, 2, 10).await.unwrap();
        conn.close().await.unwrap();
        all.push(if is_plain {
            answers(plain::router(sqlx::Pool::connect_with(world.options.clone()).await.unwrap())).await
        } else {
            let db = TxPool::<Sqlite>::builder().connect_with(world.options.clone()).await.unwrap();
            answers(guarded::router(db)).await
        });
    }
    let statuses: Vec<_> = all[1].iter().map(|answer| answer.status).collect();
    assert_eq!(statuses, [200, 409, 409, 204, 409, 200, 204, 409, 200]);
    assert_eq!(all[1][5].body, r#"[{"id":1,"item":"book","count":2}]"#);
    assert_eq!(all[0], all[1]);
}

/// Each line that the page's section shows as removed or added is in the corresponding file.
#[test]
fn the_page_about_the_example_shows_what_is_in_its_files() {
    let page = include_str!("../../../../docs/src/migrating.md");
    let section = page.split("\n## ").find(|section| section.starts_with("From plain sqlx\n")).unwrap();
    let (before, after) =
        (include_str!("../../examples/orders/plain.rs"), include_str!("../../examples/orders/guarded.rs"));
    let has = |file: &str, line: &str| file.lines().any(|other| other == line);
    let mut shown = 0;
    for diff in section.split("```diff\n").skip(1) {
        for line in diff.split("```").next().unwrap().lines().filter(|line| !line.starts_with("@@")) {
            let (sign, line) = line.split_at_checked(1).unwrap_or((" ", ""));
            match sign {
                "-" => assert!(has(before, line), "not in plain.rs: {line}"),
                "+" => assert!(has(after, line), "not in guarded.rs: {line}"),
                _ => assert!(has(before, line) && has(after, line), "not in both: {line}"),
            }
            shown += 1;
        }
    }
    assert!(shown > 40, "the page shows {shown} lines of the difference");
}
