//! Pictures as tensors: decoded, rotated upright, resized, normalised, laid out. Owns that arithmetic. Never: file
//! names, a model's other inputs.

mod jpeg;

use std::{io::Cursor, str::FromStr};

use image::{DynamicImage, ImageDecoder, ImageReader, imageops::FilterType};
use mesh_models::{Quantization, TensorSpec};
use proto_msgs::{DType, ModelFormat};

use crate::tensor::{Number, Tensor};

/// Memory for one decoded picture: 16,000 by 8,000 pixels. A small file can claim any size.
const DECODED_BYTES_MAX: u64 = 512 * 1024 * 1024;

/// Memory for a picture in the model's size, and for each step on the way there: the tensor of 13,000 by 13,000 pixels of
/// FP32. A model's file can claim any size, too.
const FITTED_BYTES_MAX: u64 = 2 * 1024 * 1024 * 1024;

/// Memory for a pixel while pictures are resized: four numbers of FP32.
const RESIZING_PIXEL_BYTES: u64 = 16;

/// Order of the dimensions.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq, clap::ValueEnum)]
pub(crate) enum Layout {
    /// As the model's input has it: channels (1, 3 or 4) last or first.
    #[default]
    Auto,
    /// Height, width, channels.
    Nhwc,
    /// Channels, height, width.
    Nchw,
}

/// Order of the colours.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq, clap::ValueEnum)]
pub(crate) enum Colors {
    /// Red first.
    #[default]
    Rgb,
    /// Blue first.
    Bgr,
}

/// How a picture of other proportions is fitted.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq, clap::ValueEnum)]
pub(crate) enum Resize {
    /// Stretched to the model's size.
    #[default]
    Stretch,
    /// Cut to the model's proportions around its middle, then resized.
    Crop,
    /// Resized as a whole, the rest black.
    Pad,
}

/// The target range of the pixel values 0 to 255.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) enum Normalize {
    /// 0 to 1 for models of real numbers, the whole range of the type for integer models.
    #[default]
    Auto,
    /// Unchanged.
    Raw,
    /// The range from the first to the second number.
    To(f64, f64),
}

impl FromStr for Normalize {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let range = || {
            let (low, high) = text.split_once("..")?;
            let (low, high): (f64, f64) = (low.trim().parse().ok()?, high.trim().parse().ok()?);
            (low < high && low.is_finite() && high.is_finite()).then_some(Self::To(low, high))
        };
        match text {
            "auto" => Ok(Self::Auto),
            "raw" => Ok(Self::Raw),
            _ => range().ok_or_else(|| "use auto, raw, or a range from low to high such as 0..1 or -1..1".to_owned()),
        }
    }
}

/// The user's options for pictures.
#[derive(Clone, Debug, Default)]
pub(crate) struct Wishes {
    pub(crate) layout: Layout,
    pub(crate) colors: Colors,
    pub(crate) resize: Resize,
    pub(crate) normalize: Normalize,
    /// Subtracted after normalising: one number for all channels, or one per channel.
    pub(crate) mean: Vec<f64>,
    /// Divided by after `mean` is subtracted.
    pub(crate) std: Vec<f64>,
}

/// Why a picture cannot become a tensor.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ImageError {
    #[error("is not a readable picture: {0}")]
    Decode(#[from] image::ImageError),
    #[error(
        "is a picture of {width}x{height} pixels, which take more than {} MiB: make it smaller, or give a .npy or raw file",
        DECODED_BYTES_MAX >> 20
    )]
    TooManyPixels { width: u32, height: u32 },
    #[error("is a JPEG that ends before its picture does: is it still being written?")]
    CutOff,
    #[error(
        "is a picture, but the model's input {spec} takes none (that would have four dimensions, such as [1,224,224,3]): give a .npy, .json or raw file"
    )]
    NotForPictures { spec: String },
    #[error("is a picture, but --layout {layout} is not the order of the model's input {spec}: leave --layout away")]
    Layout { layout: &'static str, spec: String },
    #[error("is a picture of {pixels} colour channels for --{flag} with {got} values: give one, or one each")]
    Channels { flag: &'static str, got: usize, pixels: usize },
    #[error(
        "is a picture of {width}x{height} pixels, but the model's input {spec} is too large to make it fit: give a .npy or raw file"
    )]
    TooLarge { width: u32, height: u32, spec: String },
    #[error("cannot be fitted: the model's input could have its channels first or last: say --layout nhwc or nchw")]
    Ambiguous,
}

