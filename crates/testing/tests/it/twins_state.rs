//! Broken twins that keep their state in memory, each caught at its await, and their fixed twins.

#![expect(clippy::disallowed_methods, reason = "the broken twins are made of what is banned")]

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use cancel_safe_testing::{Explore, Outcome, Way};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, DuplexStream};
use tokio::sync::{Notify, Semaphore, oneshot};
use tokio::time::{sleep, timeout};

use crate::assert_caught;

/// Stands for a call to a server or a database.
async fn remote_call() {
    sleep(Duration::from_millis(50)).await;
}

/// The await in it.
const REMOTE_CALL: u32 = line!() - 4;

fn explore() -> Explore {
    Explore::new().paused_time(true)
}

/// A circuit breaker that lets one trial call through while it is half open.
#[derive(Default)]
struct Breaker {
    trial_running: Cell<bool>,
}

impl Breaker {
    async fn call_broken(&self) {
        if !self.trial_running.replace(true) {
            remote_call().await;
            self.trial_running.set(false);
        }
    }

    async fn call_fixed(&self) {
        if !self.trial_running.replace(true) {
            let _slot = Slot(self);
            remote_call().await;
        }
    }
}

/// The half-open slot, given back when dropped.
struct Slot<'a>(&'a Breaker);

impl Drop for Slot<'_> {
    fn drop(&mut self) {
        self.0.trial_running.set(false);
    }
}

async fn is_free(breaker: &Breaker, _outcome: Outcome<()>) -> Result<(), String> {
    if breaker.trial_running.get() { Err("the half-open slot leaked".to_owned()) } else { Ok(()) }
}

#[test]
fn a_breaker_that_clears_its_slot_by_hand_leaks_it() {
    let report = explore().run(async || Breaker::default(), async |breaker| breaker.call_broken().await, is_free);
    // The innermost await of the user's own code: the one in `remote_call`.
    assert_caught(&report, file!(), REMOTE_CALL, "slot leaked");
}

#[test]
fn a_breaker_with_a_slot_guard_does_not_leak() {
    explore().run(async || Breaker::default(), async |breaker| breaker.call_fixed().await, is_free).assert_clean();
}

async fn one_permit() -> Arc<Semaphore> {
    Arc::new(Semaphore::new(1))
}

async fn permit_is_back(permits: &Arc<Semaphore>, _outcome: Outcome<()>) -> Result<(), String> {
    match timeout(Duration::from_secs(1), permits.acquire()).await {
        Ok(_permit) => Ok(()),
        Err(_) => Err("the permit leaked".to_owned()),
    }
}

#[test]
fn a_forgotten_permit_is_never_given_back() {
    let line = line!() + 5;
    let report = explore().run(
        one_permit,
        async |permits| {
            permits.acquire().await.unwrap().forget();
            sleep(Duration::from_millis(50)).await;
            permits.add_permits(1);
        },
        permit_is_back,
    );
    assert_caught(&report, file!(), line, "permit leaked");
}

#[test]
fn a_permit_that_is_held_is_given_back() {
    let report = explore().run(
        one_permit,
        async |permits| {
            let _permit = permits.acquire().await.unwrap();
            sleep(Duration::from_millis(50)).await;
        },
        permit_is_back,
    );
    report.assert_clean();
}

/// Counts open transactions; the rollback is a task that `drop` spawns, or `drop` itself.
struct Transaction {
    open: Arc<AtomicU32>,
    committed: bool,
    rolls_back_in_a_task: bool,
}

impl Transaction {
    fn begin(open: &Arc<AtomicU32>, rolls_back_in_a_task: bool) -> Self {
        open.fetch_add(1, Ordering::SeqCst);
        Self { open: Arc::clone(open), committed: false, rolls_back_in_a_task }
    }

    fn commit(mut self) {
        self.committed = true;
    }
}

impl Drop for Transaction {
    fn drop(&mut self) {
        let open = Arc::clone(&self.open);
        if self.rolls_back_in_a_task && !self.committed {
            drop(tokio::spawn(async move {
                remote_call().await;
                open.fetch_sub(1, Ordering::SeqCst);
            }));
        } else {
            open.fetch_sub(1, Ordering::SeqCst);
        }
    }
}

async fn nothing_is_open(open: &Arc<AtomicU32>, _outcome: Outcome<()>) -> Result<(), String> {
    if open.load(Ordering::SeqCst) == 0 { Ok(()) } else { Err("the rollback was lost".to_owned()) }
}

#[test]
fn a_rollback_spawned_in_drop_is_lost_on_shutdown_only() {
    let line = line!() + 5;
    let report = explore().settle_for(Duration::from_millis(100)).run(
        async || Arc::new(AtomicU32::new(0)),
        async |open| {
            let transaction = Transaction::begin(open, true);
            sleep(Duration::from_millis(50)).await;
            transaction.commit();
        },
        nothing_is_open,
    );
    assert_caught(&report, file!(), line, "rollback was lost");
    assert!(report.failures().iter().all(|failure| failure.way() == Way::Shutdown), "{report}");
}

