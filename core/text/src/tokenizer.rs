//! Text to token ids and back, over the `tokenizers` crate.

use std::{
    fmt, fs,
    io::Read,
    panic::{AssertUnwindSafe, catch_unwind},
    path::{Path, PathBuf},
    sync::Arc,
};

use mesh_core::error::Hint;

use crate::decoder::{Plan, StreamDecoder};

/// Largest tokenizer.json read, in bytes. The largest published ones are below 40 MB.
pub const FILE_BYTES_MAX: u64 = 512 << 20;

/// Most ids that are looked at. The largest published vocabularies have a few hundred thousand.
const IDS_MAX: u32 = 1 << 22;

/// Why a tokenizer cannot be had, or cannot encode.
#[derive(Debug, thiserror::Error)]
pub enum TokenizerError {
    /// The file could not be read.
    #[error("{}: {source}", .path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The file is larger than [`FILE_BYTES_MAX`].
    #[error("{}: it has more than {FILE_BYTES_MAX} bytes", .path.display())]
    TooLarge {
        /// The file.
        path: PathBuf,
    },
    /// It is not a tokenizer.json.
    #[error("not a tokenizer.json: {what}")]
    Malformed {
        /// What is wrong with it.
        what: String,
    },
    /// Its decoder is of a kind that cannot be streamed.
    #[error("the tokenizer's decoder is not supported: {what}")]
    Decoder {
        /// Which part of it.
        what: String,
    },
    /// The text could not be encoded.
    #[error("the text could not be tokenized: {what}")]
    Encode {
        /// Why.
        what: String,
    },
}

impl Hint for TokenizerError {
    fn hint(&self) -> Option<String> {
        match self {
            Self::Malformed { .. } => Some("the file may be truncated: download it again".into()),
            Self::Decoder { .. } => Some("use the model's GGUF, which llama-server decodes itself".into()),
            _ => None,
        }
    }
}

/// What a decoder lets through.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DecoderOptions {
    /// Special tokens that appear in the text all the same, for the dialect to see.
    pub keep: Vec<String>,
    /// True keeps every special token.
    pub keep_all: bool,
    /// True if the text continues other text, so that a leading space is one. False drops the space that some
    /// tokenizers put before the first word.
    pub continues: bool,
}

/// A tokenizer. Cheap to clone; safe to share.
#[derive(Clone)]
pub struct Tokenizer {
    inner: Arc<tokenizers::Tokenizer>,
    plan: Arc<Plan>,
}

impl fmt::Debug for Tokenizer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tokenizer").field("vocab_size", &self.vocab_size()).finish()
    }
}

impl Tokenizer {
    /// Reads a tokenizer.json.
    pub fn from_file(path: &Path) -> Result<Self, TokenizerError> {
        let io = |source| TokenizerError::Io { path: path.to_owned(), source };
        let mut bytes = Vec::new();
        fs::File::open(path).map_err(io)?.take(FILE_BYTES_MAX + 1).read_to_end(&mut bytes).map_err(io)?;
        if bytes.len() as u64 > FILE_BYTES_MAX {
            return Err(TokenizerError::TooLarge { path: path.to_owned() });
        }
        Self::from_bytes(&bytes).map_err(|error| match error {
            TokenizerError::Malformed { what } => {
                TokenizerError::Malformed { what: format!("{}: {what}", path.display()) }
            }
            other => other,
        })
    }

