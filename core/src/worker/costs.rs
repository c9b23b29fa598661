//! The table of model costs: one [`Cost`] for each model, limits, device and form of items.
//!
//! Owns the table, its bounds, and which entry the broker hears of. Never: what is measured, or what follows from it.

use std::{collections::BTreeMap, sync::Arc};

use proto_msgs::{Digest, ModelCost, limits::COSTS_MAX};

use super::{
    curve::Cost,
    packer::{Form, Limits},
};
use crate::Census;

/// Most entries kept: the entry not used for longest is dropped.
const KEPT_MAX: usize = 256;

/// Most entries of one model. A model with items of ever new lengths loses its own entries and nobody else's.
const KEPT_OF_MODEL_MAX: usize = 16;

/// The share of a model's latest batches that one entry has: all its batches count [`RECENT_STEP`] each, and a batch
/// loses this part (1/16) with each batch after it.
const RECENT_PART: u32 = 16;
const RECENT_STEP: u32 = 64;

/// What a [`Cost`] belongs to. A model may be right for many rows of one length and wrong for many of another.
#[derive(Clone, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub(super) struct CostKey {
    pub(super) model: Digest,
    /// The GPU's number, or −1 for the CPU: two devices of one worker may differ.
    pub(super) device: i16,
    pub(super) limits: Limits,
    /// The forms of one item's inputs, before the first stage.
    pub(super) forms: Arc<[Form]>,
}

/// The costs of all models at this worker.
#[derive(Debug)]
pub(super) struct Costs {
    table: BTreeMap<CostKey, Cost>,
    /// Of each model, the entry that the broker hears of. It stays until another has run twice as often of late:
    /// figures that jump from one device to the other with each heartbeat would fit neither.
    told: BTreeMap<Digest, CostKey>,
    /// What is known of a model that has not run.
    unknown: Cost,
    rows_max: u16,
}

impl Costs {
    pub(super) fn new(rows_max: u16) -> Self {
        Self { table: BTreeMap::new(), told: BTreeMap::new(), unknown: Cost::new(rows_max), rows_max }
    }

    pub(super) fn census(&self, census: &mut Census<'_>) {
        let Self { table, told, unknown: _, rows_max: _ } = self;
        census.lasting("costs", table.len(), KEPT_MAX);
        census.lasting("models told", told.len(), table.len());
    }

    pub(super) fn get(&self, key: &CostKey) -> &Cost {
        self.table.get(key).unwrap_or(&self.unknown)
    }

    pub(super) fn get_mut(&mut self, key: &CostKey) -> Option<&mut Cost> {
        self.table.get_mut(key)
    }

    /// The costs for a batch that starts now. `batch` is the batch's number.
    pub(super) fn touch(&mut self, key: &CostKey, batch: u64) -> &mut Cost {
        if !self.table.contains_key(key) {
            self.make_room(key.model);
            self.table.insert(key.clone(), Cost::new(self.rows_max));
        }
        for (_, cost) in self.table.iter_mut().filter(|(other, _)| other.model == key.model) {
            cost.recent -= cost.recent / RECENT_PART;
        }
        let told = self.told.entry(key.model).or_insert_with(|| key.clone());
        let told_recent = self.table.get(told).map_or(0, |cost| cost.recent);
        let cost = self.table.get_mut(key).expect("it was just made");
        (cost.touched, cost.recent) = (batch, cost.recent + RECENT_STEP);
        if cost.recent > told_recent.saturating_mul(2) {
            told.clone_from(key);
        }
        cost
    }

    /// Drops the stalest entry of the model if it has many, or the stalest of all.
    fn make_room(&mut self, model: Digest) {
        let stalest = |of: &dyn Fn(&CostKey) -> bool| {
            let entries = self.table.iter().filter(|(key, _)| of(key));
            entries.min_by_key(|(_, cost)| cost.touched).map(|(key, _)| key.clone())
        };
        let is_its = |key: &CostKey| key.model == model;
        let surplus = if self.table.keys().filter(|key| is_its(key)).count() >= KEPT_OF_MODEL_MAX {
            stalest(&is_its)
        } else if self.table.len() >= KEPT_MAX {
            stalest(&|_| true)
        } else {
            None
        };
        if let Some(surplus) = surplus {
            self.table.remove(&surplus);
            self.told.retain(|_, told| *told != surplus);
        }
    }

