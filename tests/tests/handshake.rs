//! One handshake, then direct data: messages between real processes, counted on the wire.

use std::{
    ops::Range,
    time::{Duration, Instant},
};

use bytes::Bytes;
use mesh_tests::{Job, Mesh, PATIENCE, Proxy, npy::Array, onnx, proxy::Side, redis::free_port, wait_until, zmtp::Peer};
use proto_msgs::{ClientToWorker, ErrorCode, Frame, WorkerToClient, limits::WINDOW_BYTES};

const SUBMIT: u16 = 1;
const ASK: u16 = 3;
const GRANT: u16 = 100;
const ANSWER: u16 = 104;
const REGISTER: u16 = 200;
const HEARTBEAT: u16 = 201;
const HEARTBEAT_ACK: u16 = 300;
const OPEN: u16 = 400;
const CHUNK_OF_INPUT: u16 = 401;
const CHUNK_OF_OUTPUT: u16 = 506;

/// Time after which a client asks the broker again.
const ASKS_AGAIN_AFTER: Duration = Duration::from_millis(500);

/// Kind numbers of the messages that this side sent before the moment.
fn kinds_until(proxy: &Proxy, from: Side, moment: Instant) -> Vec<u16> {
    proxy
        .seen()
        .iter()
        .filter(|seen| seen.from == from && seen.at <= moment)
        .filter_map(|seen| seen.message.kind)
        .collect()
}

#[test]
fn one_request_and_one_answer_stand_before_the_first_data_byte() {
    let mesh = Mesh::start();
    let client_to_broker = Proxy::before(mesh.endpoint());
    let worker_to_broker = Proxy::before(mesh.endpoint());
    let (door, _worker) = mesh.worker_behind_proxy("w1", &["--broker", &worker_to_broker.endpoint()]);
    let job = Job::heavy(&mesh, 2, 1);

    let began = Instant::now();
    job.start_at(&mesh, &client_to_broker.endpoint(), &[]).done(&job);

    let seen = door.seen();
    let first_data = seen.iter().find(|seen| seen.message.kind == Some(CHUNK_OF_INPUT)).expect("a chunk was sent").at;
    // A client without an answer asks again, but only so often, and each time it is given the same place.
    let again = first_data.duration_since(began).as_millis() / ASKS_AGAIN_AFTER.as_millis();
    for (side, kind) in [(Side::Dialler, SUBMIT), (Side::Listener, GRANT)] {
        let kinds = kinds_until(&client_to_broker, side, first_data);
        assert!(kinds.iter().all(|its| *its == kind), "{kinds:?}");
        assert!((1..=1 + again).contains(&(kinds.len() as u128)), "{kinds:?}, and time to ask {again} times more");
    }

    // The worker learns of the task only from the client's ticket: worker and broker exchange only heartbeats.
    let beats = |side| kinds_until(&worker_to_broker, side, first_data);
    assert!(beats(Side::Dialler).iter().all(|kind| [REGISTER, HEARTBEAT].contains(kind)));
    assert!(beats(Side::Listener).iter().all(|kind| *kind == HEARTBEAT_ACK));
}

/// With several items the client first asks how large the mesh is: that decides how many items share a task.
#[test]
fn a_submit_of_many_items_asks_one_question_before_its_first_task() {
    let mesh = Mesh::start();
    let client_to_broker = Proxy::before(mesh.endpoint());
    let (door, _worker) = mesh.worker_behind_proxy("w1", &[]);
    let model = mesh.file("add_one.onnx", &onnx::add_one());
    let items = mesh.folder().join("items");
    std::fs::create_dir(&items).unwrap();
    for item in 0..12_u16 {
        Array::of_f32(&[1], &[f32::from(item)]).write(&items.join(format!("{item}.npy")));
    }

    let arguments = ["submit", &model, items.to_str().unwrap()];
    let command = mesh.client_command_at(&client_to_broker.endpoint(), &arguments);
    mesh_tests::Submission::start(command).wait().succeeded();

    let seen = door.seen();
    let first_data = seen.iter().find(|seen| seen.message.kind == Some(CHUNK_OF_INPUT)).expect("a chunk was sent").at;
    let asked = kinds_until(&client_to_broker, Side::Dialler, first_data);
    let told = kinds_until(&client_to_broker, Side::Listener, first_data);
    assert!(asked.starts_with(&[ASK, SUBMIT]), "{asked:?}");
    assert!(told.starts_with(&[ANSWER, GRANT]), "{told:?}");
}

