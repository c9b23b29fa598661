//! What is submitted. Owns models and inputs as the user has them, their digests, and the check that a file is still the
//! one that was hashed. Never: connections.

use std::{
    fmt, fs, io,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use bytes::Bytes;
use mesh_core::client::TaskSpec;
use mesh_transport::blob::{Source, UploadError};
use proto_msgs::{
    DType, Demands, Digest, Direction, InputDecl, JobId, LabelRule, Lane, Manifest, ModelFormat, ModelRef, Slo, Stage,
    TaskId, limits,
};
use uuid::Uuid;

/// A model that is ready to be submitted, any number of times: its file has been hashed. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Model {
    inner: Arc<ModelInner>,
}

#[derive(Debug)]
struct ModelInner {
    name: String,
    reference: ModelRef,
    blob: Blob,
}

/// One input of a task.
#[derive(Clone, Debug)]
pub struct Input {
    name: Option<String>,
    dtype: Option<DType>,
    shape: Option<Vec<u64>>,
    data: Data,
}

#[derive(Clone, Debug)]
enum Data {
    Memory(Bytes),
    File(PathBuf),
}

/// What the user wants done.
#[derive(Clone, Debug)]
pub struct Task {
    pub(crate) model: Model,
    pub(crate) inputs: Vec<Input>,
    pub(crate) priority: u8,
    pub(crate) deadline: Option<Duration>,
    pub(crate) demands: Demands,
    pub(crate) detached: bool,
    pub(crate) job: JobId,
    pub(crate) items: u32,
    pub(crate) job_items: u32,
    pub(crate) lane: Option<Lane>,
    pub(crate) slo: Option<Slo>,
    pub(crate) labels: Vec<LabelRule>,
    then: Vec<(String, Model)>,
}

/// Why a task cannot be submitted at all.
#[derive(Debug, thiserror::Error)]
pub enum SubmitError {
    /// A file cannot be read.
    #[error("cannot read {}: {source}", path.display())]
    Read {
        /// Which file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The model is in no known format.
    #[error("{name} is no model: neither a TensorFlow Lite (.tflite) nor an ONNX (.onnx) file")]
    UnknownFormat {
        /// What it is called.
        name: String,
    },
    /// Something in the task is beyond a limit.
    #[error("{0}")]
    Invalid(String),
    /// The connection to the mesh was closed.
    #[error("the connection to the mesh was closed")]
    Closed,
}

impl Model {
    /// The model in a file. Reads it once to hash it (about 5 GB/s a core); it is not kept in memory.
    ///
    /// # Errors
    /// If it cannot be read or is no model.
    pub async fn from_file(path: impl Into<PathBuf>) -> Result<Self, SubmitError> {
        let path = path.into();
        let name = path.file_name().map_or_else(String::new, |name| name.to_string_lossy().into_owned());
        blocking(move || Self::new(name, Data::File(path))).await
    }

    /// A model in memory.
    ///
    /// # Errors
    /// If it is no model.
    pub async fn from_bytes(name: impl Into<String>, bytes: impl Into<Bytes>) -> Result<Self, SubmitError> {
        let (name, bytes) = (name.into(), bytes.into());
        blocking(move || Self::new(name, Data::Memory(bytes))).await
    }

    fn new(mut name: String, data: Data) -> Result<Self, SubmitError> {
        let format = detect(&data)?.ok_or_else(|| SubmitError::UnknownFormat { name: name.clone() })?;
        let (blob, digest) = Blob::hash(data)?;
        at_most("the model", blob.size_bytes, limits::MODEL_BYTES_MAX, "bytes")?;
        name.truncate(name.floor_char_boundary(limits::NAME_BYTES_MAX));
        let reference = ModelRef { digest, size_bytes: blob.size_bytes, format };
        Ok(Self { inner: Arc::new(ModelInner { name, reference, blob }) })
    }

    /// What a person calls it: the file's name.
    pub fn name(&self) -> &str {
        &self.inner.name
    }

