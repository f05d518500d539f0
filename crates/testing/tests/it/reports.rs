//! A report for people, for editors and for programs.

use std::time::Duration;

use cancel_safe_testing::{Explore, Outcome, Report, drop_after};
use tokio::task::yield_now;
use tokio::time::sleep;

use crate::run_again;

async fn refuse<S, T>(_state: &S, outcome: Outcome<T>) -> Result<(), String> {
    if outcome.is_dropped() { Err("dropped \"it\"".to_owned()) } else { Ok(()) }
}

async fn helper() {
    sleep(Duration::from_millis(1)).await;
}

async fn generic<T: Send>(value: T) -> T {
    helper().await;
    value
}

fn two_awaits() -> Report {
    Explore::new().paused_time(true).budgets([]).run(
        async || (),
        async |()| {
            drop(generic(String::new()).await);
            yield_now().await;
        },
        refuse,
    )
}

#[test]
fn each_await_is_told_with_its_callers_and_counted_in_a_table() {
    let report = two_awaits();
    let text = report.to_string();
    assert!(text.contains("the simplest of each await:"), "{text}");
    let helper = report.failures().iter().find(|it| it.point() == 1).unwrap();
    let lines: Vec<u32> = helper.callers().iter().map(cancel_safe_testing::Site::line).collect();
    let body = lines[1];
    assert_eq!(helper.site().unwrap().line() + 4, lines[0], "the helper was called by the generic function: {report}");
    let yielding = report.failures().iter().find(|it| it.point() == 2).unwrap();
    assert_eq!(yielding.site().unwrap().line(), body + 1);
    assert!(yielding.callers().is_empty(), "{report}");
    assert!(text.contains(&format!("called from {}:{body}", file!())), "{text}");
    // The table has a row for each await.
    for site in report.sites() {
        assert!(text.lines().any(|row| row.trim_start().starts_with(&format!("{site} "))), "{text}");
    }
}

#[test]
fn a_failure_of_production_is_told_before_one_of_a_starved_budget() {
    let report = Explore::new().paused_time(true).ways([cancel_safe_testing::Way::Eager]).run(
        async || (tokio::sync::Mutex::new(()), std::cell::Cell::new(false)),
        async |(lock, is_past)| {
            drop(lock.lock().await);
            is_past.set(true);
            yield_now().await;
            yield_now().await;
        },
        async |(_, is_past), outcome| match outcome {
            // Point 1 of a starved budget, and point 2 of the natural one.
            Outcome::Dropped { point: 1, .. } if !is_past.get() => Err("starved".to_owned()),
            Outcome::Dropped { point: 2, .. } => Err("natural".to_owned()),
            _ => Ok(()),
        },
    );
    assert!(report.failures().iter().any(|it| it.point() == 1), "{report}");
    assert_eq!(report.failures()[0].message(), "natural", "{report}");
}

