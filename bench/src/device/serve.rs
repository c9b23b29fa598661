//! The part of the Open Inference Protocol v2 that a worker uses, on a Unix socket: ready, metadata, infer with tensors
//! as raw bytes. One thread per connection, one request at a time on each.

use std::{
    collections::BTreeMap,
    io::{BufRead, BufReader, Read, Write},
    os::unix::net::{UnixListener, UnixStream},
    path::PathBuf,
    sync::Arc,
    time::Duration,
};

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};

use super::{Book, Cost};

/// Header with the length of the JSON in a body; tensors follow the JSON.
const JSON_LENGTH: &str = "inference-header-content-length";

/// Longest request: far more than any experiment sends.
const BODY_BYTES_MAX: usize = 256 << 20;

/// Arguments of the runner.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Settings {
    /// The device's file. A model on another device than `0` uses the file with the device's name appended.
    pub device: PathBuf,
    /// The model.
    pub model: PathBuf,
    /// The socket to listen on.
    pub socket: PathBuf,
}

impl Settings {
    /// Reads `--device FILE serve --model FILE --socket PATH`. Other arguments of `mesh-runner` are ignored.
    ///
    /// # Errors
    /// If one of the three is missing.
    pub fn from_args(args: impl Iterator<Item = String>) -> Result<Self> {
        let mut given = BTreeMap::new();
        let mut args = args.peekable();
        while let Some(arg) = args.next() {
            if let Some((flag, value)) = arg.split_once('=').filter(|_| arg.starts_with("--")) {
                given.insert(flag.to_owned(), value.to_owned());
            } else if let Some(value) = args.next_if(|value| arg.starts_with("--") && !value.starts_with("--")) {
                given.insert(arg, value);
            }
        }
        let mut path = |flag: &str| given.remove(flag).map(PathBuf::from).with_context(|| format!("{flag} is missing"));
        Ok(Self { device: path("--device")?, model: path("--model")?, socket: path("--socket")? })
    }
}

/// Answers requests.
#[derive(Debug)]
struct Runner {
    cost: Cost,
    book: Book,
}

/// The parts of a request that matter here.
struct Request {
    path: String,
    json_bytes: usize,
    body: Vec<u8>,
}

/// Serves until the process is killed.
///
/// # Errors
/// If the model states no cost, or the socket cannot be used.
pub fn serve(settings: &Settings) -> Result<()> {
    // Timers exact to the nanosecond, instead of to 50 microseconds.
    let _ = nix::sys::prctl::set_timerslack(1);
    let model = std::fs::read(&settings.model).with_context(|| format!("cannot read {}", settings.model.display()))?;
    let cost = Cost::read_from(&model)?;
    let device = if cost.device == "0" {
        settings.device.clone()
    } else {
        let mut named = settings.device.clone().into_os_string();
        named.push(format!(".{}", cost.device));
        named.into()
    };
    let runner = Arc::new(Runner { cost, book: Book::open(&device)? });
    let listener = UnixListener::bind(&settings.socket)
        .with_context(|| format!("cannot listen on {}", settings.socket.display()))?;
    for stream in listener.incoming() {
        let (stream, runner) = (stream?, Arc::clone(&runner));
        std::thread::spawn(move || {
            let _ = nix::sys::prctl::set_timerslack(1);
            if let Err(error) = runner.converse(stream) {
                eprintln!("mesh-device: a connection ended: {error:#}");
            }
        });
    }
    Ok(())
}

impl Runner {
    fn converse(&self, stream: UnixStream) -> Result<()> {
        let mut reader = BufReader::new(stream);
        while let Some(request) = read_request(&mut reader)? {
            let (status, json, tensor) = match self.answer(&request) {
                Ok((json, tensor)) => ("200 OK", json, tensor),
                Err(error) => ("400 Bad Request", json!({"error": format!("{error:#}"), "code": "RUN_FAILED"}), vec![]),
            };
            let json = json.to_string();
            let (length, kind) = (json.len() + tensor.len(), if tensor.is_empty() { "json" } else { "octet-stream" });
            let head = format!(
                "HTTP/1.1 {status}\r\nContent-Type: application/{kind}\r\nContent-Length: {length}\r\n\
                 {JSON_LENGTH}: {}\r\n\r\n{json}",
                json.len()
            );
            reader.get_mut().write_all(&[head.as_bytes(), &tensor].concat())?;
        }
        Ok(())
    }

    fn answer(&self, request: &Request) -> Result<(Value, Vec<u8>)> {
        let parts: Vec<&str> = request.path.trim_matches('/').split('/').collect();
        match parts[..] {
            ["v2", "health", _] | ["v2", "models", _, "ready"] => Ok((json!({}), Vec::new())),
            ["v2", "models", name] => Ok((metadata(name), Vec::new())),
            ["v2", "models", name, "infer"] => self.infer(name, request),
            _ => bail!("there is no {}", request.path),
        }
    }

