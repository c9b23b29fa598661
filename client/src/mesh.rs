//! The entry of the SDK: a connection to the mesh, and the tasks submitted through it. Owns no state: every call asks
//! the driver.

use std::{cmp::Reverse, sync::Arc, time::Duration};

use mesh_transport::{Admit, Admitted, Context, Limits, Security, address, keys, keys::KeyPair};
use proto_msgs::{
    AnswerBody, ClientId, ClusterView, Direction, ErrorCode, ModelView, Outcome, PublicKey, Question, TaskId, TaskView,
    WhyView, WorkerView,
};
use tokio::sync::{mpsc, oneshot};
use uuid::Uuid;

use crate::{
    AskError, ConnectError, Listen, News, Options, SubmitError, Task, TaskError, TaskResult, Update,
    driver::{Driver, Setup},
    happened::{Command, Watcher},
    options,
    silence::BrokerLink,
    spool::Spool,
    task::blocking,
};

/// Commands that may wait for the driver. Further callers wait themselves.
const COMMANDS_MAX: usize = 256;

/// Unread news of one task. Later news is dropped until there is room; the result is never dropped.
const NEWS_MAX: usize = 64;

/// Time limit of a question, unless [`Mesh::asking_within`] sets another.
const ASK_WITHIN: Duration = Duration::from_secs(10);

/// A connection to the mesh. Cheap to clone. It closes with its last clone and [`TaskHandle`], see also
/// [`Mesh::close`].
#[derive(Clone, Debug)]
pub struct Mesh {
    commands: mpsc::Sender<Command>,
    shared: Arc<Shared>,
    ask_within: Duration,
}

#[derive(Debug)]
struct Shared {
    client: ClientId,
    key: Option<PublicKey>,
    broker: String,
    broker_link: BrokerLink,
    direction: Option<Direction>,
}

impl Mesh {
    /// Joins the mesh: waits until the broker's connection is up. If the broker goes away later, waits for it.
    ///
    /// # Errors
    /// If the broker does not answer in time or refuses, or if keys, addresses or the state folder cannot be used.
    pub async fn connect(options: Options) -> Result<Self, ConnectError> {
        options::check_advertised(&options.advertise)?;
        let client = options::client_id(&options.state_dir)?;
        let spool = Spool::new(&options.state_dir)?;
        let (keys, broker_key) = read_keys(&options)?;
        let context = Context::new(keys.map_or(Security::None, Security::Keys))?;
        let mut broker = context.dial(&options.broker, broker_key, Limits::CONTROL).map_err(ConnectError::Broker)?;
        broker.connected(options.connect_within).await.map_err(ConnectError::Broker)?;

        let admitted = Admitted::default();
        let towards = address::own_towards(&options.broker);
        let listen_at = match (&options.listen, options.direction) {
            (Listen::At(endpoint), _) => Some(endpoint.clone()),
            (Listen::Auto, None | Some(Direction::WorkerDials)) => towards.map(|own| address::of_ip(own, "0")),
            (Listen::Auto | Listen::Never, _) => None,
        };
        let listener = match listen_at {
            Some(endpoint) => Some(context.listen(&endpoint, Admit::Listed(admitted.clone()), Limits::DIRECT)?),
            None if options.direction == Some(Direction::WorkerDials) => {
                return Err(ConnectError::Invalid("workers can dial only a client that listens somewhere".to_owned()));
            }
            None => None,
        };
        let endpoints = listener
            .as_ref()
            .map_or_else(Vec::new, |listener| options::advertised(&options.advertise, listener.endpoint(), towards));

        let (commands, inbox) = mpsc::channel(COMMANDS_MAX);
        let key = context.public_key();
        let broker_link = BrokerLink::up(key.is_some());
        let setup = Setup {
            client,
            context,
            broker,
            broker_key,
            broker_link: broker_link.clone(),
            listener,
            admitted,
            endpoints,
            spool,
        };
        tokio::spawn(Driver::new(setup, inbox).run());
        let shared =
            Arc::new(Shared { client, key, broker: options.broker, broker_link, direction: options.direction });
        Ok(Self { commands, shared, ask_within: ASK_WITHIN })
    }

    /// The id of this client.
    pub fn client_id(&self) -> ClientId {
        self.shared.client
    }

    /// Sets the time limit for answers to questions. Tasks are not questions.
    pub fn asking_within(mut self, within: Duration) -> Self {
        self.ask_within = within;
        self
    }

