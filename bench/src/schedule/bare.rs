//! The baseline of closed loops: the messages that the mesh sends for each task (submit and close, grant, opening with
//! data, result with data) over bare libzmq between the same number of programs, and nothing else. No scheduling, no
//! hashing, no runner: what these hand-overs cost on this machine at least.
//!
//! ```text
//!   clients (this process, one thread) --submit--> broker --grant--> clients
//!                                      --opening, data--> device --result, data--> clients
//! ```

use std::{
    process::Command,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use clap::ValueEnum;
use mesh_bench::device::Cost;
use mesh_tests::{PATIENCE, Process};
use nix::sys::prctl;
use proto_msgs::{Attempt, BrokerToClient, ClientToBroker, ClientToWorker, Close, Outcome, Ticket};

use crate::broker::driver::example_grant;

/// Bytes of an item, and of its answer: one FP32 number.
const ITEM_BYTES: usize = 4;

/// Bytes of a result message without its data: about those of the mesh's.
const RESULT_BYTES: usize = 150;

/// A server of the baseline.
#[derive(Clone, Copy, Debug, Eq, PartialEq, ValueEnum)]
pub(crate) enum Role {
    /// Answers each submit with a grant.
    Broker,
    /// Waits until all clients have asked or 64 rows are there, takes the time of such a batch, and answers.
    Device,
}

/// Prints `listening on ENDPOINT` and serves until it is killed.
pub(crate) fn serve(role: Role) -> Result<()> {
    let router = zmq::Context::new().socket(zmq::ROUTER)?;
    router.bind("tcp://127.0.0.1:*")?;
    println!("listening on {}", router.get_last_endpoint()?.ok().context("libzmq names its endpoint")?);
    match role {
        Role::Broker => grant_all(&router),
        Role::Device => run_batches(&router),
    }
}

fn grant_all(router: &zmq::Socket) -> Result<()> {
    let grant = BrokerToClient::Grant(example_grant()).to_frame()?.head;
    loop {
        let parts = router.recv_multipart(0)?;
        router.send(&parts[0], zmq::SNDMORE)?;
        router.send(&grant[..], 0)?;
    }
}

/// The data of a request begins with the number of clients; its length gives the rows.
fn run_batches(router: &zmq::Socket) -> Result<()> {
    let cost = cost();
    let _exact_to_the_nanosecond = prctl::set_timerslack(1);
    loop {
        let (mut asking, mut rows, mut clients) = (Vec::new(), 0, u64::MAX);
        while rows < cost.rows_max && (asking.len() as u64) < clients {
            let [peer, _opening, data] = <[Vec<u8>; 3]>::try_from(router.recv_multipart(0)?)
                .map_err(|parts| anyhow::anyhow!("{} parts instead of three", parts.len()))?;
            let (count, items) = data.split_first_chunk().context("data begins with the number of clients")?;
            clients = u64::from_le_bytes(*count);
            rows += (items.len() / ITEM_BYTES) as u64;
            asking.push((peer, items.to_vec()));
        }
        thread::sleep(cost.batch(rows));
        for (peer, items) in asking {
            router.send_multipart([&peer[..], &[0; RESULT_BYTES], &items], 0)?;
        }
    }
}

/// The cost of the device of the closed loops.
pub(super) fn cost() -> Cost {
    Cost::new(5000, 200)
}

/// Both servers.
pub(super) struct Bare {
    broker: String,
    device: String,
    _processes: [Process; 2],
}

impl Bare {
    pub(super) fn start() -> Result<Self> {
        let [(broker, first), (device, second)] = [start("broker")?, start("device")?];
        Ok(Self { broker, device, _processes: [first, second] })
    }

    /// Items per second of so many clients, each of which sends its next items when it has the answer to the last.
    pub(super) fn closed_loop(&self, clients: usize, items: u32, run_for: Duration) -> Result<f64> {
        let context = zmq::Context::new();
        let connect = |endpoint: &str| -> Result<zmq::Socket> {
            let socket = context.socket(zmq::DEALER)?;
            socket.set_linger(0)?;
            socket.connect(endpoint)?;
            Ok(socket)
        };
        let sockets = (0..clients).map(|_| Ok([connect(&self.broker)?, connect(&self.device)?]));
        let sockets = sockets.collect::<Result<Vec<_>>>()?;
        let messages = Messages::new(clients, items)?;
        for [broker, _] in &sockets {
            broker.send(&messages.submit[..], 0)?;
        }
        let (began, mut answers) = (Instant::now(), 0_u64);
        while began.elapsed() < run_for {
            let mut polled: Vec<_> = sockets.iter().flatten().map(|socket| socket.as_poll_item(zmq::POLLIN)).collect();
            ensure!(zmq::poll(&mut polled, PATIENCE.as_millis() as i64)? > 0, "no answer from the baseline");
            let readable: Vec<bool> = polled.iter().map(zmq::PollItem::is_readable).collect();
            for ([broker, device], readable) in sockets.iter().zip(readable.chunks(2)) {
                if readable[0] {
                    broker.recv_multipart(0)?;
                    device.send_multipart([&messages.opening, &messages.data], 0)?;
                }
                if readable[1] {
                    device.recv_multipart(0)?;
                    answers += 1;
                    broker.send(&messages.submit[..], 0)?;
                }
            }
        }
        Ok(answers as f64 * f64::from(items) / began.elapsed().as_secs_f64())
    }
}

fn start(role: &str) -> Result<(String, Process)> {
    let mut command = Command::new(std::env::current_exe()?);
    command.args(["bare", role]);
    let mut process = Process::start(role, command);
    let endpoint =
        process.wait_for_line("its endpoint", PATIENCE, |line| line.strip_prefix("listening on ").map(str::to_owned));
    Ok((endpoint, process))
}

/// A client's messages, as long as the mesh's.
struct Messages {
    /// With the `Close` of the task before.
    submit: Vec<u8>,
    opening: Vec<u8>,
    data: Vec<u8>,
}

impl Messages {
    fn new(clients: usize, items: u32) -> Result<Self> {
        let (task, client) = (mesh_samples::task_id(0), mesh_samples::client_id(0));
        let close = Close { task, client, attempt: Attempt(1), outcome: Outcome::Done { run_us: 100, load_us: 0 } };
        let [submit, close] = [ClientToBroker::Submit(mesh_samples::submit(0, 0)), ClientToBroker::Close(close)];
        let submit = [submit.to_frame()?.head, close.to_frame()?.head].concat();
        let ticket = Ticket::sign(mesh_samples::ticket_body(0, 0, 0), &mesh_samples::TICKET_KEY);
        let opening = ClientToWorker::Open(mesh_samples::opening(ticket, None)).to_frame()?.head;
        let mut data = (clients as u64).to_le_bytes().to_vec();
        data.resize(data.len() + items as usize * ITEM_BYTES, 0);
        Ok(Self { submit, opening: opening.to_vec(), data })
    }
}
