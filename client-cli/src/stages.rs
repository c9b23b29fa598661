//! `--then`: models that take the outputs of the model before. Owns their names, and the check that each stage fits the
//! one before, as far as the files show. Never: the worker's own check, which decides.

use std::{
    fs::File,
    path::{Path, PathBuf},
};

use mesh_models::{Signature, TensorSpec};
use mesh_sdk::{Model, ModelFormat, Task};

use crate::exit::{self, Failed};

/// One `--then` argument.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Then {
    pub(crate) name: String,
    pub(crate) path: PathBuf,
}

/// Parses `NAME=MODEL`, or `MODEL` with the file's name. An existing file with `=` in its name has precedence.
pub(crate) fn parse(text: &str) -> Result<Then, String> {
    let (name, path) = match text.split_once('=') {
        Some((name, path)) if !name.is_empty() && !name.contains('/') && !Path::new(text).exists() => {
            (name.to_owned(), PathBuf::from(path))
        }
        _ => {
            let path = PathBuf::from(text);
            let stem = path.file_stem().map(|stem| stem.to_string_lossy().into_owned());
            (stem.ok_or_else(|| format!("'{text}' is not a model file: write MODEL or NAME=MODEL"))?, path)
        }
    };
    Ok(Then { name, path })
}

/// A stage whose file has been inspected.
#[derive(Debug)]
pub(crate) struct Stage {
    then: Then,
    /// `None` if only the runtime knows it.
    signature: Option<Signature>,
}

/// Inspects the stages' files.
///
/// # Errors
/// If one is not a model.
pub(crate) fn read(stages: &[Then]) -> Result<Vec<Stage>, Failed> {
    stages.iter().map(|then| Ok(Stage { then: then.clone(), signature: read_signature(&then.path)? })).collect()
}

/// The inputs and outputs of a model; `None` if only the runtime knows them.
///
/// # Errors
/// If the file cannot be read or is not a model.
pub(crate) fn read_signature(path: &Path) -> Result<Option<Signature>, Failed> {
    use mesh_models::SignatureError;
    let bad = |error: &dyn std::fmt::Display| {
        Failed::new(exit::BAD_INPUT, "MODEL_INVALID", format!("{}: {error}", path.display()))
    };
    let file = File::open(path).map_err(|error| bad(&error))?;
    match mesh_models::read_signature(file) {
        Ok(signature) => Ok(Some(signature)),
        Err(error @ (SignatureError::UnknownFormat | SignatureError::Read(_))) => Err(bad(&error)),
        Err(error) => {
            tracing::info!(%error, "inputs are sent as they are; the worker will say what it thinks of them");
            Ok(None)
        }
    }
}

/// Checks that each stage accepts the outputs of the one before. The worker checks what the files do not show.
///
/// # Errors
/// If a stage does not fit; names the first one.
pub(crate) fn check(model: &Path, signature: Option<&Signature>, stages: &[Stage]) -> Result<(), Failed> {
    let first = (model.display().to_string(), signature);
    let named = stages.iter().map(|stage| (stage.then.path.display().to_string(), stage.signature.as_ref()));
    let all: Vec<(String, Option<&Signature>)> = std::iter::once(first).chain(named).collect();
    for (pair, stage) in all.windows(2).zip(stages) {
        let [(before, Some(gives)), (after, Some(takes))] = pair else { continue };
        fits(gives, takes).map_err(|problem| {
            let text = format!("stage '{}' ({after}) does not take what {before} gives: {problem}", stage.then.name);
            Failed::new(exit::BAD_INPUT, "MODEL_INPUT_MISMATCH", text)
        })?;
    }
    Ok(())
}

/// Checks by name if the outputs have all names of the next model's inputs, else by position, like the worker.
fn fits(before: &Signature, after: &Signature) -> Result<(), String> {
    let output = |name: &str| before.outputs.iter().find(|output| output.name == name);
    let by_name: Option<Vec<&TensorSpec>> = after.inputs.iter().map(|input| output(&input.name)).collect();
    let given = match by_name {
        Some(given) => given,
        None if before.outputs.len() == after.inputs.len() => before.outputs.iter().collect(),
        None => {
            let names =
                |specs: &[TensorSpec]| specs.iter().map(|spec| spec.name.as_str()).collect::<Vec<_>>().join(", ");
            let (gives, takes) = (before.outputs.len(), after.inputs.len());
            return Err(format!(
                "there are {gives} outputs ({}) for {takes} inputs ({}), and their names do not tell which goes where",
                names(&before.outputs),
                names(&after.inputs)
            ));
        }
    };
    let misfit = given.into_iter().zip(&after.inputs).find(|(output, input)| !agrees(before.format, output, input));
    misfit.map_or(Ok(()), |(output, input)| {
        Err(format!("output '{}' is {output}, input '{}' is {input}", output.name, input.name))
    })
}