    /// Submits a task. Returns once its inputs are hashed. The task then runs whether or not the caller waits for it.
    /// Dropping the handle cancels it.
    ///
    /// # Errors
    /// If an input cannot be read or a limit is exceeded. Nothing has been sent then.
    pub async fn submit(&self, task: Task) -> Result<TaskHandle, SubmitError> {
        let id: TaskId = Uuid::now_v7().into();
        let (owner, direction) = ((self.shared.client, self.shared.key), self.shared.direction);
        let (spec, payload) = if task.is_quickly_prepared() {
            task.prepare(id, owner, direction)?
        } else {
            blocking(move || task.prepare(id, owner, direction)).await.unwrap_or(Err(SubmitError::Closed))?
        };
        let (watcher, handle) = self.watch(id);
        let command = Command::Submit { spec: Box::new(spec), payload: Arc::new(payload), watcher };
        self.commands.send(command).await.map_err(|_| SubmitError::Closed)?;
        Ok(handle)
    }

    /// A handle that waits for the result of a detached task, even if another process of this client submitted it.
    pub async fn fetch(&self, task: TaskId) -> TaskHandle {
        let (watcher, handle) = self.watch(task);
        // If the driver is gone, the handle reports it.
        let _ = self.commands.send(Command::Fetch { task, watcher }).await;
        handle
    }

    fn watch(&self, task: TaskId) -> (Watcher, TaskHandle) {
        let (news, news_inbox) = mpsc::channel(NEWS_MAX);
        let (done, done_inbox) = oneshot::channel();
        let handle = TaskHandle { task, news: news_inbox, done: Some(done_inbox), commands: self.commands.clone() };
        (Watcher { news, done }, handle)
    }

    /// Stops a task, even if another process of this client submitted it. `Ok` holds the task's outcome: cancelled, or
    /// how it had ended before.
    ///
    /// # Errors
    /// If there is no such task, or the broker does not answer.
    pub async fn cancel(&self, task: TaskId) -> Result<Outcome, AskError> {
        let (reply, answer) = oneshot::channel();
        let outcome = self.answered(Command::Cancel { task, reply: Some(reply) }, answer).await?;
        match outcome {
            Outcome::Failed(failure) if failure.code == ErrorCode::NotFound => Err(AskError::NotFound(task)),
            Outcome::Failed(failure) if matches!(failure.code, ErrorCode::Forbidden | ErrorCode::StoreAway) => {
                Err(AskError::Refused(failure))
            }
            outcome => Ok(outcome),
        }
    }

    /// The broker's view of the mesh.
    ///
    /// # Errors
    /// If the broker does not answer.
    pub async fn cluster(&self) -> Result<ClusterView, AskError> {
        match self.ask(Question::Cluster).await? {
            AnswerBody::Cluster(view) => Ok(view),
            _ => Err(unexpected()),
        }
    }

    /// All live workers, in order of id.
    ///
    /// # Errors
    /// If the broker does not answer.
    pub async fn workers(&self) -> Result<Vec<WorkerView>, AskError> {
        let rows = |body| if let AnswerBody::Workers(page) = body { Some(page) } else { None };
        self.pages(|after| Question::Workers { after }, rows, |view| view.worker, usize::MAX).await
    }

    /// This client's tasks that the broker remembers, newest first, at most `rows_max`.
    ///
    /// # Errors
    /// If the broker does not answer.
    pub async fn tasks(&self, rows_max: usize) -> Result<Vec<TaskView>, AskError> {
        let rows = |body| if let AnswerBody::Tasks(page) = body { Some(page) } else { None };
        let ask = |after: Option<Reverse<TaskId>>| Question::Tasks { before: after.map(|Reverse(task)| task) };
        self.pages(ask, rows, |view| Reverse(view.task), rows_max).await
    }

    /// The cost of each model at each worker that has run it, in order of worker and model.
    ///
    /// # Errors
    /// If the broker does not answer.
    pub async fn models(&self) -> Result<Vec<ModelView>, AskError> {
        let rows = |body| if let AnswerBody::Models(page) = body { Some(page) } else { None };
        self.pages(|after| Question::Models { after }, rows, |view| (view.worker, view.cost.model), usize::MAX).await
    }

    /// Asks page by page, each time for the rows after the last one received, until there are enough rows or no more.
    async fn pages<R, K: Copy + PartialOrd>(
        &self,
        ask: impl Fn(Option<K>) -> Question,
        rows: impl Fn(AnswerBody) -> Option<Vec<R>>,
        key: impl Fn(&R) -> K,
        rows_max: usize,
    ) -> Result<Vec<R>, AskError> {
        let mut all: Vec<R> = Vec::new();
        loop {
            let after = all.last().map(&key);
            let page = rows(self.ask(ask(after)).await?).ok_or_else(unexpected)?;
            // A page that does not continue after the last row would be asked for without end.
            let goes_on = page.first().is_some_and(|first| after.is_none_or(|after| key(first) > after));
            if goes_on {
                all.extend(page);
            }
            if !goes_on || all.len() >= rows_max {
                all.truncate(rows_max);
                return Ok(all);
            }
        }
    }