#[test]
fn a_program_reads_the_same_as_a_person() {
    let report = two_awaits();
    let json = report.to_json();
    for part in [
        r#""clean":false"#,
        r#""varied":false"#,
        r#""message":"dropped \"it\"""#,
        r#""kind":"check""#,
        r#""again":"1:eager:natural""#,
        r#""rival":null"#,
        r#""callers":[{"file":"#,
    ] {
        assert!(json.contains(part), "{part} is missing: {json}");
    }
    assert_eq!(json.matches(r#""again":"#).count(), report.failures().len());
    assert!(!json.contains("verdict"));
    let judged = Explore::new().cancel_safe(async || (), async |()| (), async |()| ());
    assert!(judged.to_json().contains(r#""verdict":"safe""#), "{}", judged.to_json());
}

#[test]
fn every_address_that_a_failure_prints_is_found_again() {
    const CHILD: &str = "CANCEL_SAFE_TEST_EVERY_ADDRESS";
    let here = "reports::every_address_that_a_failure_prints_is_found_again";
    let judged = || {
        Explore::new().paused_time(true).budgets([1]).cancel_safe(
            async || 0,
            async |count| {
                *count += 1;
                yield_now().await;
                *count
            },
            async |_| (),
        )
    };
    let suspended = || {
        Explore::new().paused_time(true).budgets([]).suspended(
            async || std::cell::Cell::new(0),
            async |count| {
                let read = count.get();
                sleep(Duration::from_millis(1)).await;
                count.set(read + 1);
            },
            async |count| count.set(count.get() + 1),
            async |count, outcome, ()| {
                if outcome.is_completed() && count.get() != 2 { Err("lost".to_owned()) } else { Ok(()) }
            },
        )
    };
    if let Ok(which) = std::env::var(CHILD) {
        let report = if which == "judged" { judged() } else { suspended() };
        assert_eq!(report.failures().len(), 1, "{report}");
        return;
    }
    for (which, report) in [("judged", judged()), ("suspended", suspended())] {
        assert!(!report.is_clean());
        for failure in report.failures().iter().take(4) {
            let text = failure.to_string();
            let (_, address) = text.rsplit_once("CANCEL_SAFE_ONLY=").unwrap();
            let again = run_again(here, &[(CHILD, which), ("CANCEL_SAFE_ONLY", address)]);
            assert!(again.status.success(), "{which} {address}: {}", String::from_utf8_lossy(&again.stderr));
        }
    }
}

#[test]
fn a_panic_is_printed_once_and_the_hook_of_the_program_stays() {
    const CHILD: &str = "CANCEL_SAFE_TEST_PANICS";
    let here = "reports::a_panic_is_printed_once_and_the_hook_of_the_program_stays";
    if std::env::var_os(CHILD).is_some() {
        let report = Explore::new().run(
            async || (),
            async |()| yield_now().await,
            async |(), outcome| {
                assert!(outcome.is_completed(), "out of cheese");
                Ok(())
            },
        );
        assert!(report.failures().len() > 3);
        let job = async |()| drop(tokio::task::spawn_blocking(|| panic!("out of wine")).await);
        let _report = Explore::new().run(async || (), async |()| job(()).await, async |(), _| Ok(()));
        let _caught = std::panic::catch_unwind(|| panic!("another"));
        let _caught = std::panic::catch_unwind(|| panic!("another"));
        return;
    }
    let output = run_again(here, &[(CHILD, "")]);
    assert!(output.status.success());
    let printed = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(printed.matches("out of cheese").count(), 1, "{printed}");
    assert_eq!(printed.matches("out of wine").count(), 1, "{printed}");
    assert_eq!(printed.matches("another").count(), 2, "{printed}");
}

#[test]
fn every_frame_of_an_await_that_was_dropped_goes_to_the_coverage_file() {
    const CHILD: &str = "CANCEL_SAFE_TEST_COVERAGE";
    let here = "reports::every_frame_of_an_await_that_was_dropped_goes_to_the_coverage_file";
    if std::env::var_os(CHILD).is_some() {
        assert!(!two_awaits().is_clean());
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("coverage");
    let output = run_again(here, &[(CHILD, ""), ("CANCEL_SAFE_COVERAGE", file.to_str().unwrap())]);
    assert!(output.status.success());
    let text = std::fs::read_to_string(&file).unwrap();
    let mut lines = Vec::new();
    for row in text.lines() {
        let fields: Vec<&str> = row.split('\t').collect();
        assert_eq!((fields.len(), fields[0]), (4, "await"), "{row}");
        assert!(std::path::Path::new(fields[1]).is_absolute() && fields[1].ends_with("tests/it/reports.rs"), "{row}");
        assert!(fields[3].parse::<u32>().unwrap() > 1, "{row}");
        lines.push(fields[2].parse::<u32>().unwrap());
    }
    let report = two_awaits();
    let helper = report.failures().iter().find(|it| it.point() == 1).unwrap();
    for site in helper.callers().iter().chain(report.sites()) {
        assert!(lines.contains(&site.line()), "{site} is missing: {text}");
    }
    // A file that cannot be written is reported.
    let nowhere = directory.path().join("no").join("coverage");
    assert!(!run_again(here, &[(CHILD, ""), ("CANCEL_SAFE_COVERAGE", nowhere.to_str().unwrap())]).status.success());
}

#[test]
fn a_random_select_is_named_where_a_report_varies() {
    let random = Explore::new().paused_time(true).budgets([]).timeout(Duration::from_secs(60)).run(
        async || (),
        async |()| {
            for _ in 0..20 {
                tokio::select! {
                    () = std::future::ready(()) => {}
                    () = std::future::ready(()) => yield_now().await,
                }
            }
        },
        async |(), _| Ok(()),
    );
    assert!(random.is_varied(), "{random}");
    assert!(random.to_string().contains("is not `biased`"), "{random}");
}

#[tokio::test]
async fn drop_after_so_many_pendings() {
    let polled = std::cell::Cell::new(0);
    let future = || async {
        polled.set(polled.get() + 1);
        yield_now().await;
        yield_now().await;
        7
    };
    assert_eq!(drop_after(0, future()).await, None);
    assert_eq!(polled.get(), 0, "never polled");
    assert_eq!(drop_after(1, future()).await, None);
    assert_eq!(drop_after(2, future()).await, None);
    assert_eq!(drop_after(3, future()).await, Some(7));
    assert_eq!(drop_after(9, future()).await, Some(7));
}
