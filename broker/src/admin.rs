//! The admin port: plain HTTP for people, supervisors and Prometheus. Read only, no login: bind it to an internal
//! address.
//!
//! Owns the meaning of each page. Never: numbers of its own. It asks the run loop, and a loop that does not answer is
//! reported as stuck.
//!
//! ```text
//!   /healthz   200 while the run loop turns. A store that is away is reported in the body ("degraded") with 200:
//!              decisions go on, and a restart would not bring the store back.
//!   /readyz    200 while workers and clients are served; 503 before (store not read yet) and after the stop.
//!              A store that goes away later is reported in the body with 200: attached tasks need none.
//!   /metrics   OpenMetrics text
//! ```

use std::{
    collections::VecDeque,
    convert::Infallible,
    io,
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicU8, Ordering},
    },
    thread,
    time::Duration,
};

use bytes::Bytes;
use http_body_util::Full;
use hyper::{
    Method, Request, Response, StatusCode,
    body::Incoming,
    header::{CONTENT_TYPE, HeaderValue},
    server::conn::http1,
    service::service_fn,
};
use hyper_util::rt::{TokioIo, TokioTimer};
use prometheus_client::registry::Registry;
use serde_json::{Value, json};
use tokio::{
    net::{TcpListener, TcpStream},
    sync::{mpsc, oneshot},
    task::AbortHandle,
    time::{sleep, timeout},
};
use tracing::{debug, warn};

use crate::metrics::{self, Snapshot};

/// Connections at the same time: a few scrapers, a supervisor and people. For a further one the oldest is closed, so that
/// requests that never come to their end lock nobody out.
const CONNECTIONS_MAX: usize = 64;

/// Time after which a connection without a request is closed.
const IDLE_MAX: Duration = Duration::from_secs(75);

/// The run loop answers within microseconds; after this time it hangs.
const ANSWER_MAX: Duration = Duration::from_secs(2);

/// Pause after a failed accept (usually no file descriptor is left).
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Content type of the metrics page.
const OPENMETRICS: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// A question to the run loop.
pub type Question = oneshot::Sender<Snapshot>;

/// State of the broker as the pages show it.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[repr(u8)]
pub enum Phase {
    /// The store is not read yet.
    Starting,
    /// Workers and clients are served.
    Serving,
    /// Workers and clients are no longer served.
    Stopping,
}

/// The broker's end: sets the phase that the pages show.
#[derive(Clone, Debug)]
pub struct PhaseTeller(Arc<AtomicU8>);

impl PhaseTeller {
    /// Starts in [`Phase::Starting`].
    pub fn new() -> Self {
        Self(Arc::new(AtomicU8::new(Phase::Starting as u8)))
    }

    /// Sets the phase.
    pub fn set(&self, phase: Phase) {
        self.0.store(phase as u8, Ordering::Release);
    }

    fn get(&self) -> Phase {
        match self.0.load(Ordering::Acquire) {
            0 => Phase::Starting,
            1 => Phase::Serving,
            _ => Phase::Stopping,
        }
    }
}

impl Default for PhaseTeller {
    fn default() -> Self {
        Self::new()
    }
}

/// The parts that the pages need.
#[derive(Debug)]
pub struct Pages {
    /// Counters of the run loop.
    pub registry: Registry,
    /// Phase of the broker.
    pub phase: PhaseTeller,
    /// Questions to the run loop.
    pub ask: mpsc::Sender<Question>,
}

/// Binds the address and serves the pages from its own thread until the process ends. Returns the address with its
/// actual port.
///
/// # Errors
/// If the address cannot be bound.
pub fn serve(address: SocketAddr, pages: Pages) -> io::Result<SocketAddr> {
    let listener = std::net::TcpListener::bind(address)?;
    listener.set_nonblocking(true)?;
    let bound = listener.local_addr()?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let work = move || runtime.block_on(accept(listener, Arc::new(pages)));
    thread::Builder::new().name("admin".to_owned()).spawn(work)?;
    Ok(bound)
}

