//! Real Redis servers: started on free ports of this machine, ended with the test.

use std::{
    fs,
    net::{TcpListener, TcpStream},
    path::Path,
    process::{Child, Command, Stdio},
};

use tempfile::TempDir;

use crate::wait_for;

/// One process; killed when dropped.
#[derive(Debug)]
pub(crate) struct Server {
    pub(crate) port: u16,
    _folder: TempDir,
    arguments: Vec<String>,
    process: Option<Child>,
}

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

impl Server {
    /// A server with an append-only file and these further settings (`--name`, `value`).
    pub(crate) fn start(settings: &[&str]) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let port = free_port();
        let mut arguments: Vec<String> = Vec::new();
        for (name, value) in
            [("--save", ""), ("--appendonly", "yes"), ("--bind", "127.0.0.1"), ("--loglevel", "warning")]
        {
            arguments.extend([name.to_owned(), value.to_owned()]);
        }
        arguments.extend(["--dir".to_owned(), folder.path().display().to_string()]);
        arguments.extend(["--port".to_owned(), port.to_string()]);
        arguments.extend(settings.iter().map(|setting| (*setting).to_owned()));
        let mut server = Self { port, _folder: folder, arguments, process: None };
        server.start_again();
        server
    }

    /// A cluster node.
    pub(crate) fn start_node() -> Self {
        // Its second port is for the other nodes.
        let bus = free_port().to_string();
        Self::start(&["--cluster-enabled", "yes", "--cluster-port", &bus, "--cluster-node-timeout", "2000"])
    }

    /// A sentinel that watches only this master.
    pub(crate) fn start_sentinel(master_port: u16) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let port = free_port();
        let file = folder.path().join("sentinel.conf");
        let text = format!(
            "port {port}\nbind 127.0.0.1\ndir {}\nsentinel monitor attic 127.0.0.1 {master_port} 1\n\
             sentinel down-after-milliseconds attic 500\nsentinel failover-timeout attic 2000\n",
            folder.path().display()
        );
        fs::write(&file, text).unwrap();
        let arguments = vec![file.display().to_string(), "--sentinel".to_owned()];
        let mut server = Self { port, _folder: folder, arguments, process: None };
        server.start_again();
        server
    }

    /// Sets the settings of the next start.
    pub(crate) fn use_settings(&mut self, settings: &[&str]) {
        self.arguments.extend(settings.iter().map(|setting| (*setting).to_owned()));
    }

    pub(crate) fn url(&self) -> String {
        format!("redis://127.0.0.1:{}", self.port)
    }

    /// Starts the process (again, on its old files) and waits until it accepts connections.
    pub(crate) fn start_again(&mut self) {
        let mut command = Command::new("redis-server");
        command.args(&self.arguments).stdout(Stdio::null()).stderr(Stdio::null());
        self.process = Some(command.spawn().unwrap());
        wait_for("redis-server takes connections", || TcpStream::connect(("127.0.0.1", self.port)).is_ok());
    }

    /// Kills the server with SIGKILL.
    pub(crate) fn kill(&mut self) {
        if let Some(mut process) = self.process.take() {
            process.kill().unwrap();
            process.wait().unwrap();
        }
    }

    /// The answer of `redis-cli` to these arguments.
    pub(crate) fn cli(&self, arguments: &[&str]) -> String {
        let port = self.port.to_string();
        let output = Command::new("redis-cli").args(["-p", &port, "-c"]).args(arguments).output().unwrap();
        String::from_utf8(output.stdout).unwrap().trim().to_owned()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.kill();
    }
}

/// Three masters that share all slots.
pub(crate) fn start_cluster() -> [Server; 3] {
    let nodes = [Server::start_node(), Server::start_node(), Server::start_node()];
    let addresses = nodes.each_ref().map(|node| format!("127.0.0.1:{}", node.port));
    let made = Command::new("redis-cli").args(["--cluster", "create"]).args(&addresses).arg("--cluster-yes").output();
    assert!(made.unwrap().status.success(), "the cluster did not come about");
    for node in &nodes {
        wait_for("the node knows the cluster", || node.cli(&["CLUSTER", "INFO"]).contains("cluster_state:ok"));
    }
    nodes
}

/// A master, its replica, and a sentinel that knows both.
pub(crate) fn start_watched() -> (Server, Server, Server) {
    let master = Server::start(&[]);
    let replica = Server::start(&["--replicaof", &format!("127.0.0.1 {}", master.port)]);
    wait_for("the replica is in step", || replica.cli(&["INFO", "replication"]).contains("master_link_status:up"));
    let sentinel = Server::start_sentinel(master.port);
    wait_for("the sentinel knows the replica", || sentinel.cli(&["SENTINEL", "replicas", "attic"]).contains("ip"));
    (master, replica, sentinel)
}

/// A server that speaks only TLS, and the file of the certificate that signed its own. Both files are made in `folder`.
pub(crate) fn start_with_tls(folder: &Path) -> (Server, String) {
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
    let mut server = Server::start(&[]);
    server.kill();
    let port = server.port.to_string();
    server.use_settings(&["--port", "0", "--tls-port", &port, "--tls-auth-clients", "no"]);
    server.use_settings(&["--tls-cert-file", &cert, "--tls-key-file", &key]);
    server.start_again();
    (server, cert)
}

fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}
