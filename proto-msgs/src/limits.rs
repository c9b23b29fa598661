//! The limits of messages, and those that several programs keep. A value from the network is checked against one of these
//! before anything is allocated for it. Limits of one machine or table stand beside it, with their reason.

/// Bytes of one control message. A page of 200 worker views fits with room to spare. So does a heartbeat with every
/// list full, since its attempts are a page ([`PAGE_BYTES_MAX`]), too.
pub const CONTROL_BYTES_MAX: usize = 512 * 1024;

/// Bytes of payload in one chunk of the direct stream. Larger chunks gain nothing on libzmq, and on a slow link one of
/// them would outlast libzmq's heartbeats.
pub const CHUNK_BYTES_MAX: usize = 1024 * 1024;

/// Bytes of one frame, enforced by libzmq itself: one chunk and its header.
pub const FRAME_BYTES_MAX: usize = CHUNK_BYTES_MAX + 64 * 1024;

/// Unacknowledged bytes that a sender may have under way for one attempt: enough for 1 Gbit/s at 100 ms round trip.
pub const WINDOW_BYTES: u32 = 16 * 1024 * 1024;

/// Bytes of a name that a person chose: worker, model, tensor, label.
pub const NAME_BYTES_MAX: usize = 256;

/// Bytes of an explanation shown to a person.
pub const TEXT_BYTES_MAX: usize = 4096;

/// Endpoints one node may advertise.
pub const ENDPOINTS_MAX: usize = 8;

/// Labels on one worker.
pub const LABELS_MAX: usize = 32;

/// GPUs in one worker: twice the densest host sold today.
pub const GPUS_MAX: usize = 16;

/// Items in one task. More items belong into several tasks, which several workers can run.
pub const ITEMS_MAX: u32 = 1024;

/// Models of a task's later stages, after the first model.
pub const STAGES_AFTER_MAX: usize = 7;

/// Label rules of one task.
pub const RULES_MAX: usize = 8;

/// Models whose cost one heartbeat reports: the most recently run ones.
pub const COSTS_MAX: usize = 64;

/// Points of one model's cost curve: 1, 2, 4 … 64, and as many between them.
pub const CURVE_POINTS_MAX: usize = 16;

/// Runs described in one result: the first ones of a task that was cut into more.
pub const RUN_NOTES_MAX: usize = 64;

/// Slots of one worker, both lanes together.
pub const SLOTS_MAX: usize = 192;

/// Longest interval between heartbeats. With a longer one a worker's death would go unnoticed for many minutes.
pub const HEARTBEAT_MS_MAX: u32 = 60_000;

/// Entries of a worker's device map: [`GPUS_MAX`] GPUs and the CPU, several times over.
pub const DEVICE_MAP_MAX: usize = 64;

/// Rated candidates kept with a decision.
pub const DECISION_CANDIDATES_MAX: usize = 8;

/// Attempts in one heartbeat, finished and unacknowledged ones included. Also the attempts that its answer forgets or
/// stops.
pub const ATTEMPTS_MAX: usize = 256;

/// Attempts of one worker whose end is still to come, sent ahead ones included: enough for every slot, and fewer than one
/// heartbeat names, so that it has room for ends too.
pub const ACTIVE_ATTEMPTS_MAX: usize = 192;

const _: () = assert!(SLOTS_MAX <= ACTIVE_ATTEMPTS_MAX && ACTIVE_ATTEMPTS_MAX < ATTEMPTS_MAX);

/// Models that one worker reports as held: the most recently used ones if it has more.
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

/// Bytes of one page of an answer, or of the attempts in a heartbeat: half a message, which leaves room for the rest.
pub const PAGE_BYTES_MAX: usize = CONTROL_BYTES_MAX / 2;

/// The longest deadline that a task may ask for: a day.
pub const DEADLINE_MS_MAX: u64 = 24 * 60 * 60 * 1000;

/// Highest user priority.
pub const PRIORITY_MAX: u8 = 100;

/// Priority of a task that asks for none.
pub const PRIORITY_DEFAULT: u8 = 50;