/// Positions and sizes of height, width and channels in the model's input.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Frame {
    is_channels_first: bool,
    /// `None`: the picture's own height.
    height: Option<u32>,
    width: Option<u32>,
    channels: usize,
    has_batch: bool,
}

/// Decodes a picture into the form of the model's input `spec`.
pub(crate) fn read(
    bytes: &[u8],
    spec: &TensorSpec,
    format: ModelFormat,
    wishes: &Wishes,
) -> Result<Tensor, ImageError> {
    let frame = frame_of(spec, format, wishes.layout)?;
    let dtype = spec.dtype.filter(|dtype| !matches!(dtype, DType::Bytes | DType::Bool));
    let dtype = dtype.ok_or_else(|| ImageError::NotForPictures { spec: spec.to_string() })?;
    for (flag, values) in [("mean", &wishes.mean), ("std", &wishes.std)] {
        if values.len() > 1 && values.len() != frame.channels {
            return Err(ImageError::Channels { flag, got: values.len(), pixels: frame.channels });
        }
    }
    let picture = decode(bytes)?;
    if fitting_bytes(&picture, &frame, dtype, wishes.resize) > FITTED_BYTES_MAX {
        let (width, height) = (picture.width(), picture.height());
        return Err(ImageError::TooLarge { width, height, spec: spec.to_string() });
    }
    let picture = fit(picture, &frame, wishes.resize);
    let (width, height) = (picture.width(), picture.height());
    let pixels = match frame.channels {
        1 => picture.into_luma8().into_raw(),
        3 => picture.into_rgb8().into_raw(),
        _ => picture.into_rgba8().into_raw(),
    };
    let data = lay_out(&pixels, &frame, dtype, spec.quantization, wishes);
    let channels = frame.channels as u64;
    let mut shape = if frame.is_channels_first {
        vec![channels, height.into(), width.into()]
    } else {
        vec![height.into(), width.into(), channels]
    };
    if frame.has_batch {
        shape.insert(0, 1);
    }
    Ok(Tensor { dtype, shape, data: data.into() })
}

fn frame_of(spec: &TensorSpec, format: ModelFormat, layout: Layout) -> Result<Frame, ImageError> {
    let not_for_pictures = || ImageError::NotForPictures { spec: spec.to_string() };
    let shape = spec.shape.as_deref().ok_or_else(not_for_pictures)?;
    let (has_batch, three) = match shape {
        // A batch of one picture, or an open number of pictures.
        [1 | -1, three @ ..] if three.len() == 3 => (true, three),
        // A picture alone. Rows of an open number are no picture: they are a batch of something else.
        [height, width, last] if *height > 0 || (*width < 0 && matches!(last, 3 | 4)) => (false, shape),
        _ => return Err(not_for_pictures()),
    };
    let could_be = |channels: i64| matches!(channels, 1 | 3 | 4);
    let is_channels_first = match (layout, could_be(three[0]), could_be(three[2])) {
        (Layout::Nchw, true, _) | (Layout::Auto, true, false) => true,
        (Layout::Nhwc, _, true) | (Layout::Auto, false, true) => false,
        // Both are possible: the convention of the model format decides.
        (Layout::Auto, true, true) if three[0] != three[2] => format == ModelFormat::Onnx,
        (Layout::Auto, true, true) => return Err(ImageError::Ambiguous),
        (Layout::Nchw, false, true) => return Err(ImageError::Layout { layout: "nchw", spec: spec.to_string() }),
        (Layout::Nhwc, true, false) => return Err(ImageError::Layout { layout: "nhwc", spec: spec.to_string() }),
        _ => return Err(not_for_pictures()),
    };
    let (height, width, channels) =
        if is_channels_first { (three[1], three[2], three[0]) } else { (three[0], three[1], three[2]) };
    // A length beyond all limits stays one, so that it is refused.
    let side = |length: i64| (length > 0).then(|| u32::try_from(length).unwrap_or(u32::MAX));
    Ok(Frame { is_channels_first, height: side(height), width: side(width), channels: channels as usize, has_batch })
}

