//! Real Redis servers in the forms that a broker can use: clusters, watched pairs, behind TLS.

use std::{
    path::Path,
    process::{Command, Stdio},
};

use mesh_tests::{PATIENCE, Redis, redis::free_port, wait_until};

/// `false`, with a message, if a person has declared that there is no Redis. Without such a declaration, a missing
/// Redis is a failure.
pub(crate) fn redis_is_there() -> bool {
    if std::env::var_os("MESH_SKIP_REDIS").is_some_and(|value| value == "1") {
        assert!(std::env::var_os("MESH_REQUIRE_ALL").is_none(), "this test must run here: unset MESH_SKIP_REDIS");
        eprintln!("skipped: MESH_SKIP_REDIS=1");
        return false;
    }
    let found = Command::new("redis-server").arg("--version").stdout(Stdio::null()).status();
    assert!(found.is_ok(), "redis-server is not installed: apt-get install redis, or set MESH_SKIP_REDIS=1");
    true
}

/// A server with an append-only file.
pub(crate) fn start_redis() -> Redis {
    Redis::start_with(&["--appendonly", "yes"])
}

/// Three masters that share all slots.
pub(crate) fn start_cluster() -> [Redis; 3] {
    let nodes = [start_node(), start_node(), start_node()];
    let addresses = nodes.each_ref().map(|node| format!("127.0.0.1:{}", node.port()));
    let made = Command::new("redis-cli").args(["--cluster", "create"]).args(&addresses).arg("--cluster-yes").output();
    let made = made.unwrap();
    assert!(made.status.success(), "no cluster: {}", String::from_utf8_lossy(&made.stdout));
    for node in &nodes {
        wait_until("the node to know the cluster", PATIENCE, || {
            node.cli(&["CLUSTER", "INFO"]).contains("cluster_state:ok")
        });
    }
    nodes
}

fn start_node() -> Redis {
    // Its second port is for the other nodes.
    let bus = free_port().to_string();
    let node = ["--cluster-enabled", "yes", "--cluster-port", &bus, "--cluster-node-timeout", "2000"];
    Redis::start_with(&[&["--appendonly", "yes"], &node[..]].concat())
}

/// A master, its replica, and a sentinel that knows both.
pub(crate) fn start_watched() -> (Redis, Redis, Redis) {
    let master = start_redis();
    let replica = Redis::start_with(&["--appendonly", "yes", "--replicaof", &format!("127.0.0.1 {}", master.port())]);
    wait_until("the replica to be in step", PATIENCE, || {
        replica.cli(&["INFO", "replication"]).contains("master_link_status:up")
    });
    let sentinel = Redis::start_sentinel("attic", master.port());
    wait_until("the sentinel to know the replica", PATIENCE, || {
        sentinel.cli(&["SENTINEL", "replicas", "attic"]).contains("ip")
    });
    (master, replica, sentinel)
}

/// A server that speaks only TLS, and the file of the certificate that signed its own. Both files are made in `folder`.
pub(crate) fn start_with_tls(folder: &Path) -> (Redis, String) {
    let file = |name: &str| folder.join(name).display().to_string();
    let (cert, key) = (file("cert.pem"), file("key.pem"));
    let made = Command::new("openssl")
        .args(["req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2"])
        .args(["-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1"])
        .args(["-addext", "basicConstraints=critical,CA:FALSE"])
        .args(["-keyout", &key, "-out", &cert])
        .output()
        .expect("openssl is there");
    assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
    let mut server = start_redis();
    let port = server.port().to_string();
    let tls_only = ["--port", "0", "--tls-port", &port, "--tls-auth-clients", "no"];
    server.restart_with(&[&tls_only[..], &["--tls-cert-file", &cert, "--tls-key-file", &key]].concat());
    (server, cert)
}
