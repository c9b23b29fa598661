//! The table of model costs: one [`Cost`] for each model, limits and device.
//!
//! Owns the table and its bound. Never: what is measured, or what follows from it.

use std::collections::BTreeMap;

use proto_msgs::{Digest, ModelCost, limits::COSTS_MAX};

use super::{curve::Cost, packer::Limits};

/// Most entries kept: a model has several if its limits or devices differ. The entry not used for longest is dropped.
const KEPT_MAX: usize = 256;

/// What a [`Cost`] belongs to.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub(super) struct CostKey {
    pub(super) model: Digest,
    pub(super) limits: Limits,
    /// The GPU's number, or −1 for the CPU: two devices of one worker may differ.
    pub(super) device: i16,
}

/// The costs of all models at this worker.
#[derive(Debug)]
pub(super) struct Costs {
    table: BTreeMap<CostKey, Cost>,
    rows_max: u16,
}

impl Costs {
    pub(super) fn new(rows_max: u16) -> Self {
        Self { table: BTreeMap::new(), rows_max }
    }

    pub(super) fn get(&self, key: &CostKey) -> Option<&Cost> {
        self.table.get(key)
    }

    pub(super) fn get_mut(&mut self, key: &CostKey) -> Option<&mut Cost> {
        self.table.get_mut(key)
    }

    /// The costs for a batch that starts now. `batch` is the batch's number.
    pub(super) fn touch(&mut self, key: CostKey, batch: u64) -> &mut Cost {
        if self.table.len() >= KEPT_MAX
            && !self.table.contains_key(&key)
            && let Some(stalest) = self.table.iter().min_by_key(|(_, cost)| cost.touched).map(|(key, _)| *key)
        {
            self.table.remove(&stalest);
        }
        let cost = self.table.entry(key).or_insert_with(|| Cost::new(self.rows_max));
        cost.touched = batch;
        cost
    }

    /// The costs for a heartbeat: of each model its latest entry, the most recently run models first.
    pub(super) fn said(&self) -> Vec<ModelCost> {
        let mut latest: BTreeMap<Digest, &Cost> = BTreeMap::new();
        for (key, cost) in &self.table {
            let newest = latest.entry(key.model).or_insert(cost);
            if newest.touched < cost.touched {
                *newest = cost;
            }
        }
        let mut latest: Vec<(Digest, &Cost)> = latest.into_iter().collect();
        latest.sort_by_key(|(_, cost)| std::cmp::Reverse(cost.touched));
        latest.into_iter().take(COSTS_MAX).map(|(model, cost)| cost.said(model)).collect()
    }
}
