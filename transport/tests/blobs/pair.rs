//! Both ends of a connection, uploads and intakes on them, blobs to send.

use std::{collections::HashMap, fs, path::PathBuf, time::Duration};

use mesh_transport::{
    Admit, Context, Door, Heard, Inbox, Limits, Outlet, Received, Security,
    blob::{Arrival, Content, Feedback, Incoming, IncomingError, Intake, Outgoing, UploadEnd, Uploading},
};
use proto_msgs::{Attempt, AttemptId, BlobIndex, Chunk, ClientToWorker, Frame, TaskId};
use tokio::{sync::oneshot, time::timeout};

pub(crate) const PATIENCE: Duration = Duration::from_secs(20);
pub(crate) const MIB: usize = 1024 * 1024;

pub(crate) fn attempt() -> AttemptId {
    AttemptId { task: TaskId::from_bytes([7; 16]), attempt: Attempt(1) }
}

/// Bytes that look different everywhere and compress badly.
pub(crate) fn noise(len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    blake3::Hasher::new().update(&len.to_le_bytes()).finalize_xof().fill(&mut bytes);
    bytes
}

pub(crate) async fn within<T>(what: &str, future: impl Future<Output = T>) -> T {
    timeout(PATIENCE, future).await.unwrap_or_else(|_| panic!("{what}: nothing within {PATIENCE:?}"))
}

/// A folder with a blob's file in it and room for what arrives.
pub(crate) struct Folder(pub(crate) tempfile::TempDir);

impl Folder {
    pub(crate) fn new() -> Self {
        Self(tempfile::tempdir().expect("a folder"))
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    pub(crate) fn with_file(&self, name: &str, bytes: &[u8]) -> PathBuf {
        let path = self.path(name);
        fs::write(&path, bytes).expect("written");
        path
    }
}

/// A worker's door and a client's connection to it.
pub(crate) struct Pair {
    pub(crate) context: Context,
    pub(crate) door: Door,
    pub(crate) arriving: Inbox<Received>,
    pub(crate) outlet: Outlet,
    pub(crate) heard: Inbox<Heard>,
}

impl Pair {
    pub(crate) async fn connected() -> Self {
        let context = Context::new(Security::None).expect("a context");
        let listener = context.listen("tcp://127.0.0.1:0", Admit::Anyone, Limits::DIRECT).expect("a free port");
        let (door, arriving) = listener.spawn();
        let (outlet, heard) = dial(&context, &door).await;
        Self { context, door, arriving, outlet, heard }
    }
}

pub(crate) async fn dial(context: &Context, door: &Door) -> (Outlet, Inbox<Heard>) {
    let mut dialer = context.dial(door.endpoint(), None, Limits::DIRECT).expect("an address");
    dialer.connected(PATIENCE).await.expect("connected");
    dialer.spawn()
}

/// A chunk that a client sent.
pub(crate) fn chunk_of(frame: &Frame) -> Chunk {
    match ClientToWorker::from_frame(frame).expect("a message") {
        ClientToWorker::Chunk(chunk) => chunk,
        other => panic!("no chunk: {other:?}"),
    }
}

/// An upload under way, and its end.
pub(crate) struct Sender {
    pub(crate) uploading: Uploading,
    pub(crate) end: Option<UploadEnd>,
    pub(crate) ended: oneshot::Receiver<UploadEnd>,
}

impl Sender {
    pub(crate) fn start(outgoing: Outgoing, outlet: &Outlet) -> Self {
        let (say, ended) = oneshot::channel();
        let (uploading, end) = Uploading::start(outgoing, outlet.clone(), async move |end| {
            // Whoever asks no more knows already.
            let _unheard = say.send(end);
        });
        Self { uploading, end, ended }
    }

    pub(crate) fn tell(&mut self, feedback: Feedback) {
        let end = self.uploading.tell(feedback);
        self.end = self.end.take().or(end);
    }

    pub(crate) fn credit(&mut self, blob: BlobIndex, received_bytes: u64) {
        self.tell(Feedback::Credit { blob, received_bytes });
    }

    pub(crate) async fn result(self) -> UploadEnd {
        match self.end {
            Some(end) => end,
            None => within("the end of the upload", self.ended).await.expect("it says how it ended"),
        }
    }
}

/// Takes blobs in until all are complete, and passes credits to the sender as the network would.
pub(crate) async fn receive(
    arriving: &mut Inbox<Received>,
    blobs: Vec<Incoming>,
    sender: &mut Sender,
    window: u32,
) -> Result<HashMap<BlobIndex, Content>, IncomingError> {
    let wanted = blobs.len();
    let (intake, mut arrivals) = Intake::start(blobs, window);
    let mut contents = HashMap::new();
    while contents.len() < wanted {
        tokio::select! {
            received = arriving.recv() => {
                let frame = received.expect("the door is open").frame;
                intake.push(chunk_of(&frame), frame.payload)?;
            }
            arrival = within("an arrival", arrivals.recv()) => match arrival.expect("not over yet") {
                Arrival::Credit { blob, received_bytes } => sender.credit(blob, received_bytes),
                Arrival::Complete { blob, content } => { contents.insert(blob, content); }
                Arrival::Failed(error) => return Err(error),
            },
        }
    }
    Ok(contents)
}

pub(crate) fn read(content: &Content) -> Vec<u8> {
    match content {
        Content::File(path) => fs::read(path).expect("readable"),
        Content::Memory(bytes) => bytes.to_vec(),
    }
}
