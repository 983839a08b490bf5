//! Bytes that don't compress, their digest, and files of them.

use std::fs::File;
use std::io::{BufWriter, Read as _, Write as _};
use std::path::Path;

use anyhow::{Context, Result};
use sha2::{Digest as _, Sha256};

/// A cheap generator (xorshift64*): the same seed gives the same bytes.
pub(crate) struct Noise(u64);

impl Noise {
    pub(crate) fn new(seed: u64) -> Noise {
        Noise(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    pub(crate) fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    pub(crate) fn fill(&mut self, buffer: &mut [u8]) {
        for part in buffer.chunks_mut(8) {
            part.copy_from_slice(&self.next().to_le_bytes()[..part.len()]);
        }
    }
}

/// Writes a file of noise; its `sha256:...` digest.
pub(crate) fn write(path: &Path, seed: u64, bytes: u64) -> Result<String> {
    let file = File::create(path).with_context(|| format!("make {}", path.display()))?;
    let mut out = BufWriter::with_capacity(1 << 20, file);
    let (mut noise, mut hash, mut buffer) = (Noise::new(seed), Sha256::new(), vec![0; 1 << 20]);
    let mut left = bytes;
    while left > 0 {
        let part = &mut buffer[..left.min(1 << 20) as usize];
        noise.fill(part);
        hash.update(&*part);
        out.write_all(part)?;
        left -= part.len() as u64;
    }
    out.flush()?;
    Ok(format!("sha256:{}", hex(&hash.finalize())))
}

/// The digest of a file's bytes, read `times` times over.
pub(crate) fn digest_repeated(path: &Path, times: u64) -> Result<String> {
    let mut hash = Sha256::new();
    for _ in 0..times {
        let mut file = File::open(path)?;
        let mut buffer = vec![0; 1 << 20];
        loop {
            let read = file.read(&mut buffer)?;
            if read == 0 {
                break;
            }
            hash.update(&buffer[..read]);
        }
    }
    Ok(format!("sha256:{}", hex(&hash.finalize())))
}

/// The digest of bytes.
pub(crate) fn digest(bytes: &[u8]) -> String {
    format!("sha256:{}", hex(&Sha256::digest(bytes)))
}

pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
