//! How likely tokens were, before any step of sampling.

use mesh_core::{Candidate, TokenLogprob};
use mlx_rs::{
    Array, Dtype,
    error::Exception,
    ops::{self, indexing},
};

/// What one row reports with its token, not yet evaluated.
#[derive(Clone, Debug)]
pub struct Likely {
    /// The chosen one's logarithm, the ids of the likeliest, and theirs, in f32, which holds every id exactly: one array is
    /// one wait.
    packed: Array,
}

impl Likely {
    /// Of one row's own logits, `[1, 1, vocab]`, the `chosen` token, `[1, 1]`, and so many of the likeliest.
    pub fn new(logits: &Array, chosen: &Array, top: u32) -> Result<Self, Exception> {
        let vocab = logits.dim(2);
        let logits = logits.as_dtype(Dtype::Float32)?.reshape(&[vocab])?;
        let all = logits.subtract(logits.logsumexp_axis(-1, true)?)?;
        let chosen = indexing::take_axis(&all, chosen.as_dtype(Dtype::Uint32)?.reshape(&[1])?, 0)?;
        let top = i32::try_from(top).unwrap_or(i32::MAX).min(vocab);
        if top == 0 {
            return Ok(Self { packed: chosen });
        }
        let order = ops::argpartition_axis(all.negative()?, top - 1, -1)?;
        let ids = mesh_graph::ffi::slice(&order, [0], [top])?;
        let values = indexing::take_axis(&all, &ids, 0)?;
        Ok(Self { packed: ops::concatenate(&[chosen, ids.as_dtype(Dtype::Float32)?, values], 0)? })
    }

    /// What is to be evaluated.
    pub fn array(&self) -> &Array {
        &self.packed
    }

    /// What is reported of `chosen`; waits for the device.
    pub fn read(&self, chosen: u32) -> Result<TokenLogprob, Exception> {
        self.packed.eval()?;
        let packed = self.packed.to_vec_exact::<f32>().map_err(|error| Exception::custom(error.to_string()))?;
        let Some((own, top)) = packed.split_first() else { return Err(Exception::custom("nothing was reported")) };
        let candidate = |id, logprob| Candidate { id, bytes: None, logprob };
        let (ids, values) = top.split_at(top.len() / 2);
        let mut top: Vec<Candidate> = ids.iter().zip(values).map(|(id, value)| candidate(*id as u32, *value)).collect();
        top.sort_by(|a, b| b.logprob.total_cmp(&a.logprob).then(a.id.cmp(&b.id)));
        Ok(TokenLogprob { chosen: candidate(chosen, *own), top })
    }
}
