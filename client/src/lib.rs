//! SDK: submit tasks to the mesh from a program.
//!
//! Owns one connection to the broker, the direct connections to workers, and the tasks of this process. Never decides
//! where a task runs or when it is lost: that is `mesh_core::client`, which this crate drives.
//!
//! ```no_run
//! # async fn example() -> Result<(), Box<dyn std::error::Error>> {
//! use mesh_sdk::{Input, Mesh, Model, Options, Task};
//!
//! let mesh = Mesh::connect(Options::new("tcp://broker.example:5555")).await?;
//! let model = Model::from_file("model.tflite").await?;
//! let mut task = mesh.submit(Task::new(model).input(Input::file("input.bin"))).await?;
//! for output in task.wait().await?.outputs {
//!     println!("{} {} {:?}", output.name, output.dtype, output.shape);
//! }
//! # Ok(()) }
//! ```
//!
//! ```text
//!   Mesh, TaskHandle --Command--> Driver (one task)  --events--> core::client::Client
//!                                  |  |      ^       <--actions--
//!                        broker ---'  |      '---- Happened (dialled, heard, sent, arrived)
//!                        workers -----'            from the tasks of links and transfers
//! ```
//!
//! Where to begin: [`Mesh`], then [`Task`]; inside, `driver`.

mod driver;
mod happened;
mod input;
mod links;
mod mesh;
mod model;
mod options;
mod outputs;
mod questions;
mod result;
mod session;
mod silence;
mod spool;
mod task;

pub use input::{Input, SubmitError};
pub use mesh::{Mesh, TaskHandle};
pub use model::{Model, ModelError};
pub use options::{BROKER_DEFAULT, ConnectError, Listen, Options, default_state_dir};
pub use outputs::{Output, Outputs};
pub use proto_msgs::{
    Arch, Attempt, Candidate, ClientId, ClusterView, DType, DecisionView, Demands, Digest, Direction, Dispatch,
    ErrorCode, Failure, JobId, LabelRule, Lane, ModelCost, ModelFormat, ModelRef, ModelView, Outcome, Packing, Phase,
    Prediction, RankView, RunNote, Slo, TaskId, TaskStanding, TaskView, WhyView, Wishes, WorkerId, WorkerView,
};
pub use result::{AskError, News, TaskError, TaskResult, Timings, Update};
pub use session::SENDING_EVERY;
pub use task::{Task, new_job};