    /// Digest, size and format.
    pub fn reference(&self) -> ModelRef {
        self.inner.reference
    }
}

fn detect(data: &Data) -> Result<Option<ModelFormat>, SubmitError> {
    match data {
        Data::Memory(bytes) => Ok(mesh_models::detect(&bytes[..bytes.len().min(mesh_models::HEAD_BYTES)])),
        Data::File(path) => {
            let head = read_head(path).map_err(|source| SubmitError::Read { path: path.clone(), source })?;
            Ok(mesh_models::detect(&head))
        }
    }
}

fn read_head(path: &Path) -> io::Result<Vec<u8>> {
    use std::io::Read;
    let mut head = Vec::with_capacity(mesh_models::HEAD_BYTES);
    fs::File::open(path)?.take(mesh_models::HEAD_BYTES as u64).read_to_end(&mut head)?;
    Ok(head)
}

impl Input {
    /// Raw little-endian elements in row-major order, as the model wants them.
    pub fn raw(bytes: impl Into<Bytes>) -> Self {
        Self { name: None, dtype: None, shape: None, data: Data::Memory(bytes.into()) }
    }

    /// A file of raw little-endian elements in row-major order. Hashed when the task is submitted, read again when sent.
    pub fn file(path: impl Into<PathBuf>) -> Self {
        Self { name: None, dtype: None, shape: None, data: Data::File(path.into()) }
    }

    /// A tensor: the worker compares type and shape with the model's.
    pub fn tensor(dtype: DType, shape: impl Into<Vec<u64>>, bytes: impl Into<Bytes>) -> Self {
        Self::raw(bytes).shaped(dtype, shape)
    }

    /// Says what the bytes are, where the model leaves it open.
    pub fn shaped(mut self, dtype: DType, shape: impl Into<Vec<u64>>) -> Self {
        self.dtype = Some(dtype);
        self.shape = Some(shape.into());
        self
    }

    /// For the model's input of this name; without a name inputs are taken by position.
    pub fn named(mut self, name: impl Into<String>) -> Self {
        self.name = Some(name.into());
        self
    }

    fn prepare(self) -> Result<(InputDecl, Blob), SubmitError> {
        let Self { name, dtype, shape, data } = self;
        at_most("an input name", name.as_ref().map_or(0, String::len) as u64, limits::NAME_BYTES_MAX as u64, "bytes")?;
        at_most("an input", shape.as_ref().map_or(0, Vec::len) as u64, limits::RANK_MAX as u64, "dimensions")?;
        let (blob, digest) = Blob::hash(data)?;
        Ok((InputDecl { name, dtype, shape, digest, size_bytes: blob.size_bytes }, blob))
    }
}

/// `x: FP32 [1, 3]`, with what is known of it.
impl fmt::Display for Input {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(name) = &self.name {
            write!(f, "{name}: ")?;
        }
        match (self.dtype, &self.shape, &self.data) {
            (Some(dtype), Some(shape), _) => write!(f, "{dtype} {shape:?}"),
            (_, _, Data::Memory(bytes)) => write!(f, "{} bytes", bytes.len()),
            (_, _, Data::File(path)) => path.display().fmt(f),
        }
    }
}

impl Task {
    /// A task for this model, without inputs yet.
    pub fn new(model: Model) -> Self {
        Self {
            model,
            inputs: Vec::new(),
            priority: limits::PRIORITY_DEFAULT,
            deadline: None,
            demands: Demands::default(),
            detached: false,
            job: new_job(),
            items: 1,
            job_items: 0,
            lane: None,
            slo: None,
            labels: Vec::new(),
            then: Vec::new(),
        }
    }

    /// One more input.
    pub fn input(mut self, input: Input) -> Self {
        self.inputs.push(input);
        self
    }

    /// More inputs.
    pub fn inputs(mut self, inputs: impl IntoIterator<Item = Input>) -> Self {
        self.inputs.extend(inputs);
        self
    }

    /// 0 (whenever there is room) to 100 (first of all); 50 if not said.
    pub fn priority(mut self, priority: u8) -> Self {
        self.priority = priority;
        self
    }

    /// The answer is worthless after this long.
    pub fn deadline(mut self, deadline: Option<Duration>) -> Self {
        self.deadline = deadline;
        self
    }

    /// What a worker must have, and the run may use.
    pub fn demands(mut self, demands: Demands) -> Self {
        self.demands = demands;
        self
    }

    /// Go on when this program ends, and keep the result for [`Mesh::fetch`](crate::Mesh::fetch).
    pub fn detached(mut self, detached: bool) -> Self {
        self.detached = detached;
        self
    }

    /// Tasks of one job are shown together.
    pub fn job(mut self, job: JobId) -> Self {
        self.job = job;
        self
    }

    /// How many complete sets of the model's inputs the inputs hold, one behind the other along the first dimension. The
    /// outputs come back the same way; [`Outputs::item`](crate::Outputs::item) takes them apart.
    pub fn items(mut self, items: u32) -> Self {
        self.items = items;
        self
    }

