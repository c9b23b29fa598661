//! Whether a JPEG file is whole. Decoders fill the missing rest of a picture with grey, and a camera's file that is still
//! being written would give a wrong answer without a word.
//!
//! The form of the file: ITU-T T.81, Annex B.

/// The byte before every marker's code.
const MARKER: u8 = 0xFF;
const START_OF_IMAGE: u8 = 0xD8;
const END_OF_IMAGE: u8 = 0xD9;
const START_OF_SCAN: u8 = 0xDA;

/// Whether the file begins like a JPEG.
pub(super) fn is_one(bytes: &[u8]) -> bool {
    bytes.starts_with(&[MARKER, START_OF_IMAGE, MARKER])
}

/// Whether the file has its end-of-image marker; one inside a segment (a preview) does not count.
pub(super) fn is_whole(bytes: &[u8]) -> bool {
    let mut at = 2;
    let mut is_in_scan = false;
    while let (Some(&first), Some(&code)) = (bytes.get(at), bytes.get(at + 1)) {
        match (first, code) {
            (MARKER, END_OF_IMAGE) => return true,
            // Filling before a marker.
            (MARKER, MARKER) => at += 1,
            // Data of a scan: a stuffed byte, a restart marker, or any other byte.
            (MARKER, 0x00 | 0x01 | 0xD0..=0xD7) => at += 2,
            (MARKER, code) => {
                let Some(length) = bytes.get(at + 2..at + 4) else { return false };
                is_in_scan = code == START_OF_SCAN;
                at += 2 + usize::from(u16::from_be_bytes([length[0], length[1]]));
            }
            _ if is_in_scan => at += 1,
            // No marker where one must be: the decoder judges that.
            _ => return true,
        }
    }
    false
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A picture of noise, so that its scan has bytes of all values.
    fn jpeg() -> Vec<u8> {
        let picture = image::RgbImage::from_fn(64, 48, |x, y| {
            let noise = x.wrapping_mul(0x9E37_79B1) ^ y.wrapping_mul(0x85EB_CA6B);
            image::Rgb([noise as u8, (noise >> 9) as u8, (noise >> 17) as u8])
        });
        let mut file = std::io::Cursor::new(Vec::new());
        picture.write_to(&mut file, image::ImageFormat::Jpeg).unwrap();
        file.into_inner()
    }

    #[test]
    fn a_file_is_whole_with_its_last_marker_and_not_before() {
        let whole = jpeg();
        assert!(is_one(&whole) && is_whole(&whole));
        for len in 3..whole.len() {
            assert!(!is_whole(&whole[..len]), "cut after {len} of {} bytes", whole.len());
        }
        let with_a_tail = [&whole[..], b"what some cameras append"].concat();
        assert!(is_whole(&with_a_tail));
    }

    #[test]
    fn the_end_of_a_preview_is_not_the_end_of_the_picture() {
        let whole = jpeg();
        // An application segment with a whole JPEG in it.
        let length = (whole.len() + 2) as u16;
        let preview = [&[MARKER, 0xE1], &length.to_be_bytes()[..], &whole].concat();
        let with_preview = [&whole[..2], &preview, &whole[2..]].concat();
        assert!(is_whole(&with_preview));
        assert!(!is_whole(&with_preview[..preview.len() + 2]));
        assert!(!is_whole(&with_preview[..with_preview.len() - 200]));
    }
}
