//! Comparisons of items that the model answers all alike: they take many calls, and others need the slot meanwhile. What
//! one has found out before it is cut short is kept, and the next one goes on from there.
//!
//! ```text
//!   one call of the items ──► made-up items, one single run each ──► calls of made-up items beside others ──► the verdict
//!        └── each arrow is a call, after which the comparison may be cut short ──┘
//! ```
//!
//! Owns the steps and what is kept of them, within bounds. Never decides when a comparison begins or ends.

use std::{collections::VecDeque, time::Duration};

use mesh_core::worker::Equality;
use parking_lot::Mutex;
use proto_msgs::{ErrorCode, Failure};

use super::{
    Calls,
    made_up::{CHANGES, make},
    micros,
    sample::{Known, Sample, bytes_of, given, tell_apart},
};
use crate::{
    data::payload::Payload,
    runners::{oip::Tensor, pool::Key},
};

/// Comparisons that are kept; at the limit the oldest goes, which only loses some calls.
const KEPT_MAX: usize = 16;

/// Most bytes of a comparison's items that are kept: a dozen pictures and their answers.
const KEPT_BYTES_MAX: u64 = 16 << 20;

/// Most bytes of all that is kept.
const ALL_BYTES_MAX: u64 = 32 << 20;

/// The comparisons that were cut short, the oldest first, with their sizes in bytes.
#[derive(Debug, Default)]
pub(crate) struct Unfinished {
    kept: Mutex<VecDeque<(Key, Begun, u64)>>,
}

impl Unfinished {
    /// What is known of these items, if it was begun in such a runner with items of these shapes and at most so many. Calls
    /// have `count` rows; one of so many rows took `packed`, if it was made. What calls of another size showed does not
    /// count.
    pub(super) fn go_on(&self, runner: Key, sample: Sample, count: usize, packed: Option<(u32, Duration)>) -> Begun {
        let mut kept = self.kept.lock();
        let is_it = |(of, begun, _): &(Key, Begun, u64)| *of == runner && begun.sample.is_like(&sample);
        let found = kept.iter().position(is_it).and_then(|at| kept.remove(at)).map(|(_, begun, _)| begun);
        let fits = |begun: &Begun| begun.sample.items.len() <= sample.items.len();
        let mut begun = found.filter(fits).unwrap_or_else(|| Begun::new(sample, count));
        // Whoever begins anew at another size has not come on before as much is known again.
        let steps_before = begun.steps();
        if begun.count != count {
            begun = Begun { count, packed: None, compared: 0, ..begun };
        }
        let packed = packed.or(begun.packed);
        let begun = Begun { packed, ..begun };
        Begun { steps_before: steps_before.max(begun.steps()), ..begun }
    }

    /// Keeps what was found out, and says how the comparison stands: without one more step, nobody knows whether the next
    /// one gets any further. Items in files are not kept, for the files would be.
    pub(super) fn keep(&self, runner: Key, mut begun: Begun) -> Equality {
        let size_bytes = begun.size_bytes();
        if size_bytes > KEPT_BYTES_MAX || begun.known().any(|known| known.inputs.iter().flatten().any(Payload::is_file))
        {
            return Equality::Inconclusive;
        }
        let has_come_on = begun.steps() > begun.steps_before;
        begun.detach();
        let mut kept = self.kept.lock();
        kept.retain(|(of, other, _)| *of != runner || !other.sample.is_like(&begun.sample));
        while kept.len() >= KEPT_MAX
            || kept.iter().map(|(.., bytes)| bytes).sum::<u64>() > ALL_BYTES_MAX.saturating_sub(size_bytes)
        {
            kept.pop_front();
        }
        kept.push_back((runner, begun, size_bytes));
        if has_come_on { Equality::Unfinished } else { Equality::Inconclusive }
    }
}

/// How far a comparison has come.
#[derive(Debug)]
pub(super) struct Begun {
    /// Items with the same answer. The others are made from them.
    sample: Sample,
    /// Rows of each call.
    count: usize,
    /// Rows and time of the first packed call, which gave the same; `None` before it.
    packed: Option<(u32, Duration)>,
    /// For each change that was tried, the item that it made; `None` if it suits no input, or the model refused it.
    made: Vec<Option<Known>>,
    /// Calls of made-up items beside others that gave the same as single runs.
    compared: usize,
    /// Steps that were known when it began.
    steps_before: usize,
}

