//! Lists that do not fit in one answer: a broker that gives them two rows at a time.

#![expect(clippy::unwrap_used, reason = "a test says what it expects by failing")]

use mesh_samples::{task_id, task_number, worker_id};
use mesh_sdk::{
    AskError, Attempt, Digest, JobId, Lane, Mesh, ModelCost, ModelFormat, ModelRef, ModelView, Options, Packing,
    TaskStanding, TaskView, Wishes,
};
use mesh_transport::{Admit, Context, Door, Inbox, Limits, Received, Security};
use proto_msgs::{Answer, AnswerBody, BrokerToClient, ClientToBroker, Question};

const PAGE: usize = 2;

fn task(number: u32) -> TaskView {
    TaskView {
        task: task_id(number),
        job: JobId::from_bytes([1; 16]),
        model_name: "m".to_owned(),
        model: ModelRef { digest: Digest::of(b"m"), size_bytes: 1, format: ModelFormat::Onnx },
        input_bytes: 1,
        items: 1,
        priority: 50,
        lane: Lane::Realtime,
        detached: false,
        wishes: Wishes::default(),
        then: Vec::new(),
        standing: TaskStanding::Placed,
        attempt: Attempt(1),
        worker: None,
        submitted_unix_ms: 0,
        ended_unix_ms: None,
    }
}

fn model(worker: u32, model: u8) -> ModelView {
    let cost = ModelCost {
        model: Digest::from_bytes([model; 32]),
        packing: Packing::On,
        best_batch: 4,
        next_batch: 4,
        curve: vec![(1, 100)],
        load_us: 0,
        dispatched: [0; 4],
    };
    ModelView { worker: worker_id(worker), worker_name: "w".to_owned(), warm: true, cost }
}

/// Five tasks, newest first; two models at each of two workers, and one at a third.
fn answer(question: &Question) -> AnswerBody {
    match question {
        Question::Tasks { before } => {
            let known = (1..=5).rev().map(task).filter(|view| before.is_none_or(|before| view.task < before));
            AnswerBody::Tasks(known.take(PAGE).collect())
        }
        Question::Models { after } => {
            let all = [(1, 1), (1, 2), (2, 1), (2, 2), (3, 1)].map(|(worker, of)| model(worker, of)).into_iter();
            let behind = all.filter(|view| after.is_none_or(|after| (view.worker, view.cost.model) > after));
            AnswerBody::Models(behind.take(PAGE).collect())
        }
        _ => AnswerBody::NotFound,
    }
}

async fn play_broker(door: Door, mut inbox: Inbox<Received>) {
    while let Some(Received { peer, frame, .. }) = inbox.recv().await {
        if let ClientToBroker::Ask(ask) = ClientToBroker::from_frame(&frame).unwrap() {
            let body = answer(&ask.question);
            let answer = BrokerToClient::Answer(Answer { request: ask.request, body });
            door.to(peer).send(answer.to_frame().unwrap()).await.unwrap();
        }
    }
}

async fn mesh() -> (Mesh, tempfile::TempDir) {
    let context = Context::new(Security::None).unwrap();
    let (door, inbox) = context.listen("tcp://127.0.0.1:0", Admit::Anyone, Limits::CONTROL).unwrap().spawn();
    let state = tempfile::tempdir().unwrap();
    let options = Options { state_dir: state.path().to_owned(), ..Options::new(door.endpoint()) };
    tokio::spawn(play_broker(door, inbox));
    (Mesh::connect(options).await.unwrap(), state)
}

#[tokio::test]
async fn a_list_is_asked_for_page_by_page_to_its_end() {
    let (mesh, _state) = mesh().await;
    let tasks: Vec<u32> = mesh.tasks(100).await.unwrap().iter().map(|view| task_number(view.task)).collect();
    assert_eq!(tasks, [5, 4, 3, 2, 1]);
    let models = mesh.models().await.unwrap();
    assert_eq!(models.len(), 5);
    assert!(models.is_sorted_by_key(|view| (view.worker, view.cost.model)), "in the order in which they were given");
}

#[tokio::test]
async fn no_more_rows_come_back_than_were_wanted() {
    let (mesh, _state) = mesh().await;
    let tasks: Vec<u32> = mesh.tasks(3).await.unwrap().iter().map(|view| task_number(view.task)).collect();
    assert_eq!(tasks, [5, 4, 3]);
}

#[tokio::test]
async fn an_answer_to_another_question_is_not_taken_for_an_empty_list() {
    let (mesh, _state) = mesh().await;
    let error = mesh.workers().await.unwrap_err();
    assert!(matches!(&error, AskError::Version(text) if text.contains("another version")), "{error}");
}
