//! What files of prefixes depend on beside tokens: the weights, and how they are computed with.

use std::{
    fs::File,
    io::{self, Read, Seek, SeekFrom},
    path::PathBuf,
};

use sha2::{Digest, Sha256};

/// What a model is, as far as its keys and values depend on it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Identity {
    /// Its weight files.
    pub weights: Vec<PathBuf>,
    /// Everything else: settings, device, how weights lie in memory.
    pub circumstances: String,
}

/// What segments and points are made of, in which order; another layout gets another name.
const LAYOUT: &str = "segments and points by layer, 1";

/// The beginning of each file that is hashed whole: headers of safetensors with names, types and shapes.
const HEAD_BYTES: u64 = 1 << 20;

/// Samples of the rest of each file.
const SAMPLES: u64 = 256;

/// Bytes of each sample.
const SAMPLE_BYTES: u64 = 4096;

impl Identity {
    /// A hash of it. Weights are sampled, not read whole: other weights of the same shape differ everywhere.
    pub fn hash(&self) -> io::Result<String> {
        let mut hash = Sha256::new();
        hash.update(env!("CARGO_PKG_VERSION"));
        hash.update(LAYOUT);
        hash.update(self.circumstances.len().to_le_bytes());
        hash.update(&self.circumstances);
        for path in &self.weights {
            let mut file = File::open(path)?;
            let size = file.metadata()?.len();
            hash.update(size.to_le_bytes());
            let mut part = Vec::new();
            (&mut file).take(HEAD_BYTES).read_to_end(&mut part)?;
            hash.update(&part);
            for sample in 0..SAMPLES {
                let at = size.saturating_sub(SAMPLE_BYTES) / SAMPLES * (sample + 1);
                file.seek(SeekFrom::Start(at))?;
                part.clear();
                (&mut file).take(SAMPLE_BYTES).read_to_end(&mut part)?;
                hash.update(&part);
            }
        }
        Ok(hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn other_weights_or_circumstances_are_another_model() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("model.safetensors");
        let mut bytes = vec![7_u8; 3 << 20];
        std::fs::write(&path, &bytes).unwrap();
        let identity = Identity { weights: vec![path.clone()], circumstances: "bf16".into() };
        let before = identity.hash().unwrap();
        assert_eq!(before, identity.hash().unwrap());
        assert_ne!(before, Identity { circumstances: "f32".into(), ..identity.clone() }.hash().unwrap());
        bytes[2 << 20..].fill(8);
        std::fs::write(&path, &bytes).unwrap();
        assert_ne!(before, identity.hash().unwrap());
        assert!(Identity { weights: vec!["nowhere".into()], ..identity }.hash().is_err());
    }
}
