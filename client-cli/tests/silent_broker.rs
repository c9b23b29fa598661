//! The program at a broker that lets it in and says nothing, or little.

#![expect(clippy::unwrap_used, reason = "a test says what it expects by failing")]

use std::{fs, path::Path, process::Stdio, time::Duration};

use mesh_transport::{Admit, Context, Door, Inbox, Limits, Received, Security};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use proto_msgs::{Answer, AnswerBody, BrokerToClient, ClientToBroker};
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
    command.current_dir(folder).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).kill_on_drop(true);
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

#[tokio::test]
async fn a_watch_ends_with_its_reader() {
    let (broker, mut heard) = broker();
    let folder = tempfile::tempdir().unwrap();
    let (reader, writer) = std::io::pipe().unwrap();
    let mut watch = client(&broker, folder.path(), &["workers", "--watch"]).stdout(writer).spawn().unwrap();
    drop(reader);
    let answering = async {
        while let Some(Received { peer, frame, .. }) = heard.recv().await {
            if let Ok(ClientToBroker::Ask(ask)) = ClientToBroker::from_frame(&frame) {
                let answer = Answer { request: ask.request, body: AnswerBody::Workers(Vec::new()) };
                broker.to(peer).send(BrokerToClient::Answer(answer).to_frame().unwrap()).await.unwrap();
            }
        }
    };
    tokio::select! {
        () = answering => panic!("the broker stays"),
        ended = timeout(PATIENCE, watch.wait()) => assert_eq!(ended.expect("it ends").unwrap().code(), Some(0)),
    }
}