    /// Rows are numbers: `x` is FP32 of any length, and `y` is `x` plus one, element by element.
    fn infer(&self, name: &str, request: &Request) -> Result<(Value, Vec<u8>)> {
        let json: Value = serde_json::from_slice(&request.body[..request.json_bytes])?;
        let shape = &json["inputs"][0]["shape"];
        let tensor = &request.body[request.json_bytes..];
        let rows = shape[0].as_u64().context("the input has one dimension")?;
        ensure!(json["inputs"][0]["datatype"] == "FP32" && tensor.len() as u64 == rows * 4, "x is FP32, 4 bytes a row");
        ensure!(rows <= self.cost.rows_max, "{rows} rows do not fit: the device takes {}", self.cost.rows_max);
        let wait = self.book.book(self.cost.batch(rows), rows)?;
        let one_more = |bytes: &[u8; 4]| (f32::from_le_bytes(*bytes) + 1.0).to_le_bytes();
        let answer: Vec<u8> = tensor.as_chunks().0.iter().flat_map(one_more).collect();
        std::thread::sleep(wait);
        let output = json!({
            "name": "y", "datatype": "FP32", "shape": [rows], "parameters": {"binary_data_size": answer.len()},
        });
        let run_us = Duration::as_micros(&self.cost.batch(rows)) as u64;
        let json = json!({
            "model_name": name, "model_version": "1", "parameters": {"run_us": run_us}, "outputs": [output],
        });
        Ok((json, answer))
    }
}

fn metadata(name: &str) -> Value {
    let any_length = |name: &str| json!([{"name": name, "datatype": "FP32", "shape": [-1]}]);
    let (inputs, outputs) = (any_length("x"), any_length("y"));
    json!({"name": name, "versions": ["1"], "platform": "onnxruntime_onnx", "inputs": inputs, "outputs": outputs})
}

/// The next request; `None` when the other side has hung up.
fn read_request(reader: &mut BufReader<UnixStream>) -> Result<Option<Request>> {
    let mut line = String::new();
    if reader.read_line(&mut line)? == 0 {
        return Ok(None);
    }
    let path = line.split(' ').nth(1).context("no HTTP")?.to_owned();
    let (mut body_bytes, mut json_bytes) = (0, None);
    loop {
        line.clear();
        ensure!(reader.read_line(&mut line)? > 0, "hung up within a request");
        let Some((name, value)) = line.trim_end().split_once(':') else { break };
        match name.to_ascii_lowercase().as_str() {
            "content-length" => body_bytes = value.trim().parse()?,
            JSON_LENGTH => json_bytes = Some(value.trim().parse::<usize>()?),
            _ => {}
        }
    }
    let json_bytes = json_bytes.unwrap_or(body_bytes);
    ensure!(body_bytes <= BODY_BYTES_MAX && json_bytes <= body_bytes, "lengths that cannot be");
    let mut body = vec![0; body_bytes];
    reader.read_exact(&mut body)?;
    Ok(Some(Request { path, json_bytes, body }))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settings(text: &str) -> Result<Settings> {
        Settings::from_args(text.split_whitespace().map(str::to_owned))
    }

    #[test]
    fn it_is_started_like_mesh_runner_and_does_not_mind_what_it_does_not_know() {
        let given = settings("--device d serve --model m --gpu --socket=s --name model --threads 2").unwrap();
        assert_eq!(given, Settings { device: "d".into(), model: "m".into(), socket: "s".into() });
        assert!(settings("serve --model m --socket s").unwrap_err().to_string().contains("--device"));
    }

    #[test]
    fn a_batch_comes_back_with_one_more_in_each_row_after_its_time() {
        let folder = tempfile::tempdir().unwrap();
        let runner = Runner { cost: Cost::new(2000, 1000), book: Book::open(&folder.path().join("d")).unwrap() };
        let json = r#"{"inputs":[{"name":"x","shape":[3],"datatype":"FP32"}]}"#.as_bytes();
        let tensor: Vec<u8> = [1.0_f32, 2.0, 4.0].iter().flat_map(|x| x.to_le_bytes()).collect();
        let request = |tensor: &[u8]| Request {
            path: "/v2/models/model/infer".into(),
            json_bytes: json.len(),
            body: [json, tensor].concat(),
        };
        let began = std::time::Instant::now();
        let (_, answer) = runner.answer(&request(&tensor)).unwrap();
        assert!(began.elapsed() >= Duration::from_millis(5));
        let expected: Vec<u8> = [2.0_f32, 3.0, 5.0].iter().flat_map(|x| x.to_le_bytes()).collect();
        assert_eq!(answer, expected);
        assert!(runner.answer(&request(&tensor[4..])).is_err(), "a row is missing");
    }
}
