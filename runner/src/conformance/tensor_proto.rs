//! Owns reading tensors as the ONNX project stores them (`TensorProto`).

use anyhow::{Context, Result, anyhow, ensure};
use mesh_models::onnx_dtype;
use proto_msgs::DType;

use crate::{
    protobuf::{Damaged, Field, Fields, packed},
    tensor::{AlignedBytes, Tensor, element_count, push_string},
};

/// Parses the tensor in a file.
pub(super) fn parse(file: &[u8]) -> Result<Tensor> {
    let damaged = |_: Damaged| anyhow!("the tensor is damaged");
    let (mut shape, mut dtype, mut raw) = (Vec::new(), None, None);
    let mut data = Vec::new();
    for field in Fields::of(file) {
        match field.map_err(damaged)? {
            Field::Number(1, dimension) => shape.push(dimension as i64),
            Field::Bytes(1, dimensions) => {
                shape.extend(packed(dimensions).map_err(damaged)?.into_iter().map(|dimension| dimension as i64));
            }
            Field::Number(2, number) => dtype = onnx_dtype(number),
            Field::Bytes(9, bytes) => raw = Some(bytes),
            // `float_data` and `double_data` are already little-endian.
            Field::Bytes(4 | 10, bytes) | Field::Fixed(4 | 10, bytes) => data.extend_from_slice(bytes),
            Field::Bytes(5 | 7 | 11, numbers) => {
                for number in packed(numbers).map_err(damaged)? {
                    push_number(&mut data, dtype.context("numbers before their type")?, number);
                }
            }
            Field::Number(5 | 7 | 11, number) => {
                push_number(&mut data, dtype.context("numbers before their type")?, number);
            }
            Field::Bytes(6, string) => push_string(&mut data, string),
            _ => {}
        }
    }
    let dtype = dtype.context("the mesh cannot carry this type of tensor")?;
    let data = raw.map_or(data, <[u8]>::to_vec);
    if let Some(element_bytes) = dtype.size_bytes() {
        let bytes = element_count(&shape).map(|count| count * element_bytes);
        ensure!(bytes == Some(data.len()), "{} bytes for shape {shape:?} of {dtype}", data.len());
    }
    Ok(Tensor { dtype, shape, data: AlignedBytes::copied(&data).into() })
}

/// Appends a number of `int32_data`, `int64_data` or `uint64_data` in the width of its type.
fn push_number(data: &mut Vec<u8>, dtype: DType, number: u64) {
    let width = dtype.size_bytes().unwrap_or(0);
    data.extend_from_slice(&number.to_le_bytes()[..width]);
}
