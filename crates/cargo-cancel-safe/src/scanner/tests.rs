//! What the scanner finds in snippets that are easy to get wrong.
//!
//! Invariant: the positions are those that rustc puts in line tables, as read from backtraces.

use crate::place::{AwaitKind, Owner, Position, Reason};
use crate::scanner::{Scanned, scan};

fn scanned(text: &str) -> Scanned {
    scan(text).unwrap_or_else(|error| panic!("{error}: {text}"))
}

/// Each await as `line:column function`, with the macro that waits.
fn awaits(text: &str) -> Vec<String> {
    let shown = |found: &crate::Await| match &found.kind {
        AwaitKind::Await => format!("{} {}", found.position, found.function),
        kind => format!("{} {} {kind}", found.position, found.function),
    };
    scanned(text).0.awaits.iter().map(shown).collect()
}

#[test]
fn an_await_is_at_its_word_and_columns_are_bytes() {
    assert_eq!(awaits("async fn f() {\n    let _ = leaf(1).await;\n}"), ["2:21 f"]);
    assert_eq!(awaits("async fn f() {\n    a\n        .b(\n)\n        .await?;\n}"), ["5:10 f"]);
    assert_eq!(
        awaits("async fn f() {\n    let _ = leaf(\"äöü€😀\").await;\n\tlet _ = a.await;\n}"),
        ["2:35 f", "3:12 f"]
    );
    assert_eq!(awaits("\u{feff}async fn f() { a.await }"), ["1:18 f"]);
    assert_eq!(awaits("#!/usr/bin/env x\nasync fn f() { a . /* c */ await }"), ["2:28 f"]);
    assert_eq!(awaits("async fn f() {\r\n    a.await\r\n}\r\n"), ["2:7 f"]);
}

#[test]
fn each_of_several_in_one_expression_is_found() {
    assert_eq!(
        awaits("async fn f() {\n g(a.await?, b.await)\n .await? + c.await\n}"),
        ["2:6 f", "2:16 f", "3:3 f", "3:14 f"]
    );
    assert_eq!(awaits("async fn f() { if a.await && let Ok(_) = b.await {} }"), ["1:21 f", "1:44 f"]);
}