    /// Reads the contents of a tokenizer.json.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, TokenizerError> {
        let malformed = |what: String| TokenizerError::Malformed { what };
        // The crate panics on some files that are not JSON, or not what they claim: first the cheap check, then a net.
        serde_json::from_slice::<serde::de::IgnoredAny>(bytes).map_err(|error| malformed(error.to_string()))?;
        let mut inner = catch_unwind(AssertUnwindSafe(|| tokenizers::Tokenizer::from_bytes(bytes)))
            .map_err(|_| malformed("its parts do not fit together".into()))?
            .map_err(|error| malformed(error.to_string()))?;
        // Some files carry the settings of their training. A prompt is never cut or filled behind the user's back.
        inner.with_truncation(None).map_err(|error| malformed(error.to_string()))?;
        inner.with_padding(None);
        let decoder = inner.get_decoder().map(serde_json::to_value).transpose();
        let decoder = decoder.map_err(|error| malformed(error.to_string()))?;
        let plan = Plan::of(decoder.as_ref()).map_err(|what| TokenizerError::Decoder { what })?;
        Ok(Self { inner: Arc::new(inner), plan: Arc::new(plan) })
    }

    /// Token ids of a text. Special tokens written in the text are recognised. `add_special` adds the tokenizer's own
    /// begin-of-text token and the like: right for raw text, wrong for rendered templates, which write their own.
    pub fn encode(&self, text: &str, add_special: bool) -> Result<Vec<u32>, TokenizerError> {
        match self.inner.encode_fast(text, add_special) {
            Ok(encoding) => Ok(encoding.get_ids().to_vec()),
            Err(error) => Err(TokenizerError::Encode { what: error.to_string() }),
        }
    }

    /// As [`Tokenizer::encode`], and where each token ends in `text`, in bytes. Takes somewhat longer.
    pub fn encode_with_ends(&self, text: &str, add_special: bool) -> Result<(Vec<u32>, Vec<usize>), TokenizerError> {
        match self.inner.encode(text, add_special) {
            Ok(encoding) => {
                Ok((encoding.get_ids().to_vec(), encoding.get_offsets().iter().map(|(_, end)| *end).collect()))
            }
            Err(error) => Err(TokenizerError::Encode { what: error.to_string() }),
        }
    }

    /// The text of token ids, special ones left out: what a decoder makes of them.
    pub fn decode(&self, ids: &[u32]) -> String {
        let mut decoder = self.decoder();
        let mut text: String = ids.iter().map(|&id| decoder.push(id)).collect();
        text.push_str(&decoder.finish());
        text
    }

    /// A decoder that leaves special tokens out.
    pub fn decoder(&self) -> StreamDecoder {
        self.decoder_with(DecoderOptions::default())
    }

    /// A decoder with options.
    pub fn decoder_with(&self, options: DecoderOptions) -> StreamDecoder {
        StreamDecoder::new(self.clone(), self.plan.clone(), options)
    }

    /// Entries in the vocabulary, added tokens included.
    pub fn vocab_size(&self) -> usize {
        self.inner.get_vocab_size(true)
    }

    /// The id of a token.
    pub fn token_to_id(&self, token: &str) -> Option<u32> {
        self.inner.token_to_id(token)
    }

    /// The token of an id, as the vocabulary spells it.
    pub fn id_to_token(&self, id: u32) -> Option<String> {
        self.inner.id_to_token(id)
    }

    /// The bytes that a token stands for within a text, special tokens as they are spelled. `None` if there is no such token.
    pub fn token_bytes(&self, id: u32) -> Option<Vec<u8>> {
        self.decoded_token(id).map(|token| self.plan.bytes(token))
    }

    /// The tokens whose text holds one of `texts`.
    pub fn tokens_with(&self, texts: &[String]) -> Vec<u32> {
        let holds = |bytes: &[u8], text: &[u8]| bytes.windows(text.len().max(1)).any(|window| window == text);
        let held = |id: &u32| {
            self.token_bytes(*id).is_some_and(|bytes| texts.iter().any(|text| holds(&bytes, text.as_bytes())))
        };
        (0..self.ids()).filter(held).collect()
    }

    /// One more than the largest id. Vocabularies may have gaps.
    pub fn ids(&self) -> u32 {
        let model = self.inner.get_vocab(true);
        model.into_values().max().map_or(0, |largest| largest.saturating_add(1)).min(IDS_MAX)
    }

    /// Whether a token is special: not part of what users read.
    pub fn is_special(&self, token: &str) -> bool {
        self.inner.get_added_vocabulary().is_special_token(token)
    }

    /// The token of an id as decoding spells it, which for added tokens may differ from the vocabulary's spelling.
    pub(crate) fn decoded_token(&self, id: u32) -> Option<String> {
        let added = self.inner.get_added_vocabulary();
        added.simple_id_to_token(id).or_else(|| self.inner.id_to_token(id))
    }

    /// The crate's own tokenizer, to compare with.
    #[cfg(test)]
    pub(crate) fn inner_for_tests(&self) -> &tokenizers::Tokenizer {
        &self.inner
    }
}

#[cfg(test)]
#[path = "tokenizer_tests.rs"]
mod tests;