#[test]
fn the_data_follows_the_opening_message_without_waiting_for_an_answer() {
    let mesh = Mesh::start();
    let (door, _worker) = mesh.worker_behind_proxy("w1", &[]);
    let job = Job::heavy(&mesh, 2, 7);
    let size_bytes = std::fs::metadata(&job.model).unwrap().len();

    door.withhold_answers(true);
    let started = job.start(&mesh, &[]);
    // The amount that is sent without an answer on a link of unknown speed.
    wait_until("a part of the model to be sent", PATIENCE, || door.payload_bytes(CHUNK_OF_INPUT) > size_bytes / 4);
    assert_eq!(door.worker_said(), [], "no answer came through");
    assert_eq!(door.seen()[0].message.kind, Some(OPEN));

    door.withhold_answers(false);
    started.done(&job);
}

#[test]
fn a_captured_ticket_that_was_changed_opens_no_door() {
    let mesh = Mesh::start();
    let (door, _worker) = mesh.worker_behind_proxy("w1", &[]);
    Job::small(&mesh).run(&mesh);
    let captured = Frame { head: door.seen()[0].message.head.clone(), payload: Bytes::new() };
    let Ok(ClientToWorker::Open(mut open)) = ClientToWorker::from_frame(&captured) else {
        panic!("no opening message")
    };
    let mut thief = Peer::connect(&door.address()).unwrap();
    let mut refusal = |frame: &Frame| {
        thief.send(frame).unwrap();
        let answer = thief.recv(PATIENCE).unwrap().expect("an answer");
        let Ok(WorkerToClient::Refuse(refuse)) = WorkerToClient::from_frame(&answer) else { panic!("let in") };
        refuse.code
    };

    open.ticket.mac[0] ^= 1;
    assert_eq!(refusal(&ClientToWorker::Open(open).to_frame().unwrap()), ErrorCode::BadTicket);
    // The unchanged ticket is valid but useless: its attempt is over.
    assert_ne!(refusal(&captured), ErrorCode::BadTicket);
}

/// The same model with another input, since equal inputs are not sent twice either.
fn other_input(mesh: &Mesh, job: &Job) -> Job {
    let input = mesh.array("two.npy", &Array::of_f32(&[1], &[2.0]));
    Job { input, expected: vec![job.expected[0] + 1.0], ..job.clone() }
}

#[test]
fn a_model_that_the_worker_holds_costs_no_byte() {
    let mesh = Mesh::start();
    let (door, _worker) = mesh.worker_behind_proxy("w1", &[]);
    let job = Job::heavy(&mesh, 2, 2);
    let first = job.run(&mesh);
    let before = door.payload_bytes(CHUNK_OF_INPUT);
    assert!(before > 2 << 20 && first.sent_bytes() > 2 << 20, "the model was sent once");

    let second = other_input(&mesh, &job).run(&mesh);

    let input_bytes = 4;
    assert_eq!(door.payload_bytes(CHUNK_OF_INPUT) - before, input_bytes, "only the input was sent");
    assert_eq!(second.sent_bytes(), input_bytes);
}

#[test]
fn a_model_is_still_held_after_a_restart_of_the_worker() {
    let mesh = Mesh::start();
    let (door, mut worker) = mesh.worker_behind_proxy("w1", &[]);
    let job = Job::heavy(&mesh, 2, 3);
    job.run(&mesh);
    let before = door.payload_bytes(CHUNK_OF_INPUT);

    worker.restart();
    let holds = || mesh.ask(&["workers"])["workers"][0]["held_models"].as_array().is_some_and(|held| held.len() == 1);
    wait_until("the worker to say what it holds", PATIENCE, holds);
    other_input(&mesh, &job).run(&mesh);

    assert_eq!(door.payload_bytes(CHUNK_OF_INPUT) - before, 4);
}

#[test]
fn a_worker_that_cannot_be_dialled_dials() {
    let mesh = Mesh::start();
    let worker_to_broker = Proxy::before(mesh.endpoint());
    let _worker = mesh.worker_with("nat", &["--no-listen", "--broker", &worker_to_broker.endpoint()]);
    let job = Job::heavy(&mesh, 20, 4);

    let done = job.run(&mesh);

    assert_eq!(done.worker(), "nat");
    let introductions = worker_to_broker.count(301);
    assert!(introductions >= 1, "the broker told the worker to dial");
    // No chunk went through the broker, nor to an address of the worker, which has none: the worker dialled.
    assert_eq!(worker_to_broker.count(CHUNK_OF_INPUT), 0);
}

/// A proxy at which workers dial a client, and the client's arguments for it.
fn door_of_client() -> (Proxy, [String; 6]) {
    let port = free_port();
    let proxy = Proxy::before(&format!("127.0.0.1:{port}"));
    let [direction, listen, advertise] = ["--direction", "--listen", "--advertise"].map(str::to_owned);
    let listened = format!("tcp://127.0.0.1:{port}");
    let arguments = [direction, "worker-dials".into(), listen, listened, advertise, proxy.address()];
    (proxy, arguments)
}

