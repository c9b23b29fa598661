//! Jobs with a known right answer, and the result of a job submitted with `--output`.

use std::{
    path::{Path, PathBuf},
    process::Command,
};

use serde_json::Value;

use super::{Answer, Mesh, Submission, npy::Array, onnx};

/// A model file, input files, and the right answer.
#[derive(Clone, Debug)]
pub struct Job {
    /// The model's file.
    pub model: String,
    /// The input's file.
    pub input: String,
    /// Expected values of output `y`.
    pub expected: Vec<f64>,
}

impl Job {
    /// `y = x + 1` on four numbers.
    pub fn small(mesh: &Mesh) -> Self {
        let input = mesh.array("four.npy", &Array::of_f32(&[4], &[0.0, 1.5, -3.0, 41.0]));
        Self { model: mesh.file("add_one.onnx", &onnx::add_one()), input, expected: vec![1.0, 2.5, -2.0, 42.0] }
    }

    /// A model file of this many MiB that do not compress. Each `seed` gives another model.
    pub fn heavy(mesh: &Mesh, mib: usize, seed: u16) -> Self {
        let input = mesh.array("one.npy", &Array::of_f32(&[1], &[1.0]));
        let model = mesh.file(&format!("heavy{mib}-{seed}.onnx"), &onnx::heavy(mib << 20, seed));
        Self { model, input, expected: vec![f64::from(seed) + 1.0] }
    }

    /// `y = x + 1` on this many MiB of numbers that do not compress: the output is as large as the input.
    pub fn voluminous(mesh: &Mesh, mib: usize) -> Self {
        let mut state = 1_u32;
        let numbers = std::iter::repeat_with(|| {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 8) as f32
        });
        let numbers: Vec<f32> = numbers.take(mib << 18).collect();
        let input = mesh.array(&format!("numbers{mib}.npy"), &Array::of_f32(&[numbers.len()], &numbers));
        let expected = numbers.iter().map(|number| f64::from(number + 1.0)).collect();
        Self { model: mesh.file("add_one.onnx", &onnx::add_one()), input, expected }
    }

    /// A run of about this many milliseconds (longer on a busy machine).
    pub fn long(mesh: &Mesh, ms: i64) -> Self {
        let trips = ms * 1000;
        let input = mesh.array(&format!("trips{ms}.npy"), &Array::of_i64(&[1], &[trips]));
        Self { model: mesh.file("counting.onnx", &onnx::counting()), input, expected: vec![trips as f64] }
    }

    /// A run of about this many milliseconds, however many rows of two numbers run together. This job has one such row.
    /// Each length gives another model.
    pub fn sociable(mesh: &Mesh, ms: i64, row: [f32; 2]) -> Self {
        let trips = ms * 1000;
        let name = format!("row{}-{}.npy", row[0], row[1]);
        let input = mesh.array(&name, &Array::of_f32(&[1, 2], &row));
        let model = mesh.file(&format!("sociable{ms}.onnx"), &onnx::sociable(trips));
        Self { model, input, expected: row.iter().map(|number| f64::from(*number) + trips as f64).collect() }
    }

    /// A run that never ends.
    pub fn endless(mesh: &Mesh) -> Self {
        let input = mesh.array("forever.npy", &Array::of_i64(&[1], &[i64::MAX]));
        Self { model: mesh.file("counting.onnx", &onnx::counting()), input, expected: Vec::new() }
    }

    /// The arguments `submit MODEL INPUT`, and more.
    pub fn submit<'a>(&'a self, more: &[&'a str]) -> Vec<&'a str> {
        [&["submit", self.model.as_str(), self.input.as_str()], more].concat()
    }

    /// Submits, waits, and checks that the answer is right.
    ///
    /// # Panics
    /// If there is no answer, or a wrong one.
    #[track_caller]
    pub fn run(&self, mesh: &Mesh) -> Done {
        self.start(mesh, &[]).done(self)
    }

    /// Submits detached, waits until the client may leave, and returns the task's id.
    ///
    /// # Panics
    /// If the task is not accepted.
    #[track_caller]
    pub fn detach(&self, mesh: &Mesh) -> String {
        let report = mesh.ask(&self.submit(&["--detach"]));
        report["items"][0]["task"].as_str().unwrap_or_else(|| panic!("no task in {report}")).to_owned()
    }

    /// Submits without waiting.
    pub fn start(&self, mesh: &Mesh, more: &[&str]) -> Started {
        self.start_at(mesh, mesh.endpoint(), more)
    }

    /// Submits without waiting; the client reaches the broker at another address.
    pub fn start_at(&self, mesh: &Mesh, broker: &str, more: &[&str]) -> Started {
        self.started(mesh, more, |arguments| mesh.client_command_at(broker, arguments))
    }

    /// Submits without waiting, as another user.
    pub fn start_as(&self, mesh: &Mesh, user: &str, more: &[&str]) -> Started {
        self.started(mesh, more, |arguments| mesh.client_command_of(user, arguments))
    }

    fn started(&self, mesh: &Mesh, more: &[&str], command: impl FnOnce(&[&str]) -> Command) -> Started {
        let folder = tempfile::tempdir_in(mesh.folder()).expect("the folder is ours").keep();
        let output = folder.display().to_string();
        let arguments = self.submit(&[more, &["--json", "--output", &output]].concat());
        Started { client: Submission::start(command(&arguments)), folder }
    }
}

/// A running submit.
#[derive(Debug)]
pub struct Started {
    /// The client.
    pub client: Submission,
    folder: PathBuf,
}

impl Started {
    /// Waits for the end, whatever the result is.
    pub fn answer(self) -> Answer {
        self.client.wait()
    }

    /// Waits for the right answer of `job`.
    ///
    /// # Panics
    /// If there is no answer, or a wrong one.
    #[track_caller]
    pub fn done(self, job: &Job) -> Done {
        let answer = self.client.wait().succeeded();
        let done = Done { item: answer.json()["items"][0].clone(), folder: self.folder };
        let numbers = done.output("y").numbers();
        let first = &numbers[..numbers.len().min(8)];
        assert!(numbers == job.expected, "the answer is wrong: {first:?} and so on");
        done
    }
}

/// A result.
#[derive(Debug)]
pub struct Done {
    /// The only item as `--json` printed it.
    pub item: Value,
    folder: PathBuf,
}

impl Done {
    /// An output, read from its `.npy` file.
    pub fn output(&self, name: &str) -> Array {
        Array::read(&self.folder.join(format!("{name}.npy")))
    }

    /// The folder of `--output`.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// The name of the worker that ran the task.
    ///
    /// # Panics
    /// If the client did not print it.
    pub fn worker(&self) -> &str {
        self.item["worker"]["name"].as_str().unwrap_or_else(|| panic!("no worker in {}", self.item))
    }

    /// Number of placements of the task.
    ///
    /// # Panics
    /// If the client did not print it.
    pub fn attempts(&self) -> u64 {
        self.item["attempts"].as_u64().unwrap_or_else(|| panic!("no attempts in {}", self.item))
    }

    /// Bytes of model and inputs that the client sent.
    ///
    /// # Panics
    /// If the client did not print it.
    pub fn sent_bytes(&self) -> u64 {
        self.item["sent_bytes"].as_u64().unwrap_or_else(|| panic!("no sent_bytes in {}", self.item))
    }
}
