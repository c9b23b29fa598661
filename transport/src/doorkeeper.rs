//! The door-keeper: libzmq asks it about each new connection to a listener with keys (ZAP, RFC 27).
//!
//! It has its own thread, because a handshake must not wait for a busy runtime. Owns which keys are admitted where.
//! Never: what an admitted peer may do.

use std::{
    collections::HashMap,
    io,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use parking_lot::Mutex;
use proto_msgs::PublicKey;

use crate::{Admit, keys};

/// The address at which libzmq looks for a door-keeper.
const ZAP_ENDPOINT: &str = "inproc://zeromq.zap.01";

/// The address at which the thread hears that it must end.
const STOP_ENDPOINT: &str = "inproc://mesh.doorkeeper.stop";

/// Interval at which refusals of the same address are logged.
const LOG_EVERY: Duration = Duration::from_secs(60);

/// Addresses remembered for [`LOG_EVERY`]. If there are more, all are forgotten and may be logged again.
const LOGGED_MAX: usize = 1024;

/// Rules by domain, one domain per listener.
type Rules = Arc<Mutex<HashMap<String, Admit>>>;

pub(crate) struct Doorkeeper {
    rules: Rules,
    next_domain: AtomicU64,
    stop: Mutex<zmq::Socket>,
    thread: Option<JoinHandle<()>>,
}

impl Doorkeeper {
    pub(crate) fn start(context: &zmq::Context) -> io::Result<Self> {
        let requests = context.socket(zmq::REP)?;
        requests.set_linger(0)?;
        requests.bind(ZAP_ENDPOINT)?;
        let stopped = context.socket(zmq::PAIR)?;
        stopped.bind(STOP_ENDPOINT)?;
        let stop = context.socket(zmq::PAIR)?;
        stop.set_linger(0)?;
        stop.connect(STOP_ENDPOINT)?;
        let rules = Rules::default();
        let keeper = Keeper { rules: Arc::clone(&rules), logged: HashMap::new() };
        let thread =
            thread::Builder::new().name("mesh-doorkeeper".into()).spawn(move || keeper.run(&requests, &stopped))?;
        Ok(Self { rules, next_domain: AtomicU64::new(1), stop: Mutex::new(stop), thread: Some(thread) })
    }

    /// Makes a new domain with this rule, for one listener.
    pub(crate) fn open(&self, admit: Admit) -> String {
        let domain = format!("door-{}", self.next_domain.fetch_add(1, Ordering::Relaxed));
        self.rules.lock().insert(domain.clone(), admit);
        domain
    }

    /// Removes the domain of a listener that is gone.
    pub(crate) fn close(&self, domain: &str) {
        self.rules.lock().remove(domain);
    }
}

impl Drop for Doorkeeper {
    fn drop(&mut self) {
        let told = self.stop.lock().send("", 0).is_ok();
        if let (true, Some(thread)) = (told, self.thread.take()) {
            let _ = thread.join(); // The thread never panics.
        }
    }
}

/// The thread's side of the door-keeper.
struct Keeper {
    rules: Rules,
    logged: HashMap<String, Instant>,
}

impl Keeper {
    fn run(mut self, requests: &zmq::Socket, stopped: &zmq::Socket) {
        loop {
            let mut items = [requests.as_poll_item(zmq::POLLIN), stopped.as_poll_item(zmq::POLLIN)];
            match zmq::poll(&mut items, -1) {
                Ok(_) if items[1].is_readable() => return,
                Ok(_) | Err(zmq::Error::EINTR) => {}
                Err(_) => return,
            }
            if !items[0].is_readable() {
                continue;
            }
            let Ok(request) = requests.recv_multipart(zmq::DONTWAIT) else { continue };
            let answer = self.answer(&request);
            let _ = requests.send_multipart(answer, 0); // If it fails, the peer fails to connect.
        }
    }

    /// The ZAP answer: version, request id, status, text, user id, metadata.
    fn answer(&mut self, request: &[Vec<u8>]) -> [Vec<u8>; 6] {
        let request_id = request.get(1).cloned().unwrap_or_default();
        let (status, text, user) = match self.admit(request) {
            Some(key) => ("200", "", keys::to_text(&key)),
            None => ("400", "this key is not admitted here", String::new()),
        };
        [b"1.0".to_vec(), request_id, status.into(), text.into(), user.into_bytes(), Vec::new()]
    }

    /// The admitted key of a ZAP request: version, request id, domain, address, routing id, mechanism, credentials (the
    /// key).
    fn admit(&mut self, request: &[Vec<u8>]) -> Option<PublicKey> {
        let [version, _, domain, address, _, mechanism, key] = request else { return None };
        if version != b"1.0" || mechanism != b"CURVE" {
            return None;
        }
        let key = PublicKey(key.as_slice().try_into().ok()?);
        let domain = std::str::from_utf8(domain).ok()?;
        let admitted = match self.rules.lock().get(domain)? {
            Admit::Anyone => true,
            Admit::Listed(keys) => keys.contains(&key),
        };
        if !admitted {
            self.log_refusal(&String::from_utf8_lossy(address), &key);
            return None;
        }
        Some(key)
    }

    fn log_refusal(&mut self, address: &str, key: &PublicKey) {
        if self.logged.get(address).is_some_and(|logged| logged.elapsed() < LOG_EVERY) {
            return;
        }
        if self.logged.len() >= LOGGED_MAX {
            self.logged.clear();
        }
        self.logged.insert(address.to_owned(), Instant::now());
        tracing::warn!(address, key = keys::to_text(key), "refused a connection: its key is not authorized");
    }
}
