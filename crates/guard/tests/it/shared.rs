//! One critical section that several scopes poll. Each scope may hold it, and none may wake the others for ever: the
//! polls are counted.

use std::cell::{Cell, RefCell};
use std::future::{Future, pending, poll_fn};
use std::pin::{Pin, pin};
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll};
use std::time::Duration;

use cancel_safe_guard::{CRITICAL_LIMIT, critical, critical_for, timeout, with_token};
use futures_util::future::FutureExt;
use tokio::time::{Instant, sleep};
use tokio_util::sync::CancellationToken;

use crate::torn::{torn_here, watch};
use crate::{elapsed, soon};

/// More polls than any of these programs needs, and far fewer than a spinning one makes.
const MANY: usize = 50;
const HOUR: Duration = Duration::from_secs(3600);

fn ms(count: u64) -> Duration {
    Duration::from_millis(count)
}

type Boxed<T> = Pin<Box<dyn Future<Output = T> + Send>>;

/// A future that any of several callers may poll, until one of them has seen its end.
struct Common<T> {
    future: Mutex<Option<Boxed<T>>>,
    polls: AtomicUsize,
}

impl<T> Common<T> {
    fn new(future: impl Future<Output = T> + Send + 'static) -> Arc<Self> {
        Arc::new(Self { future: Mutex::new(Some(Box::pin(future))), polls: AtomicUsize::new(0) })
    }

    /// Polls the future, and polls it again every millisecond, because its wakes go only to the last caller.
    async fn wait(self: Arc<Self>) {
        let mut look = tokio::time::interval(ms(1));
        poll_fn(|cx| {
            while look.poll_tick(cx).is_ready() {}
            self.poll(cx)
        })
        .await;
    }

    /// Polls the future whenever the caller is polled, and never by a timer.
    async fn wait_woken(self: Arc<Self>) {
        poll_fn(|cx| self.poll(cx)).await;
    }

    fn poll(&self, cx: &mut Context<'_>) -> Poll<()> {
        assert!(self.polls.fetch_add(1, SeqCst) < MANY, "it is polled again and again");
        let mut future = self.future.lock().unwrap();
        let Some(polled) = future.as_mut() else { return Poll::Ready(()) };
        let polled = polled.as_mut().poll(cx).map(drop);
        if polled.is_ready() {
            *future = None;
        }
        polled
    }
}

#[tokio::test(start_paused = true)]
async fn a_shared_section_is_polled_no_more_often_than_it_is_woken() {
    watch();
    let start = Instant::now();
    for (first, second) in [(HOUR, HOUR), (ms(5), HOUR), (HOUR, ms(5)), (ms(5), ms(5)), (ms(5), ms(8))] {
        let polls = Cell::new(0);
        let section = critical(sleep(ms(20))).shared();
        let counted = || {
            let (mut section, polls) = (section.clone(), &polls);
            poll_fn(move |cx| {
                polls.set(polls.get() + 1);
                assert!(polls.get() < MANY, "{first:?} and {second:?}: it is polled again and again");
                section.poll_unpin(cx)
            })
        };
        let (one, two) = (timeout(first, counted()), timeout(second, counted()));
        let begun = Instant::now();
        assert_eq!(soon(async { tokio::join!(one, two) }).await, (Ok(()), Ok(())));
        assert_eq!(begun.elapsed(), ms(20), "both were held, or had time");
    }
    assert_eq!((start.elapsed(), torn_here()), (ms(100), 0));
}

#[tokio::test(start_paused = true)]
async fn a_section_shared_with_code_outside_any_scope_does_not_spin() {
    watch();
    let polls = Cell::new(0);
    let section = critical(sleep(ms(20))).shared();
    let counted = || {
        let (mut section, polls) = (section.clone(), &polls);
        poll_fn(move |cx| {
            polls.set(polls.get() + 1);
            assert!(polls.get() < MANY, "it is polled again and again");
            section.poll_unpin(cx)
        })
    };
    // The third one is in a new scope each time.
    let fresh = poll_fn(|cx| pin!(timeout(HOUR, counted())).poll(cx));
    let start = Instant::now();
    let all = async { tokio::join!(biased; timeout(ms(5), counted()), counted(), fresh) };
    assert_eq!(soon(all).await, (Ok(()), (), Ok(())));
    assert_eq!((start.elapsed(), torn_here()), (ms(20), 0));
}

#[tokio::test(start_paused = true)]
async fn a_section_behind_a_mutex_holds_both_tasks_and_does_not_spin() {
    watch();
    for (first, second) in [(HOUR, HOUR), (ms(5), HOUR), (ms(5), ms(5)), (ms(5), ms(8))] {
        let common = Common::new(critical(sleep(ms(20))));
        let start = Instant::now();
        let task = |deadline| tokio::spawn(timeout(deadline, Arc::clone(&common).wait()));
        let (one, two) = soon(async { tokio::join!(task(first), task(second)) }).await;
        assert_eq!((one.unwrap(), two.unwrap()), (Ok(()), Ok(())));
        assert_eq!(start.elapsed(), ms(20));
    }
    assert_eq!(torn_here(), 0);
}

