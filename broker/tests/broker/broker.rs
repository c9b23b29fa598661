//! `mesh-broker` as its neighbours see it: the real program, tested by workers and clients made here that send single
//! frames.

use std::{
    collections::HashSet,
    fs,
    io::Write,
    net::TcpStream,
    time::{Duration, Instant},
};

use mesh_transport::{Heard, KeyPair, Security, keys};
use proto_msgs::{AnswerBody, BrokerToClient, ClientToBroker, ErrorCode, Frame, Header, Outcome, Question, VERSION};

use crate::{
    mesh::{self, Mesh, TestClient, TestWorker, next},
    process::Broker,
    servers::{redis_is_there, start_cluster, start_redis, start_watched, start_with_tls},
    wait_for,
};

/// A registered worker and a connected client.
async fn worker_and_client(mesh: &Mesh) -> (TestWorker, TestClient) {
    let mut worker = TestWorker::new(mesh).await;
    worker.register();
    assert!(worker.heartbeat().await.known);
    (worker, TestClient::new(mesh).await)
}

#[tokio::test]
async fn a_task_is_granted_to_the_worker_that_has_room() {
    let broker = Broker::start(&[]);
    let (worker, mut client) = worker_and_client(&Mesh::open(&broker)).await;
    let grant = client.submit_until_granted(false).await;
    assert_eq!(grant.worker, worker.register.worker);
    assert_eq!(grant.endpoints, worker.register.endpoints);
    let ours = (worker.register.worker, worker.register.epoch);
    let now = grant.ticket.body.expires_unix_ms;
    assert_eq!(grant.ticket.verify(&worker.register.ticket_key, ours, None, now), Ok(()));
    let metrics = broker.page("/metrics");
    assert!(metrics.contains("mesh_broker_grants_total 1\n"), "{metrics}");
    assert!(metrics.contains("mesh_broker_events_total{event=\"Register\"} 1\n"), "{metrics}");
}

#[tokio::test]
async fn more_peers_find_room_than_a_shell_allows_open_files() {
    let broker = Broker::start_after("ulimit -Sn 60");
    let mesh = Mesh::open(&broker);
    let mut clients = Vec::new();
    for _ in 0..80 {
        clients.push(TestClient::new(&mesh).await);
    }
    let mut worker = TestWorker::new(&mesh).await;
    worker.register();
    assert!(worker.heartbeat().await.known);
    clients[79].submit_until_granted(false).await;

    let broker = Broker::start_after("ulimit -n 100");
    assert!(broker.log().contains("LimitNOFILE"), "who cannot have more is told: {}", broker.log());
}

#[tokio::test]
async fn a_worker_that_the_broker_does_not_know_is_asked_to_register() {
    let broker = Broker::start(&[]);
    let mut worker = TestWorker::new(&Mesh::open(&broker)).await;
    assert!(!worker.heartbeat().await.known);
    worker.register();
    assert!(worker.heartbeat().await.known);
}

#[tokio::test]
async fn a_worker_that_falls_silent_is_taken_off_the_table() {
    let broker = Broker::start(&[]);
    let mesh = Mesh::open(&broker);
    let (worker, mut client) = worker_and_client(&mesh).await;
    drop(worker);
    wait_for("the worker is lost", || broker.page("/metrics").contains("mesh_broker_workers_lost_total 1\n"));
    let queued = client.submit(false).await;
    assert!(matches!(queued, BrokerToClient::Queued(_) | BrokerToClient::Ended(_)), "{queued:?}");
}

