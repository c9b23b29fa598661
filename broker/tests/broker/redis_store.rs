//! The store in Redis, against real servers.

use std::{sync::Arc, time::Duration};

use mesh_broker::store::{self, Kept, Opened, Redis, RedisSettings, Store, StoreError, StoreSettings, Write};
use mesh_core::broker::{Change, Event, TaskRecord, WorkerRecord};
use proto_msgs::{Outcome, TaskId};
use tokio::time::timeout;

use crate::{
    samples::{task, worker},
    servers::{redis_is_there, start_cluster, start_redis, start_watched, start_with_tls},
    wait_for,
};

/// Longer than a killed broker's lease, and than a failover.
const PATIENCE: Duration = Duration::from_secs(20);

fn settings(url: &str, holder: &str) -> RedisSettings {
    RedisSettings {
        address: url.parse().unwrap(),
        root_cert: None,
        cluster: "attic".to_owned(),
        holder: holder.to_owned(),
    }
}

/// A store without the writer's thread.
async fn direct(url: &str, holder: &str) -> Result<(Redis, Vec<TaskRecord>), StoreError> {
    let mut redis = Redis::open(&settings(url, holder)).await?;
    let restored = redis.restore().await?;
    Ok((redis, restored))
}

async fn opened(settings: RedisSettings) -> Opened {
    store::open(StoreSettings::Redis(Box::new(settings)), Duration::ZERO).await.unwrap()
}

fn put(number: u8) -> Write {
    Write::PutTask { record: Arc::new(task(number)), durable: true }
}

fn save_task(number: u8) -> Change {
    Change::PutTask { record: Box::new(task(number)), durable: true }
}

fn stored(number: u8) -> Event {
    Event::Stored { task: task(number).spec.task, footing: task(number).footing() }
}

async fn expect(opened: &mut Opened, event: Event) {
    let come = timeout(PATIENCE, opened.events.recv()).await;
    assert_eq!(come.unwrap_or_else(|_| panic!("in vain: {event:?}")), Some(event));
}

fn worker_key(number: u8) -> String {
    format!("mesh:{{attic}}:worker:{}", worker(number).register.worker)
}

fn task_key(number: u8) -> String {
    format!("mesh:{{attic}}:task:{}", TaskId::from_bytes([number; 16]))
}

#[tokio::test]
async fn tasks_come_back_after_a_restart_and_the_copies_for_people_go() {
    if !redis_is_there() {
        return;
    }
    let server = start_redis();
    let (mut redis, nothing) = direct(&server.url(), "first").await.unwrap();
    assert!(nothing.is_empty());
    let mut ended = task(2);
    ended.ended = Some((Outcome::Cancelled, 1_795_000_000_001));
    let copy = Write::PutTask { record: Arc::new(task(3)), durable: false };
    let batch = vec![put(1), Write::PutTask { record: Arc::new(ended.clone()), durable: true }, copy, put(4)];
    redis.write(&batch).await.unwrap();
    redis.write(&vec![Write::DropTask(task(4).spec.task)]).await.unwrap();
    redis.release().await;
    server.cli(&["HSET", &task_key(5), "record_version", "1"]);
    server.cli(&["SADD", "mesh:{attic}:tasks", &TaskId::from_bytes([5; 16]).to_string()]);
    let (_redis, mut restored) = direct(&server.url(), "second").await.unwrap();
    restored.sort_by_key(|record| record.spec.task);
    assert_eq!(restored, [task(1), ended]);
    assert_eq!(server.cli(&["EXISTS", &task_key(3)]), "0", "nobody owns it any more");
    assert_eq!(server.cli(&["EXISTS", &task_key(5)]), "0", "nobody could end what an older broker wrote");
    assert_eq!(server.cli(&["SCARD", "mesh:{attic}:tasks"]), "2");
}

