//! How an attempt is opened, and what happens to its transfers if it ends first.

use mesh_samples::{ticket_body, worker_id};
use proto_msgs::{Attempt, AttemptId, ClientId, DType, Direction, Outcome, OutputDecl, TaskId, Ticket, TicketKey};

use super::*;
use crate::{Input, Model, Task};

const ID: AttemptId = AttemptId { task: TaskId::from_bytes([3; 16]), attempt: Attempt(1) };

fn session(payload: Option<Arc<Payload>>) -> Session {
    let ticket = Ticket::sign(ticket_body(0, 0, 0), &TicketKey([1; 32]));
    let grant = Grant {
        id: ID,
        worker: worker_id(0),
        worker_name: "w0".to_owned(),
        worker_key: None,
        endpoints: Vec::new(),
        direction: Direction::ClientDials,
        window_bytes: limits::WINDOW_BYTES,
        model_held: false,
        predicted_ms: None,
        ticket,
    };
    Session::new(Box::new(grant), payload, Resume::No)
}

#[tokio::test]
async fn a_large_output_that_nobody_wants_any_more_leaves_no_file_though_it_is_whole() {
    let state = tempfile::tempdir().unwrap();
    let spool = Spool::new(state.path()).unwrap();
    let bytes = vec![7; taking::MEMORY_BYTES_MAX as usize + 1];
    let output = OutputDecl {
        name: "y".to_owned(),
        dtype: DType::U8,
        shape: vec![bytes.len() as u64],
        size_bytes: bytes.len() as u64,
        digest: blake3::hash(&bytes).into(),
    };
    let result = RunResult {
        id: ID,
        outcome: Outcome::Done { run_us: 1, load_us: 0 },
        outputs: vec![output],
        runs: Vec::new(),
        held_us: 1,
        goes_on: false,
    };
    let (happened, mut inbox) = mpsc::channel(64);
    let mut session = session(None);
    session.take(&result, &spool, &happened).unwrap();
    let files = || std::fs::read_dir(spool.place(0).path().parent().unwrap()).unwrap().count() - 1;
    assert_eq!(files(), 1, "beside the lock");

    let mut offset = 0;
    let whole = loop {
        // A full window first, and the last byte when there is room for it.
        for piece in bytes[offset..].chunks(limits::CHUNK_BYTES_MAX).take(16) {
            let chunk = Chunk { id: ID, blob: 1, offset: offset as u64, inflated_bytes: None };
            session.chunk(chunk, bytes::Bytes::copy_from_slice(piece)).unwrap();
            offset += piece.len();
        }
        match inbox.recv().await.unwrap() {
            Happened::Arrived { arrival, .. } if matches!(arrival, Arrival::Complete { .. }) => break arrival,
            Happened::Arrived { arrival: Arrival::Credit { .. }, .. } => {}
            other => panic!("{other:?}"),
        }
    };
    // Cancelled now: the event comes too late for anyone.
    drop((session, whole));

    assert_eq!(files(), 0);
}

#[tokio::test]
async fn a_worker_that_has_dialled_in_is_not_late_while_a_neighbour_brings_the_model() {
    let model = Model::from_bytes("m.tflite", &b"\x1c\0\0\0TFL3"[..]).await.unwrap();
    let (_, payload) = Task::new(model)
        .input(Input::raw(vec![1]))
        .prepare(ID.task, (ClientId::from_bytes([1; 16]), None), None)
        .unwrap();
    let mut session = session(Some(Arc::new(payload)));
    session.wait_for_dial_in(1);
    assert!(session.waits_for_dial_in(1) && !session.waits_for_dial_in(2));

    // The worker dials in, and another attempt on its link sends the model.
    assert!(session.be_patient(|_| true));

    assert!(!session.waits_for_dial_in(1));
    assert_eq!(session.to_open(), Some(Resume::No), "as soon as the model is there");
}