    /// The broker's view of one task.
    ///
    /// # Errors
    /// If there is no such task, or the broker does not answer.
    pub async fn status(&self, task: TaskId) -> Result<TaskView, AskError> {
        match self.ask(Question::Task(task)).await? {
            AnswerBody::Task(view) => Ok(view),
            AnswerBody::NotFound => Err(AskError::NotFound(task)),
            _ => Err(unexpected()),
        }
    }

    /// Why a task is at its worker, or still has none.
    ///
    /// # Errors
    /// If there is no such task, or the broker does not answer.
    pub async fn why(&self, task: TaskId) -> Result<WhyView, AskError> {
        match self.ask(Question::Why(task)).await? {
            AnswerBody::Why(view) => Ok(view),
            AnswerBody::NotFound => Err(AskError::NotFound(task)),
            _ => Err(unexpected()),
        }
    }

    /// Closes the connection: cancels tasks that are still attached at their workers, and waits a moment for queued
    /// messages to leave. If a program ends without it, the others may notice only by their timeouts.
    pub async fn close(self) {
        let (reply, closed) = oneshot::channel();
        if self.commands.send(Command::Close { reply }).await.is_ok() {
            // An error means that the driver has already ended.
            let _ = closed.await;
        }
    }

    async fn ask(&self, question: Question) -> Result<AnswerBody, AskError> {
        let (reply, answer) = oneshot::channel();
        self.answered(Command::Ask { question, reply }, answer).await
    }

    async fn answered<T>(
        &self,
        command: Command,
        answer: oneshot::Receiver<Result<T, AskError>>,
    ) -> Result<T, AskError> {
        self.commands.send(command).await.map_err(|_| AskError::Closed)?;
        match tokio::time::timeout(self.ask_within, answer).await {
            Ok(Ok(answer)) => answer,
            Ok(Err(_)) => Err(AskError::Closed),
            Err(_) => {
                let (broker, hint) = (self.shared.broker.clone(), self.shared.broker_link.hint());
                Err(AskError::Silent { broker, within: self.ask_within, hint })
            }
        }
    }
}

fn unexpected() -> AskError {
    AskError::Version("the broker's answer does not fit the question: is it of another version?".to_owned())
}

fn read_keys(options: &Options) -> Result<(Option<KeyPair>, Option<PublicKey>), ConnectError> {
    match (&options.key_file, &options.broker_key) {
        (None, None) => Ok((None, None)),
        (Some(own), Some(broker)) => Ok((Some(KeyPair::load(own)?), Some(keys::read_public(broker)?))),
        (Some(_), None) => Err(ConnectError::HalfKeyed(
            "a key file is given, but not the broker's public key: add the broker key (its .pub file or the 40 characters)",
        )),
        (None, Some(_)) => Err(ConnectError::HalfKeyed(
            "the broker's key is given, but no key file of this client: make one with `mesh-client keygen FILE`",
        )),
    }
}

/// A submitted task.
///
/// **Dropping the handle cancels the task** within a second, unless it has already returned the task's end. This holds
/// for a [detached](crate::Task::detached) task, too: its [`Self::wait`] ends as soon as the worker has everything, and
/// then the program may exit.
#[must_use = "to drop the handle cancels the task: keep it, and wait for its end"]
#[derive(Debug)]
pub struct TaskHandle {
    task: TaskId,
    news: mpsc::Receiver<News>,
    /// `None` once the end has been read.
    done: Option<oneshot::Receiver<Result<TaskResult, TaskError>>>,
    commands: mpsc::Sender<Command>,
}

impl TaskHandle {
    /// The task's id, for every other command.
    pub fn id(&self) -> TaskId {
        self.task
    }

    /// Waits for the next news or for the end, which is returned once. The future may be dropped halfway (in a
    /// `select!`) and `next` called again. Unread news may be dropped, the end never is.
    pub async fn next(&mut self) -> Update {
        let Some(done) = &mut self.done else { return Update::End(Err(TaskError::Closed)) };
        let end = tokio::select! {
            biased;
            Some(news) = self.news.recv() => return Update::News(news),
            end = done => end.unwrap_or(Err(TaskError::Closed)),
        };
        self.done = None;
        Update::End(end)
    }

    /// Cancels the task: the worker stops it. [`Self::wait`] then returns [`TaskError::Cancelled`], or the result if
    /// that came first.
    pub async fn cancel(&self) {
        // If the driver is gone, the task is over anyway.
        let _ = self.commands.send(Command::Cancel { task: self.task, reply: None }).await;
    }

    /// Waits for the end, which is returned once.
    ///
    /// # Errors
    /// If the task has no result; the error says why.
    pub async fn wait(&mut self) -> Result<TaskResult, TaskError> {
        loop {
            if let Update::End(end) = self.next().await {
                return end;
            }
        }
    }
}
