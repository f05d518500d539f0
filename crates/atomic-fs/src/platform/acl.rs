//! POSIX access control lists, in the kernel's format for an extended attribute; nothing here makes a system call.
//!
//! Invariant: a derived list grants nobody anything that the original list did not grant.

/// Version 2, the only existing one.
const HEADER: [u8; 4] = 2_u32.to_le_bytes();
const ENTRY_BYTES: usize = 8;
/// The id in an entry that names no user or group.
const NOBODY: u32 = u32::MAX;

const OWNER: u16 = 0x01;
const USER: u16 = 0x02;
const GROUP: u16 = 0x04;
const NAMED_GROUP: u16 = 0x08;
const MASK: u16 = 0x10;
const OTHER: u16 = 0x20;

/// An access control list.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct List(Vec<Right>);

/// What one entry grants: some of the bits `rwx`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Right {
    tag: u16,
    bits: u16,
    id: u32,
}

impl List {
    /// The list that is equivalent to the permission bits; the kernel stores it as just these bits.
    pub(super) fn of_mode(mode: u32) -> Self {
        let right = |tag, shift: u32| Right { tag, bits: (mode >> shift & 7) as u16, id: NOBODY };
        Self(vec![right(OWNER, 6), right(GROUP, 3), right(OTHER, 0)])
    }

    /// `None` unless this room understands the whole list.
    pub(super) fn parse(bytes: &[u8]) -> Option<Self> {
        let (entries, rest) = bytes.strip_prefix(&HEADER)?.as_chunks::<ENTRY_BYTES>();
        let entries = entries.iter().map(|&[t0, t1, b0, b1, i0, i1, i2, i3]| Right {
            tag: u16::from_le_bytes([t0, t1]),
            bits: u16::from_le_bytes([b0, b1]),
            id: u32::from_le_bytes([i0, i1, i2, i3]),
        });
        let list = Self(entries.collect());
        let is_known =
            |right: &Right| matches!(right.tag, OWNER | USER | GROUP | NAMED_GROUP | MASK | OTHER) && right.bits <= 7;
        let once = |tag| list.0.iter().filter(|right| right.tag == tag).count() == 1;
        let is_whole = rest.is_empty() && list.0.iter().all(is_known) && [OWNER, GROUP, OTHER].into_iter().all(once);
        is_whole.then_some(list)
    }

    pub(super) fn to_bytes(&self) -> Vec<u8> {
        let mut bytes = HEADER.to_vec();
        for Right { tag, bits, id } in &self.0 {
            bytes.extend(tag.to_le_bytes());
            bytes.extend(bits.to_le_bytes());
            bytes.extend(id.to_le_bytes());
        }
        bytes
    }

    /// The list for a file with another group: the group's entry would now apply to other people.
    ///
    /// The new group may be anybody, so it gets only what every group and all others had. No entry covers the members
    /// of the old group any more, so they now count as others, and others therefore get no more than the old group had.
    /// Entries that name a user or group keep their meaning.
    pub(crate) fn for_another_group(mut self) -> Self {
        let all = |tags: &[u16]| {
            let of_these = self.0.iter().filter(|right| tags.contains(&right.tag));
            of_these.fold(7, |bits, right| bits & right.bits)
        };
        let group = all(&[GROUP, NAMED_GROUP, MASK, OTHER]);
        let other = all(&[GROUP, MASK, OTHER]);
        for right in &mut self.0 {
            match right.tag {
                GROUP => right.bits = group,
                OTHER => right.bits = other,
                _ => {}
            }
        }
        self
    }
}

