//! Compares a [`Listener`](mesh_transport::Listener) that echoes with a bare libzmq ROUTER that echoes, under the same
//! load.
//!
//! ```text
//!   cargo run --release -p mesh-transport --example echo_speed -- [MESSAGES] [BYTES]
//! ```
//!
//! The load is one blocking libzmq DEALER in a thread with 256 messages under way, then with one.

use std::{
    env,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use mesh_transport::{Admit, Context, Limits, Security};

/// Messages under way.
const WINDOW: usize = 256;

/// Rounds of each, in turns, so that a busy machine disturbs both.
const ROUNDS: usize = 5;

type Result<T> = std::result::Result<T, Box<dyn std::error::Error + Send + Sync>>;

/// Processor time of the echoing thread in nanoseconds; the thread updates it now and then.
#[derive(Clone, Default)]
struct Used(Arc<AtomicU64>);

impl Used {
    fn tell(&self) {
        let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
        // SAFETY: writes a timespec.
        unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &mut time) };
        self.0.store(time.tv_sec as u64 * 1_000_000_000 + time.tv_nsec as u64, Ordering::Relaxed);
    }

    fn nanoseconds(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// An echoing thread.
struct Server {
    endpoint: String,
    used: Used,
}

fn main() -> Result<()> {
    let arguments: Vec<usize> = env::args().skip(1).filter_map(|text| text.parse().ok()).collect();
    let messages = arguments.first().copied().unwrap_or(500_000);
    let bytes = arguments.get(1).copied().unwrap_or(64);
    let ours = start_ours()?;
    let bare = start_bare()?;
    for round in 1..=ROUNDS {
        for (name, server) in [("listener", &ours), ("bare", &bare)] {
            let used_before = server.used.nanoseconds();
            let rate = rate(&server.endpoint, messages, bytes)?;
            let used = server.used.nanoseconds() - used_before;
            let trip = round_trip(&server.endpoint, bytes)?;
            println!(
                "round {round}: {name:8} {rate:8.0} msg/s, {:.2} us of processor each, {:.1} us round trip",
                used as f64 / messages as f64 / 1e3,
                trip.as_secs_f64() * 1e6,
            );
        }
    }
    Ok(())
}

fn start_ours() -> Result<Server> {
    let used = Used::default();
    let telling = used.clone();
    let (tell, told) = std::sync::mpsc::channel();
    thread::Builder::new().name("ours".into()).spawn(move || -> Result<()> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        runtime.block_on(async move {
            let context = Context::new(Security::None)?;
            let mut listener = context.listen("tcp://127.0.0.1:0", Admit::Anyone, Limits::CONTROL)?;
            tell.send(listener.endpoint().to_owned())?;
            loop {
                let mut received = Some(listener.recv().await);
                let mut left = 64;
                while let Some(message) = received {
                    listener.send(message.peer, message.frame)?;
                    left -= 1;
                    received = if left > 0 { listener.try_recv() } else { None };
                }
                telling.tell();
            }
        })
    })?;
    Ok(Server { endpoint: told.recv()?, used })
}

fn start_bare() -> Result<Server> {
    let used = Used::default();
    let telling = used.clone();
    let socket = zmq::Context::new().socket(zmq::ROUTER)?;
    socket.bind("tcp://127.0.0.1:*")?;
    let endpoint = socket.get_last_endpoint()?.map_err(|_| "an address that is no text")?;
    thread::spawn(move || -> Result<()> {
        let (mut name, mut body) = (zmq::Message::new(), zmq::Message::new());
        for count in 0_u64.. {
            if count.is_multiple_of(64) {
                telling.tell();
            }
            socket.recv(&mut name, 0)?;
            socket.recv(&mut body, 0)?;
            socket.send(std::mem::replace(&mut name, zmq::Message::new()), zmq::SNDMORE)?;
            socket.send(std::mem::replace(&mut body, zmq::Message::new()), 0)?;
        }
        Ok(())
    });
    Ok(Server { endpoint, used })
}

fn dial(endpoint: &str) -> Result<zmq::Socket> {
    let socket = zmq::Context::new().socket(zmq::DEALER)?;
    socket.connect(endpoint)?;
    Ok(socket)
}

fn rate(endpoint: &str, messages: usize, bytes: usize) -> Result<f64> {
    let (socket, body, mut answer) = (dial(endpoint)?, vec![7; bytes], zmq::Message::new());
    let began = Instant::now();
    for sent in 0..messages + WINDOW {
        if sent < messages {
            socket.send(&body[..], 0)?;
        }
        if sent >= WINDOW {
            socket.recv(&mut answer, 0)?;
        }
    }
    Ok(messages as f64 / began.elapsed().as_secs_f64())
}

/// The median time of a message and its answer.
fn round_trip(endpoint: &str, bytes: usize) -> Result<Duration> {
    let (socket, body, mut answer) = (dial(endpoint)?, vec![7; bytes], zmq::Message::new());
    let mut trips = Vec::new();
    for _ in 0..10_000 {
        let began = Instant::now();
        socket.send(&body[..], 0)?;
        socket.recv(&mut answer, 0)?;
        trips.push(began.elapsed());
    }
    trips.sort_unstable();
    Ok(trips[trips.len() / 2])
}