#[tokio::test]
async fn a_broker_that_is_stopped_for_a_while_takes_nobody_for_silent() {
    let broker = Broker::start(&["--client-silence", "2s"]);
    let (mut worker, mut client) = worker_and_client(&Mesh::open(&broker)).await;
    client.submit_until_granted(false).await;
    let pauses_before = broker.metric("pauses_total");
    broker.signal("STOP");
    let stopped = Instant::now();
    wait_for("a pause longer than anybody's silence may be", || {
        worker.beat();
        client.say();
        stopped.elapsed() > Duration::from_secs(5)
    });
    broker.signal("CONT");
    assert!(worker.heartbeat().await.known);
    // A busy machine may make it stand still more than once.
    assert!(broker.metric("pauses_total") > pauses_before, "the pause was noticed: {}", broker.page("/metrics"));
    assert_eq!((broker.metric("tasks_failed_total"), broker.metric("workers_lost_total")), (0.0, 0.0));
}

#[tokio::test]
async fn a_detached_task_outlives_kill_9_with_the_embedded_store() {
    let state = tempfile::tempdir().unwrap();
    let folder = state.path().display().to_string();
    outlives_kill_9(&["--state-dir", &folder]).await;
}

#[tokio::test]
async fn a_detached_task_outlives_kill_9_with_redis() {
    if redis_is_there() {
        let redis = start_redis();
        outlives_kill_9(&["--redis", &redis.url(), "--cluster", "attic"]).await;
    }
}

#[tokio::test]
async fn a_detached_task_outlives_kill_9_with_redis_behind_tls() {
    if redis_is_there() {
        let files = tempfile::tempdir().unwrap();
        let (redis, cert) = start_with_tls(files.path());
        let url = format!("rediss://127.0.0.1:{}", redis.port());
        outlives_kill_9(&["--redis", &url, "--redis-ca", &cert]).await;
        let (code, log) = Broker::fail(&["--redis", &url, "--cluster", "attic"]);
        assert!(code.is_some_and(|code| code != 0) && log.contains("ertificate"), "{code:?} {log}");
    }
}

#[tokio::test]
async fn a_detached_task_outlives_kill_9_with_a_redis_cluster() {
    if redis_is_there() {
        let nodes = start_cluster();
        let url = format!("redis+cluster://127.0.0.1:{},127.0.0.1:{}", nodes[0].port(), nodes[1].port());
        outlives_kill_9(&["--redis", &url]).await;
    }
}

#[tokio::test]
async fn a_detached_task_outlives_a_failover_and_kill_9_with_a_redis_sentinel() {
    if !redis_is_there() {
        return;
    }
    let (mut master, replica, sentinel) = start_watched();
    let store = ["--redis", &format!("redis+sentinel://127.0.0.1:{}/attic", sentinel.port())];
    outlives_kill_9(&store).await;
    let broker = Broker::start(&store);
    let mut client = TestClient::new(&Mesh::open(&broker)).await;
    client.submit_until_durable().await;
    master.kill();
    wait_for("health tells of it", || broker.page("/healthz").contains("\"degraded\""));
    wait_for("health is well again", || broker.page("/healthz").contains("\"ok\""));
    assert!(replica.cli(&["ROLE"]).starts_with("master"));
    drop(broker);
    let broker = Broker::start(&store);
    let mut client = client.again(&Mesh::open(&broker)).await;
    let answer = client.ask(Question::Task(client.task())).await;
    assert!(matches!(answer, AnswerBody::Task(_)), "the task is forgotten: {answer:?}");
}

async fn outlives_kill_9(store: &[&str]) {
    let mut broker = Broker::start(store);
    let mut client = TestClient::new(&Mesh::open(&broker)).await;
    client.submit_until_durable().await;
    broker.kill();
    let broker = Broker::start(store);
    let mut client = client.again(&Mesh::open(&broker)).await;
    let AnswerBody::Task(view) = client.ask(Question::Task(client.task())).await else {
        panic!("the task is forgotten")
    };
    assert!(view.detached);
    assert_eq!(view.model_name, "mobilenet");
}

