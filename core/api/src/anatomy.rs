//! What a model's weights are parts of, and what is kept of a sequence: known from names and sizes, before anything is
//! loaded.

use std::fmt;

use serde::Serialize;

/// What a tensor is part of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "lowercase")]
#[allow(missing_docs)] // The names are the documentation.
pub enum Part {
    Embedding,
    Attention,
    /// Recurrences and convolutions in attention's place.
    Recurrence,
    Mlp,
    Router,
    /// Those that are chosen among; shared ones belong to the MLP.
    Experts,
    Norm,
    Head,
    /// Towers and projectors of other senses.
    Senses,
    Other,
}

impl Part {
    /// Every part, in the order that a model has them.
    pub const ALL: [Self; 10] = [
        Self::Embedding,
        Self::Attention,
        Self::Recurrence,
        Self::Mlp,
        Self::Router,
        Self::Experts,
        Self::Norm,
        Self::Head,
        Self::Senses,
        Self::Other,
    ];

    /// By a tensor's name, of a checkpoint or of a GGUF.
    pub fn of(name: &str) -> Self {
        let has = |words: &[&str]| words.iter().any(|word| name.contains(word));
        let module = |words: &[&str]| name.split('.').any(|module| words.contains(&module));
        if has(&["vision", "visual", "audio", "multi_modal", "mm_projector", "embed_vision"]) || name.starts_with("mm.")
        {
            Self::Senses
        } else if module(&["lm_head", "output"]) {
            Self::Head
        } else if has(&["embed_tokens", "token_embd", "per_layer_token_embd", "wte"]) {
            Self::Embedding
        } else if has(&["norm", "layernorm"]) {
            Self::Norm
        } else if has(&["shared_expert", "shexp"]) {
            Self::Mlp
        } else if has(&["gate_inp", "router", "e_score_correction_bias", "exp_probs_b", "expert_bias"])
            || has(&[".mlp.gate.", ".block_sparse_moe.gate.", ".feed_forward.gate."])
        {
            Self::Router
        } else if has(&[".experts.", "switch_mlp", "switch_glu", "_exps."]) {
            Self::Experts
        } else if has(&["linear_attn", "conv", "ssm_", "mamba", "A_log", "dt_bias"]) {
            Self::Recurrence
        } else if has(&["attn", "attention", "q_proj", "k_proj", "v_proj", "o_proj"]) {
            Self::Attention
        } else if has(&["mlp", "ffn", "feed_forward", "fc1", "fc2"]) {
            Self::Mlp
        } else {
            Self::Other
        }
    }
}

impl fmt::Display for Part {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Embedding => "embedding",
            Self::Attention => "attention",
            Self::Recurrence => "recurrence",
            Self::Mlp => "mlp",
            Self::Router => "router",
            Self::Experts => "experts",
            Self::Norm => "norm",
            Self::Head => "head",
            Self::Senses => "senses",
            Self::Other => "other",
        })
    }
}

/// Weights of one part that are stored alike.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Stored {
    /// What they are part of.
    pub part: Part,
    /// How they are stored: `BF16`, `Q4_K`, `affine 4-bit group 64`.
    pub form: String,
    /// How many tensors; codes, scales and biases of a matrix are one.
    pub tensors: u64,
    /// How many values.
    pub parameters: u64,
    /// What they take, in bytes.
    pub bytes: u64,
}

/// What is kept of a sequence while it is computed, in values: how wide those are is for a backend to say, but for states,
/// which add up over a sequence and are 32-bit floats wherever they are kept.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Kept {
    /// Of each token, in layers that see everything.
    pub token_values: u64,
    /// Of layers with windows: how many tokens they see, and values of each.
    pub windows: Vec<(u32, u64)>,
    /// Of states, whatever the length.
    pub state_values: u64,
}

impl Kept {
    /// Adds a layer that keeps so many values of each token, all of them or of a window.
    pub fn add(&mut self, window: Option<u32>, values: u64) {
        match window {
            None => self.token_values = self.token_values.saturating_add(values),
            Some(window) => match self.windows.iter_mut().find(|(other, _)| *other == window) {
                Some((_, sum)) => *sum = sum.saturating_add(values),
                None => self.windows.push((window, values)),
            },
        }
    }

    /// Bytes that a sequence of so many tokens takes, with values of so many bytes.
    pub fn bytes(&self, tokens: u64, value_bytes: u64) -> u64 {
        let seen = self.windows.iter().map(|(window, values)| tokens.min(u64::from(*window)).saturating_mul(*values));
        let values = seen.fold(tokens.saturating_mul(self.token_values), u64::saturating_add);
        values.saturating_mul(value_bytes).saturating_add(self.state_values.saturating_mul(4))
    }
}

impl fmt::Display for Kept {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} values a token", self.token_values)?;
        for (window, values) in &self.windows {
            write!(f, ", {values} of each of the last {window}")?;
        }
        match self.state_values {
            0 => Ok(()),
            values => write!(f, ", {values} of states"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_tell_parts() {
        for (name, part) in [
            ("model.embed_tokens.weight", Part::Embedding),
            ("token_embd.weight", Part::Embedding),
            ("model.layers.0.self_attn.q_proj.weight", Part::Attention),
            ("model.layers.0.self_attn.q_norm.weight", Part::Norm),
            ("blk.3.attn_q.weight", Part::Attention),
            ("blk.3.attn_output.weight", Part::Attention),
            ("blk.3.ffn_norm.weight", Part::Norm),
            ("blk.3.ffn_gate_inp.weight", Part::Router),
            ("blk.3.ffn_gate_exps.weight", Part::Experts),
            ("blk.3.ffn_gate_shexp.weight", Part::Mlp),
            ("model.layers.1.mlp.gate_proj.weight", Part::Mlp),
            ("model.layers.1.mlp.gate.weight", Part::Router),
            ("model.layers.1.mlp.gate.scales", Part::Router),
            ("model.layers.1.mlp.experts.7.up_proj.weight", Part::Experts),
            ("model.layers.1.mlp.switch_mlp.up_proj.scales", Part::Experts),
            ("model.layers.1.mlp.shared_experts.up_proj.weight", Part::Mlp),
            ("model.layers.1.block_sparse_moe.experts.0.w1.weight", Part::Experts),
            ("model.layers.1.linear_attn.in_proj_qkvz.weight", Part::Recurrence),
            ("model.layers.1.conv.in_proj.weight", Part::Recurrence),
            ("lm_head.weight", Part::Head),
            ("output.weight", Part::Head),
            ("output_norm.weight", Part::Norm),
            ("vision_tower.blocks.0.attn.weight", Part::Senses),
            ("rope_freqs.weight", Part::Other),
        ] {
            assert_eq!(Part::of(name), part, "{name}");
        }
    }

    #[test]
    fn windows_stop_growing() {
        let mut kept = Kept { state_values: 5, ..Kept::default() };
        kept.add(None, 10);
        kept.add(Some(8), 3);
        kept.add(Some(8), 4);
        assert_eq!(kept.bytes(4, 2), 2 * (40 + 28) + 20);
        assert_eq!(kept.bytes(100, 2), 2 * (1000 + 56) + 20);
        assert_eq!(kept.to_string(), "10 values a token, 7 of each of the last 8, 5 of states");
        assert_eq!(kept.bytes(u64::MAX, u64::MAX), u64::MAX);
    }
}