#[tokio::test]
async fn a_person_reads_a_worker_with_hgetall_and_the_row_expires_with_the_worker() {
    if !redis_is_there() {
        return;
    }
    let server = start_redis();
    let (mut redis, _) = direct(&server.url(), "first").await.unwrap();
    redis.write(&vec![Write::PutWorker { record: Arc::new(worker(1)), whole: true }]).await.unwrap();
    let row = server.cli(&["HGETALL", &worker_key(1)]) + "\n";
    for (name, value) in [
        ("name", "drawer-1"),
        ("arch", "arm64"),
        ("endpoints", "tcp://10.0.0.7:40001"),
        ("gpu_names", "RTX A2000, RTX A2000"),
        ("gpu_memory_used_bytes", "1073741824 1073741824"),
        ("cpu_permille", "250"),
        ("temperature_milli_c", "61500"),
        ("slots", "2"),
        ("slots_realtime", "1"),
        ("slots_batch", "1"),
        ("realtime_waiting_items", "0"),
        ("packing", "on"),
        ("run_us", "10000"),
        ("best_batch_items", "8"),
        ("best_batch_us", "45000"),
        ("slots_used", "1"),
        ("seen_unix_ms", "1795000000000"),
    ] {
        assert!(row.contains(&format!("{name}\n{value}\n")), "{name} in {row}");
    }
    assert!(!row.contains("ticket"), "a secret: {row}");
    let left_ms: u64 = server.cli(&["PTTL", &worker_key(1)]).parse().unwrap();
    assert!((3_000..=5_000).contains(&left_ms), "{left_ms}");
    let seen = server.cli(&["ZRANGE", "mesh:{attic}:workers", "0", "-1", "WITHSCORES"]);
    assert_eq!(seen, format!("{}\n1795000000000", worker(1).register.worker));
    redis.write(&vec![Write::DropWorker(worker(1).register.worker)]).await.unwrap();
    assert_eq!(server.cli(&["KEYS", "*"]), "mesh:{attic}:broker");
}

#[tokio::test]
async fn an_outage_is_told_and_made_up_for_even_if_the_server_comes_back_empty() {
    if !redis_is_there() {
        return;
    }
    let mut server = mesh_tests::Redis::start_with(&["--appendonly", "no"]);
    let mut opened = opened(settings(&server.url(), "first")).await;
    opened.handle.save(save_task(1));
    expect(&mut opened, stored(1)).await;
    server.kill();
    expect(&mut opened, Event::StoreAway).await;
    assert!(opened.handle.health().away.is_some());
    opened.handle.save(save_task(2));
    opened.handle.save(Change::PutWorker(Box::new(worker(1))));
    server.start_again();
    // Both tasks are confirmed, in any order, before the store counts as back.
    let mut confirmed = Vec::new();
    loop {
        match timeout(PATIENCE, opened.events.recv()).await.unwrap().unwrap() {
            Event::Stored { task, .. } => confirmed.push(task),
            event => break assert_eq!(event, Event::StoreBack),
        }
    }
    confirmed.sort_unstable();
    assert_eq!(confirmed, [task(1).spec.task, task(2).spec.task]);
    assert_eq!(server.cli(&["SCARD", "mesh:{attic}:tasks"]), "2");
    assert_eq!(server.cli(&["EXISTS", &worker_key(1)]), "1");
    assert!(opened.handle.health().away.is_none());
    opened.handle.close().await;
    assert_eq!(server.cli(&["EXISTS", "mesh:{attic}:broker"]), "0", "the lease is given back");
}

#[tokio::test]
async fn a_table_emptied_by_a_person_is_filled_again() {
    if !redis_is_there() {
        return;
    }
    let server = start_redis();
    let mut opened = opened(settings(&server.url(), "first")).await;
    opened.handle.save(save_task(1));
    expect(&mut opened, stored(1)).await;
    server.cli(&["FLUSHALL"]);
    expect(&mut opened, stored(1)).await;
    assert_eq!(server.cli(&["EXISTS", &task_key(1)]), "1");
}

#[tokio::test]
async fn heartbeats_are_merged_and_the_rest_of_the_row_is_written_once() {
    if !redis_is_there() {
        return;
    }
    let server = start_redis();
    let opened = opened(settings(&server.url(), "first")).await;
    for number in 0..50 {
        let record = WorkerRecord { seen_unix_ms: number, ..worker(1) };
        opened.handle.save(Change::PutWorker(Box::new(record)));
    }
    wait_for("the last heartbeat is in the table", || server.cli(&["HGET", &worker_key(1), "seen_unix_ms"]) == "49");
    assert!(opened.handle.health().written <= 3, "{:?}", opened.handle.health());
}

#[tokio::test]
async fn a_second_broker_is_refused_at_once_and_a_killed_ones_lease_runs_out() {
    if !redis_is_there() {
        return;
    }
    let server = start_redis();
    let first = opened(settings(&server.url(), "the first broker")).await;
    let refused = direct(&server.url(), "second").await.unwrap_err();
    assert!(refused.to_string().contains("the first broker") && refused.is_configuration(), "{refused}");
    first.handle.close().await;
    let (killed, _) = direct(&server.url(), "third").await.unwrap();
    drop(killed);
    let (mut fourth, _) = direct(&server.url(), "fourth").await.unwrap();
    assert_eq!(fourth.keep().await.unwrap(), Kept::Same);
}