impl List {
    /// For a directory: everybody who may write to it may read and write, and nobody else may do anything, except the
    /// owner, who always may.
    pub(crate) fn for_writers(mut self) -> Self {
        for right in &mut self.0 {
            right.bits = if right.tag == OWNER || right.bits & 2 != 0 { 6 } else { 0 };
        }
        self
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn list(rights: &[(u16, u16, u32)]) -> List {
        List(rights.iter().map(|&(tag, bits, id)| Right { tag, bits, id }).collect())
    }

    #[test]
    fn what_the_kernel_says_is_read_and_said_again() {
        let known =
            list(&[(OWNER, 6, NOBODY), (USER, 7, 12345), (GROUP, 4, NOBODY), (MASK, 7, NOBODY), (OTHER, 1, NOBODY)]);
        let bytes = known.to_bytes();
        assert_eq!(bytes[..20], [2, 0, 0, 0, 1, 0, 6, 0, 255, 255, 255, 255, 2, 0, 7, 0, 0x39, 0x30, 0, 0]);
        assert_eq!(List::parse(&bytes), Some(known));
        assert_eq!(List::of_mode(0o4751), list(&[(OWNER, 7, NOBODY), (GROUP, 5, NOBODY), (OTHER, 1, NOBODY)]));
    }

    #[test]
    fn what_is_not_understood_in_full_is_refused() {
        let good = List::of_mode(0o640).to_bytes();
        assert!(List::parse(&good).is_some());
        assert_eq!(List::parse(&[]), None);
        assert_eq!(List::parse(&HEADER), None, "nobody is spoken of");
        assert_eq!(List::parse(&good[..good.len() - 1]), None, "cut");
        assert_eq!(List::parse(&good[..good.len() - ENTRY_BYTES]), None, "no others");
        assert_eq!(List::parse(&[&good[..], &good[4..]].concat()), None, "twice");
        for (position, value) in [(0, 3), (4, 0x40), (6, 8)] {
            let mut bad = good.clone();
            bad[position] = value;
            assert_eq!(List::parse(&bad), None, "{position}");
        }
    }

    /// What the kernel grants to somebody who is not the owner: `None` for a user without an entry and group.
    fn granted(list: &List, user: u32, groups: &[u32], group_of_file: u32, wanted: u16) -> bool {
        let of = |tag| list.0.iter().filter(move |right| right.tag == tag);
        let mask = of(MASK).next().map_or(7, |right| right.bits);
        if let Some(right) = of(USER).find(|right| right.id == user) {
            return right.bits & mask & wanted == wanted;
        }
        let owning = of(GROUP).filter(|_| groups.contains(&group_of_file));
        let matching: Vec<_> = owning.chain(of(NAMED_GROUP).filter(|right| groups.contains(&right.id))).collect();
        if matching.is_empty() {
            return of(OTHER).all(|right| right.bits & wanted == wanted);
        }
        matching.iter().any(|right| right.bits & mask & wanted == wanted)
    }

    /// Every list with two bits per entry, every member of every set of groups.
    #[test]
    fn another_group_grants_nobody_what_the_old_one_did_not() {
        let bits = [0, 4, 6];
        let mut seen = 0;
        for choice in 0..3_usize.pow(6) {
            let pick = |place: u32| bits[choice / 3_usize.pow(place) % 3];
            let old = list(&[
                (OWNER, 6, NOBODY),
                (USER, pick(0), 10),
                (GROUP, pick(1), NOBODY),
                (NAMED_GROUP, pick(2), 2),
                (NAMED_GROUP, pick(3), 3),
                (MASK, pick(4), NOBODY),
                (OTHER, pick(5), NOBODY),
            ]);
            // The second new group is one that has an entry of its own.
            for new_group in [4, 2] {
                let new = old.clone().for_another_group();
                for user in [10, 11] {
                    for set in 0..16_u32 {
                        let groups: Vec<_> = (1..=4).filter(|group| set >> (group - 1) & 1 == 1).collect();
                        for wanted in [4, 2, 6] {
                            let now = granted(&new, user, &groups, new_group, wanted);
                            assert!(
                                !now || granted(&old, user, &groups, 1, wanted),
                                "{user} {groups:?} {old:?} {new:?}"
                            );
                            seen += u32::from(now);
                        }
                    }
                }
            }
        }
        assert!(seen > 1000, "it must not pass by granting nothing");
    }
}
