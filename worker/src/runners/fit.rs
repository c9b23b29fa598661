//! Fits a client's inputs to the model's: names, element types, shapes. A raw file only has a length; the model's shape
//! says the rest. Inputs that do not fit are refused here, before the model sees a byte.

use proto_msgs::{DType, ErrorCode, Failure, InputDecl};

/// An input of a model, as the model declares it.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) struct TensorMeta {
    pub(crate) name: String,
    pub(crate) dtype: DType,
    /// Length of each dimension; -1 for any length.
    pub(crate) shape: Vec<i64>,
}

/// A client's input, fitted to the model.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) struct Fitted {
    pub(crate) name: String,
    pub(crate) dtype: DType,
    pub(crate) shape: Vec<u64>,
    /// Index of the input among the client's inputs.
    pub(crate) index: usize,
}

/// Finds the place in the model for each of the client's inputs.
pub(crate) fn fit(model: &[TensorMeta], inputs: &[InputDecl]) -> Result<Vec<Fitted>, Failure> {
    if inputs.len() > model.len() {
        return Err(mismatch(format!("the model takes {}, {} were given", describe_all(model), inputs.len())));
    }
    let mut places: Vec<Option<usize>> = vec![None; model.len()];
    for (index, input) in inputs.iter().enumerate() {
        let Some(name) = &input.name else { continue };
        let place = model
            .iter()
            .position(|meta| meta.name == *name)
            .ok_or_else(|| mismatch(format!("the model has no input '{name}': it takes {}", describe_all(model))))?;
        if places[place].replace(index).is_some() {
            return Err(mismatch(format!("input '{name}' was given twice")));
        }
    }
    let mut unnamed = (0..inputs.len()).filter(|index| inputs[*index].name.is_none());
    for place in places.iter_mut().filter(|place| place.is_none()) {
        *place = unnamed.next();
    }
    let fitted = model.iter().zip(places).filter_map(|(meta, place)| {
        let index = place?;
        Some(fit_one(meta, &inputs[index], index))
    });
    // Missing inputs may have defaults in the model: the runner checks that.
    fitted.collect()
}

fn fit_one(meta: &TensorMeta, input: &InputDecl, index: usize) -> Result<Fitted, Failure> {
    if let Some(dtype) = input.dtype.filter(|dtype| *dtype != meta.dtype) {
        return Err(wrong(meta, &format!("elements of type {dtype}")));
    }
    let shape = match &input.shape {
        Some(shape) => check_shape(meta, shape, input.size_bytes)?,
        None => infer_shape(meta, input.size_bytes)?,
    };
    Ok(Fitted { name: meta.name.clone(), dtype: meta.dtype, shape, index })
}

fn check_shape(meta: &TensorMeta, shape: &[u64], size_bytes: u64) -> Result<Vec<u64>, Failure> {
    let same = |(want, got): (&i64, &u64)| *want < 0 || u64::try_from(*want) == Ok(*got);
    if shape.len() != meta.shape.len() || !meta.shape.iter().zip(shape).all(same) {
        return Err(wrong(meta, &format!("shape {}", show_shape(shape.iter()))));
    }
    if let Some(element_bytes) = meta.dtype.size_bytes() {
        let elements = shape.iter().try_fold(1_u64, |product, dim| product.checked_mul(*dim));
        if elements.and_then(|elements| elements.checked_mul(element_bytes as u64)) != Some(size_bytes) {
            return Err(wrong(meta, &format!("{size_bytes} bytes for shape {}", show_shape(shape.iter()))));
        }
    }
    Ok(shape.to_vec())
}

/// The shape that matches `size_bytes`: a division if one length is open, an error if several are.
fn infer_shape(meta: &TensorMeta, size_bytes: u64) -> Result<Vec<u64>, Failure> {
    let got = || wrong(meta, &format!("{size_bytes} bytes"));
    let unclear = |why: &str| {
        let text = format!("the model's {} {why}: give it as .npy or .json, which say their shape", describe(meta));
        mismatch(text)
    };
    let open = meta.shape.iter().filter(|dim| **dim < 0).count();
    if open > 1 {
        return Err(unclear("has several open lengths"));
    }
    let Some(element_bytes) = meta.dtype.size_bytes() else {
        return if open == 0 { Ok(known(&meta.shape, 0)) } else { Err(unclear("takes strings")) };
    };
    let mut fixed = meta.shape.iter().filter_map(|dim| u64::try_from(*dim).ok());
    let fixed_bytes = fixed.try_fold(element_bytes as u64, |product, dim| product.checked_mul(dim));
    let fixed_bytes = fixed_bytes.ok_or_else(got)?;
    match open {
        0 if fixed_bytes == size_bytes => Ok(known(&meta.shape, 0)),
        1 if fixed_bytes > 0 && size_bytes > 0 && size_bytes.is_multiple_of(fixed_bytes) => {
            Ok(known(&meta.shape, size_bytes / fixed_bytes))
        }
        _ => Err(got()),
    }
}

fn known(shape: &[i64], open: u64) -> Vec<u64> {
    shape.iter().map(|dim| u64::try_from(*dim).unwrap_or(open)).collect()
}