#[tokio::test]
async fn without_redis_the_broker_goes_on_deciding_and_catches_up() {
    if !redis_is_there() {
        return;
    }
    let mut redis = start_redis();
    let broker = Broker::start(&["--redis", &redis.url()]);
    let mesh = Mesh::open(&broker);
    let (mut worker, mut attached) = worker_and_client(&mesh).await;
    wait_for("the worker is in the table", || redis.cli(&["ZCARD", "mesh:{default}:workers"]) == "1");
    redis.kill();
    wait_for("health tells of it", || broker.page("/healthz").contains("\"degraded\""));
    assert!(broker.page("/readyz").contains("\"ready\":true"));
    assert!(worker.heartbeat().await.known);
    attached.submit_until_granted(false).await;
    let mut detached = TestClient::new(&mesh).await;
    let refused = detached.submit(true).await;
    assert!(
        matches!(&refused, BrokerToClient::Ended(ended)
            if matches!(&ended.outcome, Outcome::Failed(failure) if failure.code == ErrorCode::StoreAway)
                && ended.retry_after_ms.is_some()),
        "{refused:?}"
    );
    redis.start_again();
    wait_for("health is well again", || broker.page("/healthz").contains("\"ok\""));
    assert!(worker.heartbeat().await.known);
    let row = format!("mesh:{{default}}:worker:{}", worker.register.worker);
    wait_for("the row is back, whole", || redis.cli(&["HGET", &row, "name"]) == "drawer");
    detached.submit_until_durable().await;
}

#[tokio::test]
async fn a_broker_that_slept_too_long_leaves_the_table_to_the_next_one() {
    if !redis_is_there() {
        return;
    }
    let redis = start_redis();
    let store = ["--redis", &redis.url(), "--cluster", "attic"].map(str::to_owned);
    let store: Vec<&str> = store.iter().map(String::as_str).collect();
    let sleeper = Broker::start(&store);
    let (code, said) = Broker::fail(&store);
    assert_eq!(code, Some(78), "{said}");
    assert!(said.contains(&sleeper.endpoint) || said.contains("process"), "the holder is named: {said}");
    sleeper.signal("STOP");
    let next = Broker::start(&store);
    sleeper.signal("CONT");
    wait_for("the sleeper sees it", || sleeper.page("/healthz").contains("already has a broker"));
    assert!(next.page("/healthz").contains("\"ok\""));
    let mut client = TestClient::new(&Mesh::open(&next)).await;
    client.submit_until_durable().await;
}

#[tokio::test]
async fn what_is_no_message_is_counted_and_dropped_and_other_versions_are_told() {
    let broker = Broker::start(&[]);
    let mesh = Mesh::open(&broker);
    let mut stranger = mesh.dial().await;
    stranger.send(Frame::new(b"GET / HTTP/1.1\r\n\r\n".to_vec())).unwrap();
    let mut newer = ClientToBroker::Ask(mesh::question(Question::Cluster)).to_frame().unwrap().head.to_vec();
    newer[4..6].copy_from_slice(&(VERSION + 1).to_le_bytes());
    stranger.send(Frame::new(newer)).unwrap();
    let answer = loop {
        if let Heard::Frame(frame) = next(&mut stranger).await {
            break frame;
        }
    };
    assert_eq!(answer, Frame::unsupported());
    assert_eq!(Header::split(&answer.head).unwrap().0.kind, 0);
    let metrics = broker.page("/metrics");
    for reason in ["not_ours", "version"] {
        assert!(metrics.contains(&format!("undecodable_frames_total{{reason=\"{reason}\"}} 1\n")), "{metrics}");
    }
}

