//! The order of tasks: priorities within a tenant's limits, equal shares among those who wait, and no tenant starves.

use mesh_tests::{Job, Mesh, MeshOptions, PATIENCE, Submission, Worker, jobs::Started, wait_until};
use serde_json::Value;

/// A worker that runs one task at a time: two run together would also end together.
fn one_by_one(mesh: &Mesh) -> Worker {
    mesh.worker_with("w1", &["--pack-max", "1"])
}

/// An endless task that occupies the only slot; interrupting it frees the slot.
fn occupied(mesh: &Mesh) -> Started {
    let started = Job::endless(mesh).start_as(mesh, "blocker", &[]);
    wait_until("the slot to be in use", PATIENCE, || mesh.count_of("blocker", "running") == 1);
    started
}

/// Submits as this user and waits until the broker has the task.
fn queued(mesh: &Mesh, user: &str, more: &[&str]) -> Started {
    let before = mesh.tasks_of(user).len();
    // Its own demand keeps the task from being sent ahead of its slot, where the faster of two clients would be first.
    let started = Job::long(mesh, 150).start_as(mesh, user, &[more, &["--cpu", "0.5"]].concat());
    wait_until("it to wait", PATIENCE, || mesh.tasks_of(user).len() == before + 1);
    started
}

/// The users of these tasks, in the order in which the broker placed them: however long a client takes to tell of its
/// task's end, the broker chooses who is next.
fn order(mesh: &Mesh, users: &[&str]) -> Vec<String> {
    let placed_at = |user: &str, task: &Value| {
        let command = mesh.client_command_of(user, &["why", task["task"].as_str().expect("an id"), "--json"]);
        let why = Submission::start(command).wait().succeeded().json();
        why["decision"]["at_unix_ms"].as_u64().unwrap_or_else(|| panic!("no decision in {why}"))
    };
    let mut places: Vec<(u64, String)> = users
        .iter()
        .flat_map(|user| mesh.tasks_of(user).into_iter().map(|task| (placed_at(user, &task), (*user).to_owned())))
        .collect();
    places.sort();
    places.into_iter().map(|(_, user)| user).collect()
}

fn all_done(mesh: &Mesh, users: &[&str]) {
    for user in users {
        wait_until("all to be done", PATIENCE, || mesh.tasks_of(user).iter().all(|task| task["state"] == "done"));
    }
}

#[test]
fn of_those_that_wait_the_important_one_goes_first() {
    let mesh = Mesh::start();
    let _worker = one_by_one(&mesh);
    let blocker = occupied(&mesh);
    let _waiting = [("low", "10"), ("high", "90"), ("middle", "50")]
        .map(|(user, priority)| queued(&mesh, user, &["--priority", priority]));

    blocker.client.interrupt();

    let users = ["low", "middle", "high"];
    all_done(&mesh, &users);
    assert_eq!(order(&mesh, &users), ["high", "middle", "low"]);
}

#[test]
fn a_tenant_s_priority_counts_no_more_than_it_may() {
    let id = "6d657368-0000-4000-8000-000000000001";
    let tenant = format!("{id}=20");
    let mesh = Mesh::with(MeshOptions { broker_args: vec!["--tenant".into(), tenant], ..MeshOptions::default() });
    std::fs::create_dir(mesh.folder().join("capped")).expect("the folder is ours");
    mesh.file("capped/client-id", format!("{id}\n").as_bytes());
    let _worker = one_by_one(&mesh);
    let blocker = occupied(&mesh);
    let _waiting =
        [("capped", "100"), ("usual", "50")].map(|(user, priority)| queued(&mesh, user, &["--priority", priority]));

    blocker.client.interrupt();

    let users = ["capped", "usual"];
    all_done(&mesh, &users);
    assert_eq!(order(&mesh, &users), ["usual", "capped"]);
}

#[test]
fn two_clients_share_whoever_came_first_with_more() {
    let mesh = Mesh::start();
    let _worker = one_by_one(&mesh);
    // After this run the cost is known: shares are shares of time.
    Job::long(&mesh, 150).run(&mesh);
    let blocker = occupied(&mesh);
    let _much: Vec<Started> = (0..24).map(|_| queued(&mesh, "much", &[])).collect();
    let _little: Vec<Started> = (0..8).map(|_| queued(&mesh, "little", &[])).collect();

    blocker.client.interrupt();

    all_done(&mesh, &["much", "little"]);
    let order = order(&mesh, &["much", "little"]);
    let last_of_little = order.iter().rposition(|user| user == "little").expect("they are done");
    // With equal shares, the eighth task of one user begins with about eight of the other.
    assert!((12..=19).contains(&last_of_little), "the last of eight is number {last_of_little} of 32: {order:?}");
}

#[test]
fn equals_go_in_the_order_in_which_they_came() {
    let mesh = Mesh::start();
    let _worker = one_by_one(&mesh);
    let blocker = occupied(&mesh);
    let users = ["first", "second", "third", "fourth", "fifth", "sixth"];
    let _waiting = users.map(|user| queued(&mesh, user, &[]));

    blocker.client.interrupt();

    all_done(&mesh, &users);
    assert_eq!(order(&mesh, &users), users);
}