/// Whether type and shape are compatible.
fn agrees(format: ModelFormat, output: &TensorSpec, input: &TensorSpec) -> bool {
    let same_type = output.dtype.is_none() || input.dtype.is_none() || output.dtype == input.dtype;
    let (Some(gives), Some(takes)) = (&output.shape, &input.shape) else { return same_type };
    // TensorFlow Lite files contain such shapes for outputs whose shape is known only at run time.
    let is_unknown = format == ModelFormat::TfLite && (gives.is_empty() || gives.contains(&0));
    let same = |(gives, takes): (&i64, &i64)| *gives < 0 || *takes < 0 || gives == takes;
    same_type && (is_unknown || gives.len() == takes.len() && gives.iter().zip(takes).all(same))
}

/// Reads and hashes the model in a file.
///
/// # Errors
/// If the file cannot be read or is not a model.
pub(crate) async fn load(path: &Path) -> Result<Model, Failed> {
    let failed = |error| Failed::new(exit::of_model(&error), "BAD_INPUT", error);
    Model::from_file(path).await.map_err(failed)
}

/// Adds the stages to the task.
///
/// # Errors
/// If a model cannot be read.
pub(crate) async fn add(mut task: Task, stages: Vec<Stage>) -> Result<Task, Failed> {
    for Stage { then, .. } in stages {
        task = task.then(then.name, load(&then.path).await?);
    }
    Ok(task)
}

#[cfg(test)]
mod tests {
    use mesh_sdk::DType;

    use super::*;

    fn spec(name: &str, dtype: DType, shape: &[i64]) -> TensorSpec {
        TensorSpec { name: name.into(), dtype: Some(dtype), shape: Some(shape.to_vec()), quantization: None }
    }

    fn model(inputs: &[TensorSpec], outputs: &[TensorSpec]) -> Signature {
        Signature { format: ModelFormat::Onnx, inputs: inputs.to_vec(), outputs: outputs.to_vec() }
    }

    fn checked(before: Signature, after: Signature) -> Result<(), String> {
        let stage = Stage { then: parse("decode=d.onnx").unwrap(), signature: Some(after) };
        check(Path::new("e.onnx"), Some(&before), &[stage]).map_err(|failed| failed.text)
    }

    #[test]
    fn a_stage_has_a_name_or_that_of_its_file() {
        let then = |name: &str, path: &str| Then { name: name.into(), path: path.into() };
        assert_eq!(parse("decode=models/d.onnx"), Ok(then("decode", "models/d.onnx")));
        assert_eq!(parse("models/decoder.onnx"), Ok(then("decoder", "models/decoder.onnx")));
        assert_eq!(parse("models=1/d.onnx"), Ok(then("models", "1/d.onnx")));
        assert_eq!(parse("./a=b.onnx"), Ok(then("a=b", "./a=b.onnx")), "a folder is no name");
        assert!(parse("").is_err());
    }

    #[test]
    fn outputs_go_by_name_or_by_place() {
        let (y, z) = (spec("y", DType::F32, &[-1, 4]), spec("z", DType::I64, &[1]));
        let gives = model(&[], &[y.clone(), z.clone()]);
        assert_eq!(checked(gives.clone(), model(&[z.clone(), y.clone()], &[])), Ok(()));
        assert_eq!(checked(gives.clone(), model(std::slice::from_ref(&z), &[])), Ok(()), "the other is left over");
        let renamed = [spec("a", DType::F32, &[8, 4]), spec("b", DType::I64, &[-1])];
        assert_eq!(checked(gives.clone(), model(&renamed, &[])), Ok(()));
        let error = checked(gives, model(&[spec("a", DType::F32, &[8, 4])], &[])).unwrap_err();
        let expected = "stage 'decode' (d.onnx) does not take what e.onnx gives: there are 2 outputs (y, z) for 1 inputs (a), \
            and their names do not tell which goes where";
        assert_eq!(error, expected);
    }

    #[test]
    fn another_type_or_shape_is_named_with_both_sides() {
        let gives = || model(&[], &[spec("y", DType::F32, &[-1, 4])]);
        let takes = |dtype, shape: &[i64]| model(&[spec("x", dtype, shape)], &[]);
        let error = |after| checked(gives(), after).unwrap_err();
        assert!(error(takes(DType::F16, &[-1, 4])).ends_with("output 'y' is FP32 [?,4], input 'x' is FP16 [?,4]"));
        assert!(error(takes(DType::F32, &[-1, 5])).ends_with("output 'y' is FP32 [?,4], input 'x' is FP32 [?,5]"));
        assert!(error(takes(DType::F32, &[4])).ends_with("input 'x' is FP32 [4]"));
        assert_eq!(checked(gives(), takes(DType::F32, &[1, -1])), Ok(()), "open lengths may agree");
    }

    #[test]
    fn what_the_files_do_not_tell_is_left_to_the_worker() {
        let unknown = TensorSpec { shape: None, ..spec("y", DType::F32, &[]) };
        assert_eq!(checked(model(&[], &[unknown]), model(&[spec("x", DType::F32, &[4])], &[])), Ok(()));
        let stage = Stage { then: parse("d.onnx").unwrap(), signature: None };
        assert!(check(Path::new("e.onnx"), Some(&model(&[], &[])), &[stage]).is_ok());
    }
}
