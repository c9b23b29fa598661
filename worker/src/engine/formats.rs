//! Which model formats a runner's program can run: the program is asked once, before the worker registers.
//!
//! Owns the question and the reading of the answer. Never: what follows from it.

use std::{process::Stdio, time::Duration};

use proto_msgs::ModelFormat;
use serde::Deserialize;
use tokio::{process::Command, time::timeout};

/// Time for the program to open its libraries, which a slow disk takes seconds to read.
const ANSWER_WAIT: Duration = Duration::from_secs(20);

/// What a runner's program can run, and why not the rest.
#[derive(Debug, Eq, PartialEq)]
pub(super) struct Answer {
    /// Formats with a library that can be used.
    pub(super) formats: Vec<ModelFormat>,
    /// Why models of a format cannot run.
    pub(super) failures: Vec<(ModelFormat, String)>,
    /// What an operator may not expect, though it works.
    pub(super) remarks: Vec<String>,
}

/// One element of the answer to `mesh-runner runtimes --json`.
#[derive(Deserialize)]
struct Line {
    format: String,
    failure: Option<String>,
    remark: Option<String>,
}

/// Asks the program. One that does not know the question can run everything, as far as anybody knows.
pub(super) async fn ask(mut program: Command) -> Answer {
    program.args(["runtimes", "--json"]).stdin(Stdio::null()).stderr(Stdio::null()).kill_on_drop(true);
    let output = timeout(ANSWER_WAIT, program.output()).await.ok().and_then(Result::ok);
    output.and_then(|output| read(&output.stdout)).unwrap_or_else(|| Answer {
        formats: ModelFormat::ALL.to_vec(),
        failures: Vec::new(),
        remarks: Vec::new(),
    })
}

fn read(said: &[u8]) -> Option<Answer> {
    let lines: Vec<Line> = serde_json::from_slice(said).ok().filter(|lines: &Vec<Line>| !lines.is_empty())?;
    let mut answer = Answer { formats: Vec::new(), failures: Vec::new(), remarks: Vec::new() };
    for line in lines {
        let format = line.format.parse().ok()?;
        match line.failure {
            Some(failure) => answer.failures.push((format, failure)),
            None => answer.formats.push(format),
        }
        answer.remarks.extend(line.remark);
    }
    Some(answer)
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn answer_of(script: &str) -> Answer {
        let mut program = Command::new("sh");
        program.args(["-c", script, "runner"]);
        ask(program).await
    }

    #[tokio::test]
    async fn a_format_without_a_library_is_left_out() {
        let said = r#"[{"format":"tflite","library":"/l","remark":"odd"},{"format":"onnx","failure":"missing"}]"#;
        let answer = answer_of(&format!("[ \"$*\" = 'runtimes --json' ] && echo '{said}'; exit 13")).await;
        assert_eq!(answer.formats, [ModelFormat::TfLite]);
        assert_eq!(answer.failures, [(ModelFormat::Onnx, "missing".to_owned())]);
        assert_eq!(answer.remarks, ["odd"]);
    }

    #[tokio::test]
    async fn a_program_that_does_not_know_the_question_is_believed_to_run_everything() {
        for script in ["exit 2", "echo usage", "kill -ABRT $$", "echo '[{\"format\":\"gguf\"}]'"] {
            assert_eq!(answer_of(script).await.formats, ModelFormat::ALL, "{script}");
        }
    }
}