    /// Items of the whole job, this task's included: what the broker chooses the lane by.
    pub fn job_items(mut self, job_items: u32) -> Self {
        self.job_items = job_items;
        self
    }

    /// The lane whose slots it may use; `None`: by the number of the job's items.
    pub fn lane(mut self, lane: Option<Lane>) -> Self {
        self.lane = lane;
        self
    }

    /// What its stream of tasks is promised: workers that break it too often are passed over.
    pub fn slo(mut self, slo: Slo) -> Self {
        self.slo = Some(slo);
        self
    }

    /// One more wish for a label of the worker.
    pub fn label(mut self, rule: LabelRule) -> Self {
        self.labels.push(rule);
        self
    }

    /// One more model, which takes what the one before it gave.
    pub fn then(mut self, name: impl Into<String>, model: Model) -> Self {
        self.then.push((name.into(), model));
        self
    }

    /// Hashes the inputs and checks every limit. Blocks.
    pub(crate) fn prepare(
        self,
        task: TaskId,
        direction: Option<Direction>,
    ) -> Result<(TaskSpec, Payload), SubmitError> {
        self.check()?;
        let prepared: Vec<(InputDecl, Blob)> =
            self.inputs.into_iter().map(Input::prepare).collect::<Result<_, SubmitError>>()?;
        let (inputs, mut blobs): (Vec<InputDecl>, Vec<Blob>) = prepared.into_iter().unzip();
        let input_bytes = inputs.iter().map(|input| input.size_bytes).fold(0, u64::saturating_add);
        at_most("the inputs together", input_bytes, limits::INPUT_BYTES_MAX, "bytes")?;
        blobs.insert(0, self.model.inner.blob.clone());
        blobs.extend(self.then.iter().map(|(_, model)| model.inner.blob.clone()));
        let stage = |(name, model): (String, Model)| Stage { name, model: model.reference() };
        let then: Vec<Stage> = self.then.into_iter().map(stage).collect();
        let (model, model_name) = (self.model.reference(), self.model.name().to_owned());
        let spec = TaskSpec {
            task,
            job: self.job,
            model_name: model_name.clone(),
            model,
            then: then.clone(),
            input_bytes,
            items: self.items,
            job_items: self.job_items.max(self.items),
            lane: self.lane,
            slo: self.slo,
            labels: self.labels,
            priority: self.priority,
            deadline: self.deadline,
            demands: self.demands,
            detached: self.detached,
            direction,
        };
        let manifest = Manifest { model, model_name, then, items: self.items, inputs };
        Ok((spec, Payload { manifest, blobs }))
    }

    /// What the mesh would refuse is said before anything is read.
    fn check(&self) -> Result<(), SubmitError> {
        if self.priority > limits::PRIORITY_MAX {
            let text = format!("priority {} is out of range: use 0 to {}", self.priority, limits::PRIORITY_MAX);
            return Err(SubmitError::Invalid(text));
        }
        at_most("the task", self.inputs.len() as u64, limits::TENSORS_MAX as u64, "inputs")?;
        let deadline_ms = self.deadline.map_or(0, |deadline| deadline.as_millis() as u64);
        at_most("the deadline", deadline_ms, limits::DEADLINE_MS_MAX, "ms")?;
        if self.items == 0 {
            return Err(SubmitError::Invalid("a task of no items has nothing to run: give it at least one".to_owned()));
        }
        at_most("the task", self.items.into(), limits::ITEMS_MAX.into(), "items")?;
        at_most("the task", self.then.len() as u64, limits::STAGES_AFTER_MAX as u64, "models after the first")?;
        at_most("the task", self.labels.len() as u64, limits::RULES_MAX as u64, "wishes for labels")?;
        let names = self.then.iter().map(|(name, _)| name);
        let texts = names.chain(self.labels.iter().flat_map(|rule| [&rule.key, &rule.value]));
        for text in texts {
            at_most("a name", text.len() as u64, limits::NAME_BYTES_MAX as u64, "bytes")?;
        }
        Ok(())
    }
}

/// A fresh job id.
pub fn new_job() -> JobId {
    Uuid::now_v7().into()
}

/// What a task sends, as often as it takes.
#[derive(Debug)]
pub(crate) struct Payload {
    pub(crate) manifest: Manifest,
    /// The model, then the inputs, then the models of later stages.
    pub(crate) blobs: Vec<Blob>,
}