#[test]
fn a_worker_that_is_told_to_dial_does_and_a_broken_link_costs_at_most_one_window() {
    let mesh = Mesh::start();
    let (unused, _worker) = mesh.worker_behind_proxy("w1", &[]);
    let (door, arguments) = door_of_client();
    let job = Job::heavy(&mesh, 64, 8);
    let size_bytes = std::fs::metadata(&job.model).unwrap().len();
    door.throttle(Some(32 << 20));

    let started = job.start(&mesh, &arguments.each_ref().map(String::as_str));
    wait_until("half the model to be sent", PATIENCE, || door.bytes_from(Side::Listener) > 30 << 20);
    door.cut();
    assert!(door.bytes_from(Side::Listener) < 60 << 20, "it was on its way");
    door.throttle(None);
    let done = started.done(&job);

    assert!(door.connections() >= 2, "it was to be made again");
    assert_eq!((unused.connections(), done.attempts()), (0, 1), "only the worker dials, and the place stays");
    let sent_bytes = door.payload_bytes(CHUNK_OF_INPUT);
    assert!(
        (size_bytes..=size_bytes + u64::from(WINDOW_BYTES) + 4).contains(&sent_bytes),
        "{sent_bytes} bytes for a model of {size_bytes}"
    );
}

#[test]
fn the_slow_line_of_one_client_keeps_no_other_client_from_sending_the_same_model() {
    let mesh = Mesh::start();
    let _worker = mesh.worker_with("w1", &["--slots", "2"]);
    let (slow_line, arguments) = door_of_client();
    slow_line.throttle(Some(200 << 10));
    let job = Job::heavy(&mesh, 20, 12);
    let size_bytes = std::fs::metadata(&job.model).unwrap().len();
    let slow = job.start(&mesh, &arguments.each_ref().map(String::as_str));
    wait_until("the model to be on its way", PATIENCE, || slow_line.payload_bytes(CHUNK_OF_INPUT) > 0);

    job.start_as(&mesh, "another", &[]).done(&job);

    let sent_bytes = slow_line.bytes_from(Side::Listener);
    assert!(sent_bytes < size_bytes / 2, "the other client waited for {sent_bytes} bytes");
    slow_line.throttle(None);
    assert_eq!(slow.done(&job).attempts(), 1, "what came twice harms nobody");
}

#[test]
fn where_there_is_room_for_one_copy_of_a_model_the_other_client_waits_for_it_however_slow_it_is() {
    let mesh = Mesh::start();
    let _worker = mesh.worker_with("w1", &["--slots", "2", "--quota", "30MiB"]);
    let (slow_line, arguments) = door_of_client();
    slow_line.throttle(Some(200 << 10));
    let job = Job::heavy(&mesh, 20, 13);
    let slow = job.start(&mesh, &arguments.each_ref().map(String::as_str));
    wait_until("the model to be on its way", PATIENCE, || slow_line.payload_bytes(CHUNK_OF_INPUT) > 0);

    let waiting = job.start_as(&mesh, "another", &[]);
    // Seconds later it is clear that the line is slow.
    wait_until("more of the model", PATIENCE, || slow_line.payload_bytes(CHUNK_OF_INPUT) > 1 << 20);
    slow_line.throttle(None);

    assert_eq!(slow.done(&job).attempts(), 1);
    let waited = waiting.done(&job);
    assert_eq!(waited.attempts(), 1, "it is not sent elsewhere");
    // What a client sends with its opening message, it sends before it can hear that it need not.
    assert!(waited.sent_bytes() < 10 << 20, "{} bytes of a model that comes already", waited.sent_bytes());
}

#[test]
fn a_task_waits_for_room_in_the_quota_that_another_has_at_present_however_often_it_is_refused() {
    let mesh = Mesh::start();
    let _worker = mesh.worker_with("w1", &["--slots", "2", "--quota", "30MiB"]);
    let (slow_line, arguments) = door_of_client();
    slow_line.throttle(Some(200 << 10));
    let (first, second) = (Job::heavy(&mesh, 20, 14), Job::heavy(&mesh, 20, 15));
    let slow = first.start(&mesh, &arguments.each_ref().map(String::as_str));
    wait_until("the model to be on its way", PATIENCE, || slow_line.payload_bytes(CHUNK_OF_INPUT) > 0);

    let waiting = second.start_as(&mesh, "another", &[]);
    wait_until("more refusals than failures are forgiven", PATIENCE, || {
        mesh.tasks_of("another").first().is_some_and(|task| task["attempts"].as_u64() > Some(4))
    });
    slow_line.throttle(None);

    slow.done(&first);
    waiting.done(&second);
}