impl Begun {
    pub(super) fn new(sample: Sample, count: usize) -> Self {
        Self { sample, count, packed: None, made: Vec::new(), compared: 0, steps_before: 0 }
    }

    fn steps(&self) -> usize {
        usize::from(self.packed.is_some()) + self.made.len() + self.compared
    }

    /// The rows of its first packed call, and the call's time in microseconds, if it was made.
    pub(super) fn packed(&self) -> Option<(u32, u64)> {
        self.packed.map(|(rows, took)| (rows, micros(took)))
    }

    /// Makes the calls that are left; an error if there is no time for the next one, or one cannot be made. `single` is
    /// the time of a single run.
    pub(super) async fn advance(&mut self, calls: &mut Calls<'_, '_>, single: Duration) -> Result<Equality, Failure> {
        if self.packed.is_none() {
            let rows = self.sample.items.len() as u32;
            // Perhaps nothing is gained by it.
            calls.in_time(single * rows)?;
            let (equal, took) = self.sample.packed(calls).await;
            if equal != Equality::Same {
                return Ok(equal);
            }
            self.packed = took.map(|took| (rows, took));
        }
        self.make_up(calls, single).await?;
        self.compare_made_up(calls).await
    }

    /// Compares calls of these items with single runs, made-up ones among them. Not to be cut short.
    pub(super) async fn beside_made_up(mut self, calls: &mut Calls<'_, '_>) -> Result<Equality, Failure> {
        self.make_up(calls, Duration::ZERO).await?;
        self.compare_made_up(calls).await
    }

    /// Makes up the other items, each from another known one if there are enough.
    async fn make_up(&mut self, calls: &mut Calls<'_, '_>, single: Duration) -> Result<(), Failure> {
        while let Some(change) = CHANGES.get(self.made.len()) {
            calls.in_time(single)?;
            let from = &self.sample.items[self.made.len() % self.sample.items.len()];
            match make(calls, &self.sample.fitted, from, *change).await {
                Ok(made) => self.made.push(made),
                Err(failure) if failure.code == ErrorCode::RunFailed => self.made.push(None),
                Err(failure) => return Err(failure),
            }
        }
        Ok(())
    }

    /// Compares calls with single runs: a made-up item that tells rows apart, beside known ones and beside every other
    /// made-up one.
    async fn compare_made_up(&mut self, calls: &mut Calls<'_, '_>) -> Result<Equality, Failure> {
        let count = self.count;
        let Some(first) = self.sample.items.first() else { return Ok(Equality::Inconclusive) };
        let mut others: Vec<&Known> = self.made.iter().flatten().collect();
        let mut telling = None;
        for (at, other) in others.iter().enumerate() {
            if tell_apart(vec![first.outputs.clone(), other.outputs.clone()]).await {
                telling = Some(at);
                break;
            }
        }
        let Some(telling) = telling.map(|at| others.remove(at)) else { return Ok(Equality::Inconclusive) };
        let beside: Vec<&Known> = std::iter::once(first).chain(others).collect();
        // In a small call the telling one would have few neighbours, and a row that looks at them might not show.
        for some in beside.chunks(count.saturating_sub(1).max(1)).skip(self.compared) {
            calls.in_time(self.packed.map_or(Duration::ZERO, |(_, took)| took))?;
            let together = std::iter::once(telling).chain(some.iter().copied()).chain(self.sample.items.iter().cycle());
            match self.sample.together_as_alone(calls, together.take(count).collect()).await? {
                Equality::Same => self.compared += 1,
                other => return Ok(other),
            }
        }
        Ok(Equality::Same)
    }

    fn known(&mut self) -> impl Iterator<Item = &mut Known> {
        self.sample.items.iter_mut().chain(self.made.iter_mut().flatten())
    }

    fn size_bytes(&mut self) -> u64 {
        let fitted = self.sample.fitted.clone();
        let of = |known: &mut Known| bytes_of(&given(&fitted, &[known]), std::slice::from_ref(&known.outputs));
        self.known().map(of).sum()
    }

    /// Copies what is in the memory of requests and answers: nothing larger stays with it.
    fn detach(&mut self) {
        for known in self.known() {
            known.outputs.iter_mut().for_each(Tensor::detach);
            for piece in known.inputs.iter_mut().flatten() {
                *piece = piece.clone().detached();
            }
        }
    }
}
