//! Many workers that do nothing but beat: each a TCP connection of its own, all in one thread.

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
use proto_msgs::{
    Arch, EngineKind, Epoch, Frame, Heartbeat, Load, ModelFormat, Register, TicketKey, WorkerId, WorkerToBroker,
};

const HEARTBEAT: Duration = Duration::from_secs(1);

/// The connected workers. Dropping it disconnects them.
#[derive(Debug)]
pub(crate) struct Fleet {
    over: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

struct Member {
    peer: Peer,
    beat: Heartbeat,
}

impl Fleet {
    /// Connects and registers `workers` workers with `slots` slots each; then each says a heartbeat a second or, if
    /// `flat_out`, as many as it can.
    pub(crate) fn start(address: &str, workers: usize, slots: u16, flat_out: bool) -> Result<Self> {
        let mut members = Vec::with_capacity(workers);
        for number in 0..workers {
            let mut peer = Peer::connect(address).with_context(|| format!("worker {number} cannot connect"))?;
            let register = register(number, slots);
            peer.send(&frame(&WorkerToBroker::Register(register.clone())))?;
            members.push(Member { peer, beat: heartbeat(&register) });
        }
        let over = Arc::new(AtomicBool::new(false));
        let over_too = Arc::clone(&over);
        let thread = std::thread::spawn(move || beat(&mut members, flat_out, &over_too));
        Ok(Self { over, thread: Some(thread) })
    }
}

impl Drop for Fleet {
    fn drop(&mut self) {
        self.over.store(true, Ordering::Relaxed);
        self.thread.take().map(JoinHandle::join);
    }
}

/// Goes round the workers; each turn takes one interval, so that beats are spread evenly.
fn beat(members: &mut [Member], flat_out: bool, over: &AtomicBool) {
    let start = Instant::now();
    let step = HEARTBEAT.div_f64(members.len() as f64);
    for turn in 0_u64.. {
        let at = (turn % members.len() as u64) as usize;
        let due = start + step.mul_f64(turn as f64);
        if !flat_out && let Some(early) = due.checked_duration_since(Instant::now()) {
            std::thread::sleep(early);
        }
        if over.load(Ordering::Relaxed) {
            return;
        }
        let member = &mut members[at];
        // The answers are read so that the broker's queue to this worker does not grow.
        while let Ok(Some(_)) = member.peer.recv(Duration::ZERO) {}
        member.beat.seq += 1;
        // A broker that has gone ends the bench by itself.
        let _ = member.peer.send(&frame(&WorkerToBroker::Heartbeat(member.beat.clone())));
    }
}

fn frame(message: &WorkerToBroker) -> Frame {
    message.to_frame().expect("short")
}

pub(crate) fn register(number: usize, slots: u16) -> Register {
    let mut id = *b"bench worker    ";
    id[12..].copy_from_slice(&(number as u32).to_be_bytes());
    Register {
        worker: WorkerId::from_bytes(id),
        epoch: Epoch(1),
        name: format!("bench-{number}"),
        version: env!("CARGO_PKG_VERSION").into(),
        os: "bench".into(),
        arch: Arch::HERE,
        cores: 4,
        memory_bytes: 8 << 30,
        engine: EngineKind::Process,
        formats: vec![ModelFormat::TfLite, ModelFormat::Onnx],
        endpoints: vec!["tcp://127.0.0.1:9".into()],
        key: None,
        ticket_key: TicketKey([7; 32]),
        slots,
        labels: Vec::new(),
        gpus: Vec::new(),
        heartbeat_ms: HEARTBEAT.as_millis() as u32,
    }
}

pub(crate) fn heartbeat(register: &Register) -> Heartbeat {
    Heartbeat {
        worker: register.worker,
        epoch: register.epoch,
        seq: 0,
        draining: false,
        load: Load { cpu_permille: 120, load1_milli: 400, memory_available_bytes: 6 << 30, ..Load::default() },
        attempts: Vec::new(),
        held: Vec::new(),
        warm: Vec::new(),
        link_bytes_per_s: 0,
    }
}
