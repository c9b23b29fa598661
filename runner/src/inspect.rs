//! Owns `mesh-runner inspect`.

use anyhow::Result;

use crate::{cli::Inspect, engine::Model, serve::oip::ModelMetadata};

/// Prints a model's inputs and outputs.
pub(crate) fn inspect(arguments: &Inspect) -> Result<()> {
    let model = Model::load(&arguments.model.file, arguments.model.options.options())?;
    let signature = model.signature();
    if arguments.json {
        let name = arguments.model.file.file_stem().unwrap_or_default().to_string_lossy();
        println!("{}", serde_json::to_string_pretty(&ModelMetadata::of(&name, signature))?);
        return Ok(());
    }
    println!("{} in {}, loaded in {:.1?}", signature.format, model.runtime(), model.load_time());
    for (side, tensors) in [("in ", &signature.inputs), ("out", &signature.outputs)] {
        for tensor in tensors {
            println!("{side} {} {tensor}", tensor.name);
        }
    }
    Ok(())
}
