//! A runner that serves a real model, and a client that speaks just enough HTTP to it.

use std::{
    fs,
    io::{Read, Write},
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    process::{Child, Command, Output, Stdio},
    sync::Once,
    time::{Duration, Instant},
};

use serde_json::{Value, json};

/// Limit of every wait: longer than anything here takes on a busy machine.
const PATIENCE: Duration = Duration::from_secs(60);

/// A model from a package; fetched, like the libraries, when a test first asks for it.
pub(crate) fn model(name: &str) -> PathBuf {
    static FETCHED: Once = Once::new();
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the crate is in the workspace");
    FETCHED.call_once(|| {
        for script in ["docker/fetch-runtimes", "runner/reference/fetch-models"] {
            let output = Command::new(root.join(script)).output().expect("the script can be started");
            assert!(output.status.success(), "{script}: {}", String::from_utf8_lossy(&output.stderr));
        }
    });
    let cache = std::env::var_os("MESH_TEST_CACHE").map_or_else(|| root.join("target/test-cache"), PathBuf::from);
    cache.join("models").join(name)
}

/// The folder under which `docker/fetch-runtimes` puts the libraries, unless told otherwise.
pub(crate) fn data_folder() -> PathBuf {
    let chosen = std::env::var_os("XDG_DATA_HOME").filter(|folder| !folder.is_empty());
    chosen.map_or_else(|| std::env::home_dir().expect("a user has a home").join(".local/share"), PathBuf::from)
}

pub(crate) fn program() -> Command {
    Command::new(env!("CARGO_BIN_EXE_mesh-runner"))
}

/// Exit and output of `serve` for a model that it cannot load.
pub(crate) fn refusal(
    model: &Path,
    arguments: &[&str],
    environment: &[(&str, &Path)],
) -> (Option<i32>, String, String) {
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("runner.sock");
    let mut command = program();
    command.args(["serve", "--model"]).arg(model).arg("--socket").arg(&socket).args(arguments);
    let Output { status, stderr, stdout } = command.envs(environment.iter().copied()).output().unwrap();
    assert!(stdout.is_empty(), "stdout is for nobody");
    assert!(!socket.exists(), "the socket goes with the runner");
    let stderr = String::from_utf8(stderr).unwrap();
    let said = stderr.lines().find_map(|line| serde_json::from_str::<Value>(line).ok());
    let said = said.unwrap_or_else(|| panic!("no line of JSON in {stderr}"));
    let text = |key: &str| said[key].as_str().unwrap().to_owned();
    (status.code(), text("code"), text("text"))
}

pub(crate) struct Runner {
    pub(crate) process: Child,
    pub(crate) folder: tempfile::TempDir,
}

impl Runner {
    pub(crate) fn serve(model: &Path, arguments: &[&str]) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let mut command = program();
        command.args(["serve", "--model"]).arg(model).arg("--socket").arg(folder.path().join("runner.sock"));
        let process = command.args(arguments).stderr(Stdio::null()).spawn().unwrap();
        Self { process, folder }
    }

    pub(crate) fn socket(&self) -> PathBuf {
        self.folder.path().join("runner.sock")
    }

    pub(crate) fn connect(&self) -> Connection {
        let stream = until("the socket accepts", || UnixStream::connect(self.socket()).ok());
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        Connection { stream, read: Vec::new() }
    }

    pub(crate) fn signal(&self, signal: i32) {
        // SAFETY: a system call on a child that is not waited for yet.
        assert_eq!(unsafe { libc::kill(self.process.id() as i32, signal) }, 0);
    }
}

