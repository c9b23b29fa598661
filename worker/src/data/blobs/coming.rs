//! Models under way: if two clients would send the same one, the second attempt waits for the first one's copy, unless
//! that one is slow.

use std::{
    collections::HashMap,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use parking_lot::{Mutex, MutexGuard};
use proto_msgs::{ClientId, Digest};
use tokio::sync::watch;

/// Time within which a copy under way must be complete, or the next one begins; its speed is judged after half of it.
/// Doubled with each copy: on a line that the clients share, each new copy slows the others.
const SOON: Duration = Duration::from_secs(4);

/// How often the time is doubled: it is eight minutes then, and any copy may be stuck for good.
const DOUBLED_MAX: usize = 7;

/// Longest time that an attempt waits for another reason than speed: for its own client's copy, or because there is no
/// room for another one. Ten minutes carry a large model over most lines. Beyond that, another worker may do better.
pub(crate) const OTHERS_WAIT: Duration = Duration::from_secs(600);

/// Longest time that an own copy is guessed to take before any transfer was measured. A copy under way that needs
/// longer is slow, however large the model is.
const GUESS_MAX: Duration = Duration::from_secs(60);

/// The models that attempts receive at present. Clones share the list.
#[derive(Clone, Debug, Default)]
pub(crate) struct Coming {
    copies: Arc<Mutex<HashMap<Digest, Vec<Arc<Copy>>>>>,
}

/// A model's bytes on their way from one client.
#[derive(Debug)]
struct Copy {
    client: ClientId,
    size_bytes: u64,
    begun: Instant,
    received_bytes: AtomicU64,
    /// Closed when the transfer has ended, good or bad.
    ended: watch::Receiver<()>,
}

/// What an attempt knows that needs a model.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Wish {
    pub(crate) model: Digest,
    pub(crate) size_bytes: u64,
    pub(crate) client: ClientId,
    /// Time that its own copy would take; zero if that is not known.
    pub(crate) own: Duration,
    /// Time at which it began to wait.
    pub(crate) since: Instant,
    /// Whether it waits for others however slow they are: there is no room for a second copy. The caller bounds that
    /// wait by [`OTHERS_WAIT`].
    pub(crate) is_patient: bool,
}

/// The attempt that receives a model: the one that asks, or another.
#[derive(Debug)]
pub(crate) enum Claim {
    /// The attempt that asked.
    Mine(Arriving),
    /// Another attempt; the channel closes when its transfer has ended, good or bad. Worth another look before that: a
    /// copy may turn out slow.
    Theirs(watch::Receiver<()>),
}

/// The right to receive a model. Dropped when the model has arrived or will not come.
#[derive(Debug)]
pub(crate) struct Arriving {
    coming: Coming,
    pub(crate) model: Digest,
    /// Whether another client's copy was under way already.
    pub(crate) is_second: bool,
    copy: Arc<Copy>,
    /// Closes the channel of those that wait.
    _done: watch::Sender<()>,
}

impl Coming {
    /// Claims a model for the caller, unless another attempt receives it and is worth the wait.
    pub(crate) fn claim(&self, now: Instant, wish: Wish) -> Claim {
        let mut all = self.copies();
        let copies = all.entry(wish.model).or_default();
        let doubled = copies.len().saturating_sub(1).min(DOUBLED_MAX);
        let soon = SOON * (1 << doubled);
        let judged_after = soon / 2;
        // On the same line as the fastest copy, the own one would take as long as that takes as a whole.
        let guess = || copies.iter().filter_map(|copy| copy.takes(now, judged_after)).min().unwrap_or_default();
        let own = if wish.own.is_zero() { guess().min(GUESS_MAX) } else { wish.own };
        let (patience, waited) = (soon.max(own), now.duration_since(wish.since));
        let has_waited_long = waited > patience.saturating_mul(2);
        let ends_in = |copy: &Copy| copy.ends_in(now, judged_after);
        let is_worth_it = |copy: &&Arc<Copy>| {
            // A client's second copy would take the same line as its first.
            let is_own = copy.client == wish.client && waited < OTHERS_WAIT;
            wish.is_patient || is_own || !has_waited_long && ends_in(copy) <= patience
        };
        if let Some(theirs) = copies.iter().filter(is_worth_it).min_by_key(|copy| ends_in(copy)) {
            return Claim::Theirs(theirs.ended.clone());
        }
        let (done, ended) = watch::channel(());
        let Wish { model, size_bytes, client, .. } = wish;
        let copy = Arc::new(Copy { client, size_bytes, begun: now, received_bytes: AtomicU64::new(0), ended });
        let is_second = !copies.is_empty();
        copies.push(copy.clone());
        Claim::Mine(Arriving { coming: self.clone(), model, is_second, copy, _done: done })
    }

    fn copies(&self) -> MutexGuard<'_, HashMap<Digest, Vec<Arc<Copy>>>> {
        self.copies.lock()
    }
}

impl Copy {
    /// Predicted time to the end of the transfer, at its speed so far; none while it is younger than `judged_after`.
    fn ends_in(&self, now: Instant, judged_after: Duration) -> Duration {
        let Some(takes) = self.takes(now, judged_after) else { return Duration::ZERO };
        takes.saturating_sub(now.duration_since(self.begun))
    }

    /// Predicted time of the whole transfer, at its speed so far; `None` while it is younger than `judged_after`.
    fn takes(&self, now: Instant, judged_after: Duration) -> Option<Duration> {
        let took = now.duration_since(self.begun);
        let received_bytes = self.received_bytes.load(Ordering::Relaxed);
        let takes = took.as_secs_f64() * self.size_bytes as f64 / received_bytes as f64;
        (took >= judged_after).then(|| Duration::try_from_secs_f64(takes).unwrap_or(Duration::MAX))
    }
}

