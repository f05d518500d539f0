//! The proof that a recorded value can be read back unchanged, and when to make it.
//!
//! Invariant: a result whose proof failed is not recorded, and after the first ones the proofs take at most about a
//! hundredth of the time, however large the results are.

use std::{
    any::type_name,
    time::{Duration, Instant},
};

use serde::{Serialize, de::DeserializeOwned};

use crate::{
    codec::Codec,
    difference::{Difference, Tree, difference},
    error::TaskError,
    shape::{Digest, Refused, look},
};

/// How many results at the start of each session are proven, whatever it costs.
const FIRST: u32 = 16;
/// The most results between two proofs.
const LONGEST_GAP: u32 = 1024;
/// The proofs may take one part in this many of the time.
const SHARE: u64 = 100;

/// Encodes values and proves now and then that they come back.
#[derive(Debug)]
pub(crate) struct Prover {
    codec: Codec,
    /// How many values to skip before the next proof.
    skip: u32,
    proven: u32,
    /// How many values the last proof stands for, itself included, and when it ended.
    gap: u32,
    ended: Option<Instant>,
}

impl Prover {
    pub(crate) fn new(codec: Codec) -> Self {
        Self { codec, skip: 0, proven: 0, gap: 1, ended: None }
    }

    /// Appends the encoded value to `bytes`.
    #[inline]
    pub(crate) fn encode<T>(&mut self, index: usize, value: &T, bytes: &mut Vec<u8>) -> Result<(), TaskError>
    where
        T: Serialize + DeserializeOwned,
    {
        let start = bytes.len();
        self.codec.encode(value, bytes).map_err(|cause| TaskError::unwritten::<T>(self.codec, index, cause))?;
        if self.skip > 0 {
            self.skip -= 1;
            return Ok(());
        }
        self.prove(index, value, &bytes[start..])
    }

    #[cold]
    fn prove<T>(&mut self, index: usize, value: &T, bytes: &[u8]) -> Result<(), TaskError>
    where
        T: Serialize + DeserializeOwned,
    {
        let begun = Instant::now();
        let codec = self.codec;
        let back: T = codec.decode(bytes).map_err(|cause| TaskError::unread::<T>(codec, index, bytes, cause))?;
        let found = compare(value, &back, codec.is_human_readable());
        if let Some(Difference { path, detail }) =
            found.map_err(|cause| TaskError::unwritten::<T>(codec, index, cause.into()))?
        {
            return Err(TaskError::RoundTrip { index, type_name: type_name::<T>(), codec, path, detail });
        }
        let ended = Instant::now();
        self.proven = self.proven.saturating_add(1);
        let since = self.ended.replace(ended).map(|before| begun.duration_since(before));
        self.gap = match since {
            Some(since) if self.proven >= FIRST => {
                let longest = longest_gap(ended - begun, since, self.gap);
                // At random, so that no pattern in the input can evade the proofs.
                fastrand::u32(1..=longest)
            }
            _ => 1,
        };
        self.skip = self.gap - 1;
        Ok(())
    }
}

/// How far apart two proofs may be if a proof took `proof`, and `values` values took `since`.
fn longest_gap(proof: Duration, since: Duration, values: u32) -> u32 {
    let each = (since.as_nanos() as u64 / u64::from(values)).max(1);
    let mean = (proof.as_nanos() as u64).saturating_mul(SHARE) / each;
    // Drawn evenly from one to the longest, the gaps are on average half of the longest.
    mean.saturating_mul(2).clamp(1, u64::from(LONGEST_GAP)) as u32
}

/// How a value differs from the original.
fn compare<T: Serialize>(before: &T, after: &T, human_readable: bool) -> Result<Option<Difference>, Refused> {
    if look::<Digest, T>(before, human_readable)? == look(after, human_readable)? {
        return Ok(None);
    }
    // Only now, because a tree takes many times the memory.
    let (before, after): (Tree, Tree) = (look(before, human_readable)?, look(after, human_readable)?);
    Ok(difference(&before, &after))
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn us(micros: u64) -> Duration {
        Duration::from_micros(micros)
    }

    #[test]
    fn costly_items_are_all_proven_and_trivial_ones_at_least_one_in_1024() {
        // A proof of a microsecond, and the time of one item.
        assert_eq!(longest_gap(us(1), us(200), 1), 1);
        assert_eq!(longest_gap(us(1), us(10), 1), 20);
        assert_eq!(longest_gap(us(1), us(100), 10), 20);
        assert_eq!(longest_gap(us(1), Duration::from_nanos(10), 1), LONGEST_GAP);
        // A result so large that its proof takes as long as its item.
        assert_eq!(longest_gap(us(500_000), us(500_000), 1), 200);
        assert_eq!(longest_gap(Duration::ZERO, Duration::ZERO, 1), 1);
        assert_eq!(longest_gap(Duration::MAX, Duration::ZERO, LONGEST_GAP), LONGEST_GAP);
    }

    /// Written as a number, and read as nothing.
    #[derive(Debug, serde::Serialize)]
    struct OneWay(u8);

    impl<'de> serde::Deserialize<'de> for OneWay {
        fn deserialize<D: serde::Deserializer<'de>>(_: D) -> Result<Self, D::Error> {
            Err(serde::de::Error::custom("one way only"))
        }
    }

    #[test]
    fn a_value_that_does_not_come_back_is_refused_whichever_of_the_first_it_is() {
        for before in 0..FIRST as usize {
            let mut prover = Prover::new(Codec::MessagePack);
            let mut bytes = b"before".to_vec();
            for index in 0..before {
                prover.encode(index, &Some(Some(1u8)), &mut bytes).unwrap();
            }
            let error = prover.encode(before, &Some(None::<u8>), &mut bytes).unwrap_err();
            assert!(matches!(error, TaskError::RoundTrip { index, .. } if index == before), "{error}");
        }
        let error = Prover::new(Codec::MessagePack).encode(3, &OneWay(1), &mut Vec::new()).unwrap_err();
        assert!(matches!(error, TaskError::Codec { index: 3, action: "read back", .. }), "{error}");
    }

    #[test]
    fn a_value_is_looked_at_in_the_form_in_which_it_is_written() {
        let mut bytes = Vec::new();
        let address: std::net::IpAddr = "10.0.0.1".parse().unwrap();
        Prover::new(Codec::MessagePack).encode(0, &address, &mut bytes).unwrap();
        assert_eq!(&bytes[1..], b"10.0.0.1");
        assert_eq!(compare(&address, &address, false).unwrap(), None);
    }

    #[test]
    fn the_first_results_are_proven_and_then_never_more_than_1023_in_a_row_are_not() {
        let mut prover = Prover::new(Codec::MessagePack);
        let mut bytes = Vec::new();
        let (mut proofs, mut run) = (0, 0);
        for index in 0..20_000usize {
            bytes.clear();
            let before = prover.proven;
            prover.encode(index, &7u8, &mut bytes).unwrap();
            if prover.proven == before {
                run += 1;
                assert!(index >= FIRST as usize, "result {index} was not proven");
                assert!(run < LONGEST_GAP, "{run} results in a row were not proven");
            } else {
                (proofs, run) = (proofs + 1, 0);
            }
        }
        assert!(proofs >= FIRST + 19_000 / LONGEST_GAP, "{proofs} proofs");
    }
}
