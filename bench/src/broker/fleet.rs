//! Many workers that only send heartbeats: each has its own TCP connection, all share one thread.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::JoinHandle,
    time::{Duration, Instant},
};

use anyhow::{Context, Result};
use mesh_tests::zmtp::Peer;
use proto_msgs::{Arch, BrokerToWorker, Frame, Heartbeat, Load, Register, WorkerId, WorkerToBroker};

/// Time between two heartbeats of one worker.
pub(crate) const HEARTBEAT: Duration = Duration::from_secs(1);

/// Rate of the heartbeats.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Pace {
    /// Once a second per worker, spread evenly.
    EverySecond,
    /// As fast as the broker accepts them.
    FlatOut,
}

/// The connected workers. Dropping it disconnects them.
#[derive(Debug)]
pub(crate) struct Fleet {
    over: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

struct Member {
    peer: Peer,
    register: Register,
    beat: Heartbeat,
}

impl Fleet {
    /// Connects and registers `workers` workers with `slots` slots each and starts their heartbeats.
    pub(crate) fn start(endpoint: &str, workers: usize, slots: u16, pace: Pace) -> Result<Self> {
        let mut members = Vec::with_capacity(workers);
        for number in 0..workers {
            let peer = Peer::connect(endpoint).with_context(|| format!("worker {number} cannot connect"))?;
            let register = register(number, slots);
            let beat = heartbeat(&register);
            members.push(Member { peer, register, beat });
        }
        // Only now, so that the first worker has not fallen silent when the last one is connected.
        for member in &mut members {
            member.peer.send(&frame(WorkerToBroker::Register(member.register.clone())))?;
        }
        let over = Arc::new(AtomicBool::new(false));
        let over_too = Arc::clone(&over);
        let thread = std::thread::spawn(move || keep_beating(&mut members, pace, &over_too));
        Ok(Self { over, thread: Some(thread) })
    }
}

impl Drop for Fleet {
    fn drop(&mut self) {
        self.over.store(true, Ordering::Relaxed);
        self.thread.take().map(JoinHandle::join);
    }
}

/// Sends the heartbeats of all workers in turn; a round takes one interval.
fn keep_beating(members: &mut [Member], pace: Pace, over: &AtomicBool) {
    let start = Instant::now();
    let step = HEARTBEAT.div_f64(members.len() as f64);
    for turn in 0_u32.. {
        if pace == Pace::EverySecond
            && let Some(early) = (start + step * turn).checked_duration_since(Instant::now())
        {
            std::thread::sleep(early);
        }
        if over.load(Ordering::Relaxed) {
            return;
        }
        let at = turn as usize % members.len();
        members[at].beat();
    }
}

impl Member {
    /// Reads answers first, so that the broker's queue to this worker does not grow. A worker that the broker does not
    /// know registers again, like a real one. A worker whose connection is gone stays silent, and its number is
    /// missing.
    fn beat(&mut self) {
        while let Ok(Some(answer)) = self.peer.recv(Duration::ZERO) {
            if let Ok(BrokerToWorker::HeartbeatAck(ack)) = BrokerToWorker::from_frame(&answer)
                && !ack.known
            {
                let _ = self.peer.send(&frame(WorkerToBroker::Register(self.register.clone())));
            }
        }
        self.beat.seq += 1;
        let _ = self.peer.send(&frame(WorkerToBroker::Heartbeat(self.beat.clone())));
    }
}

fn frame(message: WorkerToBroker) -> Frame {
    message.to_frame().expect("invariant: a worker without tasks has little to say")
}

fn register(number: usize, slots: u16) -> Register {
    let mut id = *b"bench worker    ";
    id[12..].copy_from_slice(&(number as u32).to_be_bytes());
    Register {
        worker: WorkerId::from_bytes(id),
        name: format!("bench-{number}"),
        arch: Arch::HERE,
        endpoints: vec!["tcp://127.0.0.1:9".into()],
        // Submits of one item without a wish go to the realtime lane.
        slots: [slots, 0],
        heartbeat_ms: HEARTBEAT.as_millis() as u32,
        ..mesh_samples::register(number as u32)
    }
}

fn heartbeat(register: &Register) -> Heartbeat {
    let load = Load { cpu_permille: 120, load1_milli: 400, memory_available_bytes: 6 << 30, ..Load::default() };
    Heartbeat { load, ..mesh_samples::heartbeat(register, 0) }
}
