//! Speed of a file between two processes: read, sent, received, hashed, written, verified.
//!
//! ```text
//!   cargo run --release -p mesh-transport --example stream_speed -- serve /dev/shm/in
//!   cargo run --release -p mesh-transport --example stream_speed -- send tcp://127.0.0.1:PORT FILE [TIMES]
//! ```
//!
//! The receiver prints its address. `MESH_SPEED_KEYS=1` on both sides encrypts (with keys made only for this run).

use std::{
    env, fs,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use mesh_transport::{
    Admit, Context, Door, Heard, Inbox, KeyPair, Limits, Received, Security,
    blob::{Arrival, Feedback, Incoming, Intake, Outgoing, Role, Source, Uploading},
};
use proto_msgs::{
    Attempt, AttemptId, ClientToWorker, Credit, Digest, Frame, PublicKey, TaskId, WorkerToClient, limits::WINDOW_BYTES,
};

type Result<T> = std::result::Result<T, Box<dyn std::error::Error + Send + Sync>>;

fn main() -> Result<()> {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    let arguments: Vec<String> = env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match arguments[..] {
        ["serve", folder] => runtime.block_on(serve(Path::new(folder))),
        ["send", endpoint, file] => runtime.block_on(send(endpoint, Path::new(file), 1)),
        ["send", endpoint, file, times] => runtime.block_on(send(endpoint, Path::new(file), times.parse()?)),
        _ => Err("usage: stream_speed serve FOLDER | send ENDPOINT FILE [TIMES]".into()),
    }
}

/// The context of either side and, with keys, the receiver's public key (which the receiver writes to a file for the
/// sender).
fn context(key_file: &Path, serving: bool) -> Result<(Context, Option<PublicKey>)> {
    if env::var_os("MESH_SPEED_KEYS").is_none() {
        return Ok((Context::new(Security::None)?, None));
    }
    let keys = KeyPair::generate()?;
    let theirs = if serving {
        fs::write(key_file, mesh_transport::keys::to_text(&keys.public()))?;
        None
    } else {
        Some(mesh_transport::keys::read_public(&key_file.display().to_string())?)
    };
    Ok((Context::new(Security::Keys(keys))?, theirs))
}

fn key_file() -> PathBuf {
    env::temp_dir().join("stream_speed.pub")
}

async fn serve(folder: &Path) -> Result<()> {
    fs::create_dir_all(folder)?;
    let (context, _) = context(&key_file(), true)?;
    let (door, mut inbox) = context.listen("tcp://127.0.0.1:0", Admit::Anyone, Limits::DIRECT)?.spawn();
    println!("{}", door.endpoint());
    loop {
        let opening = inbox.recv().await.ok_or("closed")?;
        let target = folder.join("blob");
        take(&door, &mut inbox, opening, &target).await?;
        fs::remove_file(&target)?;
        println!("receiver: peak {} MiB", peak_memory_mib());
    }
}

/// Receives one blob, announced as `SIZE DIGEST`.
async fn take(door: &Door, inbox: &mut Inbox<Received>, opening: Received, target: &Path) -> Result<()> {
    let text = String::from_utf8(opening.frame.head.to_vec())?;
    let (size, digest) = text.split_once(' ').ok_or("no announcement")?;
    let incoming = Incoming::to_file(target, 0, size.parse()?, digest.parse::<Digest>()?)?;
    let outlet = door.to(opening.peer);
    let (intake, mut arrivals) = Intake::start(vec![incoming], WINDOW_BYTES);
    loop {
        tokio::select! {
            received = inbox.recv() => {
                let frame = received.ok_or("closed")?.frame;
                let ClientToWorker::Chunk(chunk) = ClientToWorker::from_frame(&frame)? else { continue };
                intake.push(chunk, frame.payload)?;
            }
            arrival = arrivals.recv() => match arrival.ok_or("intake ended")? {
                Arrival::Credit { blob, received_bytes } => {
                    let credit = Credit { id: attempt(), blob, received_bytes };
                    outlet.send(WorkerToClient::Credit(credit).to_frame()?).await?;
                }
                Arrival::Complete { .. } => {
                    outlet.send(Frame::new(b"done".to_vec())).await?;
                    return Ok(());
                }
                Arrival::Failed(error) => return Err(error.into()),
            }
        }
    }
}

async fn send(endpoint: &str, file: &Path, times: u32) -> Result<()> {
    let (context, their_key) = context(&key_file(), false)?;
    let mut dialer = context.dial(endpoint, their_key, Limits::DIRECT)?;
    dialer.connected(Duration::from_secs(5)).await?;
    let (outlet, mut inbox) = dialer.spawn();
    for _ in 0..times {
        let began = Instant::now();
        let source = Source::file(file)?;
        let (size, digest) = (source.size_bytes(), source.digest()?);
        let hashed = began.elapsed();
        outlet.send(Frame::new(format!("{size} {digest}").into_bytes())).await?;
        let outgoing = Outgoing::new(Role::Client, attempt(), vec![(0, source)], WINDOW_BYTES);
        let (uploading, _none_yet) = Uploading::start(outgoing, outlet.clone(), async |_| {});
        wait_until_done(&mut inbox, uploading).await?;
        let took = began.elapsed();
        let gigabytes = size as f64 / 1e9;
        println!(
            "sender: {size} bytes, hashed in {:.1} ms, all in {:.1} ms: {:.2} GB/s ({:.2} without hashing first), peak {} MiB",
            hashed.as_secs_f64() * 1e3,
            took.as_secs_f64() * 1e3,
            gigabytes / took.as_secs_f64(),
            gigabytes / (took - hashed).as_secs_f64(),
            peak_memory_mib(),
        );
    }
    outlet.close().await;
    Ok(())
}

async fn wait_until_done(inbox: &mut Inbox<Heard>, mut uploading: Uploading) -> Result<()> {
    loop {
        let Heard::Frame(frame) = inbox.recv().await.ok_or("closed")? else { continue };
        if frame.head == b"done"[..] {
            return Ok(());
        }
        if let WorkerToClient::Credit(Credit { blob, received_bytes, .. }) = WorkerToClient::from_frame(&frame)? {
            uploading.tell(Feedback::Credit { blob, received_bytes }).transpose()?;
        }
    }
}

fn attempt() -> AttemptId {
    AttemptId { task: TaskId::from_bytes([1; 16]), attempt: Attempt(1) }
}

/// Peak memory of this process in MiB.
fn peak_memory_mib() -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    peak.and_then(|text| text.split_whitespace().next()?.parse::<u64>().ok()).map_or(0, |kib| kib / 1024)
}