/// Decodes a picture within limits and rotates it by its camera orientation.
fn decode(bytes: &[u8]) -> Result<DynamicImage, ImageError> {
    if jpeg::is_one(bytes) && !jpeg::is_whole(bytes) {
        return Err(ImageError::CutOff);
    }
    let mut reader = ImageReader::new(Cursor::new(bytes)).with_guessed_format().map_err(image::ImageError::IoError)?;
    let mut limits = image::Limits::default();
    limits.max_alloc = Some(DECODED_BYTES_MAX);
    reader.limits(limits.clone());
    let mut decoder = reader.into_decoder()?;
    // A decoder counts what it takes for itself, not the picture.
    let (width, height) = decoder.dimensions();
    limits.reserve(decoder.total_bytes()).map_err(|_| ImageError::TooManyPixels { width, height })?;
    let orientation = decoder.orientation()?;
    let mut picture = DynamicImage::from_decoder(decoder)?;
    picture.apply_orientation(orientation);
    Ok(picture)
}

/// Memory that it takes to resize the picture, or that its tensor takes, if that is more.
fn fitting_bytes(picture: &DynamicImage, frame: &Frame, dtype: DType, resize: Resize) -> u64 {
    let from = [picture.width(), picture.height()].map(u64::from);
    let to = [frame.width, frame.height].map(|side| side.map(u64::from));
    let to = [to[0].unwrap_or(from[0]), to[1].unwrap_or(from[1])];
    let pixels = |[width, height]: [u64; 2]| width.saturating_mul(height);
    let element_bytes = dtype.size_bytes().unwrap_or(1) as u64;
    let tensor_bytes = pixels(to).saturating_mul(frame.channels as u64 * element_bytes);
    if to == from {
        return tensor_bytes;
    }
    let ratios = [0, 1].map(|side| to[side] as f64 / from[side].max(1) as f64);
    // The whole picture in the size at which it covers, or fits into, the model's.
    let whole = |ratio: f64| from.map(|side| (side as f64 * ratio).ceil() as u64);
    let resized = match resize {
        Resize::Stretch => to,
        Resize::Crop => whole(ratios[0].max(ratios[1])),
        Resize::Pad => whole(ratios[0].min(ratios[1])),
    };
    // The height is changed first, then the width.
    let largest = pixels([from[0], resized[1]]).max(pixels(resized)).max(pixels(to));
    tensor_bytes.max(largest.saturating_mul(RESIZING_PIXEL_BYTES))
}

/// Resizes the picture to the model's size, with a filter that averages skipped pixels (like Pillow's `BILINEAR`).
fn fit(picture: DynamicImage, frame: &Frame, resize: Resize) -> DynamicImage {
    let (width, height) = (frame.width.unwrap_or(picture.width()), frame.height.unwrap_or(picture.height()));
    if (width, height) == (picture.width(), picture.height()) {
        return picture;
    }
    match resize {
        Resize::Stretch => picture.resize_exact(width, height, FilterType::Triangle),
        Resize::Crop => picture.resize_to_fill(width, height, FilterType::Triangle),
        Resize::Pad => {
            let inner = picture.resize(width, height, FilterType::Triangle);
            let mut whole = DynamicImage::new(width, height, inner.color());
            let (x, y) = ((width - inner.width()) / 2, (height - inner.height()) / 2);
            image::imageops::replace(&mut whole, &inner, x.into(), y.into());
            whole
        }
    }
}