#[tokio::test]
async fn keys_of_other_software_are_named_and_left_alone() {
    if !redis_is_there() {
        return;
    }
    let server = start_redis();
    server.cli(&["SET", "mesh:{attic}:workers", "somebody's"]);
    let refused = direct(&server.url(), "first").await.unwrap_err();
    assert!(refused.to_string().contains("mesh:{attic}:workers") && refused.is_configuration(), "{refused}");
    assert_eq!(server.cli(&["GET", "mesh:{attic}:workers"]), "somebody's");
    server.cli(&["DEL", "mesh:{attic}:workers"]);
    let (mut redis, _) = direct(&server.url(), "first").await.unwrap();
    server.cli(&["SET", &task_key(1), "somebody's"]);
    let refused = redis.write(&vec![put(2), put(1)]).await.unwrap_err();
    assert!(refused.to_string().contains(&task_key(1)), "{refused}");
    server.cli(&["DEL", "mesh:{attic}:broker"]);
    server.cli(&["SADD", "mesh:{attic}:broker", "somebody's"]);
    let refused = redis.keep().await.unwrap_err();
    let named = "key mesh:{attic}:broker at ";
    assert!(refused.to_string().starts_with(named) && refused.is_configuration(), "{refused}");
}

#[tokio::test]
async fn a_user_with_rights_on_the_keys_of_the_mesh_is_enough() {
    if !redis_is_there() {
        return;
    }
    let server = start_redis();
    let rights =
        ["on", ">pa:ss", "~mesh:*", "-@all", "+@hash", "+@set", "+@sortedset", "+@keyspace", "+@string", "+ping"];
    server.cli(&[&["ACL", "SETUSER", "broker"][..], &rights].concat());
    server.cli(&["ACL", "SETUSER", "default", "off"]);
    let url = format!("redis://broker:pa%3Ass@127.0.0.1:{}", server.port());
    let (mut redis, _) = direct(&url, "first").await.unwrap();
    redis.write(&vec![put(1), Write::PutWorker { record: Arc::new(worker(1)), whole: true }]).await.unwrap();
    redis.write(&vec![Write::DropTask(task(1).spec.task)]).await.unwrap();
    assert_eq!(redis.keep().await.unwrap(), Kept::Same);
    for wrong in [server.url(), format!("redis://broker:wrong@127.0.0.1:{}", server.port())] {
        let refused = direct(&wrong, "second").await.unwrap_err();
        assert!(matches!(refused, StoreError::Refused { .. }), "{refused}");
        assert!(!refused.to_string().contains("wrong"), "{refused}");
    }
}

#[tokio::test]
async fn a_cluster_of_three_masters_works_like_one_server() {
    if !redis_is_there() {
        return;
    }
    let nodes = start_cluster();
    let url = format!("redis+cluster://127.0.0.1:{},127.0.0.1:{}", nodes[0].port(), nodes[1].port());
    let (mut redis, _) = direct(&url, "first").await.unwrap();
    let row = Write::PutWorker { record: Arc::new(worker(1)), whole: true };
    redis.write(&vec![put(1), row, put(2)]).await.unwrap();
    redis.write(&vec![Write::DropTask(task(2).spec.task)]).await.unwrap();
    assert_eq!(redis.keep().await.unwrap(), Kept::Same);
    redis.release().await;
    let (_redis, restored) = direct(&url, "second").await.unwrap();
    assert_eq!(restored, [task(1)]);
    assert_eq!(nodes[2].cli(&["HGET", &worker_key(1), "name"]), "drawer-1");
}

#[tokio::test]
async fn after_a_failover_the_new_master_gets_everything() {
    if !redis_is_there() {
        return;
    }
    let (mut master, replica, sentinel) = start_watched();
    let mut opened = opened(settings(&format!("redis+sentinel://127.0.0.1:{}/attic", sentinel.port()), "first")).await;
    opened.handle.save(save_task(1));
    expect(&mut opened, stored(1)).await;
    master.kill();
    expect(&mut opened, Event::StoreAway).await;
    expect(&mut opened, stored(1)).await;
    expect(&mut opened, Event::StoreBack).await;
    assert!(replica.cli(&["ROLE"]).starts_with("master"));
    assert_eq!(replica.cli(&["EXISTS", &task_key(1)]), "1");
}

#[tokio::test]
async fn tls_with_an_authority_of_ones_own() {
    if !redis_is_there() {
        return;
    }
    let files = tempfile::tempdir().unwrap();
    let (server, cert) = start_with_tls(files.path());
    let url = format!("rediss://127.0.0.1:{}", server.port());
    let mut with_ca = settings(&url, "first");
    with_ca.root_cert = Some(cert.into());
    let mut redis = Redis::open(&with_ca).await.unwrap();
    redis.restore().await.unwrap();
    redis.write(&vec![put(1)]).await.unwrap();
    let untrusted = Redis::open(&settings(&url, "second")).await.unwrap_err();
    assert!(untrusted.to_string().contains("self-signed certificate itself, with --redis-ca"), "{untrusted}");
    assert!(untrusted.is_configuration(), "trying again is useless");
}
