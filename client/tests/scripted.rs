//! The SDK against a broker and a worker that follow a script: what is sent when, and what is not. (The real ones are in
//! the workspace's `tests/`.)

#![expect(clippy::unwrap_used, reason = "a test says what it expects by failing")]

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Arc, Mutex},
    time::Duration,
};

use mesh_sdk::{
    Direction, Dispatch, ErrorCode, Input, Lane, Mesh, Model, News, Options, Outcome, RunNote, Task, TaskError, Update,
    WorkerId,
};
use mesh_transport::{Admit, Context, Door, Inbox, Limits, Received, Security};
use proto_msgs::{
    Accept, Attempt, AttemptId, BrokerToClient, Chunk, ClientToBroker, ClientToWorker, Credit, DType, Digest, Ended,
    Frame, Grant, MODEL_BLOB, Manifest, OutputDecl, PeerId, Phase, Progress, RunResult, Standing, Submit, Ticket,
    TicketBody, TicketKey, WorkerToClient, limits::WINDOW_BYTES,
};
use tokio::task::AbortHandle;

const WORKER: WorkerId = WorkerId::from_bytes([7; 16]);
const MODEL: &[u8] = b"\x1c\0\0\0TFL3 and the rest of a model";
const OUTPUT: [u8; 4] = 1.5_f32.to_le_bytes();

/// No step of a script takes longer on the slowest machine.
const PATIENCE: Duration = Duration::from_secs(20);

/// What broker and worker do.
#[derive(Clone, Copy, Default)]
struct Script {
    /// The broker's word on the model in grants.
    grants_say_held: bool,
    /// The worker has the model from the start.
    worker_holds: bool,
    /// The worker announces another digest than its output's.
    output_is_damaged: bool,
    /// The worker hears everything and says nothing.
    is_mute: bool,
    /// The worker never finishes.
    never_ends: bool,
    /// The broker has no room for anybody.
    is_full: bool,
}

/// What was seen.
#[derive(Default)]
struct Seen {
    /// Payload bytes by blob.
    chunk_bytes: BTreeMap<u16, usize>,
    links: BTreeSet<PeerId>,
    closed: Vec<Outcome>,
    lost: u32,
    aborted: u32,
    released: u32,
}

struct Stage {
    mesh: Mesh,
    seen: Arc<Mutex<Seen>>,
    worker: AbortHandle,
    _state: tempfile::TempDir,
}

impl Stage {
    async fn set(script: Script) -> Self {
        let context = Context::new(Security::None).unwrap();
        let listen = |limits| context.listen("tcp://127.0.0.1:0", Admit::Anyone, limits).unwrap().spawn();
        let (broker, broker_inbox) = listen(Limits::CONTROL);
        let (worker, worker_inbox) = listen(Limits::DIRECT);
        let seen = Arc::new(Mutex::new(Seen::default()));
        let state = tempfile::tempdir().unwrap();
        let options = Options { state_dir: state.path().to_owned(), ..Options::new(broker.endpoint()) };
        let worker_endpoint = worker.endpoint().to_owned();
        tokio::spawn(play_broker(script, broker, broker_inbox, worker_endpoint, seen.clone()));
        let worker = tokio::spawn(play_worker(script, worker, worker_inbox, seen.clone())).abort_handle();
        Self { mesh: Mesh::connect(options).await.unwrap(), seen, worker, _state: state }
    }

    async fn task(&self) -> Task {
        Task::new(Model::from_bytes("m.tflite", MODEL).await.unwrap()).input(Input::raw(vec![1, 2, 3]))
    }

    /// Waits until something was seen.
    async fn wait_until(&self, is_so: impl Fn(&Seen) -> bool) {
        let look = async {
            while !is_so(&self.seen.lock().unwrap()) {
                tokio::task::yield_now().await;
            }
        };
        tokio::time::timeout(PATIENCE, look).await.expect("it is seen in time");
    }

    fn model_bytes(&self) -> usize {
        self.seen.lock().unwrap().chunk_bytes.get(&MODEL_BLOB).copied().unwrap_or(0)
    }
}

