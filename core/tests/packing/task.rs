//! Models, machines and tasks of these worlds.

use mesh_core::worker::Equality;
use proto_msgs::{ErrorCode, Lane};

/// A time in microseconds.
pub(crate) type Micros = u64;

/// The run times and limits of a model.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Model {
    pub(crate) base_us: Micros,
    pub(crate) each_us: Micros,
    /// The rows that a call of so many rows is charged for.
    pub(crate) charged: fn(u32) -> u32,
    /// How a packed call compares with single runs.
    pub(crate) many: Equality,
    /// Calls with more rows than this fail.
    pub(crate) rows_max: u32,
    /// Calls with more rows than this give wrong rows, and nothing else shows it.
    pub(crate) right_to: u32,
    /// The runner ends during the packed call of a probe.
    pub(crate) dies_comparing: bool,
}

impl Model {
    pub(crate) const fn packs(base_us: Micros, each_us: Micros) -> Self {
        Self {
            base_us,
            each_us,
            charged: |rows| rows,
            many: Equality::Same,
            rows_max: u32::MAX,
            right_to: u32::MAX,
            dies_comparing: false,
        }
    }

    pub(crate) fn batch_us(&self, rows: u32) -> Micros {
        self.base_us + self.each_us * u64::from((self.charged)(rows))
    }

    /// How a packed call with so many rows compares with single runs.
    pub(crate) fn compared(&self, rows: u32) -> Equality {
        if self.many == Equality::Same && rows > self.right_to { Equality::Differs } else { self.many }
    }
}

/// The slots and devices of the worker.
#[derive(Clone, Debug)]
pub(crate) struct Machine {
    pub(crate) slots: [u16; 2],
    pub(crate) device_map: Vec<i16>,
    pub(crate) device_width: u16,
}

/// A task as its client sends it.
#[derive(Clone, Debug)]
pub(crate) struct Task {
    pub(crate) client: u8,
    pub(crate) lane: Lane,
    pub(crate) priority: u8,
    pub(crate) items: u32,
    /// Numbers in each item.
    pub(crate) length: u64,
    /// Numbers of the models that the task passes through.
    pub(crate) way: Vec<usize>,
    /// The task's last row makes the model of this stage fail.
    pub(crate) poison_at: Option<u8>,
    /// How it fails then.
    pub(crate) fails_with: ErrorCode,
    pub(crate) deadline_us: Option<Micros>,
    pub(crate) slo_ms: Option<u32>,
    /// GiB promised of a GPU; each GPU has ten.
    pub(crate) gpu_gib: u64,
    /// The GPU of which it is promised.
    pub(crate) gpu: Option<u8>,
}

impl Task {
    pub(crate) fn new(client: u8, lane: Lane, items: u32) -> Self {
        Self {
            client,
            lane,
            priority: 50,
            items,
            length: 4,
            way: vec![0],
            poison_at: None,
            fails_with: ErrorCode::RunFailed,
            deadline_us: None,
            slo_ms: None,
            gpu_gib: 0,
            gpu: None,
        }
    }
}