impl Drop for Runner {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

pub(crate) fn until<T>(what: &str, mut look: impl FnMut() -> Option<T>) -> T {
    let start = Instant::now();
    loop {
        if let Some(seen) = look() {
            return seen;
        }
        assert!(start.elapsed() < PATIENCE, "not within {PATIENCE:?}: {what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

pub(crate) struct Connection {
    stream: UnixStream,
    read: Vec<u8>,
}

pub(crate) struct Answer {
    pub(crate) status: u16,
    pub(crate) json: Value,
    binary: Vec<u8>,
}

/// An input as binary data.
pub(crate) struct Input<'a> {
    pub(crate) name: &'a str,
    pub(crate) datatype: &'a str,
    pub(crate) shape: &'a [i64],
    pub(crate) data: Vec<u8>,
}

impl Connection {
    pub(crate) fn get(&mut self, path: &str) -> Answer {
        self.send(&format!("GET {path} HTTP/1.1\r\nhost: runner\r\n\r\n"), &[]);
        self.answer()
    }

    pub(crate) fn infer_json(&mut self, request: &Value) -> Answer {
        self.post(&[], request.to_string().as_bytes())
    }

    /// Runs the model with inputs and outputs as binary data.
    pub(crate) fn infer(&mut self, inputs: &[Input<'_>], parameters: Value) -> Answer {
        let heads: Vec<_> = inputs
            .iter()
            .map(|input| {
                let parameters = json!({ "binary_data_size": input.data.len() });
                let Input { name, datatype, shape, .. } = input;
                json!({ "name": name, "datatype": datatype, "shape": shape, "parameters": parameters })
            })
            .collect();
        let mut request = json!({ "inputs": heads, "parameters": parameters });
        request["parameters"]["binary_data_output"] = json!(true);
        let mut body = request.to_string().into_bytes();
        let length = body.len().to_string();
        inputs.iter().for_each(|input| body.extend_from_slice(&input.data));
        self.post(&[("Inference-Header-Content-Length", &length)], &body)
    }

    pub(crate) fn post(&mut self, headers: &[(&str, &str)], body: &[u8]) -> Answer {
        let headers: String = headers.iter().map(|(name, value)| format!("{name}: {value}\r\n")).collect();
        let length = body.len();
        let head = format!(
            "POST /v2/models/model/infer HTTP/1.1\r\nhost: runner\r\ncontent-length: {length}\r\n{headers}\r\n"
        );
        self.send(&head, body);
        self.answer()
    }

    /// Sends the first piece of a request, so long that the runner must have begun to read it. Returns the rest.
    pub(crate) fn begin_json(&mut self, request: &Value) -> Vec<u8> {
        let body = request.to_string().into_bytes();
        let space = vec![b' '; 1 << 20];
        let length = space.len() + body.len();
        let head = format!("POST /v2/models/model/infer HTTP/1.1\r\nhost: runner\r\ncontent-length: {length}\r\n\r\n");
        self.send(&head, &space);
        body
    }

    pub(crate) fn finish(&mut self, rest: &[u8]) -> Answer {
        self.send("", rest);
        self.answer()
    }

    fn send(&mut self, head: &str, body: &[u8]) {
        self.stream.write_all(head.as_bytes()).unwrap();
        self.stream.write_all(body).unwrap();
    }

    fn answer(&mut self) -> Answer {
        let head_end = loop {
            if let Some(at) = self.read.windows(4).position(|window| window == b"\r\n\r\n") {
                break at;
            }
            self.more();
        };
        let head = String::from_utf8(self.read[..head_end].to_vec()).unwrap().to_lowercase();
        let number = |name: &str| -> Option<usize> {
            head.lines().find_map(|line| line.strip_prefix(&format!("{name}: "))?.parse().ok())
        };
        let status = head.split(' ').nth(1).unwrap().parse().unwrap();
        let length = number("content-length").unwrap_or(0);
        let json_length = number("inference-header-content-length").unwrap_or(length);
        while self.read.len() < head_end + 4 + length {
            self.more();
        }
        let body: Vec<_> = self.read.drain(..head_end + 4 + length).skip(head_end + 4).collect();
        let (json, binary) = body.split_at(json_length);
        let json = if json.is_empty() { Value::Null } else { serde_json::from_slice(json).unwrap() };
        Answer { status, json, binary: binary.to_vec() }
    }

    fn more(&mut self) {
        let mut piece = [0; 65536];
        let count = self.stream.read(&mut piece).unwrap();
        assert!(count > 0, "the runner closed the connection");
        self.read.extend_from_slice(&piece[..count]);
    }
}

impl Answer {
    /// The bytes of an output.
    pub(crate) fn output(&self, name: &str) -> &[u8] {
        let mut at = 0;
        for output in self.json["outputs"].as_array().unwrap_or_else(|| panic!("no outputs: {}", self.json)) {
            let size = output["parameters"]["binary_data_size"].as_u64().unwrap() as usize;
            if output["name"] == name {
                return &self.binary[at..at + size];
            }
            at += size;
        }
        panic!("no output {name}: {}", self.json)
    }

    pub(crate) fn floats(&self, name: &str) -> Vec<f32> {
        self.output(name).as_chunks().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect()
    }

    /// Status, code and text of an error.
    pub(crate) fn error(&self) -> (u16, &str, &str) {
        let text = |key: &str| self.json[key].as_str().unwrap_or_else(|| panic!("no error: {}", self.json));
        (self.status, text("code"), text("error"))
    }
}

pub(crate) fn floats(numbers: impl IntoIterator<Item = f32>) -> Vec<u8> {
    numbers.into_iter().flat_map(f32::to_le_bytes).collect()
}

/// Magika's view of a file: its first and last 1024 bytes.
pub(crate) fn file_ends(file: &Path) -> Vec<u8> {
    let content = fs::read(file).unwrap();
    let content = content.trim_ascii();
    let ends = content[..1024].iter().chain(&content[content.len() - 1024..]);
    ends.flat_map(|byte| i32::from(*byte).to_le_bytes()).collect()
}
