//! Workers and clients that send exactly what a test wants.

use std::time::Duration;

use mesh_transport::{Context, DialError, Dialer, Heard, Limits, Security};
use proto_msgs::{
    AnswerBody, Arch, Ask, BrokerToClient, BrokerToWorker, ClientId, ClientToBroker, Digest, Grant, HeartbeatAck,
    ModelFormat, ModelRef, PublicKey, Question, Register, Submit, TaskId, TaskSpec, WorkerId, WorkerToBroker,
};
use tokio::time::timeout;

use crate::process::Broker;

/// Limit of every wait: nothing here takes a tenth of it on an idle machine.
const PATIENCE: Duration = Duration::from_secs(20);

/// Longest wait for a node that is not admitted.
const REFUSAL: Duration = Duration::from_secs(3);

/// Interval of repetitions, as in real clients.
const REPEAT: Duration = Duration::from_millis(200);

/// The address of one broker, and the keys for it.
pub(crate) struct Mesh {
    context: Context,
    endpoint: String,
    broker_key: Option<PublicKey>,
}

impl Mesh {
    /// A mesh without keys.
    pub(crate) fn open(broker: &Broker) -> Self {
        let context = Context::new(Security::None).unwrap();
        Self { context, endpoint: broker.endpoint.clone(), broker_key: None }
    }

    pub(crate) fn with_keys(broker: &Broker, security: Security, broker_key: PublicKey) -> Self {
        let context = Context::new(security).unwrap();
        Self { context, endpoint: broker.endpoint.clone(), broker_key: Some(broker_key) }
    }

    pub(crate) async fn dial(&self) -> Dialer {
        let mut dialer = self.context.dial(&self.endpoint, self.broker_key, Limits::CONTROL).unwrap();
        dialer.connected(PATIENCE).await.unwrap();
        dialer
    }

    /// Tries to connect a node that should not be admitted.
    pub(crate) async fn try_dial(&self) -> Result<(), DialError> {
        let mut dialer = self.context.dial(&self.endpoint, self.broker_key, Limits::CONTROL)?;
        dialer.connected(REFUSAL).await
    }
}

/// The next event, within [`PATIENCE`].
pub(crate) async fn next(dialer: &mut Dialer) -> Heard {
    timeout(PATIENCE, dialer.recv()).await.expect("the broker answers")
}

pub(crate) struct TestWorker {
    pub(crate) register: Register,
    dialer: Dialer,
    seq: u64,
}

impl TestWorker {
    pub(crate) async fn new(mesh: &Mesh) -> Self {
        let register = Register {
            worker: WorkerId::from_bytes([7; 16]),
            name: "drawer".to_owned(),
            arch: Arch::HERE,
            heartbeat_ms: 500,
            ..mesh_samples::register(7)
        };
        Self { register, dialer: mesh.dial().await, seq: 0 }
    }

    pub(crate) fn register(&mut self) {
        self.send(WorkerToBroker::Register(self.register.clone()));
    }

    /// Sends one heartbeat.
    pub(crate) fn beat(&mut self) {
        self.seq += 1;
        let mut heartbeat = mesh_samples::heartbeat(&self.register, self.seq);
        heartbeat.load.disk_free_bytes = 1 << 40;
        self.send(WorkerToBroker::Heartbeat(heartbeat));
    }

    /// Sends one heartbeat and returns its answer.
    pub(crate) async fn heartbeat(&mut self) -> HeartbeatAck {
        self.beat();
        loop {
            let Heard::Frame(frame) = next(&mut self.dialer).await else { continue };
            match BrokerToWorker::from_frame(&frame).unwrap() {
                BrokerToWorker::HeartbeatAck(ack) if ack.seq == self.seq => return ack,
                _ => {}
            }
        }
    }

    fn send(&mut self, message: WorkerToBroker) {
        self.dialer.send(message.to_frame().unwrap()).unwrap();
    }
}

pub(crate) fn question(question: Question) -> Ask {
    Ask { request: 1, client: ClientId::from_bytes([8; 16]), question }
}

pub(crate) struct TestClient {
    submit: Submit,
    dialer: Dialer,
}

impl TestClient {
    /// A client with one task.
    pub(crate) async fn new(mesh: &Mesh) -> Self {
        let dialer = mesh.dial().await;
        let like = mesh_samples::submit(1, 8);
        let spec = TaskSpec {
            task: uuid::Uuid::now_v7().into(),
            client: ClientId::from_bytes([8; 16]),
            model_name: "mobilenet".to_owned(),
            model: ModelRef { digest: Digest::of(b"model"), size_bytes: 4_000_000, format: ModelFormat::TfLite },
            input_bytes: 150_528,
            ..like.spec
        };
        let submit = Submit { spec, ..like };
        Self { submit, dialer }
    }

    /// The same client with a new connection.
    pub(crate) async fn again(self, mesh: &Mesh) -> Self {
        Self { dialer: mesh.dial().await, ..self }
    }

    pub(crate) fn task(&self) -> TaskId {
        self.submit.spec.task
    }

    /// Sends the client's view of its task.
    pub(crate) fn say(&mut self) {
        self.send(ClientToBroker::Submit(self.submit.clone()));
    }

    /// Submits once and returns the first answer.
    pub(crate) async fn submit(&mut self, detached: bool) -> BrokerToClient {
        self.submit.spec.detached = detached;
        self.say();
        self.heard().await
    }

    pub(crate) async fn submit_until_granted(&mut self, detached: bool) -> Grant {
        let repeated = async {
            loop {
                if let Ok(BrokerToClient::Grant(grant)) = timeout(REPEAT, self.submit(detached)).await {
                    return grant;
                }
            }
        };
        timeout(PATIENCE, repeated).await.expect("a grant")
    }

    /// Submits detached until the broker says that the store has the task.
    pub(crate) async fn submit_until_durable(&mut self) {
        let repeated = async {
            loop {
                match timeout(REPEAT, self.submit(true)).await {
                    Ok(BrokerToClient::Queued(queued)) if queued.durable => return,
                    Ok(BrokerToClient::Grant(_)) => return,
                    _ => {}
                }
            }
        };
        timeout(PATIENCE, repeated).await.expect("a durable task");
    }

    pub(crate) fn send_question(&mut self, question: Question) {
        self.send(ClientToBroker::Ask(self::question(question)));
    }

    pub(crate) async fn ask(&mut self, question: Question) -> AnswerBody {
        self.send_question(question);
        loop {
            if let BrokerToClient::Answer(answer) = self.heard().await {
                return answer.body;
            }
        }
    }

    async fn heard(&mut self) -> BrokerToClient {
        loop {
            if let Heard::Frame(frame) = next(&mut self.dialer).await {
                return BrokerToClient::from_frame(&frame).unwrap();
            }
        }
    }

    fn send(&mut self, message: ClientToBroker) {
        self.dialer.send(message.to_frame().unwrap()).unwrap();
    }
}
