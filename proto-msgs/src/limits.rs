//! Every bound on what a peer can make us hold, in one place. A value that the network names is checked against one of
//! these before anything is allocated for it.

/// Bytes of one control message: a page of 200 worker views or a heartbeat with every list full fits with room to spare.
pub const CONTROL_BYTES_MAX: usize = 512 * 1024;

/// Bytes of payload in one chunk of the direct stream. Larger chunks gain nothing on libzmq and would outlast its
/// heartbeats on a slow link.
pub const CHUNK_BYTES_MAX: usize = 1024 * 1024;

/// What libzmq itself refuses above: one chunk and its header.
pub const FRAME_BYTES_MAX: usize = CHUNK_BYTES_MAX + 64 * 1024;

/// Unacknowledged bytes a sender may have under way on one attempt: enough for 1 Gbit/s at 100 ms round trip.
pub const WINDOW_BYTES: u32 = 16 * 1024 * 1024;

/// Bytes of a name a person chose: worker, model, tensor, label.
pub const NAME_BYTES_MAX: usize = 256;

/// Bytes of an explanation shown to a person.
pub const TEXT_BYTES_MAX: usize = 4096;

/// Endpoints one node may advertise.
pub const ENDPOINTS_MAX: usize = 8;

/// Labels on one worker.
pub const LABELS_MAX: usize = 32;

/// GPUs in one worker: twice the densest host sold today.
pub const GPUS_MAX: usize = 16;

/// Items in one task: more belong in several tasks, which several workers can run.
pub const ITEMS_MAX: u32 = 1024;

/// Models that one task may pass through after the first.
pub const STAGES_AFTER_MAX: usize = 7;

/// Label rules of one task.
pub const RULES_MAX: usize = 8;

/// Models of which one heartbeat says what they cost: the most recently run ones.
pub const COSTS_MAX: usize = 64;

/// Points of one model's cost curve: 1, 2, 4 … 64 and as many between.
pub const CURVE_POINTS_MAX: usize = 16;

/// Runs of which a result tells how they went: the first ones of a task cut into more.
pub const RUN_NOTES_MAX: usize = 64;

/// Slots of one worker, both lanes together.
pub const SLOTS_MAX: usize = 192;

/// Slowest heartbeat of a worker: with a slower one its death would go unnoticed for many minutes.
pub const HEARTBEAT_MS_MAX: u32 = 60_000;

/// Device ids in a worker's device map; [`GPUS_MAX`] of them and the CPU, several times over.
pub const DEVICE_MAP_MAX: usize = 64;

/// Candidates of which a decision remembers how they were rated.
pub const DECISION_CANDIDATES_MAX: usize = 8;

/// Attempts that one heartbeat names, finished and unacknowledged ones included, and that its answer forgets or stops.
pub const ATTEMPTS_MAX: usize = 256;

/// Models one worker names as held; the most recently used ones where it has more.
pub const HELD_MAX: usize = 256;

/// Inputs or outputs of one model.
pub const TENSORS_MAX: usize = 128;

/// Dimensions of one tensor.
pub const RANK_MAX: usize = 8;

/// Bytes of one model file.
pub const MODEL_BYTES_MAX: u64 = 64 << 30;

/// Bytes of all inputs of one task.
pub const INPUT_BYTES_MAX: u64 = 16 << 30;

/// Bytes of all outputs of one task.
pub const OUTPUT_BYTES_MAX: u64 = 16 << 30;

/// Rows in one page of an answer.
pub const PAGE_ROWS_MAX: usize = 200;

/// Bytes of one page of an answer: half a message, since the rest of the answer comes on top.
pub const PAGE_BYTES_MAX: usize = CONTROL_BYTES_MAX / 2;

/// The longest deadline a task may name: a day.
pub const DEADLINE_MS_MAX: u64 = 24 * 60 * 60 * 1000;

/// Highest user priority.
pub const PRIORITY_MAX: u8 = 100;

/// Priority of a task that names none.
pub const PRIORITY_DEFAULT: u8 = 50;