/// Bytes that were hashed.
#[derive(Clone, Debug)]
pub(crate) struct Blob {
    data: Data,
    stamp: Option<Stamp>,
    size_bytes: u64,
}

/// What changes with a file's content.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
struct Stamp {
    inode: u64,
    size_bytes: u64,
    modified_ns: (i64, i64),
}

impl Stamp {
    fn of(path: &Path) -> Result<Self, UploadError> {
        let meta = fs::metadata(path).map_err(|source| UploadError::Read { path: path.to_owned(), source })?;
        Ok(Self { inode: meta.ino(), size_bytes: meta.len(), modified_ns: (meta.mtime(), meta.mtime_nsec()) })
    }
}

impl Blob {
    fn hash(data: Data) -> Result<(Self, Digest), SubmitError> {
        let failed = |error| match error {
            UploadError::Read { path, source } => SubmitError::Read { path, source },
            other => SubmitError::Invalid(other.to_string()),
        };
        let stamp = match &data {
            Data::Memory(_) => None,
            Data::File(path) => Some(Stamp::of(path).map_err(failed)?),
        };
        let source = open(&data).map_err(failed)?;
        let digest = source.digest().map_err(failed)?;
        let blob = Self { data, stamp, size_bytes: source.size_bytes() };
        // Also notices a file that changed between the stamp and the end of the hashing.
        blob.source().map_err(failed)?;
        Ok((blob, digest))
    }

    /// Length.
    pub(crate) fn size_bytes(&self) -> u64 {
        self.size_bytes
    }

    /// The bytes, to be sent.
    ///
    /// # Errors
    /// If the file is gone, or not the one that was hashed.
    pub(crate) fn source(&self) -> Result<Source, UploadError> {
        if let (Some(stamp), Data::File(path)) = (self.stamp, &self.data)
            && Stamp::of(path)? != stamp
        {
            return Err(UploadError::Changed { path: path.clone() });
        }
        open(&self.data)
    }
}

fn open(data: &Data) -> Result<Source, UploadError> {
    match data {
        Data::Memory(bytes) => Ok(Source::memory(bytes.clone())),
        Data::File(path) => Source::file(path),
    }
}

fn at_most(what: &str, got: u64, max: u64, unit: &str) -> Result<(), SubmitError> {
    if got <= max {
        return Ok(());
    }
    Err(SubmitError::Invalid(format!("{what} has {got} {unit}, the limit is {max}")))
}

/// Runs file work where it holds nobody up.
pub(crate) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, SubmitError> + Send + 'static,
) -> Result<T, SubmitError> {
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result,
        // The runtime is being shut down, or the work panicked, which is a bug that has been printed.
        Err(_) => Err(SubmitError::Closed),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MODEL: &[u8] = b"\x1c\0\0\0TFL3 and so on";
    const TASK: TaskId = TaskId::from_bytes([1; 16]);

    #[test]
    fn what_is_beyond_a_limit_is_said_before_anything_is_sent() {
        let model = Model::new("m".into(), Data::Memory(MODEL.into())).unwrap();
        let many = (0..200).map(|_| Input::raw(vec![0]));

        let error = Task::new(model.clone()).inputs(many).prepare(TASK, None).unwrap_err();
        assert_eq!(error.to_string(), "the task has 200 inputs, the limit is 128");
        let error = Task::new(model).priority(101).prepare(TASK, None).unwrap_err();
        assert_eq!(error.to_string(), "priority 101 is out of range: use 0 to 100");
    }

    #[test]
    fn no_model_is_refused_by_name() {
        let error = Model::new("cat.jpg".into(), Data::Memory(b"\xff\xd8\xff".as_slice().into())).unwrap_err();
        assert!(error.to_string().starts_with("cat.jpg is no model"), "{error}");
    }

    #[test]
    fn a_file_that_changed_since_it_was_hashed_is_not_sent() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("input.bin");
        fs::write(&path, b"before").unwrap();
        let (blob, digest) = Blob::hash(Data::File(path.clone())).unwrap();
        assert_eq!(digest, Digest::of(b"before"));
        assert!(blob.source().is_ok());

        fs::write(&path, b"afterwards").unwrap();

        let error = blob.source().unwrap_err();
        assert!(matches!(&error, UploadError::Changed { path: named } if *named == path), "{error}");
        fs::remove_file(&path).unwrap();
        assert!(matches!(blob.source(), Err(UploadError::Read { .. })));
    }
}
