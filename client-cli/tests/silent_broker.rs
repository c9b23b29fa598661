//! The program at a broker that lets it in and says nothing, or little.

#![expect(clippy::unwrap_used, reason = "a test says what it expects by failing")]

use std::{
    fs::{self, File},
    io::Read,
    path::Path,
    process::Stdio,
    time::Duration,
};

use mesh_transport::{Admit, Context, Door, Inbox, Limits, Received, Security};
use nix::{
    fcntl::{FcntlArg, fcntl},
    sys::{
        signal::{Signal, kill},
        stat::Mode,
    },
    unistd::{Pid, mkfifo},
};
use proto_msgs::{
    Answer, AnswerBody, Attempt, BrokerToClient, ClientToBroker, Digest, Frame, JobId, Lane, ModelFormat, ModelRef,
    TaskId, TaskStanding, TaskView, Wishes,
};
use tokio::{
    process::{Child, Command},
    time::timeout,
};

/// Much less than the hour that the program is allowed, and much more than it needs.
const PATIENCE: Duration = Duration::from_secs(30);

/// The smallest size of a pipe.
const PAGE_BYTES: i32 = 4096;

fn broker() -> (Door, Inbox<Received>) {
    let context = Context::new(Security::None).unwrap();
    context.listen("tcp://127.0.0.1:0", Admit::Anyone, Limits::CONTROL).unwrap().spawn()
}

fn client(broker: &Door, folder: &Path, arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_mesh-client"));
    command.args(["--broker", broker.endpoint(), "--timeout", "1h", "--state-dir", "state"]).args(arguments);
    command.current_dir(folder).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    command.env_remove("RUST_LOG").kill_on_drop(true);
    command
}

async fn end_of(mut child: Child) -> Option<i32> {
    timeout(PATIENCE, child.wait()).await.expect("it ends").unwrap().code()
}

/// The exit code of a client that has asked for something and is then told to stop.
async fn interrupted(arguments: &[&str]) -> Option<i32> {
    let (broker, mut heard) = broker();
    let folder = tempfile::tempdir().unwrap();
    for input in ["model.tflite", "a.bin", "b.bin"] {
        fs::write(folder.path().join(input), b"\x1c\0\0\0TFL3").unwrap();
    }
    let child = client(&broker, folder.path(), arguments).spawn().unwrap();
    timeout(PATIENCE, heard.recv()).await.expect("it asks").unwrap();
    kill(Pid::from_raw(child.id().unwrap().cast_signed()), Signal::SIGINT).unwrap();
    end_of(child).await
}

#[tokio::test]
async fn one_ctrl_c_ends_whatever_it_waits_for() {
    let task = "01890000-0000-7000-8000-000000000000";
    assert_eq!(interrupted(&["status", task]).await, Some(130));
    assert_eq!(interrupted(&["result", task]).await, Some(130));
    assert_eq!(interrupted(&["wait", task]).await, Some(130));
    assert_eq!(interrupted(&["submit", "model.tflite", "a.bin", "b.bin"]).await, Some(130));
    assert_eq!(interrupted(&["workers", "--watch"]).await, Some(0));
}

/// A pipe whose reader has left.
fn unread() -> Stdio {
    let (_reader, writer) = std::io::pipe().unwrap();
    writer.into()
}

/// Tells the client to stop, and returns its exit code.
async fn told(child: Child, signal: Signal) -> Option<i32> {
    kill(Pid::from_raw(child.id().unwrap().cast_signed()), signal).unwrap();
    end_of(child).await
}

#[tokio::test]
async fn who_reads_a_pipe_that_nobody_writes_to_can_be_stopped() {
    let (broker, heard) = broker();
    let folder = tempfile::tempdir().unwrap();
    for input in ["model.tflite", "a.bin"] {
        fs::write(folder.path().join(input), b"\x1c\0\0\0TFL3").unwrap();
    }
    let pipe = folder.path().join("pipe");
    mkfifo(&pipe, Mode::S_IRWXU).unwrap();
    let serving = broker.clone();
    tokio::spawn(async move { answer(&serving, heard, nothing).await });
    let stopped = async |arguments: &[&str], signal| {
        let child = client(&broker, folder.path(), arguments).spawn().unwrap();
        let pipe = pipe.clone();
        // This opens as soon as the client does, and nothing is ever written.
        let opening = tokio::task::spawn_blocking(move || File::options().write(true).open(pipe).unwrap());
        let _writer = timeout(PATIENCE, opening).await.expect("it reads").unwrap();
        told(child, signal).await
    };
    assert_eq!(stopped(&["submit", "model.tflite", "pipe"], Signal::SIGTERM).await, Some(143));
    assert_eq!(stopped(&["submit", "model.tflite", "a.bin", "pipe"], Signal::SIGTERM).await, Some(143));
    assert_eq!(stopped(&["submit", "model.tflite", "pipe", "a.bin"], Signal::SIGINT).await, Some(130));
    assert_eq!(stopped(&["bench", "model.tflite", "pipe"], Signal::SIGINT).await, Some(130));
}