async fn accept(listener: std::net::TcpListener, pages: Arc<Pages>) {
    let listener = TcpListener::from_std(listener).expect("the runtime is entered and the socket does not block");
    let mut open: VecDeque<AbortHandle> = VecDeque::new();
    loop {
        match listener.accept().await {
            Ok((stream, _)) => {
                open.retain(|connection| !connection.is_finished());
                while open.len() >= CONNECTIONS_MAX {
                    open.pop_front().into_iter().for_each(|oldest| oldest.abort());
                }
                let pages = Arc::clone(&pages);
                open.push_back(tokio::spawn(async move { talk(stream, &pages).await }).abort_handle());
            }
            Err(error) => {
                warn!("the admin port cannot accept: {error}");
                sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

async fn talk(stream: TcpStream, pages: &Arc<Pages>) {
    let service = service_fn(|request: Request<Incoming>| {
        let pages = Arc::clone(pages);
        async move { Ok::<_, Infallible>(answer(request.method(), request.uri().path(), &pages).await) }
    });
    let mut http = http1::Builder::new();
    http.timer(TokioTimer::new()).header_read_timeout(IDLE_MAX);
    if let Err(error) = http.serve_connection(TokioIo::new(stream), service).await {
        debug!("admin connection: {error}");
    }
}

async fn answer(method: &Method, path: &str, pages: &Pages) -> Response<Full<Bytes>> {
    if !matches!(*method, Method::GET | Method::HEAD) {
        return text(StatusCode::METHOD_NOT_ALLOWED, "this port is for reading: use GET\n");
    }
    match path {
        "/" => text(StatusCode::OK, "/healthz\n/readyz\n/metrics\n"),
        "/healthz" => health(pages).await,
        "/readyz" => readiness(pages).await,
        "/metrics" => {
            let page = metrics::page(&pages.registry, snapshot(pages).await);
            with_type(text(StatusCode::OK, page), OPENMETRICS)
        }
        _ => text(StatusCode::NOT_FOUND, "no such page: there are /healthz, /readyz and /metrics\n"),
    }
}

async fn snapshot(pages: &Pages) -> Option<Snapshot> {
    if pages.phase.get() != Phase::Serving {
        return None;
    }
    let (question, answer) = oneshot::channel();
    let asked = async {
        pages.ask.send(question).await.ok()?;
        answer.await.ok()
    };
    timeout(ANSWER_MAX, asked).await.ok().flatten()
}

async fn health(pages: &Pages) -> Response<Full<Bytes>> {
    match (pages.phase.get(), snapshot(pages).await) {
        (Phase::Starting, _) => json_page(StatusCode::OK, json!({ "status": "starting" })),
        (Phase::Stopping, _) => json_page(StatusCode::OK, json!({ "status": "stopping" })),
        (Phase::Serving, None) => {
            let why = format!("the run loop did not answer within {} s", ANSWER_MAX.as_secs());
            json_page(StatusCode::SERVICE_UNAVAILABLE, json!({ "status": "stuck", "why": why }))
        }
        (Phase::Serving, Some(Snapshot { gauges, store, uptime, .. })) => {
            let (away_s, why) = match &store.away {
                Some((since, why)) => (Some(since.elapsed().as_secs()), Some(why.as_str())),
                None => (None, None),
            };
            let status = if away_s.is_some() { "degraded" } else { "ok" };
            let store = json!({
                "up": away_s.is_none(), "away_s": away_s, "why": why,
                "pending_changes": store.pending, "lag_ms": store.lag.as_millis() as u64,
            });
            let body = json!({
                "status": status, "uptime_s": uptime.as_secs(), "store": store,
                "workers": gauges.workers, "tasks_queued": gauges.queued, "tasks_placed": gauges.placed,
            });
            json_page(StatusCode::OK, body)
        }
    }
}

async fn readiness(pages: &Pages) -> Response<Full<Bytes>> {
    let unready = |why| json_page(StatusCode::SERVICE_UNAVAILABLE, json!({ "ready": false, "why": why }));
    match (pages.phase.get(), snapshot(pages).await) {
        (Phase::Starting, _) => unready("the store is not read yet"),
        (Phase::Stopping, _) => unready("stopping"),
        (Phase::Serving, None) => unready("the run loop does not answer"),
        (Phase::Serving, Some(snapshot)) => {
            let store = if snapshot.store.away.is_some() { "away: detached tasks are refused" } else { "up" };
            json_page(StatusCode::OK, json!({ "ready": true, "store": store }))
        }
    }
}

fn json_page(status: StatusCode, body: Value) -> Response<Full<Bytes>> {
    with_type(text(status, format!("{body}\n")), "application/json")
}

fn text(status: StatusCode, body: impl Into<Bytes>) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(body.into()));
    *response.status_mut() = status;
    with_type(response, "text/plain; charset=utf-8")
}

fn with_type(mut response: Response<Full<Bytes>>, content_type: &'static str) -> Response<Full<Bytes>> {
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(content_type));
    response
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use http_body_util::BodyExt;

    use super::*;
    use crate::store::StoreHealth;

    fn pages(phase: Phase) -> (Pages, mpsc::Receiver<Question>) {
        let (ask, questions) = mpsc::channel(1);
        let teller = PhaseTeller::new();
        teller.set(phase);
        (Pages { registry: metrics::registry(), phase: teller, ask }, questions)
    }

    /// A run loop that always answers with this snapshot.
    fn answer_with(snapshot: Snapshot, mut questions: mpsc::Receiver<Question>) {
        tokio::spawn(async move {
            while let Some(question) = questions.recv().await {
                let _ = question.send(snapshot.clone());
            }
        });
    }

    async fn get(path: &str, pages: &Pages) -> (u16, String) {
        let response = answer(&Method::GET, path, pages).await;
        let status = response.status().as_u16();
        let body = response.into_body().collect().await.unwrap().to_bytes();
        (status, String::from_utf8(body.to_vec()).unwrap())
    }

    #[tokio::test]
    async fn a_broker_is_ready_only_while_it_serves() {
        for (phase, status) in [(Phase::Starting, 503), (Phase::Serving, 200), (Phase::Stopping, 503)] {
            let (pages, questions) = pages(phase);
            answer_with(Snapshot::default(), questions);
            assert_eq!(get("/readyz", &pages).await.0, status, "{phase:?}");
        }
    }

    #[tokio::test]
    async fn a_store_away_degrades_but_does_not_fail_health() {
        let (pages, questions) = pages(Phase::Serving);
        let away = Some((Instant::now(), "connection refused".to_owned()));
        answer_with(
            Snapshot { store: StoreHealth { away, ..StoreHealth::default() }, ..Snapshot::default() },
            questions,
        );
        let (status, body) = get("/healthz", &pages).await;
        assert_eq!(status, 200);
        assert!(body.contains(r#""status":"degraded""#) && body.contains("connection refused"), "{body}");
        let (status, body) = get("/readyz", &pages).await;
        assert!(status == 200 && body.contains("away"), "{body}");
        assert!(get("/metrics", &pages).await.1.contains("mesh_broker_store_up 0"));
    }

    #[tokio::test(start_paused = true)]
    async fn a_run_loop_that_hangs_fails_health_and_metrics_still_come() {
        let (pages, _questions) = pages(Phase::Serving);
        let (status, body) = get("/healthz", &pages).await;
        assert_eq!(status, 503);
        assert!(body.contains("stuck"), "{body}");
        assert_eq!(get("/metrics", &pages).await.0, 200);
    }

    #[tokio::test]
    async fn other_pages_and_methods_are_told_what_there_is() {
        let (pages, _questions) = pages(Phase::Starting);
        assert!(get("/", &pages).await.1.contains("/metrics"));
        assert_eq!(get("/metrics/..", &pages).await.0, 404);
        assert_eq!(answer(&Method::POST, "/healthz", &pages).await.status(), 405);
    }
}