async fn play_broker(
    script: Script,
    door: Door,
    mut inbox: Inbox<Received>,
    worker_endpoint: String,
    seen: Arc<Mutex<Seen>>,
) {
    while let Some(Received { peer, frame, .. }) = inbox.recv().await {
        let answer = match ClientToBroker::from_frame(&frame).unwrap() {
            ClientToBroker::Submit(submit) => match submit.standing {
                Standing::Asking if script.is_full => {
                    let outcome = Outcome::failed(ErrorCode::Busy, "the queue is full");
                    Some(BrokerToClient::Ended(Ended { task: submit.spec.task, outcome, retry_after_ms: Some(250) }))
                }
                Standing::Asking => Some(BrokerToClient::Grant(grant(&submit, script, &worker_endpoint))),
                Standing::Holding { .. } => None,
                Standing::Lost { outcome, .. } => {
                    seen.lock().unwrap().lost += 1;
                    Some(BrokerToClient::Ended(Ended { task: submit.spec.task, outcome, retry_after_ms: None }))
                }
            },
            ClientToBroker::Close(close) => {
                seen.lock().unwrap().closed.push(close.outcome);
                None
            }
            _ => None,
        };
        if let Some(answer) = answer {
            door.to(peer).send(answer.to_frame().unwrap()).await.unwrap();
        }
    }
}

fn grant(submit: &Submit, script: Script, worker_endpoint: &str) -> Grant {
    let id = AttemptId { task: submit.spec.task, attempt: Attempt(1) };
    let body = TicketBody {
        task: submit.spec.task,
        worker: WORKER,
        client: submit.spec.client,
        priority: submit.spec.priority,
        lane: submit.spec.lane.unwrap_or_default(),
        items: submit.spec.items,
        demands: submit.spec.demands,
        ..mesh_samples::ticket_body(0, 0, 0)
    };
    Grant {
        id,
        worker: WORKER,
        worker_name: "scripted".into(),
        worker_key: None,
        endpoints: vec![worker_endpoint.to_owned()],
        direction: Direction::ClientDials,
        window_bytes: WINDOW_BYTES,
        model_held: script.grants_say_held,
        predicted_ms: None,
        ticket: Ticket::sign(body, &TicketKey([1; 32])),
    }
}

/// An attempt as the worker knows it: which blobs it waits for.
struct Open {
    manifest: Manifest,
    missing: BTreeSet<u16>,
}

async fn play_worker(script: Script, door: Door, mut inbox: Inbox<Received>, seen: Arc<Mutex<Seen>>) {
    let (mut holds, mut holds_stage) = (script.worker_holds, false);
    let mut opened: BTreeMap<AttemptId, Open> = BTreeMap::new();
    while let Some(Received { peer, frame, .. }) = inbox.recv().await {
        seen.lock().unwrap().links.insert(peer);
        if script.is_mute {
            continue;
        }
        let message = ClientToWorker::from_frame(&frame).unwrap();
        let mut answers = Vec::new();
        match message {
            ClientToWorker::Open(open) => {
                let body = open.ticket.body;
                let id = body.attempt_id();
                let wants_stage = !holds_stage && !open.manifest.as_ref().unwrap().then.is_empty();
                let wanted = [(MODEL_BLOB, !holds), (1, true), (2, wants_stage)];
                let missing: BTreeSet<u16> =
                    wanted.into_iter().filter_map(|(blob, is_missing)| is_missing.then_some(blob)).collect();
                let needs = missing.iter().map(|blob| (*blob, 0)).collect();
                opened.insert(id, Open { manifest: open.manifest.unwrap(), missing });
                answers.push(WorkerToClient::Accept(Accept { id, needs, window_bytes: WINDOW_BYTES }).to_frame());
            }
            ClientToWorker::Chunk(Chunk { id, blob, offset, .. }) => {
                *seen.lock().unwrap().chunk_bytes.entry(blob).or_default() += frame.payload.len();
                let received_bytes = offset + frame.payload.len() as u64;
                answers.push(WorkerToClient::Credit(Credit { id, blob, received_bytes }).to_frame());
                let open = opened.get_mut(&id).unwrap();
                open.missing.remove(&blob);
                holds |= blob == MODEL_BLOB;
                holds_stage |= blob == 2;
                if open.missing.is_empty() {
                    assert_eq!(open.manifest.model.digest, Digest::of(MODEL));
                    answers.push(WorkerToClient::Progress(Progress { id, phase: Phase::Running }).to_frame());
                    answers.extend(if script.never_ends { Vec::new() } else { result(script, id) }.into_iter().map(Ok));
                }
            }
            ClientToWorker::Abort(_) => seen.lock().unwrap().aborted += 1,
            ClientToWorker::Release(_) => seen.lock().unwrap().released += 1,
            ClientToWorker::Credit(_) | ClientToWorker::Alive(_) => {}
        }
        for answer in answers {
            door.to(peer).send(answer.unwrap()).await.unwrap();
        }
    }
}