/// Converts pixels to elements in the model's order.
fn lay_out(pixels: &[u8], frame: &Frame, dtype: DType, quantization: Option<Quantization>, wishes: &Wishes) -> Vec<u8> {
    let channels = frame.channels;
    // Each of the 256 values per channel is computed once.
    let tables: Vec<Vec<Vec<u8>>> = (0..channels)
        .map(|channel| (0..=255).map(|pixel| element(pixel, channel, dtype, quantization, wishes)).collect())
        .collect();
    // The picture's channel for a channel of the tensor.
    let picked = |place: usize| match wishes.colors {
        Colors::Bgr if channels >= 3 && place < 3 => 2 - place,
        _ => place,
    };
    let mut data = Vec::with_capacity(pixels.len() * dtype.size_bytes().unwrap_or(1));
    if frame.is_channels_first {
        for (place, table) in tables.iter().enumerate() {
            let plane = pixels.iter().skip(picked(place)).step_by(channels);
            plane.for_each(|pixel| data.extend(&table[usize::from(*pixel)]));
        }
    } else {
        for pixel in pixels.chunks_exact(channels) {
            let places = tables.iter().enumerate();
            places.for_each(|(place, table)| data.extend(&table[usize::from(pixel[picked(place)])]));
        }
    }
    data
}

/// One pixel value as an element of channel `channel` of the tensor.
fn element(pixel: u8, channel: usize, dtype: DType, quantization: Option<Quantization>, wishes: &Wishes) -> Vec<u8> {
    let is_integer = !matches!(dtype, DType::F16 | DType::F32 | DType::F64 | DType::BF16);
    let is_plain = wishes.mean.is_empty() && wishes.std.is_empty();
    let mut out = Vec::new();
    if is_integer && is_plain && wishes.normalize == Normalize::Auto {
        // The whole range of a quantised type stands for the whole range of its real values.
        let value = if dtype == DType::I8 { i128::from(pixel) - 128 } else { pixel.into() };
        Number::Int(value).push_nearest(dtype, &mut out);
        return out;
    }
    let (low, high) = match wishes.normalize {
        Normalize::Auto => (0.0, 1.0),
        Normalize::Raw => (0.0, 255.0),
        Normalize::To(low, high) => (low, high),
    };
    let of_channel = |values: &[f64], default| values.get(channel).or(values.first()).copied().unwrap_or(default);
    let value = low + f64::from(pixel) / 255.0 * (high - low);
    let value = (value - of_channel(&wishes.mean, 0.0)) / of_channel(&wishes.std, 1.0);
    let value = match quantization.filter(|_| is_integer && wishes.normalize != Normalize::Raw) {
        Some(steps) => value / f64::from(steps.scale) + steps.zero_point as f64,
        None => value,
    };
    Number::Real(value).push_nearest(dtype, &mut out);
    out
}

#[cfg(test)]
mod tests {
    use clap::ValueEnum;

    use super::*;
    use crate::tensor::numbers;

    fn spec(dtype: DType, shape: &[i64]) -> TensorSpec {
        TensorSpec { name: "image".into(), dtype: Some(dtype), shape: Some(shape.to_vec()), quantization: None }
    }

    /// A picture as a PNG file.
    fn png(width: u32, height: u32, rgb: &[u8]) -> Vec<u8> {
        let picture = image::RgbImage::from_raw(width, height, rgb.to_vec()).unwrap();
        let mut file = Cursor::new(Vec::new());
        picture.write_to(&mut file, image::ImageFormat::Png).unwrap();
        file.into_inner()
    }

    fn values(tensor: &Tensor) -> Vec<f64> {
        let real = |number| match number {
            Number::Int(value) => value as f64,
            Number::Real(value) => value,
        };
        numbers(tensor.dtype, &tensor.data).map(real).collect()
    }

    fn read_as(bytes: &[u8], spec: &TensorSpec, wishes: &Wishes) -> Result<Tensor, ImageError> {
        read(bytes, spec, ModelFormat::TfLite, wishes)
    }

    const TWO: [u8; 6] = [255, 0, 51, 0, 102, 204];

    #[test]
    fn pixels_become_real_numbers_from_0_to_1() {
        let tensor = read_as(&png(2, 1, &TWO), &spec(DType::F32, &[1, 1, 2, 3]), &Wishes::default()).unwrap();
        assert_eq!((tensor.dtype, &tensor.shape[..]), (DType::F32, &[1, 1, 2, 3][..]));
        let expected = [1.0, 0.0, 0.2, 0.0, 0.4, 0.8].map(|value: f32| f64::from(value));
        assert_eq!(values(&tensor), expected);
    }