fn wrong(meta: &TensorMeta, got: &str) -> Failure {
    mismatch(format!("the model's input '{}' expects {}, got {got}", meta.name, describe(meta)))
}

fn mismatch(text: String) -> Failure {
    Failure::new(ErrorCode::InputMismatch, text)
}

fn describe_all(model: &[TensorMeta]) -> String {
    let inputs: Vec<String> = model.iter().map(|meta| format!("'{}' ({})", meta.name, describe(meta))).collect();
    format!("{} input{}: {}", model.len(), if model.len() == 1 { "" } else { "s" }, inputs.join(", "))
}

fn describe(meta: &TensorMeta) -> String {
    let shape = show_shape(meta.shape.iter());
    let elements = meta.shape.iter().try_fold(1_u64, |product, dim| product.checked_mul(u64::try_from(*dim).ok()?));
    let bytes = elements.and_then(|elements| elements.checked_mul(meta.dtype.size_bytes()? as u64));
    match bytes {
        Some(bytes) => format!("{} {shape} = {bytes} bytes", meta.dtype),
        None => format!("{} {shape}", meta.dtype),
    }
}

fn show_shape<T: ToString>(shape: impl Iterator<Item = T>) -> String {
    format!("[{}]", shape.map(|dim| dim.to_string()).collect::<Vec<_>>().join(", "))
}

#[cfg(test)]
mod tests {
    use proto_msgs::Digest;

    use super::*;

    fn image() -> TensorMeta {
        meta("image", DType::F32, &[1, 4, 4, 3])
    }

    fn meta(name: &str, dtype: DType, shape: &[i64]) -> TensorMeta {
        TensorMeta { name: name.to_owned(), dtype, shape: shape.to_vec() }
    }

    fn raw(size_bytes: u64) -> InputDecl {
        InputDecl { name: None, dtype: None, shape: None, digest: Digest::of(b""), size_bytes }
    }

    fn named(name: &str, size_bytes: u64) -> InputDecl {
        InputDecl { name: Some(name.to_owned()), ..raw(size_bytes) }
    }

    fn refused(model: &[TensorMeta], input: InputDecl) -> String {
        let failure = fit(model, &[input]).expect_err("no fit");
        assert_eq!(failure.code, ErrorCode::InputMismatch);
        failure.text
    }

    #[test]
    fn raw_bytes_take_the_models_type_and_shape() {
        let fitted = fit(&[image()], &[raw(192)]).expect("fits");
        assert_eq!(fitted, [Fitted { name: "image".into(), dtype: DType::F32, shape: vec![1, 4, 4, 3], index: 0 }]);
    }

    #[test]
    fn the_wrong_number_of_bytes_is_refused_with_both_numbers() {
        let text = refused(&[image()], raw(191));
        assert!(text.contains("192 bytes") && text.contains("191 bytes"), "{text}");
    }

    #[test]
    fn one_open_length_follows_from_the_bytes() {
        let batch = meta("x", DType::I32, &[-1, 8]);
        assert_eq!(fit(std::slice::from_ref(&batch), &[raw(96)]).expect("fits")[0].shape, [3, 8]);
        refused(std::slice::from_ref(&batch), raw(100));
        refused(&[batch], raw(0));
        let text = refused(&[meta("x", DType::I32, &[-1, -1])], raw(96));
        assert!(text.contains(".npy"), "{text}");
    }

    #[test]
    fn a_scalar_is_one_element() {
        assert_eq!(fit(&[meta("sr", DType::I64, &[])], &[raw(8)]).expect("fits")[0].shape, Vec::<u64>::new());
    }

    #[test]
    fn a_declared_type_or_shape_must_be_the_models() {
        let typed = InputDecl { dtype: Some(DType::U8), ..raw(192) };
        assert!(refused(&[image()], typed).contains("UINT8"));
        let shaped = InputDecl { shape: Some(vec![1, 4, 4, 4]), ..raw(256) };
        assert!(refused(&[image()], shaped).contains("[1, 4, 4, 4]"));
        let lying = InputDecl { shape: Some(vec![1, 4, 4, 3]), ..raw(10) };
        refused(&[image()], lying);
        let huge = InputDecl { shape: Some(vec![u64::MAX, 8]), ..raw(8) };
        refused(&[meta("x", DType::F32, &[-1, 8])], huge);
    }

    #[test]
    fn named_inputs_find_their_place_and_the_others_fill_the_rest_in_order() {
        let model = [meta("a", DType::U8, &[1]), meta("b", DType::U8, &[2]), meta("c", DType::U8, &[3])];
        let fitted = fit(&model, &[named("b", 2), raw(1), raw(3)]).expect("fits");
        let places: Vec<_> = fitted.iter().map(|input| (input.name.as_str(), input.index)).collect();
        assert_eq!(places, [("a", 1), ("b", 0), ("c", 2)]);
        assert!(refused(&model, named("d", 1)).contains("'d'"));
        assert!(fit(&model, &[named("b", 2), named("b", 2)]).is_err());
        assert!(fit(&model, &[raw(1), raw(2), raw(3), raw(4)]).is_err());
    }
}
