//! A request and its late copy: the first good answer wins.
//!
//! Invariant: the loser's permits, its admission, and its token if it was not sent are back before the winner's answer
//! is returned.

use futures_util::future::{Either, select};
use reqwest::{Request, Response};
use tokio::time::{Instant, timeout_at};

use crate::{
    breaker::{Class, State},
    call::{Call, Failed, Leg},
    hedge::{Hedging, Wager},
    limit::Permits,
    outgoing::Outgoing,
};

/// The outcome of an exchange, with what it holds.
type Outcome = (Result<Response, Failed>, Leg);

impl<'a> Call<'a> {
    /// The client's hedging, if it applies to this request.
    pub(super) fn hedging(&self) -> Option<&'a Hedging> {
        let request = &self.hop.request;
        let can_be_copied = request.body().is_none_or(|body| body.as_bytes().is_some());
        self.client.hedging.as_ref().filter(|_| request.method().is_safe() && can_be_copied)
    }

    /// Sends this hop's request, and a copy of it if the answer is late.
    pub(super) async fn hedge(&mut self, hedging: &Hedging) -> Result<Response, Failed> {
        let (response, outgoing) = self.launch();
        let leg = std::mem::take(&mut self.leg);
        let ((result, leg), copies) = self.hedged(hedging, (response, outgoing, leg)).await;
        self.leg = leg;
        self.attempts += copies;
        result
    }

    async fn hedged(
        &self,
        hedging: &Hedging,
        (response, outgoing, leg): (impl Future<Output = reqwest::Result<Response>> + Unpin, Outgoing, Leg),
    ) -> (Outcome, u32) {
        hedging.deposit();
        let pace = self.hop.origin.pace.get_or_init(Box::default);
        let mut runner = pace.run();
        let started = Instant::now();
        let mut first = Box::pin(async { (self.exchange(response, &outgoing).await, leg) });
        let early = match pace.late_after().and_then(|late| started.checked_add(late)) {
            Some(late) => timeout_at(late, &mut first).await.ok(),
            None => Some((&mut first).await),
        };
        let (outcome, copies) = match early {
            Some(outcome) => (outcome, 0),
            None => match runner.is_late().then(|| self.second(hedging)).flatten() {
                Some((copy, wager, leg)) => (self.decide(first, copy, wager, leg).await, 1),
                None => (first.await, 0),
            },
        };
        if self.is_good(&outcome) {
            runner.answered(started.elapsed(), hedging);
        }
        (outcome, copies)
    }

    /// What a copy needs, if it is available without a wait.
    fn second<'h>(&self, hedging: &'h Hedging) -> Option<(Request, Wager<'h>, Leg)> {
        let origin = &self.hop.origin;
        // In a half-open circuit, the admissions are for probes.
        if self.hop.breaker.as_ref().is_some_and(|breaker| breaker.state() != State::Closed) {
            return None;
        }
        let wager = hedging.take()?;
        let permits = Permits::try_acquire(&self.client.gate, origin.gate.as_ref())?;
        let copy = self.hop.request.try_clone()?;
        Some((copy, wager, Leg { admission: self.admit().ok()?, permits: Some(permits) }))
    }

    /// Sends the copy, and waits for the better of the two answers. Both futures are gone when this returns.
    async fn decide(
        &self,
        first: impl Future<Output = Outcome> + Unpin,
        copy: Request,
        wager: Wager<'_>,
        leg: Leg,
    ) -> Outcome {
        let (response, outgoing) = self.execute(copy);
        let _stake = Stake { wager, outgoing: outgoing.clone() };
        let second = Box::pin(async { (self.exchange(response, &outgoing).await, leg) });
        match select(first, second).await {
            Either::Left((outcome, _)) if self.is_good(&outcome) => outcome,
            Either::Right((outcome, _)) if self.is_good(&outcome) => outcome,
            Either::Left((bad, second)) => {
                self.lose(bad);
                second.await
            }
            Either::Right((bad, first)) => {
                self.lose(bad);
                first.await
            }
        }
    }

    /// Whether it makes no sense to wait for a better answer.
    fn is_good(&self, (result, _): &Outcome) -> bool {
        result.as_ref().is_ok_and(|response| self.client.origins.class_of(response) != Class::Failure)
    }

    /// Reports the answer that was not good enough to the breaker, and gives up what it held.
    fn lose(&self, (result, Leg { admission, permits }): Outcome) {
        drop(self.judge(result, admission));
        drop(permits);
    }
}

/// The wager on a copy. It is lost only if a connection took the copy, because an unsent copy costs nothing.
struct Stake<'a> {
    wager: Wager<'a>,
    outgoing: Outgoing,
}

impl Drop for Stake<'_> {
    fn drop(&mut self) {
        if self.outgoing.taken().is_some() {
            self.wager.spend();
        }
    }
}
