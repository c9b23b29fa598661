//! A mesh whose nodes have keys: every link is encrypted, and strangers are refused.

use std::process::Command;

use mesh_tests::{Job, Mesh, MeshOptions, PATIENCE, Proxy, Submission, process::binary, proxy::Side, redis::free_port};

fn mesh_with_keys() -> Mesh {
    Mesh::with(MeshOptions { keys: true, ..MeshOptions::default() })
}

#[test]
fn the_main_job_runs_and_nothing_of_it_can_be_read_on_the_way() {
    let mesh = mesh_with_keys();
    let to_broker = Proxy::before(mesh.endpoint());
    let (door, _worker) = mesh.worker_behind_proxy("w1", &[]);
    let job = Job::heavy(&mesh, 2, 41);

    job.start_at(&mesh, &to_broker.endpoint(), &[]).done(&job);

    assert!(door.bytes_from(Side::Dialler) > 2 << 20, "the model went this way");
    for link in [&door, &to_broker] {
        assert!(link.seen().iter().all(|seen| seen.message.kind.is_none()), "a message of the mesh can be read");
    }
}

#[test]
fn workers_that_dial_are_encrypted_too() {
    let mesh = mesh_with_keys();
    let _worker = mesh.worker_with("nat", &["--no-listen"]);
    let port = free_port();
    let door = Proxy::before(&format!("127.0.0.1:{port}"));
    let (listen, advertise) = (format!("tcp://127.0.0.1:{port}"), door.address());
    let job = Job::heavy(&mesh, 2, 42);

    let done = job.start(&mesh, &["--listen", &listen, "--advertise", &advertise]).done(&job);

    assert_eq!(done.worker(), "nat");
    assert!(door.bytes_from(Side::Listener) > 2 << 20, "the model went this way");
    assert!(door.seen().iter().all(|seen| seen.message.kind.is_none()), "a message of the mesh can be read");
}

#[test]
fn an_unknown_client_key_is_refused() {
    let mesh = mesh_with_keys();
    let _worker = mesh.worker("w1");
    let file = mesh.folder().join("stranger.key");
    let made = Command::new(binary("mesh-client")).arg("keygen").arg(&file).status().unwrap();
    assert!(made.success());
    let job = Job::small(&mesh);

    let mut command = Command::new(binary("mesh-client"));
    command.env("MESH_BROKER", mesh.endpoint()).arg("--state-dir").arg(mesh.folder().join("stranger"));
    command.arg("--key-file").arg(&file).arg("--broker-key").arg(mesh.folder().join("broker.key.pub"));
    command.args(job.submit(&[]));

    Submission::start(command).wait().failed_with(10, "key");
}

#[test]
fn a_worker_with_an_unknown_key_is_refused_until_it_is_listed() {
    let mesh = mesh_with_keys();
    let file = mesh.folder().join("stranger.key");
    let made = Command::new(binary("mesh-worker")).arg("keygen").arg(&file).status().unwrap();
    assert!(made.success());
    let mut stranger = mesh.unregistered_worker("stranger", &["--key-file", file.to_str().unwrap()]);
    stranger.process().wait_for_line("that its key is refused", PATIENCE, |line| {
        line.contains("key is not authorized").then_some(())
    });
    assert_eq!(mesh.metric("workers"), Some(0.0));

    let list = mesh.folder().join("authorized_keys");
    let listed = std::fs::read_to_string(&list).unwrap();
    let public = std::fs::read_to_string(mesh.folder().join("stranger.key.pub")).unwrap();
    std::fs::write(&list, format!("{listed}{} stranger\n", public.trim())).unwrap();

    stranger.wait_registered();
}

#[test]
fn a_node_without_keys_does_not_get_in() {
    let mesh = mesh_with_keys();
    let job = Job::small(&mesh);
    let mut command = Command::new(binary("mesh-client"));
    command
        .env("MESH_BROKER", mesh.endpoint())
        .arg("--state-dir")
        .arg(mesh.folder().join("bare"))
        .args(job.submit(&[]));

    let answer = Submission::start(command).wait();

    assert!([6, 10].contains(&answer.code), "{answer:?}");
    assert!(answer.stderr.contains("key"), "it says why: {answer:?}");
}

#[test]
fn a_key_file_that_others_can_read_is_refused() {
    use std::os::unix::fs::PermissionsExt;
    let mesh = mesh_with_keys();
    let key = mesh.folder().join("client.key");
    std::fs::set_permissions(&key, std::fs::Permissions::from_mode(0o644)).unwrap();
    mesh.client(&["workers"]).failed_with(2, "chmod 600");
}

/// Returns the list as it was before.
fn take_client_off_the_list(mesh: &Mesh) -> String {
    let list = mesh.folder().join("authorized_keys");
    let before = std::fs::read_to_string(&list).expect("the mesh made it");
    let without: String =
        before.lines().filter(|line| !line.ends_with(" client")).map(|line| format!("{line}\n")).collect();
    std::fs::write(&list, without).expect("the folder is ours");
    before
}

#[test]
fn who_waits_while_its_key_is_taken_off_the_list_learns_why_the_broker_is_silent_and_comes_back_with_the_key() {
    let mut mesh = mesh_with_keys();
    let _worker = mesh.worker("w1");
    let mut started = Job::endless(&mesh).start(&mesh, &[]);
    mesh_tests::wait_until("it to run", PATIENCE, || mesh.metric("slots_used") == Some(1.0));

    let before = take_client_off_the_list(&mesh);

    let mut wait_for = |words: &str| {
        started.client.process().wait_for_line(words, PATIENCE, |line| {
            (line.contains("does not answer") && line.contains(words)).then_some(())
        });
    };
    wait_for("no longer among its --authorized-keys");
    mesh.restart_broker();
    wait_for("it refuses this client's key");
    std::fs::write(mesh.folder().join("authorized_keys"), before).expect("the folder is ours");
    mesh_tests::wait_until("the key to be let in", PATIENCE, || mesh.client(&["workers"]).code == 0);
    mesh_tests::wait_until("the task to be told again", PATIENCE, || mesh.count_of("client", "running") == 1);
    started.client.interrupt();
    started.answer();
}

#[test]
fn a_key_that_is_taken_off_the_list_is_served_no_more() {
    let mesh = mesh_with_keys();
    let _worker = mesh.worker("w1");
    let job = Job::small(&mesh);
    job.run(&mesh);

    let _before = take_client_off_the_list(&mesh);

    mesh_tests::wait_until("the key to be refused", PATIENCE, || mesh.client(&["workers"]).code == 10);
}