fn result(script: Script, id: AttemptId) -> Vec<Frame> {
    let digest = Digest::of(if script.output_is_damaged { b"another" } else { &OUTPUT });
    let output = OutputDecl { name: "y".into(), dtype: DType::F32, shape: vec![1], digest, size_bytes: 4 };
    let outcome = Outcome::Done { run_us: 5, load_us: 7 };
    let run = RunNote { stage: 0, rows: (0, 1), batch_rows: 3, dispatch: Dispatch::Full, run_us: 5 };
    let result = WorkerToClient::Result(RunResult {
        id,
        outcome,
        outputs: vec![output],
        runs: vec![run],
        held_us: 1,
        goes_on: false,
    });
    let chunk = WorkerToClient::Chunk(Chunk { id, blob: 1, offset: 0, inflated_bytes: None });
    let chunk = Frame { payload: OUTPUT.to_vec().into(), ..chunk.to_frame().unwrap() };
    vec![result.to_frame().unwrap(), chunk]
}

#[tokio::test]
async fn a_task_comes_back_with_its_verified_output() {
    let stage = Stage::set(Script::default()).await;

    let result = stage.mesh.submit(stage.task().await).await.unwrap().wait().await.unwrap();

    assert_eq!(result.outputs[0].bytes().unwrap()[..], OUTPUT);
    assert_eq!((result.timings.running, result.timings.loading), (Duration::from_micros(5), Duration::from_micros(7)));
    assert_eq!((result.runs[0].batch_rows, result.runs[0].dispatch), (3, Dispatch::Full));
    assert_eq!(result.lane, Some(Lane::Realtime));
    stage.wait_until(|seen| seen.released == 1 && seen.closed.len() == 1).await;
    assert_eq!(stage.seen.lock().unwrap().chunk_bytes, BTreeMap::from([(MODEL_BLOB, MODEL.len()), (1, 3)]));
}

#[tokio::test]
async fn a_held_model_costs_no_byte() {
    let stage = Stage::set(Script { grants_say_held: true, worker_holds: true, ..Script::default() }).await;
    stage.mesh.submit(stage.task().await).await.unwrap().wait().await.unwrap();
    assert_eq!(stage.model_bytes(), 0);
}

#[tokio::test]
async fn a_model_that_is_not_held_after_all_is_sent_when_asked_for() {
    let stage = Stage::set(Script { grants_say_held: true, ..Script::default() }).await;
    stage.mesh.submit(stage.task().await).await.unwrap().wait().await.unwrap();
    assert_eq!(stage.model_bytes(), MODEL.len());
}

#[tokio::test]
async fn neighbours_bring_their_model_once_and_share_a_connection() {
    // The broker does not learn in time that the worker has the model; the client saw it.
    let stage = Stage::set(Script::default()).await;
    let task = stage.task().await;
    let mut handles = Vec::new();
    for _ in 0..20 {
        handles.push(stage.mesh.submit(task.clone()).await.unwrap());
    }
    for handle in &mut handles {
        handle.wait().await.unwrap();
    }
    assert_eq!(stage.model_bytes(), MODEL.len());
    assert_eq!(stage.seen.lock().unwrap().links.len(), 1);
}

