//! What every model graph offers, whatever its family.

use mlx_rs::{Array, error::Exception};

use crate::cache::{Cache, CacheKind};

/// What is wanted of a pass.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rows {
    /// Logits of every position: `[batch, time, vocab]`.
    All,
    /// Those of the last one: `[batch, 1, vocab]`. Saves the head's work over a long prompt.
    Last,
    /// No logits, but every position's state after the last norm, in f32: `[batch, time, hidden]`.
    States,
}

/// A causal language model. Lives and dies on the thread that built it.
pub trait CausalModel {
    /// Logits, or states, for `tokens` (`[batch, time]`, integers), which continue what `cache` holds; `cache` then holds
    /// them too.
    ///
    /// Lazy: nothing is computed before the result, or the cache, is evaluated.
    fn forward(&self, tokens: &Array, cache: &mut Cache, rows: Rows) -> Result<Array, Exception>;

    /// What each layer keeps.
    fn layout(&self) -> Vec<CacheKind>;

    /// Entries in the vocabulary.
    fn vocab_size(&self) -> u32;

    /// The length in tokens beyond which a sequence is computed differently from its first token on, where there is one.
    /// A cache that was not told ([`Cache::expect`]) that its sequence would become longer holds nothing of use then.
    fn length_limit(&self) -> Option<u32> {
        None
    }

    /// An empty cache for one sequence.
    fn new_cache(&self) -> Cache {
        Cache::new(&self.layout())
    }
}

/// A graph that could not be built or run.
#[derive(Debug, thiserror::Error)]
pub enum GraphError {
    /// config.json lacks a setting, or has one that cannot be computed.
    #[error("config.json: {0}")]
    Config(String),
    /// Tensors are missing, misshapen or left over.
    #[error("{0}")]
    Weights(String),
    /// A weight file could not be read.
    #[error("{path}: {what}")]
    File {
        /// The file.
        path: String,
        /// Why.
        what: String,
    },
    /// MLX failed.
    #[error("MLX: {}", .0.what())]
    Mlx(#[from] Exception),
}
