//! Owns the decision whether compressing a blob makes its transfer shorter.

use std::{io, time::Instant};

/// zstd level of chunks: the only level that keeps up with fast Ethernet on a small machine.
const LEVEL: i32 = 1;

/// Bytes at a blob's beginning that are probed in place of the whole blob.
pub(crate) const PROBE_BYTES: usize = 1024 * 1024;

/// Smallest gain for which compression is worth the heat: a tenth.
const GAIN_MIN: f64 = 1.1;

/// No compressor at this level is faster on any known machine. On a faster link not even a probe is worth its time.
const COMPRESSOR_BYTES_PER_S_MAX: f64 = 2e9;

/// Whether chunks are compressed (zstd level 1).
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub enum Compression {
    /// If a probe of the blob's first MiB and the link's speed show that it pays.
    #[default]
    Auto,
    /// Always.
    Always,
    /// Never.
    Never,
}

/// Whether compression pays. `ratio` is plain size divided by compressed size. Speeds are bytes per second, the
/// compressor's in plain bytes. Compressor and link work at the same time, so the slower one counts.
pub fn compression_pays(ratio: f64, compress_bytes_per_s: f64, link_bytes_per_s: f64) -> bool {
    compress_bytes_per_s.min(link_bytes_per_s * ratio) > link_bytes_per_s * GAIN_MIN
}

/// Whether compression could pay on such a link at all.
pub(crate) fn is_worth_a_probe(link_bytes_per_s: f64) -> bool {
    link_bytes_per_s < COMPRESSOR_BYTES_PER_S_MAX
}

/// Compresses chunks and probes.
pub(crate) struct Compressor(zstd::bulk::Compressor<'static>);

impl Compressor {
    pub(crate) fn new() -> io::Result<Self> {
        zstd::bulk::Compressor::new(LEVEL).map(Self)
    }

    /// Compresses `plain` into `packed` as one zstd frame; false if that would not be shorter.
    pub(crate) fn pack(&mut self, plain: &[u8], packed: &mut Vec<u8>) -> bool {
        packed.clear();
        packed.resize(plain.len(), 0);
        match self.0.compress_to_buffer(plain, packed.as_mut_slice()) {
            Ok(len) if len < plain.len() => {
                packed.truncate(len);
                true
            }
            // Only a too small buffer can fail: the result would not be shorter.
            _ => false,
        }
    }

    /// Compresses a sample. Returns ratio and speed (plain bytes per second).
    pub(crate) fn probe(&mut self, sample: &[u8]) -> (f64, f64) {
        let mut packed = Vec::new();
        let began = Instant::now();
        let shorter = self.pack(sample, &mut packed);
        let seconds = began.elapsed().as_secs_f64().max(1e-9);
        let ratio = if shorter { sample.len() as f64 / packed.len() as f64 } else { 1.0 };
        (ratio, sample.len() as f64 / seconds)
    }
}

impl std::fmt::Debug for Compressor {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Compressor")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MEGABYTE: f64 = 1e6;

    #[test]
    fn text_on_a_slow_link_pays_and_weights_do_not() {
        let (text, weights, compressor) = (3.0, 1.09, 600.0 * MEGABYTE);
        assert!(compression_pays(text, compressor, 12.0 * MEGABYTE));
        assert!(compression_pays(text, compressor, 120.0 * MEGABYTE));
        assert!(!compression_pays(weights, compressor, 12.0 * MEGABYTE));
    }

    #[test]
    fn a_link_faster_than_the_compressor_does_not_wait_for_it() {
        assert!(!compression_pays(10.0, 600.0 * MEGABYTE, 1000.0 * MEGABYTE));
        assert!(!compression_pays(10.0, 20.0 * MEGABYTE, 100.0 * MEGABYTE), "a slow processor");
    }

    #[test]
    fn what_does_not_get_shorter_is_not_packed() {
        let mut compressor = Compressor::new().expect("memory");
        let noise = blake3::Hasher::new().finalize_xof();
        let mut random = vec![0; 100_000];
        let mut noise = noise;
        noise.fill(&mut random);
        assert!(!compressor.pack(&random, &mut Vec::new()));
        let mut packed = Vec::new();
        assert!(compressor.pack(&[0; 100_000], &mut packed) && packed.len() < 1000);
        let (ratio, _) = compressor.probe(&random);
        assert_eq!(ratio, 1.0);
    }
}