impl Arriving {
    /// Notes how much has arrived.
    pub(crate) fn note(&self, received_bytes: u64) {
        self.copy.received_bytes.store(received_bytes, Ordering::Relaxed);
    }
}

impl Drop for Arriving {
    fn drop(&mut self) {
        let mut all = self.coming.copies();
        if let Some(copies) = all.get_mut(&self.model) {
            copies.retain(|copy| !Arc::ptr_eq(copy, &self.copy));
            if copies.is_empty() {
                all.remove(&self.model);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    /// A model of 20 MiB, wanted by the client of this number.
    fn wish(client: u8, since: Instant) -> Wish {
        let (model, client) = (Digest::of(b"model"), ClientId::from_bytes([client; 16]));
        Wish { model, size_bytes: 20 * MIB, client, own: Duration::ZERO, since, is_patient: false }
    }

    fn mine(claim: Claim) -> Arriving {
        match claim {
            Claim::Mine(mine) => mine,
            Claim::Theirs(_) => panic!("another copy is waited for"),
        }
    }

    fn is_theirs(claim: &Claim) -> bool {
        matches!(claim, Claim::Theirs(_))
    }

    #[tokio::test]
    async fn the_second_waits_until_the_first_has_come_to_an_end() {
        let (coming, now) = (Coming::default(), Instant::now());
        let first = mine(coming.claim(now, wish(1, now)));
        let Claim::Theirs(mut theirs) = coming.claim(now, wish(2, now)) else { panic!("somebody brings it") };
        let another = Wish { model: Digest::of(b"another"), ..wish(2, now) };
        assert!(!mine(coming.claim(now, another)).is_second);
        drop(first);
        assert!(theirs.changed().await.is_err(), "over");
        assert!(!mine(coming.claim(now, wish(2, now))).is_second, "the next may try");
        assert!(coming.copies().is_empty());
    }

    #[test]
    fn nobody_waits_for_a_slow_copy_but_its_own_client() {
        let (coming, begun) = (Coming::default(), Instant::now());
        let slow = mine(coming.claim(begun, wish(1, begun)));
        slow.note(MIB / 2);
        let now = begun + Duration::from_secs(1);
        assert!(is_theirs(&coming.claim(now, wish(2, begun))), "its speed is not known yet");
        let now = begun + Duration::from_secs(3);
        assert!(is_theirs(&coming.claim(now, wish(1, begun))));
        assert!(is_theirs(&coming.claim(now, Wish { own: Duration::from_secs(120), ..wish(2, begun) })));
        assert!(is_theirs(&coming.claim(now, Wish { is_patient: true, ..wish(2, begun) })));
        let second = mine(coming.claim(now, wish(2, begun)));
        assert!(second.is_second && is_theirs(&coming.claim(now, wish(3, now))), "the third waits for the second");
    }

    #[test]
    fn a_copy_that_is_here_soon_is_waited_for_but_not_for_ever() {
        let (coming, begun) = (Coming::default(), Instant::now());
        let fast = mine(coming.claim(begun, wish(1, begun)));
        fast.note(15 * MIB);
        let now = begun + Duration::from_secs(12);
        assert!(is_theirs(&coming.claim(now, wish(2, now))));
        fast.note(20 * MIB - 1);
        let now = begun + Duration::from_secs(60);
        assert!(is_theirs(&coming.claim(now, wish(2, now))));
        let now = begun + 2 * GUESS_MAX + Duration::from_secs(1);
        assert!(mine(coming.claim(now, wish(2, begun))).is_second, "the last byte does not come");
    }

    #[test]
    fn a_large_model_on_a_healthy_line_is_sent_once_though_no_speed_is_known() {
        let (coming, begun) = (Coming::default(), Instant::now());
        let size_bytes = 1024 * MIB;
        let large = |client| Wish { size_bytes, ..wish(client, begun) };
        let first = mine(coming.claim(begun, large(1)));
        for second in 1..40 {
            first.note(second * 25 * MIB);
            let now = begun + Duration::from_secs(second);
            assert!(is_theirs(&coming.claim(now, large(2))), "after {second} s");
        }
    }

    #[test]
    fn nobody_waits_for_ever_for_its_own_client() {
        let (coming, begun) = (Coming::default(), Instant::now());
        let stuck = mine(coming.claim(begun, wish(1, begun)));
        stuck.note(MIB);
        assert!(is_theirs(&coming.claim(begun + OTHERS_WAIT / 2, wish(1, begun))));
        assert!(mine(coming.claim(begun + OTHERS_WAIT, wish(1, begun))).is_second);
    }

    #[test]
    fn on_a_shared_line_there_are_few_copies() {
        let (coming, begun) = (Coming::default(), Instant::now());
        let mut copies = Vec::new();
        for second in 0..100 {
            let now = begun + Duration::from_secs(second);
            let next = coming.claim(now, wish(second as u8, now));
            copies.extend(match next {
                Claim::Mine(mine) => Some(mine),
                Claim::Theirs(_) => None,
            });
            let each = MIB / 5 / copies.len() as u64;
            copies.iter().for_each(|copy| copy.note(copy.copy.received_bytes.load(Ordering::Relaxed) + each));
        }
        assert!((2..=6).contains(&copies.len()), "{}", copies.len());
    }
}