#[test]
fn a_rollback_in_drop_itself_is_never_lost() {
    let report = explore().run(
        async || Arc::new(AtomicU32::new(0)),
        async |open| {
            let transaction = Transaction::begin(open, false);
            sleep(Duration::from_millis(50)).await;
            transaction.commit();
        },
        nothing_is_open,
    );
    report.assert_clean();
}

/// A peer that sends two frames of four bytes, one byte at a time, and a loop that also has a ticker to serve.
async fn slow_peer() -> tokio::sync::Mutex<DuplexStream> {
    let (mut peer, stream) = tokio::io::duplex(64);
    drop(tokio::spawn(async move {
        for byte in [0, 0, 0, 7, 0, 0, 0, 9] {
            peer.write_all(&[byte]).await.unwrap();
            sleep(Duration::from_millis(10)).await;
        }
    }));
    tokio::sync::Mutex::new(stream)
}

async fn frames_are_whole(
    _stream: &tokio::sync::Mutex<DuplexStream>,
    outcome: Outcome<Vec<[u8; 4]>>,
) -> Result<(), String> {
    match outcome.completed() {
        Some(frames) if frames != [[0, 0, 0, 7], [0, 0, 0, 9]] => Err(format!("out of step: {frames:?}")),
        _ => Ok(()),
    }
}

#[test]
fn read_exact_in_a_select_loop_loses_bytes() {
    let report = explore().budgets([]).run(
        slow_peer,
        async |stream| {
            let (mut stream, mut frames) = (stream.lock().await, Vec::new());
            loop {
                let mut frame = [0; 4];
                tokio::select! {
                    biased;
                    read = stream.read_exact(&mut frame) => match read {
                        Ok(_) => frames.push(frame),
                        Err(_) => return frames,
                    },
                    () = sleep(Duration::from_millis(15)) => {}
                }
            }
        },
        frames_are_whole,
    );
    // The exploration does not have to drop it: the loop does, and completes with the wrong frames.
    assert!(report.failures().iter().any(|it| it.is_completed() && it.message().contains("out of step")), "{report}");
}

/// Reads one frame into `partial`, so that a dropped read can be resumed.
async fn read_frame(stream: &mut DuplexStream, partial: &mut Vec<u8>) -> Option<[u8; 4]> {
    while partial.len() < 4 {
        let mut byte = [0];
        if stream.read(&mut byte).await.ok()? == 0 {
            return None;
        }
        partial.extend(byte);
    }
    std::mem::take(partial).try_into().ok()
}

#[test]
fn a_read_that_keeps_what_it_has_stays_in_step() {
    let report = explore().budgets([]).run(
        slow_peer,
        async |stream| {
            let (mut stream, mut frames, mut partial) = (stream.lock().await, Vec::new(), Vec::new());
            loop {
                tokio::select! {
                    biased;
                    frame = read_frame(&mut stream, &mut partial) => match frame {
                        Some(frame) => frames.push(frame),
                        None => return frames,
                    },
                    () = sleep(Duration::from_millis(15)) => {}
                }
            }
        },
        frames_are_whole,
    );
    report.assert_clean();
}

/// A stream whose eight bytes have all arrived. The next reader must begin at a frame or at the end.
struct Arrived {
    stream: tokio::sync::Mutex<DuplexStream>,
    partial: tokio::sync::Mutex<Vec<u8>>,
}

async fn arrived() -> Arrived {
    let (mut peer, stream) = tokio::io::duplex(64);
    peer.write_all(&[0, 0, 0, 7, 0, 0, 0, 9]).await.unwrap();
    Arrived { stream: tokio::sync::Mutex::new(stream), partial: tokio::sync::Mutex::new(Vec::new()) }
}

async fn next_frame_is_whole<T>(state: &Arrived, _outcome: Outcome<T>) -> Result<(), String> {
    let (mut stream, mut partial) = (state.stream.lock().await, state.partial.lock().await);
    match read_frame(&mut stream, &mut partial).await {
        Some([0, 0, 0, 7 | 9]) | None => Ok(()),
        Some(frame) => Err(format!("out of step: {frame:?}")),
    }
}

/// The same, while the bytes arrive one by one.
async fn arriving() -> Arrived {
    Arrived { stream: slow_peer().await, partial: tokio::sync::Mutex::new(Vec::new()) }
}

#[test]
fn read_exact_in_a_select_is_out_of_step_after_a_drop() {
    let line = line!() + 5;
    let report = explore().budgets([]).run(
        arriving,
        async |state| {
            let (mut stream, mut frame) = (state.stream.lock().await, [0; 4]);
            tokio::select! {
                biased;
                read = stream.read_exact(&mut frame) => drop(read),
                () = sleep(Duration::from_secs(1)) => {}
            }
        },
        next_frame_is_whole,
    );
    assert_caught(&report, file!(), line, "out of step");
}