#[test]
fn the_function_is_the_innermost_one_with_its_type() {
    let text = "
pub struct S;
impl S {
    pub async fn a(&self) { x.await }
    pub(crate) async fn b(&self) { async fn inner() { x.await } y.await }
}
impl<T> Tr for &mut Box<T> { async fn c() { x.await } }
pub trait Tr { async fn d() { x.await } }
trait Hidden { async fn e() { x.await } }
pub fn f() -> impl Future { async move { let c = async |x: u8| x.await; c(1).await } }
static S: L = L::new(|| async { x.await });
mod m { pub async fn r#async() { x.await } }";
    let functions: Vec<(String, bool)> =
        scanned(text).0.awaits.into_iter().map(|found| (found.function, found.public)).collect();
    let expected = [
        ("S::a", true),
        ("inner", false),
        ("S::b", false),
        ("&mutBox<T>::c", true),
        ("Tr::d", true),
        ("Hidden::e", false),
        ("f", true),
        ("f", true),
        ("", false),
        ("r#async", true),
    ];
    let expected = expected.map(|(name, public)| (name.replace("&mutBox<T>", "Box"), public));
    assert_eq!(functions, expected);
}

#[test]
fn awaits_in_macros_are_found_whatever_the_tokens_are() {
    for inside in [
        "println!(\"{:?}\", x.await)",
        "println!(\"{a}\", a = x.await)",
        "assert!(x.await, \"why\")",
        "vec![x.await; 3]",
        "vec![1, x.await]",
        "matches!(x.await, Some(n @ 1..) if n > 2)",
        "tokio::pin!(let x = async { x.await };)",
        "dsl!(a => x.await; b -> { c: x })",
        "dsl!({ ({ let y = [x.await]; y }) b -> })",
        "outer!(inner!(x.await) @)",
        "stream! { for await x in y {} yield x.await; }",
    ] {
        assert_eq!(awaits(&format!("async fn f() {{ {inside}; }}")).len(), 1, "{inside}");
    }
    for none in ["stringify!(x.await)", "quote!(x.await)", "dsl!(0..await @)", "x.r#await"] {
        assert_eq!(awaits(&format!("async fn f() {{ {none}; }}")), Vec::<String>::new(), "{none}");
    }
}

#[test]
fn select_waits_itself_and_its_arms_are_looked_into() {
    let text = "
async fn f() {
    tokio::select! {
        biased;
        Some(x) = a(1), if c.await => { h(x).await; }
        _ = async { b.await } => {}
        () = &mut x => y.await,
        else => z.await,
    }
}";
    assert_eq!(awaits(text), ["3:5 f select!", "5:30 f", "5:46 f", "6:23 f", "7:26 f", "8:19 f"]);
    let of_futures = "
async fn f() {
    let r = select! {
        x = a => x,
        complete => break,
        default => { d.await }
    };
}";
    assert_eq!(awaits(of_futures), ["3:13 f select!", "6:24 f"]);
    let unknown = "async fn f() {\n    select! { 1 2 = a.await => b }\n}";
    assert_eq!(awaits(unknown), ["2:5 f select!", "2:23 f"]);
}

#[test]
fn join_waits_itself_where_code_can_wait() {
    let text = "async fn f() {\n let _ = ::tokio::try_join!(biased; a, async { join!(b, c.await) },);\n}";
    assert_eq!(awaits(text), ["2:10 f try_join!", "2:48 f join!", "2:59 f"]);
    assert_eq!(awaits("fn f() { select! { recv(r) -> m => {} } join!(a) }"), Vec::<String>::new());
    assert_eq!(awaits("async fn f() { spawn(|| join!(a)) }"), Vec::<String>::new());
}

#[test]
fn the_body_of_a_macro_is_a_place_of_its_own() {
    let text = "
macro_rules! mine {
    ($e:expr) => { $e.await };
    (s $e:expr) => {{ tokio::select! { x = $e => x } }};
    (c $e:expr) => { $crate::join!($e) };
    ($a:expr, await) => {};
}";
    assert_eq!(awaits(text), ["3:23 mine!", "4:23 mine! select!", "5:22 mine! join!"]);
}

#[test]
fn what_is_compiled_for_tests_only_is_left_out_and_known() {
    for left_out in [
        "#[cfg(test)] mod tests { async fn f() { x.await } }",
        "#[cfg(all(unix, test))] async fn f() { x.await }",
        "#[cfg(any(test, all(test, unix)))] async fn f() { x.await }",
        "#[tokio::test] async fn f() { x.await }",
        "impl S { /// Docs.\n #[cfg(test)] async fn f() { x.await } }",
        "trait T { #[cfg(test)] async fn f() { x.await } }",
        "async fn f() { #[cfg(test)] x.await; #[cfg(test)] let y = x.await; #[cfg(test)] { x.await } }",
        "async fn f() { match a { #[cfg(test)] B => x.await, _ => {} } }",
        "#![cfg(test)]\nasync fn f() { x.await }",
        "cfg_rt! { #[cfg(test)] mod tests { async fn f() { x.await } } }",
    ] {
        assert_eq!(awaits(left_out), Vec::<String>::new(), "{left_out}");
    }
    for kept in ["not(test)", "any(test, unix)", "feature = \"test\"", "unix"] {
        assert_eq!(awaits(&format!("#[cfg({kept})] async fn f() {{ x.await }}")).len(), 1, "{kept}");
    }
    let (source, _) = scanned("async fn g() {}\n#[cfg(test)]\nmod tests {\n async fn f() { x.await }\n}");
    assert_eq!(source.owner(Position::new(4, 19)), Owner::Test);
}

#[test]
fn modules_are_declared_in_inline_modules_and_macros_too() {
    let text = "
mod a;
#[path = \"x/y.rs\"] mod b;
mod c { mod r#try; }
#[cfg(unix)] mod e;
#[cfg(test)] mod gone;
#[cfg_attr(windows, allow(dead_code), path = \"w.rs\")] mod g;
cfg_if! { if #[cfg(unix)] { mod h; } else { mod i; } }";
    let (_, declarations) = scanned(text);
    let names: Vec<&str> = declarations.iter().map(|it| it.name.as_str()).collect();
    assert_eq!(names, ["a", "b", "try", "e", "g", "h", "i"]);
    assert_eq!(declarations[1].path.as_deref(), Some("x/y.rs"));
    assert_eq!(declarations[2].inside, ["c"]);
    assert!(declarations[3].is_conditional && !declarations[0].is_conditional);
    assert_eq!(declarations[4].perhaps, ["w.rs"]);
}

#[test]
fn a_place_is_given_to_the_await_that_it_belongs_to() {
    let text = "
async fn f() {
    g(a.await, b.await);
    poll_fn(|cx| {
        x.poll(cx)
    })
    .await;
    spawn(async {
        wait!(y);
        z
            .await
    }).await;
    let c = poll_fn(|cx|
        x.poll(cx));
    c.await;
    h(|| y.poll(), z).await; let _ = || w;
}";
    let (source, _) = scanned(text);
    let owner = |line, column| match source.owner(Position::new(line, column)) {
        Owner::Await(index) => Ok(source.awaits[index].position.to_string()),
        Owner::Unknown(reason) => Err(reason),
        Owner::Test => panic!("there are no tests"),
    };
    let is = |text: &str| Ok(text.to_owned());
    // The word itself, where two share a line.
    assert_eq!(owner(3, 9), is("3:9"));
    assert_eq!(owner(3, 18), is("3:18"));
    assert_eq!(owner(3, 0), Err(Reason::SharedLine));
    // The only one on its line.
    assert_eq!(owner(7, 0), is("7:6"));
    assert_eq!(owner(15, 1), is("15:7"));
    // A closure that is part of what is awaited.
    assert_eq!(owner(5, 11), is("7:6"));
    assert_eq!(owner(10, 9), is("11:14"));
    // Another task may run the block.
    assert_eq!(owner(9, 9), Err(Reason::NoAwait));
    assert_eq!(owner(16, 10), is("16:23"));
    // Another closure on the line of an await.
    assert_eq!(owner(16, 41), Err(Reason::NotAsync));
    // Polled by hand.
    assert_eq!(owner(14, 11), Err(Reason::NotAsync));
}