#[tokio::test]
async fn whoever_waits_for_a_neighbours_model_learns_that_their_worker_died() {
    let stage = Stage::set(Script { is_mute: true, ..Script::default() }).await;
    let task = stage.task().await;
    let mut handles = [stage.mesh.submit(task.clone()).await.unwrap(), stage.mesh.submit(task).await.unwrap()];
    for handle in &mut handles {
        assert!(matches!(handle.next().await, Update::News(News::Placed { .. })));
    }
    stage.wait_until(|seen| !seen.links.is_empty()).await;

    stage.worker.abort();

    for handle in &mut handles {
        let end = tokio::time::timeout(PATIENCE, handle.wait()).await.expect("the worker is given up");
        assert!(matches!(end.unwrap_err().code(), Some(ErrorCode::WorkerLost | ErrorCode::Unreachable)));
    }
}

#[tokio::test]
async fn a_later_stages_model_is_sent_once_and_only_when_asked_for() {
    let stage = Stage::set(Script { worker_holds: true, grants_say_held: true, ..Script::default() }).await;
    let decode: &[u8] = b"\x1c\0\0\0TFL3 and a decoder";
    let task = stage.task().await.then("decode", Model::from_bytes("decode.tflite", decode).await.unwrap());
    let mut handles = Vec::new();
    for _ in 0..10 {
        handles.push(stage.mesh.submit(task.clone()).await.unwrap());
    }
    for handle in &mut handles {
        handle.wait().await.unwrap();
    }
    let stage_bytes = stage.seen.lock().unwrap().chunk_bytes.get(&2).copied();
    assert_eq!((stage.model_bytes(), stage_bytes), (0, Some(decode.len())));
}

#[tokio::test]
async fn a_full_mesh_says_when_to_come_again() {
    let stage = Stage::set(Script { is_full: true, ..Script::default() }).await;

    let error = stage.mesh.submit(stage.task().await).await.unwrap().wait().await.unwrap_err();

    assert_eq!(error.code(), Some(ErrorCode::Busy));
    assert!(
        matches!(error, TaskError::Busy { retry_after, .. } if retry_after == Duration::from_millis(250)),
        "{error}"
    );
}

#[tokio::test]
async fn an_output_that_is_not_the_announced_one_is_not_believed() {
    let stage = Stage::set(Script { output_is_damaged: true, ..Script::default() }).await;

    let error = stage.mesh.submit(stage.task().await).await.unwrap().wait().await.unwrap_err();

    assert_eq!(error.code(), Some(ErrorCode::BadChunk), "{error}");
    assert!(error.to_string().contains("damaged"), "{error}");
    assert_eq!(stage.seen.lock().unwrap().lost, 1, "another worker was asked for");
}

#[tokio::test]
async fn a_task_taken_back_is_stopped_at_worker_and_broker() {
    let stage = Stage::set(Script { never_ends: true, ..Script::default() }).await;
    let mut handle = stage.mesh.submit(stage.task().await).await.unwrap();
    stage.wait_until(|seen| seen.chunk_bytes.contains_key(&1)).await;

    handle.cancel().await;

    assert_eq!(handle.wait().await.unwrap_err(), TaskError::Cancelled);
    stage.wait_until(|seen| seen.aborted == 1 && seen.closed == [Outcome::Cancelled]).await;
}

#[tokio::test]
async fn a_task_whose_handle_is_dropped_is_taken_back() {
    let stage = Stage::set(Script { never_ends: true, ..Script::default() }).await;
    let handle = stage.mesh.submit(stage.task().await).await.unwrap();
    stage.wait_until(|seen| seen.chunk_bytes.contains_key(&1)).await;

    drop(handle);

    stage.wait_until(|seen| seen.aborted == 1 && seen.closed == [Outcome::Cancelled]).await;
}

#[tokio::test]
async fn closing_takes_back_what_is_still_attached_before_it_returns() {
    let stage = Stage::set(Script { never_ends: true, ..Script::default() }).await;
    let mut handle = stage.mesh.submit(stage.task().await).await.unwrap();
    stage.wait_until(|seen| seen.chunk_bytes.contains_key(&1)).await;

    stage.mesh.clone().close().await;

    assert_eq!(handle.wait().await.unwrap_err(), TaskError::Cancelled);
    stage.wait_until(|seen| seen.aborted == 1).await;
    assert!(stage.mesh.submit(stage.task().await).await.is_err(), "nothing more is taken");
}
