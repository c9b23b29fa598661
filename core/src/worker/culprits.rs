//! Clients whose rows ended a model's runner. For a while their rows of that model run alone, in a runner apart from that
//! of the others, and one batch at a time: else each crash takes the runner that their neighbours share. Meanwhile few of
//! their tasks are held here: else the broker sees a worker full of rows that wait, and the neighbours get no room.
//!
//! Owns who is remembered, for how long, and how many tasks are held. Never: which rows run; that is `dispatch`.

use std::{collections::BTreeMap, time::Duration};

use proto_msgs::{AttemptId, ClientId, Digest, ErrorCode, Outcome};

use super::{
    Worker,
    attempts::{Attempt, State},
};
use crate::{Census, MonoTime};

/// A culprit is remembered for as long as its crashes have gone on, within these bounds. The shorter one: who crashes
/// once a minute costs its neighbours one start of a runner a minute, which they hardly notice.
const REMEMBERED_MIN: Duration = Duration::from_secs(10);
const REMEMBERED_MAX: Duration = Duration::from_secs(600);

/// Most culprits remembered; beyond that the one that would be forgotten first is. More clients than that hardly use one
/// worker at a time.
const CULPRITS_MAX: usize = 256;

/// After a crash, culprits' rows of the model rest for this multiple of the time that the crash took, so that crashes
/// have at most a quarter of one slot, and no longer than a second, so that each culprit soon has its turn.
const REST_PARTS: u32 = 3;
const REST_MAX: Duration = Duration::from_secs(1);

/// Most tasks of a culprit held at once: one runs, others are next. The broker keeps the rest and offers them again a
/// second later.
const HELD_MAX: usize = 4;

/// Why a culprit's task is not held.
pub(super) const TURNED_AWAY: &str = "rows of this client crash the model: few of its tasks are taken at a time";

/// A client whose rows of a model ended a runner.
#[derive(Debug)]
struct Culprit {
    /// When the first of its crashes came, without a pause in which it was forgotten.
    since: MonoTime,
    until: MonoTime,
    rests_until: MonoTime,
}

/// All culprits of a worker, by model.
#[derive(Debug, Default)]
pub(super) struct Culprits {
    table: BTreeMap<(Digest, ClientId), Culprit>,
}

impl Culprits {
    /// Rows of the client, with no others beside them, ended the model's runner after this time.
    pub(super) fn crashed(&mut self, now: MonoTime, model: Digest, client: ClientId, took: Duration) {
        let key = (model, client);
        self.table.retain(|_, culprit| now < culprit.until);
        let since = self.table.get(&key).map_or(now, |culprit| culprit.since);
        if self.table.len() >= CULPRITS_MAX && !self.table.contains_key(&key) {
            let first = self.table.iter().min_by_key(|(_, culprit)| culprit.until).map(|(key, _)| *key);
            first.map(|first| self.table.remove(&first));
        }
        let until = now + now.since(since).clamp(REMEMBERED_MIN, REMEMBERED_MAX);
        let rests_until = now + took.saturating_mul(REST_PARTS).min(REST_MAX);
        self.table.insert(key, Culprit { since, until, rests_until });
    }

    /// Whether the client's rows of the model must run apart.
    pub(super) fn has(&self, now: MonoTime, model: Digest, client: ClientId) -> bool {
        self.table.get(&(model, client)).is_some_and(|culprit| now < culprit.until)
    }

    /// Whether culprits' rows of the model rest after a crash.
    pub(super) fn rest(&self, now: MonoTime, model: Digest) -> bool {
        let all = (model, ClientId::from_bytes([0; 16]))..=(model, ClientId::from_bytes([u8::MAX; 16]));
        self.table.range(all).any(|(_, culprit)| now < culprit.rests_until)
    }

    /// When the first rest ends.
    pub(super) fn next_rested(&self, now: MonoTime) -> Option<MonoTime> {
        self.table.values().map(|culprit| culprit.rests_until).filter(|at| now < *at).min()
    }

    pub(super) fn census(&self, census: &mut Census<'_>) {
        let Self { table } = self;
        census.lasting("culprits", table.len(), CULPRITS_MAX);
    }
}

impl Worker {
    /// Whether a task is one too many: its client is a culprit, and others of its tasks are here.
    pub(super) fn is_one_too_many(&self, now: MonoTime, new: &Attempt) -> bool {
        let (id, client) = (new.id(), new.ticket.client);
        let mut culprit_in = new.work.models.iter().filter(|model| self.culprits.has(now, **model, client));
        culprit_in.any(|model| self.tasks_of(*model, client).filter(|other| other.id() != id).count() >= HELD_MAX)
    }

