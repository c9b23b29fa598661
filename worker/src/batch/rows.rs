//! Items and rows: cuts a task's inputs into items, packs items together for one call, and cuts the outputs back.
//!
//! Owns the arithmetic. Never: bytes, models, runners.

use std::ops::Range;

use proto_msgs::{DType, ErrorCode, Failure, InputDecl};

use crate::runners::{
    fit::{Fitted, TensorMeta, fit},
    oip::Tensor,
};

/// Fits inputs that hold `items` items to the model. Returns the shapes of one item.
pub(crate) fn fit_items(model: &[TensorMeta], inputs: &[InputDecl], items: u32) -> Result<Vec<Fitted>, Failure> {
    if items == 1 {
        return fit(model, inputs);
    }
    let single: Result<Vec<_>, Failure> =
        inputs.iter().enumerate().map(|(index, input)| single(index, input, u64::from(items))).collect();
    let fitted = fit(model, &single?).map_err(|failure| {
        let text = format!("each of {items} items is like one input: {}", failure.text);
        Failure::new(failure.code, text)
    })?;
    match fitted.iter().find(|input| input.dtype.size_bytes().is_none()) {
        // The end of one item's strings is unknown.
        Some(input) => Err(mismatch(format!("input '{}' takes strings: submit one item at a time", input.name))),
        None => Ok(fitted),
    }
}

/// Declaration of one item of an input that holds `items` items.
fn single(index: usize, input: &InputDecl, items: u64) -> Result<InputDecl, Failure> {
    let named = || input.name.as_ref().map_or_else(|| format!("input {index}"), |name| format!("input '{name}'"));
    if !input.size_bytes.is_multiple_of(items) {
        let text =
            format!("{} has {} bytes, which is not {items} times the bytes of an item", named(), input.size_bytes);
        return Err(mismatch(text));
    }
    let size_bytes = input.size_bytes / items;
    let shape = match (&input.shape, input.dtype.and_then(DType::size_bytes)) {
        (Some(shape), Some(element_bytes)) if bytes_of(shape, element_bytes) == Some(input.size_bytes) => {
            let (first, rest) = shape.split_first().ok_or_else(|| mismatch(format!("{} is one number", named())))?;
            if !first.is_multiple_of(items) {
                let text = format!("{} has {first} rows, which is not {items} times the rows of an item", named());
                return Err(mismatch(text));
            }
            Some([&[first / items], rest].concat())
        }
        (shape, _) => shape.clone(),
    };
    Ok(InputDecl { name: input.name.clone(), dtype: input.dtype, shape, digest: input.digest, size_bytes })
}

fn bytes_of(shape: &[u64], element_bytes: usize) -> Option<u64> {
    shape.iter().try_fold(element_bytes as u64, |product, dim| product.checked_mul(*dim))
}

/// The byte range of the items `rows` in an input that holds `items` items.
pub(crate) fn bytes_of_items(size_bytes: u64, items: u32, rows: &Range<u32>) -> Range<u64> {
    let each = size_bytes / u64::from(items.max(1));
    each * u64::from(rows.start)..each * u64::from(rows.end)
}

/// Fails, with the input's name, unless the model takes any number of rows in every input.
pub(crate) fn takes_many(model: &[TensorMeta], fitted: &[Fitted]) -> Result<(), String> {
    for input in fitted {
        let meta = model.iter().find(|meta| meta.name == input.name);
        let open = meta.and_then(|meta| meta.shape.first()).is_some_and(|first| *first < 0);
        if !open || input.shape.is_empty() || input.dtype.size_bytes().is_none() {
            return Err(format!("the model's input '{}' does not leave its first dimension open", input.name));
        }
    }
    Ok(())
}

/// The shape of `items` items packed one behind the other.
pub(crate) fn packed_shape(item: &[u64], items: u64) -> Vec<u64> {
    match item.split_first() {
        Some((first, rest)) => [&[first.saturating_mul(items)], rest].concat(),
        None => vec![items],
    }
}

/// Cuts the outputs of one call with `items` items into the outputs of each item.
pub(crate) fn cut(outputs: &[Tensor], items: u32) -> Result<Vec<Vec<Tensor>>, Failure> {
    if items == 1 {
        return Ok(vec![outputs.to_vec()]);
    }
    for output in outputs {
        let rows = output.shape.first().copied().unwrap_or(0);
        if output.shape.is_empty() || !rows.is_multiple_of(u64::from(items)) || output.dtype.size_bytes().is_none() {
            let text = format!(
                "output '{}' came as {} {:?} for {items} items: not as many rows for each of them",
                output.name, output.dtype, output.shape
            );
            return Err(Failure::new(ErrorCode::RunProtocol, text));
        }
    }
    let of_item = |item: u32| {
        let piece = |output: &Tensor| {
            let shape = [&[output.shape[0] / u64::from(items)], &output.shape[1..]].concat();
            let range = bytes_of_items(output.payload.size_bytes(), items, &(item..item + 1));
            Tensor { name: output.name.clone(), dtype: output.dtype, shape, payload: output.payload.slice(range) }
        };
        outputs.iter().map(piece).collect()
    };
    Ok((0..items).map(of_item).collect())
}