#[test]
fn a_read_in_a_select_that_keeps_what_it_has_stays_in_step_after_a_drop() {
    let report = explore().run(
        arriving,
        async |state| {
            let (mut stream, mut partial) = (state.stream.lock().await, state.partial.lock().await);
            tokio::select! {
                biased;
                _ = read_frame(&mut stream, &mut partial) => {}
                () = sleep(Duration::from_secs(1)) => {}
            }
        },
        next_frame_is_whole,
    );
    report.assert_clean();
}

#[test]
fn starving_drops_a_read_of_bytes_that_are_all_there() {
    let line = line!() + 5;
    let operation = async |state: &Arrived| {
        let mut stream = state.stream.lock().await;
        for _ in 0..4 {
            let mut half = [0; 2];
            stream.read_exact(&mut half).await.unwrap();
        }
    };
    let undisturbed = explore().budgets([]).run(arrived, operation, next_frame_is_whole);
    undisturbed.assert_clean();
    let starved = explore().budgets([1]).run(arrived, operation, next_frame_is_whole);
    assert_caught(&starved, file!(), line, "out of step");
}

#[test]
fn a_read_of_single_bytes_stays_in_step_when_starved() {
    let report = explore().run(
        arrived,
        async |state| {
            let (mut stream, mut partial) = (state.stream.lock().await, state.partial.lock().await);
            for _ in 0..2 {
                read_frame(&mut stream, &mut partial).await;
            }
        },
        next_frame_is_whole,
    );
    report.assert_clean();
}

/// A connection that is either in its place or in use.
type Place = RefCell<Option<Rc<&'static str>>>;

async fn place() -> Place {
    RefCell::new(Some(Rc::new("connection")))
}

async fn in_its_place<T>(place: &Place, _outcome: Outcome<T>) -> Result<(), String> {
    if place.borrow().is_some() { Ok(()) } else { Err("the connection is gone".to_owned()) }
}

#[test]
fn what_is_taken_before_an_await_is_gone() {
    let line = line!() + 5;
    let report = explore().run(
        place,
        async |place| {
            let connection = place.take();
            sleep(Duration::from_millis(50)).await;
            place.replace(connection);
        },
        in_its_place,
    );
    assert_caught(&report, file!(), line, "gone");
}

#[test]
fn what_is_lent_across_an_await_stays() {
    let report = explore().run(
        place,
        async |place| {
            let connection = place.borrow().clone();
            sleep(Duration::from_millis(50)).await;
            drop(connection);
        },
        in_its_place,
    );
    report.assert_clean();
}

/// A user in memory and in the database.
#[derive(Default)]
struct User {
    last_login: Cell<u32>,
    stored: Cell<u32>,
}

impl User {
    async fn store(&self, login: u32) {
        remote_call().await;
        self.stored.set(login);
    }
}

async fn same_in_both<T>(user: &User, _outcome: Outcome<T>) -> Result<(), String> {
    let (memory, database) = (user.last_login.get(), user.stored.get());
    if memory == database { Ok(()) } else { Err(format!("{memory} in memory, {database} in the database")) }
}

#[test]
fn a_mutation_before_an_await_is_ahead_of_the_database() {
    let line = line!() + 6;
    let report = explore().run(
        async || User::default(),
        async |user| {
            user.last_login.set(7);
            // Written out, so that the line is here.
            sleep(Duration::from_millis(50)).await;
            user.stored.set(7);
        },
        same_in_both,
    );
    assert_caught(&report, file!(), line, "7 in memory, 0 in the database");
}

#[test]
fn a_mutation_after_the_await_is_not() {
    let report = explore().run(
        async || User::default(),
        async |user| {
            user.store(7).await;
            user.last_login.set(7);
        },
        same_in_both,
    );
    report.assert_clean();
}

/// A service that stops when its worker has ended.
#[derive(Default)]
struct Service {
    token: Arc<Notify>,
    stopped: Cell<bool>,
}

async fn stops<T>(service: &Service, outcome: Outcome<T>) -> Result<(), String> {
    if outcome.is_completed() && !service.stopped.get() { Err("not stopped".to_owned()) } else { Ok(()) }
}

#[test]
fn a_worker_that_ignores_its_token_is_a_hang_with_a_line() {
    let line = line!() + 7;
    let report = Explore::new().hang_after(Duration::from_secs(1)).run(
        async || Service::default(),
        async |service| {
            let (_still_busy, work) = oneshot::channel::<()>();
            let worker = tokio::spawn(work);
            service.token.notify_one();
            drop(worker.await);
            service.stopped.set(true);
        },
        stops,
    );
    assert_caught(&report, file!(), line, "did not end within hang_after(1s)");
    assert!(report.failures().iter().any(|failure| failure.is_hang()), "{report}");
}

#[test]
fn a_worker_that_heeds_its_token_stops() {
    let report = Explore::new().run(
        async || Service::default(),
        async |service| {
            let (_still_busy, work) = oneshot::channel::<()>();
            let token = Arc::clone(&service.token);
            let worker = tokio::spawn(async move {
                tokio::select! {
                    biased;
                    () = token.notified() => {}
                    _ = work => {}
                }
            });
            service.token.notify_one();
            drop(worker.await);
            service.stopped.set(true);
        },
        stops,
    );
    report.assert_clean();
}
