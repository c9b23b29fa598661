//! Average costs of models over all workers: the guess for a worker that has not run a model itself.

use std::collections::BTreeMap;

use proto_msgs::{Digest, Heartbeat, ModelCost};

use crate::Census;

/// Slot time per item of a model that nobody has measured, microseconds. Only shares between clients use it: while all
/// are equally unknown, any value will do.
const ITEM_UNKNOWN_US: u64 = 100_000;

/// Sums over the workers that have measured one model.
#[derive(Clone, Copy, Debug, Default)]
struct Sums {
    /// Workers that name the model, and those that have run it.
    workers: u64,
    ran: u64,
    single_us: u64,
    item_us: u64,
    loaded: u64,
    load_us: u64,
}

/// Sums over the last heartbeats of all workers.
#[derive(Debug, Default)]
pub(crate) struct Fleet {
    models: BTreeMap<Digest, Sums>,
    links: u64,
    link_bytes_per_s: u128,
}

/// Time of one item in a batch of the best size, microseconds.
pub(crate) fn item_us(cost: &ModelCost) -> u64 {
    let best = u32::from(cost.best_batch.max(1));
    cost.batch_us(best) / u64::from(best)
}

impl Fleet {
    /// Counts the models; `measured` is the number of costs in the workers' last heartbeats.
    pub(super) fn census(&self, measured: usize, census: &mut Census<'_>) {
        let Self { models, links: _, link_bytes_per_s: _ } = self;
        census.lasting("models measured", models.len(), measured);
    }

    pub(super) fn add(&mut self, heartbeat: &Heartbeat) {
        for cost in &heartbeat.costs {
            let sums = self.models.entry(cost.model).or_default();
            sums.workers += 1;
            sums.ran += u64::from(cost.batch_us(1) > 0);
            sums.single_us += cost.batch_us(1);
            sums.item_us += item_us(cost);
            sums.loaded += u64::from(cost.load_us > 0);
            sums.load_us += u64::from(cost.load_us);
        }
        self.links += u64::from(heartbeat.link_bytes_per_s > 0);
        self.link_bytes_per_s += u128::from(heartbeat.link_bytes_per_s);
    }

    pub(super) fn remove(&mut self, heartbeat: &Heartbeat) {
        for cost in &heartbeat.costs {
            let Some(sums) = self.models.get_mut(&cost.model) else { continue };
            sums.workers -= 1;
            sums.ran -= u64::from(cost.batch_us(1) > 0);
            sums.single_us -= cost.batch_us(1);
            sums.item_us -= item_us(cost);
            sums.loaded -= u64::from(cost.load_us > 0);
            sums.load_us -= u64::from(cost.load_us);
            if sums.workers == 0 {
                self.models.remove(&cost.model);
            }
        }
        self.links -= u64::from(heartbeat.link_bytes_per_s > 0);
        self.link_bytes_per_s -= u128::from(heartbeat.link_bytes_per_s);
    }

    /// Time that this many items take at an average worker, microseconds; 0 if nobody has run the model.
    pub(crate) fn run_us(&self, model: Digest, items: u32) -> u64 {
        let Some(sums) = self.models.get(&model).filter(|sums| sums.ran > 0) else { return 0 };
        let packed = (sums.item_us / sums.ran).saturating_mul(u64::from(items));
        packed.max(sums.single_us / sums.ran)
    }

    /// Time to load the model at an average worker, microseconds; 0 if nobody has measured it.
    pub(crate) fn load_us(&self, model: Digest) -> u64 {
        self.models.get(&model).and_then(|sums| sums.load_us.checked_div(sums.loaded)).unwrap_or(0)
    }

    /// Bytes per second of an average link; 0 if none is known.
    pub(crate) fn link_bytes_per_s(&self) -> u64 {
        self.link_bytes_per_s
            .checked_div(u128::from(self.links))
            .and_then(|speed| u64::try_from(speed).ok())
            .unwrap_or(0)
    }

    /// Mean slot time of one item through these models, microseconds; a model without a mean counts with a guess.
    pub(crate) fn item_us(&self, models: impl Iterator<Item = Digest>) -> u64 {
        let one = |model: Digest| {
            let sums = self.models.get(&model);
            let mean = sums.and_then(|sums| sums.item_us.checked_div(sums.ran)).unwrap_or(0);
            if mean == 0 { ITEM_UNKNOWN_US } else { mean }
        };
        models.map(one).fold(0, u64::saturating_add)
    }
}