fn task(number: u8) -> TaskView {
    TaskView {
        task: TaskId::from_bytes([255 - number; 16]),
        job: JobId::from_bytes([1; 16]),
        model_name: "model".to_owned(),
        model: ModelRef { digest: Digest::from_bytes([1; 32]), size_bytes: 8, format: ModelFormat::TfLite },
        input_bytes: 8,
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

#[tokio::test]
async fn who_prints_what_nobody_reads_can_be_stopped() {
    let (broker, heard) = broker();
    let folder = tempfile::tempdir().unwrap();
    let tasks = || AnswerBody::Tasks((0..40).map(task).collect());
    let serving = broker.clone();
    tokio::spawn(async move { answer(&serving, heard, tasks).await });
    for (signal, code) in [(Signal::SIGTERM, 143), (Signal::SIGINT, 130)] {
        let (mut reader, writer) = std::io::pipe().unwrap();
        fcntl(&reader, FcntlArg::F_SETPIPE_SZ(PAGE_BYTES)).unwrap();
        let asking = client(&broker, folder.path(), &["tasks", "--json"]).stdout(writer).spawn().unwrap();
        // It prints several pages. The first one is here, and then the pipe is full.
        let beginning = tokio::task::spawn_blocking(move || reader.read_exact(&mut [0; 1]).map(|()| reader));
        let _unread = timeout(PATIENCE, beginning).await.expect("it prints").unwrap().unwrap();
        assert_eq!(told(asking, signal).await, Some(code));
    }
}

fn nothing() -> AnswerBody {
    AnswerBody::Workers(Vec::new())
}

/// Answers each question, and before that says something that nobody understands.
async fn answer(broker: &Door, mut heard: Inbox<Received>, body: impl Fn() -> AnswerBody) {
    while let Some(Received { peer, frame, .. }) = heard.recv().await {
        let Ok(ClientToBroker::Ask(ask)) = ClientToBroker::from_frame(&frame) else { continue };
        let answer = Answer { request: ask.request, body: body() };
        let client = broker.to(peer);
        client.send(Frame::new(b"what?".to_vec())).await.unwrap();
        client.send(BrokerToClient::Answer(answer).to_frame().unwrap()).await.unwrap();
    }
}

#[tokio::test]
async fn a_watch_ends_with_its_reader() {
    let (broker, heard) = broker();
    let folder = tempfile::tempdir().unwrap();
    let watch = client(&broker, folder.path(), &["workers", "--watch"]).stdout(unread()).spawn().unwrap();
    tokio::select! {
        () = answer(&broker, heard, nothing) => panic!("the broker stays"),
        ended = end_of(watch) => assert_eq!(ended, Some(0)),
    }
}

#[tokio::test]
async fn a_log_that_nobody_reads_ends_nothing() {
    let (broker, heard) = broker();
    let folder = tempfile::tempdir().unwrap();
    let asking = client(&broker, folder.path(), &["workers", "-vv"]).stderr(unread()).spawn().unwrap();
    tokio::select! {
        () = answer(&broker, heard, nothing) => panic!("the broker stays"),
        ended = end_of(asking) => assert_eq!(ended, Some(0)),
    }
}

#[tokio::test]
async fn a_broker_that_is_connected_and_says_nothing_is_waited_for_as_long_as_was_asked() {
    let (broker, _heard) = broker();
    let folder = tempfile::tempdir().unwrap();
    let arguments = ["status", "--broker-wait", "2s"];
    let asking = client(&broker, folder.path(), &arguments).stderr(Stdio::piped()).spawn().unwrap();
    let ended = timeout(PATIENCE, asking.wait_with_output()).await.expect("it ends").unwrap();
    let said = String::from_utf8_lossy(&ended.stderr);
    assert_eq!(ended.status.code(), Some(6), "{said}");
    assert!(said.contains("within 2 s: the connection stands") && said.contains("waiting for its store"), "{said}");
}
