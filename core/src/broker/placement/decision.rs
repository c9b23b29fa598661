//! A placement decision, kept for people who ask why: the workers that were rated, and what was against each.
//!
//! Owns these values and the sentences for people. Never decides.

use proto_msgs::{Arch, Lane, ModelFormat, Packing, Prediction, TaskSpec, WorkerId, limits::DECISION_CANDIDATES_MAX};

use crate::Census;

/// A worker's rating for a task.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Rated {
    pub(crate) worker: WorkerId,
    pub(crate) obstacle: Option<Obstacle>,
    pub(crate) prediction: Prediction,
    pub(crate) busy_permille: u16,
    pub(crate) holds_model: bool,
    pub(crate) packing: Packing,
    pub(crate) best_batch: u16,
}

/// A decision, kept for people who ask why.
#[derive(Clone, Debug)]
pub(crate) struct Decision {
    pub(crate) at_unix_ms: u64,
    pub(crate) chosen: Option<WorkerId>,
    pub(crate) rated: Vec<Rated>,
}

impl Decision {
    pub(crate) fn census(&self, census: &mut Census<'_>) {
        let Self { at_unix_ms: _, chosen: _, rated } = self;
        census.passing("workers rated for a task", rated.len(), DECISION_CANDIDATES_MAX);
    }
}

/// One reason against a worker.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Obstacle {
    // Permanent: the worker could never run the task, however idle.
    Format(ModelFormat),
    Arch(Arch),
    Cores(u32),
    Memory {
        bytes: u64,
    },
    /// Memory of a run whose task asks for none; the task has outgrown that.
    RunMemory {
        bytes: u64,
    },
    /// Memory of the largest GPU that tasks of the lane may get; the other lane's, if that would do.
    GpuMemory {
        bytes: u64,
        other: Option<Lane>,
    },
    NoWay,
    NoSlots(Lane),
    /// Index of the label rule of the task that is broken.
    Label(u8),
    // Temporary.
    Unheard,
    Draining,
    /// The worker keeps as many results of detached tasks as it may.
    KeepsNoMore,
    /// It is not known yet whether the task kills workers.
    Suspicion,
    /// The worker failed the task, and no other can take it: it gets a while to recover.
    Pausing,
    /// The worker failed the task, mostly by being cut off, and may be dead: nothing has been heard of it since.
    Silent,
    /// The worker has said that what the task brings never fits its quota.
    Quota,
    CoresPromised,
    MemoryPromised,
    GpuMemoryTaken,
    /// Freed resources are kept for a task that has waited longer.
    Claimed,
    /// No slot is free, and sending ahead would gain nothing.
    SlotsInUse {
        lane: Lane,
        slots: u16,
    },
    // Drawbacks: the task fits, and another worker is better.
    /// The worker misses the latency promised to the task's stream, for so many of a thousand tasks.
    Late(u16),
    /// Index of the preferred label of the task that the worker lacks.
    Unliked(u8),
}

impl Obstacle {
    /// The obstacle as text for people; the worker is the subject.
    pub(crate) fn text(self, task: &TaskSpec) -> String {
        match self {
            Self::Format(format) => format!("cannot run {format} models"),
            Self::Arch(arch) => format!("is {arch}"),
            Self::Cores(cores) => format!("has {cores} cores"),
            Self::Memory { bytes } => format!("has {} MiB of memory", bytes >> 20),
            Self::RunMemory { bytes } => {
                format!("gives a run {} MiB of memory unless its task asks for more", bytes >> 20)
            }
            Self::GpuMemory { other: Some(lane), .. } => {
                format!("has a GPU with that much memory for the {lane} lane only")
            }
            Self::GpuMemory { bytes: 0, .. } => "has no GPU for it".to_owned(),
            Self::GpuMemory { bytes, .. } => format!("has {} MiB of memory on its largest GPU for it", bytes >> 20),
            Self::NoWay => "cannot be connected in the wanted direction".to_owned(),
            Self::NoSlots(lane) => format!("has no slots for the {lane} lane"),
            Self::Label(at) => format!("has no label {}", label(task, at)),
            Self::Unheard => "has not sent a heartbeat yet".to_owned(),
            Self::Draining => "is draining".to_owned(),
            Self::KeepsNoMore => "keeps as many results of detached tasks as it may".to_owned(),
            Self::Suspicion => "waits until it is known whether the task kills workers".to_owned(),
            Self::Pausing => "failed the task, or had no place for it, a moment ago".to_owned(),
            Self::Silent => "was cut off from the task or failed it, and has not been heard since".to_owned(),
            Self::Quota => "has too small a quota for what the task brings".to_owned(),
            Self::CoresPromised => "its cores are promised to others".to_owned(),
            Self::MemoryPromised => "its memory is promised to others".to_owned(),
            Self::GpuMemoryTaken => "its GPU memory is promised to others or in use".to_owned(),
            Self::Claimed => "keeps cores and memory for a task that has waited longer".to_owned(),
            Self::SlotsInUse { lane: Lane::Realtime, slots } => format!("all {slots} slots are in use"),
            Self::SlotsInUse { lane: Lane::Batch, slots } => format!("all {slots} batch slots are in use"),
            Self::Late(permille) => format!("missed the promised latency for {permille} of 1000 tasks"),
            Self::Unliked(at) => format!("lacks the preferred label {}", label(task, at)),
        }
    }
}

/// The label that this rule of the task names.
fn label(task: &TaskSpec, at: u8) -> String {
    task.labels.get(usize::from(at)).map_or_else(String::new, |rule| format!("{}={}", rule.key, rule.value))
}
