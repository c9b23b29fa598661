//! `mesh-runner serve`: one model behind a Unix socket. Owns the lives of socket and process: the socket exists as soon
//! as the program runs, requests wait until the model is loaded, and the socket is removed when the program ends.

use std::{
    fs,
    os::unix::fs::{FileTypeExt, PermissionsExt},
    path::{Path, PathBuf},
    pin::pin,
    sync::Arc,
    time::Duration,
};

use anyhow::{Context, Result, bail};
use hyper::{server::conn::http1, service::service_fn};
use hyper_util::rt::TokioIo;
use proto_msgs::Failure;
use tokio::{
    net::{UnixListener, UnixStream},
    signal::unix::{SignalKind, signal},
    sync::{Semaphore, watch},
    time::timeout,
};

use crate::{
    cli::Serve,
    exit::{SUCCESS, exit_status},
    model_thread::ModelThread,
};

pub(crate) mod oip;
mod request;
mod response;
mod routes;

use routes::Service;

/// Connections at a time: a worker needs one or two, a person with `curl` another.
const CONNECTIONS_MAX: usize = 64;

/// Time within which the starter of a runner connects, however busy the machine is.
const FIRST_WAIT: Duration = Duration::from_secs(60);

/// Time within which a client reconnects after a broken connection.
const LONELY_WAIT: Duration = Duration::from_secs(5);

/// Pause after a failed accept: the error would come back at once, and no event tells when it is over.
const ACCEPT_AGAIN: Duration = Duration::from_millis(100);

/// Serves until it is told to end or the model cannot be loaded.
pub(crate) fn serve(arguments: Serve) -> Result<u8> {
    let model = ModelThread::start(arguments.model, arguments.options.options())?;
    let service = Service { model, name: arguments.name, body_bytes_max: arguments.body_limit };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let ended = runtime.block_on(until_told(service, &arguments.socket, arguments.while_connected));
    // Does not wait for a run under way: the process ends here, whatever the model is doing.
    runtime.shutdown_background();
    ended
}

async fn until_told(service: Service, path: &Path, while_connected: bool) -> Result<u8> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let socket = Socket::bind(path)?;
    tracing::info!(socket = %path.display(), "serving");
    let model = service.model.clone();
    let service = Arc::new(service);
    let (connections, mut connected) = watch::channel(0_usize);
    let (leave, leaving) = watch::channel(false);
    tokio::select! {
        failure = load_failure(&model) => return Ok(report(&failure)),
        () = accept(&socket.listener, service, connections, leaving) => unreachable!("accepting never ends"),
        () = lonely(connected.clone()), if while_connected => {
            tracing::info!("nobody is connected any more");
            return Ok(SUCCESS);
        }
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
    // A service manager may tell the runner and its worker at the same time, and the worker finishes what runs.
    drop(socket);
    leave.send_replace(true);
    tokio::select! {
        _ = connected.wait_for(|count| *count == 0) => {}
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
    Ok(SUCCESS)
}

/// Returns when nobody is connected and nobody connects: then the starter of this runner is gone, and a container would
/// outlive it.
async fn lonely(mut connected: watch::Receiver<usize>) {
    let mut patience = FIRST_WAIT;
    while timeout(patience, connected.wait_for(|count| *count > 0)).await.is_ok() {
        if connected.wait_for(|count| *count == 0).await.is_err() {
            return;
        }
        patience = LONELY_WAIT;
    }
}

/// Returns the failure if the model cannot be loaded; never returns if it can.
async fn load_failure(model: &ModelThread) -> Failure {
    match model.loaded().await {
        Ok(loaded) => {
            tracing::info!(runtime = loaded.runtime, load_time = ?loaded.load_time, "loaded");
            std::future::pending().await
        }
        Err(failure) => failure,
    }
}

/// Writes the failure in the form that the worker reads, and returns the exit status for it.
fn report(failure: &Failure) -> u8 {
    eprintln!("{}", serde_json::json!({ "code": failure.code.name(), "text": failure.text }));
    exit_status(failure.code)
}

async fn accept(
    listener: &UnixListener,
    service: Arc<Service>,
    connections: watch::Sender<usize>,
    leaving: watch::Receiver<bool>,
) {
    let connections = Arc::new(connections);
    let places = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    loop {
        let place = Arc::clone(&places).acquire_owned().await.expect("the semaphore is never closed");
        match listener.accept().await {
            Ok((stream, _)) => {
                let (service, connections, leaving) = (service.clone(), connections.clone(), leaving.clone());
                connections.send_modify(|count| *count += 1);
                tokio::spawn(async move {
                    converse(stream, service, leaving).await;
                    connections.send_modify(|count| *count -= 1);
                    drop(place);
                });
            }
            Err(error) => {
                // Out of descriptors or memory: wait until connections end.
                tracing::warn!(%error, "cannot accept a connection");
                tokio::time::sleep(ACCEPT_AGAIN).await;
            }
        }
    }
}

/// Answers what one peer asks, until it hangs up or the runner is `leaving`: then after the answer that is under way.
async fn converse(stream: UnixStream, service: Arc<Service>, mut leaving: watch::Receiver<bool>) {
    let answer = service_fn(move |request| {
        let service = Arc::clone(&service);
        async move { Ok::<_, std::convert::Infallible>(service.answer(request).await) }
    });
    let mut connection = pin!(http1::Builder::new().serve_connection(TokioIo::new(stream), answer));
    let ended = tokio::select! {
        ended = connection.as_mut() => ended,
        () = async { drop(leaving.wait_for(|is_leaving| *is_leaving).await) } => {
            connection.as_mut().graceful_shutdown();
            connection.await
        }
    };
    if let Err(error) = ended {
        tracing::debug!(%error, "a connection ended early");
    }
}

/// A listening socket. Its file is removed when it is dropped.
struct Socket {
    listener: UnixListener,
    path: PathBuf,
}

impl Socket {
    fn bind(path: &Path) -> Result<Self> {
        let what = || format!("cannot listen on {}", path.display());
        match fs::symlink_metadata(path) {
            // Left behind by a runner that was killed.
            Ok(there) if there.file_type().is_socket() => fs::remove_file(path).with_context(what)?,
            Ok(_) => bail!("{}: a file that is not a socket is there", what()),
            Err(_) => {}
        }
        let listener = UnixListener::bind(path).with_context(what)?;
        // In a container the runner is another user than the worker. The folder's rights decide who may connect.
        fs::set_permissions(path, fs::Permissions::from_mode(0o666)).with_context(what)?;
        Ok(Self { listener, path: path.to_path_buf() })
    }
}

impl Drop for Socket {
    fn drop(&mut self) {
        // Fails only if the folder has already gone.
        let _ = fs::remove_file(&self.path);
    }
}