#[tokio::test(start_paused = true)]
async fn scopes_that_are_due_and_share_a_section_end_together_with_it() {
    watch();
    let common = Common::new(async {
        critical(sleep(ms(20))).await;
        pending::<()>().await;
    });
    let start = Instant::now();
    let scopes = [5, 5, 8, 10].map(|deadline| tokio::spawn(timeout(ms(deadline), Arc::clone(&common).wait_woken())));
    for scope in scopes {
        // The end of the section wakes one of them, and it lets go of the others.
        assert_eq!(soon(scope).await.unwrap(), Err(elapsed()));
        assert_eq!(start.elapsed(), ms(20));
    }
    assert_eq!(torn_here(), 0);
}

#[tokio::test(start_paused = true)]
async fn a_section_borrowed_by_two_scopes_in_turn_does_not_spin() {
    watch();
    let section = RefCell::new(Box::pin(critical(sleep(ms(20)))));
    let (polls, ended) = (Cell::new(0), Cell::new(false));
    let turn = || {
        poll_fn(|cx| {
            polls.set(polls.get() + 1);
            assert!(polls.get() < MANY, "it is polled again and again");
            if !ended.get() && section.borrow_mut().as_mut().poll(cx).is_ready() {
                ended.set(true);
            }
            if ended.get() { Poll::Ready(()) } else { Poll::Pending }
        })
    };
    let token = CancellationToken::new();
    token.cancel();
    let start = Instant::now();
    let both = async { tokio::join!(timeout(ms(5), turn()), with_token(&token, turn())) };
    let (one, two) = soon(both).await;
    assert_eq!((one, two.is_ok(), start.elapsed()), (Ok(()), true, ms(20)));
}

#[tokio::test(start_paused = true)]
async fn a_shared_scope_with_a_section_inside_does_not_spin() {
    watch();
    let common = Common::new(timeout(ms(10), critical(sleep(ms(20)))));
    let task = |deadline| tokio::spawn(timeout(deadline, Arc::clone(&common).wait()));
    let start = Instant::now();
    let (one, two) = soon(async { tokio::join!(task(ms(5)), task(ms(12))) }).await;
    assert_eq!((one.unwrap(), two.unwrap()), (Ok(()), Ok(())));
    assert_eq!(start.elapsed(), ms(20));
    assert_eq!(torn_here(), 0);
}

#[tokio::test(start_paused = true)]
async fn a_shared_section_holds_none_of_its_scopes_past_its_bound() {
    watch();
    let start = Instant::now();
    let polls = AtomicUsize::new(0);
    let section = critical(poll_fn(|_| {
        assert!(polls.fetch_add(1, SeqCst) < MANY, "it is polled again and again");
        Poll::<()>::Pending
    }));
    let section = section.shared();
    let (one, two) = (timeout(ms(5), section.clone()), timeout(ms(1_000), section));
    let one = async { (one.await, start.elapsed()) };
    let two = async { (two.await, start.elapsed()) };
    let (one, two) = tokio::time::timeout(HOUR, async { tokio::join!(one, two) }).await.unwrap();
    assert_eq!(one, (Err(elapsed()), ms(5) + CRITICAL_LIMIT));
    assert_eq!(two, (Err(elapsed()), ms(1_000) + CRITICAL_LIMIT));
    assert_eq!(torn_here(), 1, "when the last of its owners dropped it");

    let start = Instant::now();
    let section = critical_for(
        ms(10),
        critical_for(
            ms(30),
            poll_fn(|_| {
                assert!(polls.fetch_add(1, SeqCst) < MANY, "it is polled again and again");
                Poll::<()>::Pending
            }),
        ),
    )
    .shared();
    let (one, two) = soon(async { tokio::join!(timeout(ms(5), section.clone()), timeout(ms(20), section)) }).await;
    assert_eq!((one, two), (Ok(Ok(Err(elapsed()))), Ok(Ok(Err(elapsed())))));
    assert_eq!((start.elapsed(), torn_here()), (ms(30), 1));
}

#[tokio::test(start_paused = true)]
async fn a_section_polled_by_ever_new_scopes_holds_the_present_one() {
    watch();
    let mut section = Box::pin(critical(sleep(HOUR)));
    for round in 0..1_000 {
        let mut scope = Box::pin(timeout(ms(round), async {
            assert!(crate::poll_once(&mut section).is_pending());
            pending::<()>().await;
        }));
        assert!(tokio::time::timeout(ms(round), scope.as_mut()).await.is_err(), "it is held");
    }
    assert_eq!(torn_here(), 0);
}