/// The shape that an output has for every item. Fails if items differ: they could not be joined.
pub(crate) fn common_shape<'a>(items: impl Iterator<Item = &'a Tensor>) -> Result<Vec<u64>, Failure> {
    let mut first: Option<&Tensor> = None;
    for item in items {
        match first {
            Some(first) if (first.dtype, &first.shape) != (item.dtype, &item.shape) => {
                let text = format!(
                    "output '{}' has shape {:?} for one item and {:?} for another: such items do not go into one task, \
                     submit with --split 1",
                    item.name, first.shape, item.shape
                );
                return Err(Failure::new(ErrorCode::RunFailed, text));
            }
            Some(_) => {}
            None => first = Some(item),
        }
    }
    Ok(first.map(|first| first.shape.clone()).unwrap_or_default())
}

fn mismatch(text: String) -> Failure {
    Failure::new(ErrorCode::InputMismatch, text)
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use proto_msgs::Digest;

    use super::*;
    use crate::data::payload::Payload;

    fn meta(shape: &[i64]) -> TensorMeta {
        TensorMeta { name: "x".to_owned(), dtype: DType::F32, shape: shape.to_vec() }
    }

    fn raw(size_bytes: u64) -> InputDecl {
        InputDecl { name: None, dtype: None, shape: None, digest: Digest::of(b""), size_bytes }
    }

    fn array(shape: &[u64]) -> InputDecl {
        let size_bytes = 4 * shape.iter().product::<u64>();
        InputDecl { dtype: Some(DType::F32), shape: Some(shape.to_vec()), ..raw(size_bytes) }
    }

    fn item_shape(model: &[i64], input: InputDecl, items: u32) -> Result<Vec<u64>, Failure> {
        fit_items(&[meta(model)], &[input], items).map(|fitted| fitted[0].shape.clone())
    }

    fn output(shape: &[u64], values: &[u8]) -> Tensor {
        let payload = Payload::Memory(Bytes::copy_from_slice(values));
        Tensor { name: "y".to_owned(), dtype: DType::U8, shape: shape.to_vec(), payload }
    }

    #[test]
    fn an_item_has_the_shape_of_the_model_whatever_is_fixed_or_open() {
        assert_eq!(item_shape(&[1, 4], raw(8 * 16), 8), Ok(vec![1, 4]));
        assert_eq!(item_shape(&[-1, 4], raw(8 * 16), 8), Ok(vec![1, 4]));
        assert_eq!(item_shape(&[2, 4], raw(3 * 32), 3), Ok(vec![2, 4]));
        assert_eq!(item_shape(&[-1, -1], array(&[6, 5]), 3), Ok(vec![2, 5]));
    }

    #[test]
    fn a_size_that_is_not_that_of_the_items_is_refused_with_both_numbers() {
        let text = item_shape(&[1, 4], raw(100), 8).expect_err("no multiple").text;
        assert!(text.contains("100 bytes") && text.contains("8 times"), "{text}");
        let text = item_shape(&[1, 4], raw(8 * 12), 8).expect_err("three numbers each").text;
        assert!(text.contains("16 bytes") && text.contains("12 bytes") && text.contains("8 items"), "{text}");
        assert!(item_shape(&[-1, 4], array(&[3, 4]), 2).is_err());
    }

    #[test]
    fn only_an_open_first_dimension_takes_many_rows() {
        let many = |shape: &[i64], input| {
            let model = [meta(shape)];
            takes_many(&model, &fit(&model, &[input]).expect("fits"))
        };
        assert_eq!(many(&[-1, 4], raw(16)), Ok(()));
        assert!(many(&[1, 4], raw(16)).expect_err("fixed").contains("'x'"));
        assert!(many(&[1, -1], raw(16)).is_err());
    }

    #[test]
    fn every_item_gets_its_own_rows_back() {
        let items = cut(&[output(&[4, 2], &[0, 1, 2, 3, 4, 5, 6, 7])], 2).expect("two rows each");
        let bytes = |item: usize| items[item][0].payload.read().expect("memory");
        assert_eq!(
            (items[0][0].shape.as_slice(), bytes(0), bytes(1)),
            ([2, 2].as_slice(), [0, 1, 2, 3][..].to_vec().into(), [4, 5, 6, 7][..].to_vec().into())
        );
    }

    #[test]
    fn another_number_of_rows_is_named() {
        let failure = cut(&[output(&[1, 8], &[0; 8])], 4).expect_err("one row for four items");
        assert_eq!(failure.code, ErrorCode::RunProtocol);
        assert!(failure.text.contains("[1, 8]") && failure.text.contains("4 items"), "{}", failure.text);
        assert!(cut(&[output(&[], &[0])], 2).is_err(), "a scalar for two items");
    }

    #[test]
    fn an_output_has_the_shape_of_one_item_however_many_there_are_and_they_must_agree() {
        let (one, other) = (output(&[2, 3], &[0; 6]), output(&[2, 4], &[0; 8]));
        assert_eq!(common_shape([&one, &one].into_iter()), Ok(vec![2, 3]));
        let (scalar, vector) = (output(&[], &[0]), output(&[1], &[0]));
        assert_eq!(common_shape([&scalar, &scalar, &scalar].into_iter()), Ok(vec![]));
        assert!(common_shape([&scalar, &vector].into_iter()).is_err(), "a number is no list of one");
        assert!(common_shape([&one, &other].into_iter()).expect_err("ragged").text.contains("--split 1"));
    }
}