#[tokio::test]
async fn with_keys_only_listed_nodes_are_served_and_only_as_long_as_they_are_listed() {
    let files = tempfile::tempdir().unwrap();
    let file = |name: &str| files.path().join(name).display().to_string();
    let (own, known, unknown) =
        (KeyPair::generate().unwrap(), KeyPair::generate().unwrap(), KeyPair::generate().unwrap());
    own.save(&files.path().join("broker.key")).unwrap();
    fs::write(file("nodes"), format!("# nodes\n{} attic\n", keys::to_text(&known.public()))).unwrap();
    let broker = Broker::start(&["--key-file", &file("broker.key"), "--authorized-keys", &file("nodes")]);
    let insider = Mesh::with_keys(&broker, Security::Keys(known.clone()), own.public());
    let mut client = TestClient::new(&insider).await;
    let AnswerBody::Cluster(cluster) = client.ask(Question::Cluster).await else { panic!("a view of the cluster") };
    assert!(cluster.encrypted);
    let outsider = Mesh::with_keys(&broker, Security::Keys(unknown.clone()), own.public());
    assert!(outsider.try_dial().await.is_err());
    // The list changes: the stranger may connect, and the peer that was listed may no longer send.
    let listed: HashSet<_> = [unknown.public()].into();
    let text: String = listed.iter().map(|key| keys::to_text(key) + "\n").collect();
    fs::write(file("nodes"), text).unwrap();
    wait_for("the list is read again", || {
        client.send_question(Question::Cluster);
        !broker.page("/metrics").contains("revoked_key_messages_total 0\n")
    });
    let mut newcomer = TestClient::new(&outsider).await;
    assert!(matches!(newcomer.ask(Question::Cluster).await, AnswerBody::Cluster(_)));
}

#[test]
fn sigterm_ends_it_cleanly() {
    let mut broker = Broker::start(&[]);
    assert_eq!(broker.terminate(), Some(0));
}

#[test]
fn wrong_settings_are_named_in_one_line_and_exit_78() {
    let files = tempfile::tempdir().unwrap();
    let folder = files.path().display().to_string();
    let broker = Broker::start(&["--state-dir", &folder]);
    let exposed = files.path().join("exposed.key").display().to_string();
    fs::write(&exposed, "0123456789012345678901234567890123456789\n").unwrap();
    fs::write(files.path().join("list"), "").unwrap();
    let list = files.path().join("list").display().to_string();
    for (flags, named) in [
        (&["--bind", &broker.endpoint][..], "--bind"),
        (&["--admin", broker.admin.trim_start_matches("http://")], "--admin"),
        (&["--state-dir", &folder], "--state-dir"),
        (&["--state-dir", "/proc/1/nothing"], "--state-dir"),
        (&["--redis", "http://localhost"], "redis://"),
        (&["--key-file", &exposed, "--authorized-keys", &list], "chmod 600"),
        (&["--log", "=="], "--log"),
    ] {
        let (code, said) = Broker::fail(flags);
        assert_eq!(code, Some(78), "{flags:?}: {said}");
        let last = said.lines().last().unwrap_or_default();
        assert!(last.contains(named), "{flags:?}: {said}");
    }
}

#[test]
fn a_port_open_to_the_network_without_keys_is_warned_of() {
    let broker = Broker::start(&["--bind", "tcp://0.0.0.0:0"]);
    assert!(broker.log().contains("WITHOUT KEYS"), "{}", broker.log());
}

#[test]
fn keygen_makes_a_pair_that_the_broker_takes() {
    let files = tempfile::tempdir().unwrap();
    let key = files.path().join("node.key").display().to_string();
    let public = Broker::run(&["keygen", &key]);
    assert_eq!(fs::read_to_string(format!("{key}.pub")).unwrap().trim(), public.trim());
    let _broker = Broker::start(&["--key-file", &key, "--authorized-keys", &format!("{key}.pub")]);
}

#[test]
fn requests_that_never_come_to_their_end_lock_nobody_out_of_the_admin_port() {
    let broker = Broker::start(&[]);
    let address = broker.admin.trim_start_matches("http://").to_owned();
    let half = || {
        let mut stream = TcpStream::connect(&address).unwrap();
        write!(stream, "GET /healthz HTTP/1.1\r\nHost:").unwrap();
        stream
    };
    let _halves: Vec<TcpStream> = (0..100).map(|_| half()).collect();

    let page = broker.page("/healthz");

    assert!(page.starts_with("HTTP/1.1 200"), "{page}");
}
