//! The program at a broker that lets it in and says nothing, or little.

#![expect(clippy::unwrap_used, reason = "a test says what it expects by failing")]

use std::{fs, path::Path, process::Stdio, time::Duration};

use mesh_transport::{Admit, Context, Door, Inbox, Limits, Received, Security};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use proto_msgs::{Answer, AnswerBody, BrokerToClient, ClientToBroker, Frame};
use tokio::{
    process::{Child, Command},
    time::timeout,
};

/// Much less than the hour that the program is allowed, and much more than it needs.
const PATIENCE: Duration = Duration::from_secs(30);

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

/// Answers each question with nothing, and before that says something that nobody understands.
async fn answer(broker: &Door, mut heard: Inbox<Received>) {
    while let Some(Received { peer, frame, .. }) = heard.recv().await {
        let Ok(ClientToBroker::Ask(ask)) = ClientToBroker::from_frame(&frame) else { continue };
        let answer = Answer { request: ask.request, body: AnswerBody::Workers(Vec::new()) };
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
        () = answer(&broker, heard) => panic!("the broker stays"),
        ended = end_of(watch) => assert_eq!(ended, Some(0)),
    }
}

#[tokio::test]
async fn a_log_that_nobody_reads_ends_nothing() {
    let (broker, heard) = broker();
    let folder = tempfile::tempdir().unwrap();
    let asking = client(&broker, folder.path(), &["workers", "-vv"]).stderr(unread()).spawn().unwrap();
    tokio::select! {
        () = answer(&broker, heard) => panic!("the broker stays"),
        ended = end_of(asking) => assert_eq!(ended, Some(0)),
    }
}