#[test]
fn a_worker_that_cannot_dial_where_it_is_told_is_named_the_address() {
    let mesh = Mesh::start();
    let _worker = mesh.worker("w1");
    let arguments = ["--direction", "worker-dials", "--advertise", "127.0.0.1:1"];
    let answer = Job::small(&mesh).start(&mesh, &arguments).answer().failed_with(6, "127.0.0.1:1");
    answer.failed_with(6, "did not connect to tcp://127.0.0.1:1");
}

/// Bytes sent of a 64 MiB model, and its size. `zeros` is the range of zeros in each 20 KiB.
fn sent_of(zeros: Range<usize>, seed: u16) -> (u64, u64) {
    let mesh = Mesh::start();
    let (door, _worker) = mesh.worker_behind_proxy("w1", &[]);
    let model = onnx::heavy_with_zeros(64 << 20, seed, zeros);
    let input = mesh.array("one.npy", &Array::of_f32(&[1], &[1.0]));
    let expected = vec![f64::from(seed) + 1.0];
    let job = Job { model: mesh.file("model.onnx", &model), input, expected };
    door.throttle(Some(16 << 20));
    job.start(&mesh, &[]).done(&job);
    (door.payload_bytes(CHUNK_OF_INPUT), model.len() as u64)
}

#[test]
fn what_compresses_well_is_compressed_on_a_slow_link() {
    // The client measures how fast it compresses. If the machine stands still just then, it does not compress, rightly;
    // but that is not the usual case. One window is sent before the link's speed is known.
    let is_half = |(sent_bytes, size_bytes): &(u64, u64)| *sent_bytes < size_bytes / 2;
    let compressed = (0..5).map(|_| sent_of(0..20, 9)).filter(is_half).take(2).count();
    assert!(compressed == 2, "compressed {compressed} times of five");
}

#[test]
fn what_hardly_compresses_is_sent_as_it_is() {
    let (sent_bytes, size_bytes) = sent_of(0..1, 10);
    assert_eq!(sent_bytes, size_bytes + 4, "a gain of a twentieth is not worth the work");
}

#[test]
fn a_link_that_breaks_is_mended_and_at_most_one_window_is_sent_again() {
    let mesh = Mesh::start();
    let (door, _worker) = mesh.worker_behind_proxy("w1", &[]);
    let job = Job::heavy(&mesh, 64, 5);
    let size_bytes = std::fs::metadata(&job.model).unwrap().len();
    door.cut_after(30 << 20);

    let done = job.run(&mesh);

    assert!(door.has_cut(), "the link was to break");
    assert!(door.connections() >= 2, "it was to be made again");
    assert_eq!(done.attempts(), 1, "a broken link is no reason to go elsewhere");
    let sent_bytes = door.payload_bytes(CHUNK_OF_INPUT);
    assert!(
        sent_bytes <= size_bytes + u64::from(WINDOW_BYTES) + 4,
        "{} bytes were sent again",
        sent_bytes - size_bytes
    );
}

#[test]
fn a_result_goes_on_where_the_link_broke_and_no_more_than_a_window_comes_again() {
    let mesh = Mesh::start();
    let (door, _worker) = mesh.worker_behind_proxy("w1", &[]);
    let job = Job::voluminous(&mesh, 40);
    // Seconds lie between seeing a part of the result and its end.
    door.throttle_from(Side::Listener, 4 << 20);
    let started = job.start(&mesh, &[]);
    // Enough of it that more than a window would come again from its beginning.
    wait_until("a part of the result", PATIENCE, || door.payload_bytes(CHUNK_OF_OUTPUT) > 20 << 20);
    let connections = door.connections();
    door.cut();
    let sent_bytes = door.payload_bytes(CHUNK_OF_OUTPUT);
    assert!(sent_bytes < 40 << 20, "it was on its way");
    door.throttle(None);

    let done = started.done(&job);

    assert!(door.connections() > connections, "it was to be made again");
    assert_eq!(done.attempts(), 1, "a broken link is no reason to go elsewhere");
    let (size_bytes, sent_bytes) = (40 << 20, door.payload_bytes(CHUNK_OF_OUTPUT));
    assert!(sent_bytes <= size_bytes + u64::from(WINDOW_BYTES), "{} bytes came again", sent_bytes - size_bytes);
}

#[test]
fn a_silent_link_is_noticed_and_mended() {
    let mesh = Mesh::start();
    let (door, _worker) = mesh.worker_behind_proxy("w1", &[]);
    door.throttle(Some(20 << 20));
    let job = Job::heavy(&mesh, 32, 6);
    let started = job.start(&mesh, &[]);
    wait_until("a part of the model to arrive", PATIENCE, || door.bytes_from(Side::Dialler) > 4 << 20);

    door.stall();
    // Neither end gets an error: both notice the silence, and the client reconnects as soon as it can.
    let connections = door.connections();
    wait_until("a new connection", PATIENCE, || door.connections() > connections);
    door.resume();
    door.throttle(None);

    started.done(&job);
}