    #[test]
    fn channels_go_first_and_colours_change_places_when_wanted() {
        let wishes = Wishes { normalize: Normalize::Raw, ..Wishes::default() };
        let planes = read_as(&png(2, 1, &TWO), &spec(DType::F32, &[3, 1, 2]), &wishes).unwrap();
        assert_eq!((values(&planes), &planes.shape[..]), (vec![255.0, 0.0, 0.0, 102.0, 51.0, 204.0], &[3, 1, 2][..]));
        let wishes = Wishes { colors: Colors::Bgr, ..wishes };
        let turned = read_as(&png(2, 1, &TWO), &spec(DType::U8, &[-1, 1, 2, 3]), &wishes).unwrap();
        assert_eq!(turned.data[..], [51, 0, 255, 204, 102, 0]);
    }

    #[test]
    fn mean_and_deviation_count_after_the_range() {
        let wishes = Wishes { mean: vec![0.5], std: vec![0.5, 0.25, 0.1], ..Wishes::default() };
        let tensor = read_as(&png(1, 1, &[255, 0, 51]), &spec(DType::F64, &[1, 1, 3]), &wishes).unwrap();
        let expected = [1.0, -2.0, -3.0];
        assert!(values(&tensor).iter().zip(expected).all(|(got, wanted)| (got - wanted).abs() < 1e-9), "{tensor:?}");
        let wishes = Wishes { mean: vec![0.1, 0.2], ..Wishes::default() };
        let error = read_as(&png(1, 1, &[0; 3]), &spec(DType::F64, &[1, 1, 3]), &wishes).unwrap_err();
        assert!(error.to_string().contains("--mean with 2 values"), "{error}");
    }

    #[test]
    fn integers_take_the_whole_range_or_what_their_scale_says() {
        let picture = png(1, 1, &[0, 128, 255]);
        let bytes = read_as(&picture, &spec(DType::I8, &[1, 1, 3]), &Wishes::default()).unwrap();
        assert_eq!(values(&bytes), [-128.0, 0.0, 127.0]);
        let quantization = Some(Quantization { scale: 0.5, zero_point: 3 });
        let quantised = TensorSpec { quantization, ..spec(DType::I8, &[1, 1, 3]) };
        let wishes = Wishes { normalize: Normalize::To(-1.0, 1.0), ..Wishes::default() };
        assert_eq!(values(&read_as(&picture, &quantised, &wishes).unwrap()), [1.0, 3.0, 5.0]);
    }

    #[test]
    fn resizing_averages_what_it_leaves_out() {
        // Four columns to two with a triangle filter of twice the width, computed by hand: weights 3, 3, 1 of 7.
        let picture = png(4, 1, &[0, 0, 0, 70, 70, 70, 140, 140, 140, 210, 210, 210]);
        let wishes = Wishes { normalize: Normalize::Raw, layout: Layout::Nhwc, ..Wishes::default() };
        let tensor = read_as(&picture, &spec(DType::F32, &[1, 2, 1]), &wishes).unwrap();
        assert_eq!(values(&tensor), [(3.0 * 0.0 + 3.0 * 70.0 + 140.0) / 7.0, (70.0 + 3.0 * 140.0 + 3.0 * 210.0) / 7.0]);
    }

    #[test]
    fn other_proportions_are_cut_or_padded() {
        let picture = png(3, 1, &[10, 10, 10, 20, 20, 20, 30, 30, 30]);
        let fitted = |resize| {
            let wishes = Wishes { resize, layout: Layout::Nhwc, ..Wishes::default() };
            read_as(&picture, &spec(DType::U8, &[1, 1, 1]), &wishes).unwrap().data.to_vec()
        };
        assert_eq!(fitted(Resize::Crop), [20]);
        let wishes = Wishes { resize: Resize::Pad, ..Wishes::default() };
        let padded = read_as(&picture, &spec(DType::U8, &[3, 3, 1]), &wishes).unwrap();
        assert_eq!(padded.data[..], [0, 0, 0, 10, 20, 30, 0, 0, 0]);
    }