    /// Refuses an attempt that is one too many.
    pub(super) fn turn_away(&mut self, now: MonoTime, id: AttemptId) {
        if let Some(link) = self.attempts.get(id).and_then(|attempt| attempt.link) {
            self.refuse(link, id, ErrorCode::Busy, TURNED_AWAY);
        }
        self.give_up(now, id, Outcome::failed(ErrorCode::Busy, TURNED_AWAY));
    }

    /// Turns away those of a new culprit's tasks that are too many. Detached ones stay, since nobody else has their
    /// inputs, and so do those that have begun.
    pub(super) fn turn_away_surplus(&mut self, now: MonoTime, model: Digest, client: ClientId) {
        let may_go =
            |attempt: &&Attempt| !attempt.ticket.detached && matches!(attempt.state, State::Receiving | State::Ready);
        let held = self.tasks_of(model, client).filter(may_go).map(Attempt::id);
        let surplus: Vec<AttemptId> = held.skip(HELD_MAX).collect();
        for id in surplus {
            self.turn_away(now, id);
        }
    }

    /// The client's active attempts with this model.
    fn tasks_of(&self, model: Digest, client: ClientId) -> impl Iterator<Item = &Attempt> {
        let is_its = move |attempt: &&Attempt| attempt.ticket.client == client && attempt.is_active();
        self.attempts.iter().filter(is_its).filter(move |attempt| attempt.work.models.contains(&model))
    }
}

/// Whether the runner has ended if rows failed with this code, as far as the code tells: one that refuses rows for lack
/// of memory lives on.
pub(super) fn ends_runner(code: ErrorCode) -> bool {
    use ErrorCode::{ResultTooLarge, RunCrashed, RunOutOfMemory, RunProtocol, RunTimeout, WorkerOutgrown};
    matches!(code, RunCrashed | RunTimeout | RunOutOfMemory | WorkerOutgrown | RunProtocol | ResultTooLarge)
}

#[cfg(test)]
mod tests {
    use super::*;

    const MODEL: Digest = Digest::from_bytes([1; 32]);

    fn client(number: u16) -> ClientId {
        let mut bytes = [0; 16];
        bytes[..2].copy_from_slice(&number.to_be_bytes());
        ClientId::from_bytes(bytes)
    }

    fn at(ms: u64) -> MonoTime {
        MonoTime::from_micros(ms * 1000)
    }

    #[test]
    fn a_culprit_is_remembered_for_a_while_and_for_longer_if_it_goes_on() {
        let mut culprits = Culprits::default();
        culprits.crashed(at(0), MODEL, client(1), Duration::ZERO);
        assert!(culprits.has(at(9_999), MODEL, client(1)) && !culprits.has(at(10_000), MODEL, client(1)));
        assert!(!culprits.has(at(1), MODEL, client(2)) && !culprits.has(at(1), Digest::from_bytes([2; 32]), client(1)));

        for second in 1..=60 {
            culprits.crashed(at(second * 1000), MODEL, client(1), Duration::ZERO);
        }
        assert!(culprits.has(at(119_999), MODEL, client(1)) && !culprits.has(at(120_000), MODEL, client(1)));

        for second in 61..=7200 {
            culprits.crashed(at(second * 1000), MODEL, client(1), Duration::ZERO);
        }
        assert!(!culprits.has(at(7_800_000), MODEL, client(1)), "ten minutes later all is forgiven");
        culprits.crashed(at(7_800_000), MODEL, client(1), Duration::ZERO);
        assert!(!culprits.has(at(7_810_000), MODEL, client(1)), "and begins anew");
    }

    #[test]
    fn crashes_have_a_quarter_of_a_slot_and_rest_no_longer_than_a_second() {
        let mut culprits = Culprits::default();
        culprits.crashed(at(100), MODEL, client(1), Duration::from_millis(50));
        assert!(culprits.rest(at(249), MODEL) && !culprits.rest(at(250), MODEL));
        assert!(!culprits.rest(at(101), Digest::from_bytes([2; 32])));
        assert_eq!(culprits.next_rested(at(101)), Some(at(250)));
        culprits.crashed(at(300), MODEL, client(2), Duration::from_secs(300));
        assert!(culprits.rest(at(1299), MODEL) && !culprits.rest(at(1300), MODEL));
        assert_eq!(culprits.next_rested(at(1300)), None);
    }

    #[test]
    fn many_culprits_fill_no_memory_and_the_latest_are_remembered() {
        let mut culprits = Culprits::default();
        (0..1000).for_each(|number| culprits.crashed(at(number.into()), MODEL, client(number), Duration::ZERO));
        assert_eq!(culprits.table.len(), CULPRITS_MAX);
        assert!(culprits.has(at(1000), MODEL, client(999)) && !culprits.has(at(1000), MODEL, client(0)));
    }
}
