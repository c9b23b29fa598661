//! The story of a run, for a person who looks into a failure. It costs nothing unless told: a failing seed is played
//! again with the story on.

use std::collections::VecDeque;

use proto_msgs::{
    AttemptId, BrokerToClient, BrokerToWorker, ClientToBroker, ClientToWorker, WorkerToBroker, WorkerToClient,
};

use super::mesh::{Micros, short, short_id};

/// Lines shown to a person: enough to see the cause of most failures, few enough to read.
const LINES_KEPT: usize = 48;

/// The last lines of a run, and a hash over all its lines.
#[derive(Debug, Default)]
pub(crate) struct Story {
    pub(crate) is_told: bool,
    lines: VecDeque<String>,
    hash: u64,
}

impl Story {
    pub(crate) fn told() -> Self {
        Self { is_told: true, ..Self::default() }
    }

    pub(crate) fn add(&mut self, now: Micros, line: &str) {
        let line = format!("{:>4}.{:06}  {line}", now / 1_000_000, now % 1_000_000);
        for byte in line.bytes() {
            // FNV-1a: short, and good enough to tell two runs apart.
            self.hash = (self.hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3);
        }
        if std::env::var_os("MESH_SIM_WHOLE_STORY").is_some() {
            println!("{line}");
        }
        // Heartbeats without news would push all other lines out.
        if line.contains("[]") && (line.ends_with("[]") || line.contains("forget []")) {
            return;
        }
        self.lines.push_back(line);
        if self.lines.len() > LINES_KEPT {
            self.lines.pop_front();
        }
    }

    /// A hash that is equal for equal stories.
    pub(crate) fn hash(&self) -> u64 {
        self.hash
    }

    pub(crate) fn last_lines(&self) -> String {
        self.lines.iter().map(|line| format!("    {line}\n")).collect()
    }
}

/// Adds a line to the story if it is told; otherwise the arguments are not even evaluated.
macro_rules! tell {
    ($mesh:expr, $($line:tt)*) => {
        if $mesh.story.is_told {
            let line = format!($($line)*);
            $mesh.story.add($mesh.now, &line);
        }
    };
}
pub(crate) use tell;

/// A client's message to the broker, in a few words.
pub(super) fn brief_from_client(message: &ClientToBroker) -> String {
    match message {
        ClientToBroker::Submit(submit) => format!("Submit {} {:?}", short(submit.spec.task), submit.standing),
        ClientToBroker::Close(close) => format!("Close {} {:?}", short(close.task), close.outcome),
        ClientToBroker::Cancel(cancel) => format!("Cancel {}", short(cancel.task)),
        ClientToBroker::Locate(locate) => format!("Locate {}", short(locate.task)),
        ClientToBroker::Ask(ask) => format!("Ask {:?}", ask.question),
    }
}

/// A worker's message to the broker, in a few words.
pub(super) fn brief_from_worker(message: &WorkerToBroker) -> String {
    match message {
        WorkerToBroker::Register(register) => format!("Register in {:?}", register.epoch),
        WorkerToBroker::Heartbeat(heartbeat) => {
            let attempts: Vec<String> =
                heartbeat.attempts.iter().map(|report| format!("{} {:?}", short_id(report.id), report.state)).collect();
            format!("Heartbeat {} of {:?} [{}]", heartbeat.seq, heartbeat.epoch, attempts.join(", "))
        }
        WorkerToBroker::Leave(_) => "Leave".to_owned(),
    }
}

/// The broker's message to a worker, in a few words.
pub(super) fn brief_to_worker(message: &BrokerToWorker) -> String {
    let list = |ids: &[AttemptId]| ids.iter().copied().map(short_id).collect::<Vec<_>>().join(", ");
    match message {
        BrokerToWorker::HeartbeatAck(ack) => {
            let (forget, stop) = (list(&ack.forget), list(&ack.stop));
            format!("HeartbeatAck {} known {} forget [{forget}] stop [{stop}]", ack.seq, ack.known)
        }
        BrokerToWorker::Introduce(introduce) => format!("Introduce {}", short(introduce.ticket.body.task)),
        BrokerToWorker::Stop(id) => format!("Stop {}", short_id(*id)),
        BrokerToWorker::Overtaken(told) => format!("Overtaken {:?}", told.epoch),
    }
}

/// The broker's message to a client, in a few words.
pub(super) fn brief_to_client(message: &BrokerToClient) -> String {
    match message {
        BrokerToClient::Grant(grant) => {
            let body = &grant.ticket.body;
            format!("Grant {} {:?} at {} {:?}", short_id(grant.id), body.purpose, grant.worker_name, body.epoch)
        }
        BrokerToClient::Queued(queued) => format!("Queued {} durable {}", short(queued.task), queued.durable),
        BrokerToClient::Noted(noted) => {
            format!("Noted {} alive {} durable {}", short_id(noted.id), noted.worker_alive, noted.durable)
        }
        BrokerToClient::Ended(ended) => format!("Ended {} {:?}", short(ended.task), ended.outcome),
        BrokerToClient::Answer(_) => "Answer".to_owned(),
    }
}

/// A client's message to a worker, in a few words.
pub(super) fn brief_to_door(message: &ClientToWorker) -> String {
    match message {
        ClientToWorker::Open(open) => {
            let body = &open.ticket.body;
            let id = body.attempt_id();
            format!("Open {} {:?} resume {}", short_id(id), body.purpose, open.resume)
        }
        ClientToWorker::Release(id) => format!("Release {}", short_id(*id)),
        ClientToWorker::Abort(id) => format!("Abort {}", short_id(*id)),
        ClientToWorker::Alive(id) => format!("Alive {}", short_id(*id)),
        ClientToWorker::Chunk(_) | ClientToWorker::Credit(_) => "data".to_owned(),
    }
}

/// A worker's message to a client, in a few words.
pub(super) fn brief_from_door(message: &WorkerToClient) -> String {
    match message {
        WorkerToClient::DialIn(id) => format!("DialIn {}", short_id(*id)),
        WorkerToClient::Accept(accept) => format!("Accept {} needs {:?}", short_id(accept.id), accept.needs),
        WorkerToClient::Refuse(refuse) => format!("Refuse {} {} {}", short_id(refuse.id), refuse.code, refuse.text),
        WorkerToClient::Progress(progress) => format!("Progress {} {:?}", short_id(progress.id), progress.phase),
        WorkerToClient::Result(result) => format!("Result {} {:?}", short_id(result.id), result.outcome),
        WorkerToClient::Reopen(id) => format!("Reopen {}", short_id(*id)),
        WorkerToClient::Credit(_) | WorkerToClient::Chunk(_) => "data".to_owned(),
    }
}
