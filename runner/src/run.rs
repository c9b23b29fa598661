//! `mesh-runner run`: runs a model on files, without a socket. For people who try a model, and for comparisons with
//! other runtimes.

use std::{fs, path::Path, time::Instant};

use anyhow::{Context, Result, bail, ensure};
use mesh_models::TensorSpec;
use proto_msgs::DType;

use crate::{
    cli::Run,
    engine::Model,
    npy,
    tensor::{AlignedBytes, Tensor},
};

/// Runs the model and writes its outputs.
pub(crate) fn run(arguments: &Run) -> Result<()> {
    let mut model = Model::load(&arguments.model.file, arguments.model.options.options())?;
    let inputs = inputs(&model, &arguments.inputs)?;
    let mut shortest = None;
    let mut outputs = Vec::new();
    for _ in 0..arguments.repeat.max(1) {
        model.reset()?;
        let started = Instant::now();
        outputs = model.run(&inputs)?;
        let took = started.elapsed();
        shortest = Some(shortest.map_or(took, |shortest: std::time::Duration| shortest.min(took)));
    }
    fs::create_dir_all(&arguments.output)?;
    for (spec, output) in model.signature().outputs.iter().zip(&outputs) {
        let name = format!("{}.npy", file_name(&spec.name));
        let Some(file) = npy::format(output) else {
            println!("{name}: not written, numpy has no type {}", output.dtype);
            continue;
        };
        fs::write(arguments.output.join(&name), file)?;
        println!("{name}: {} {:?}", output.dtype, output.shape);
    }
    println!("load {:.1?}, run {:.1?}", model.load_time(), shortest.unwrap_or_default());
    Ok(())
}

/// Reads the files as the model's inputs, in its order.
fn inputs(model: &Model, files: &[String]) -> Result<Vec<Tensor>> {
    let specs = &model.signature().inputs;
    ensure!(files.len() == specs.len(), "the model takes {} inputs, got {}", specs.len(), files.len());
    let mut tensors = vec![None; specs.len()];
    for (index, argument) in files.iter().enumerate() {
        let named = argument.split_once('=').and_then(|(name, file)| {
            let index = specs.iter().position(|spec| spec.name == name)?;
            Some((index, file))
        });
        let (index, file) = named.unwrap_or((index, argument));
        let tensor =
            input(&specs[index], Path::new(file)).with_context(|| format!("cannot take {file} as an input"))?;
        ensure!(tensors[index].replace(tensor).is_none(), "two files for '{}'", specs[index].name);
    }
    let missing = "every input has a file: as many files as inputs, none twice";
    Ok(tensors.into_iter().map(|tensor| tensor.expect(missing)).collect())
}

fn input(spec: &TensorSpec, file: &Path) -> Result<Tensor> {
    let bytes = fs::read(file)?;
    if file.extension().is_some_and(|extension| extension == "npy") {
        return npy::parse(&bytes);
    }
    let dtype = spec.dtype.expect("tensors without a type are refused before loading");
    let Some(element_bytes) = dtype.size_bytes() else { bail!("strings are only taken over the socket") };
    Ok(Tensor {
        dtype,
        shape: shape_for(spec, dtype, bytes.len() / element_bytes)?,
        data: AlignedBytes::copied(&bytes).into(),
    })
}

/// The shape of this many elements: the declared one, with its only open dimension as large as needed.
fn shape_for(spec: &TensorSpec, dtype: DType, elements: usize) -> Result<Vec<i64>> {
    let Some(mut shape) = spec.shape.clone() else { bail!("the model does not say the shape: give a .npy file") };
    let known: i64 = shape.iter().filter(|dimension| **dimension >= 0).product();
    let open: Vec<_> = (0..shape.len()).filter(|index| shape[*index] < 0).collect();
    match open[..] {
        [] => {}
        [index] if known > 0 => shape[index] = elements as i64 / known,
        _ => bail!("the model leaves several dimensions of {dtype} open: give a .npy file"),
    }
    Ok(shape)
}

/// A name that can be a file's: tensors have names like `a/b:0`.
fn file_name(name: &str) -> String {
    let safe = |letter: char| if letter.is_ascii_alphanumeric() || "._-".contains(letter) { letter } else { '_' };
    name.chars().map(safe).collect()
}