    /// The costs for a heartbeat: one entry of each model, the most recently run models first. If the entry that the
    /// broker heard of was dropped, it hears of the newest. The reasons why batches started are those of all entries.
    pub(super) fn said(&self) -> Vec<ModelCost> {
        let mut models: BTreeMap<Digest, (u64, [u32; 4])> = BTreeMap::new();
        for (key, cost) in &self.table {
            let (touched, dispatched) = models.entry(key.model).or_default();
            *touched = cost.touched.max(*touched);
            dispatched.iter_mut().zip(cost.dispatched).for_each(|(sum, count)| *sum = sum.saturating_add(count));
        }
        let mut models: Vec<_> = models.into_iter().collect();
        models.sort_by_key(|(_, (touched, _))| std::cmp::Reverse(*touched));
        let said = |(model, (_, dispatched)): (Digest, (u64, [u32; 4]))| {
            let told = self.told.get(&model).and_then(|told| self.table.get(told));
            let newest = || {
                let entries = self.table.iter().filter(|(key, _)| key.model == model);
                entries.max_by_key(|(_, cost)| cost.touched).map(|(_, cost)| cost)
            };
            let cost = told.or_else(newest)?;
            Some(ModelCost { dispatched, ..cost.said(model) })
        };
        models.into_iter().filter_map(said).take(COSTS_MAX).collect()
    }
}

#[cfg(test)]
mod tests {
    use proto_msgs::{DType, Dispatch, InputDecl};

    use super::*;

    fn key(model: u8, device: i16, length: u64) -> CostKey {
        let (dtype, size_bytes) = (Some(DType::F32), 4 * length);
        let input = InputDecl {
            name: None,
            dtype,
            shape: Some(vec![1, length]),
            digest: Digest::from_bytes([0; 32]),
            size_bytes,
        };
        let limits = Limits::from(&mesh_samples::ticket_body(1, 1, 1));
        CostKey { model: Digest::from_bytes([model; 32]), device, limits, forms: [Form::of(&input, 1)].into() }
    }

    /// A batch of one row on this device.
    fn run(costs: &mut Costs, device: i16, batch: u64, us: u64) {
        let cost = costs.touch(&key(1, device, 4), batch);
        cost.dispatched(Dispatch::Idle);
        cost.learn(1, us);
    }

    #[test]
    fn the_broker_hears_of_one_device_until_another_has_most_of_the_work() {
        let mut costs = Costs::new(64);
        let told = |costs: &Costs| costs.said()[0].curve[0].1;
        for batch in 0..100 {
            run(&mut costs, [0, -1][batch as usize % 2], batch, [100, 9000][batch as usize % 2]);
            assert_eq!(told(&costs), 100, "after batch {batch}");
        }
        assert_eq!(costs.said()[0].dispatched[Dispatch::Idle as usize], 100);
        (100..140).for_each(|batch| run(&mut costs, -1, batch, 9000));
        assert_eq!(told(&costs), 9000);
    }

    #[test]
    fn items_of_ever_new_lengths_push_out_nobody_elses_costs() {
        let mut costs = Costs::new(64);
        costs.touch(&key(2, -1, 4), 0).learn(1, 100);
        for length in 1..1000 {
            costs.touch(&key(1, -1, length), length).learn(1, 100);
        }
        assert_eq!(costs.table.len(), 1 + KEPT_OF_MODEL_MAX);
        assert!(costs.table.contains_key(&key(2, -1, 4)) && costs.table.contains_key(&key(1, -1, 999)));
        assert_eq!((costs.said().len(), costs.told.len()), (2, 2));
        for model in 3..=255 {
            (0..2).for_each(|device| costs.touch(&key(model, device, 4), 1000).learn(1, 100));
        }
        assert_eq!(costs.table.len(), KEPT_MAX);
        assert!(costs.told.values().all(|told| costs.table.contains_key(told)), "what is told is there");
    }

    #[test]
    fn the_broker_hears_of_the_newest_entry_once_the_one_it_heard_of_is_dropped() {
        let mut costs = Costs::new(64);
        costs.touch(&key(1, 0, 4), 0).learn(1, 100);
        costs.touch(&key(1, -1, 4), 2).learn(1, 9000);
        costs.touch(&key(1, 1, 4), 1).learn(1, 500);
        let others = (2..).flat_map(|model| (1..=KEPT_OF_MODEL_MAX as u64).map(move |length| key(model, -1, length)));
        for other in others.take(KEPT_MAX - 2) {
            costs.touch(&other, 1000).learn(1, 100);
        }
        assert!(!costs.table.contains_key(&key(1, 0, 4)), "the stalest of all went");
        let mut newest_first = costs.said();
        newest_first.retain(|cost| cost.model == Digest::from_bytes([1; 32]));
        assert_eq!(newest_first[0].curve, [(1, 9000)]);
    }
}