    /// The checksum of a PNG file's chunk.
    fn crc(chunk: &[u8]) -> u32 {
        let bit = |crc: u32| if crc & 1 == 1 { (crc >> 1) ^ 0xedb8_8320 } else { crc >> 1 };
        !chunk.iter().fold(!0_u32, |crc, byte| (0..8).fold(crc ^ u32::from(*byte), |crc, _| bit(crc)))
    }

    #[test]
    fn a_file_that_claims_a_huge_picture_is_refused_before_any_memory_is_taken() {
        let mut file = png(1, 1, &[0; 3]);
        // The first chunk from its name on: width, height, depth, and grey for a colour.
        for side in [16..20, 20..24] {
            file[side].copy_from_slice(&60_000_u32.to_be_bytes());
        }
        file[25] = 0;
        let checksum = crc(&file[12..29]);
        file[29..33].copy_from_slice(&checksum.to_be_bytes());
        let error = read_as(&file, &spec(DType::U8, &[1, 1, 1, 3]), &Wishes::default()).unwrap_err().to_string();
        assert!(
            error.starts_with("is a picture of 60000x60000 pixels, which take more than 512 MiB: make it"),
            "{error}"
        );
    }

    #[test]
    fn a_model_that_claims_a_huge_picture_is_refused_before_any_memory_is_taken() {
        let picture = png(3, 1, &[0; 9]);
        let huge: [&[i64]; 5] = [
            &[1, 100_000, 100_000, 3],
            &[1, 1, 4_000_000_000, 3],
            &[1, 4_000_000_000, 1, 3],
            &[1, 1 << 40, 1 << 40, 3],
            &[1, 3, i64::MAX, i64::MAX],
        ];
        for (shape, resize) in huge.iter().flat_map(|shape| Resize::value_variants().iter().map(move |r| (shape, r))) {
            let wishes = Wishes { resize: *resize, ..Wishes::default() };
            let error = read_as(&picture, &spec(DType::F32, shape), &wishes).unwrap_err();
            assert!(matches!(error, ImageError::TooLarge { .. }), "{shape:?}, {resize:?}: {error}");
        }
        // The model's picture is small, but the one to cut it from is not.
        let wishes = Wishes { resize: Resize::Crop, layout: Layout::Nhwc, ..Wishes::default() };
        let cut = read_as(&png(1000, 1, &[0; 3000]), &spec(DType::U8, &[20_000, 1, 3]), &wishes);
        assert!(matches!(cut, Err(ImageError::TooLarge { .. })), "{cut:?}");
    }

    #[test]
    fn a_model_of_any_size_takes_the_picture_as_it_is() {
        let tensor = read_as(&png(2, 1, &TWO), &spec(DType::U8, &[-1, -1, -1, 3]), &Wishes::default()).unwrap();
        assert_eq!((&tensor.shape[..], &tensor.data[..]), (&[1, 1, 2, 3][..], &TWO[..]));
    }

    #[test]
    fn a_model_without_pictures_says_so() {
        let picture = png(2, 1, &TWO);
        let error = |spec: &TensorSpec| read_as(&picture, spec, &Wishes::default()).unwrap_err().to_string();
        assert!(error(&spec(DType::F32, &[1, 16000])).contains("input FP32 [1,16000] takes none"));
        assert!(error(&spec(DType::F32, &[-1, 43844, 1])).contains("four dimensions"), "recordings");
        assert!(error(&spec(DType::Bytes, &[1, 2, 3])).contains("takes none"));
        let wishes = Wishes { layout: Layout::Nchw, ..Wishes::default() };
        let other_order = read_as(&picture, &spec(DType::F32, &[1, 8, 8, 3]), &wishes).unwrap_err().to_string();
        assert!(other_order.contains("--layout nchw is not the order"), "{other_order}");
        assert!(error(&spec(DType::F32, &[3, 8, 3])).contains("--layout"));
        assert!(read_as(b"GIF89a", &spec(DType::U8, &[1, 1, 3]), &Wishes::default()).is_err());
    }
}
