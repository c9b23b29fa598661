//! Models that need more memory than some workers give: what one task has learned at a small worker, the client's next
//! ones need not learn again.
//!
//! Owns that. Each client learns for itself, since it is the one that says what it learned. Never excludes a worker:
//! inputs differ, so a small one is taken if there is no larger one, and a run that ends well there corrects the lesson.

use std::{collections::BTreeMap, time::Duration};

use proto_msgs::{ClientId, Digest};

use crate::{Census, MonoTime};

/// For so long it is believed. Then one task tries a small worker again, in case inputs have become smaller.
const BELIEVED: Duration = Duration::from_secs(600);

/// Limit of lessons. Beyond it, each task learns by itself.
const LESSONS_MAX: usize = 1024;

/// For each client and model: memory that was not enough for a run, and until when that counts.
#[derive(Debug, Default)]
pub(super) struct Outgrown {
    lessons: BTreeMap<(ClientId, Digest), (u64, MonoTime)>,
}

impl Outgrown {
    /// A task has outgrown this memory, and was done at a larger worker.
    pub(super) fn learn(&mut self, now: MonoTime, client: ClientId, model: Digest, bytes: u64) {
        let key = (client, model);
        let bytes = bytes.max(self.bytes(now, client, model));
        if self.lessons.len() >= LESSONS_MAX {
            self.lessons.retain(|known, (_, until)| *known != key && now < *until);
        }
        if self.lessons.len() < LESSONS_MAX {
            self.lessons.insert(key, (bytes, now + BELIEVED));
        }
    }

    /// A task that was given only this memory is done.
    pub(super) fn correct(&mut self, client: ClientId, model: Digest, bytes: u64) {
        if self.lessons.get(&(client, model)).is_some_and(|(outgrown_bytes, _)| bytes <= *outgrown_bytes) {
            self.lessons.remove(&(client, model));
        }
    }

    /// Memory that is not enough for a run of the client's; 0 if none is known.
    pub(super) fn bytes(&self, now: MonoTime, client: ClientId, model: Digest) -> u64 {
        self.lessons.get(&(client, model)).filter(|(_, until)| now < *until).map_or(0, |(bytes, _)| *bytes)
    }

    pub(super) fn census(&self, census: &mut Census<'_>) {
        let Self { lessons } = self;
        census.lasting("models that outgrew workers", lessons.len(), LESSONS_MAX);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lesson_is_believed_for_a_while_and_many_fill_no_memory() {
        let mut outgrown = Outgrown::default();
        let client = ClientId::from_bytes([1; 16]);
        let model = |number: u16| {
            let mut bytes = [0; 32];
            bytes[..2].copy_from_slice(&number.to_be_bytes());
            Digest::from_bytes(bytes)
        };
        let at = |s: u64| MonoTime::from_micros(s * 1_000_000);
        (0..2000).for_each(|number| outgrown.learn(at(0), client, model(number), 7));
        assert_eq!(outgrown.lessons.len(), LESSONS_MAX);
        assert_eq!([599, 600].map(|s| outgrown.bytes(at(s), client, model(0))), [7, 0]);
        assert_eq!(outgrown.bytes(at(1), ClientId::from_bytes([2; 16]), model(0)), 0, "nobody else's word counts");
        outgrown.learn(at(1), client, model(1), 8);
        outgrown.learn(at(1), client, model(1), 5);
        assert_eq!(outgrown.bytes(at(2), client, model(1)), 8, "known ones are kept up to date");
        outgrown.correct(client, model(1), 9);
        assert_eq!(outgrown.bytes(at(2), client, model(1)), 8, "that much was never in doubt");
        outgrown.correct(client, model(1), 6);
        assert_eq!(outgrown.bytes(at(2), client, model(1)), 0);
        outgrown.learn(at(1), client, model(1998), 9);
        outgrown.learn(at(700), client, model(1999), 9);
        assert_eq!((outgrown.bytes(at(700), client, model(1999)), outgrown.lessons.len()), (9, 1));
    }
}
