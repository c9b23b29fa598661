//! The disk of the broker's state folder is full, at the start or later.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use proto_msgs::{AnswerBody, BrokerToClient, ErrorCode, Outcome, Question};

use crate::{
    mesh::{Mesh, TestClient},
    process::Broker,
    wait_for,
};

/// A small disk, while this value lives.
struct SmallDisk {
    folder: tempfile::TempDir,
}

impl SmallDisk {
    /// A disk with so much space; `None`, with a note, if the test may not mount.
    fn mount(kib: usize) -> Option<Self> {
        let folder = tempfile::tempdir().unwrap();
        let size = format!("size={kib}k");
        let mounted = Command::new("mount").args(["-t", "tmpfs", "-o", &size, "tmpfs"]).arg(folder.path()).status();
        if mounted.is_ok_and(|status| status.success()) {
            return Some(Self { folder });
        }
        assert!(std::env::var_os("MESH_REQUIRE_ALL").is_none(), "mounting a small disk needs root");
        eprintln!("SKIPPED a disk that is full: mounting a small disk needs root");
        None
    }

    fn path(&self) -> &Path {
        self.folder.path()
    }

    /// Uses up all space but this, until the file is deleted.
    fn fill(&self) -> PathBuf {
        let path = self.path().join("others");
        let mut file = fs::File::create(&path).unwrap();
        let full = std::io::copy(&mut std::io::repeat(0), &mut file).unwrap_err();
        assert_eq!(full.kind(), std::io::ErrorKind::StorageFull);
        path
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("--lazy").arg(self.path()).status();
    }
}

#[test]
fn a_first_start_on_a_full_disk_says_so_and_the_next_one_works() {
    let Some(disk) = SmallDisk::mount(4096) else { return };
    let state = disk.path().join("broker").display().to_string();
    let others = disk.fill();

    let (code, log) = Broker::fail(&["--state-dir", &state, "--store-wait", "1ms"]);

    assert_eq!(code, Some(1), "no setting is wrong: {log}");
    assert!(log.contains("is full") && log.contains("MiB"), "{log}");
    fs::remove_file(others).unwrap();
    assert_eq!(Broker::start(&["--state-dir", &state]).terminate(), Some(0));
}

#[test]
fn a_disk_as_small_as_the_broker_says_is_enough() {
    let Some(disk) = SmallDisk::mount(2048) else { return };
    assert_eq!(Broker::start(&["--state-dir", &disk.path().display().to_string()]).terminate(), Some(0));
}

#[tokio::test]
async fn a_disk_that_fills_up_costs_no_accepted_task_and_the_broker_catches_up_when_there_is_space_again() {
    let Some(disk) = SmallDisk::mount(4096) else { return };
    let flags = ["--state-dir", &disk.path().display().to_string()];
    let mut broker = Broker::start(&flags);
    let mesh = Mesh::open(&broker);
    let mut accepted = TestClient::new(&mesh).await;
    accepted.submit_until_durable().await;

    let others = disk.fill();
    // Free pages of the file take some tasks yet.
    let mut clients = Vec::new();
    let refused = loop {
        let mut client = TestClient::new(&mesh).await;
        let answer = client.submit(true).await;
        clients.push(client);
        match answer {
            BrokerToClient::Ended(ended) => break ended.outcome,
            _ => assert!(clients.len() < 5_000, "the disk is not full"),
        }
    };
    assert!(matches!(&refused, Outcome::Failed(failure) if failure.code == ErrorCode::StoreAway), "{refused:?}");
    let health = broker.page("/healthz");
    assert!(health.contains("degraded") && health.contains("No space left"), "{health}");

    fs::remove_file(others).unwrap();
    wait_for("the store to be back", || broker.page("/healthz").contains("\"status\":\"ok\""));
    let mut late = TestClient::new(&mesh).await;
    late.submit_until_durable().await;

    broker.kill();
    let broker = Broker::start(&flags);
    let mesh = Mesh::open(&broker);
    for client in [accepted, late] {
        let task = client.task();
        let body = client.again(&mesh).await.ask(Question::Task(task)).await;
        assert!(matches!(&body, AnswerBody::Task(_)), "{body:?}");
    }
}
