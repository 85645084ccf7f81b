//! What sets the architectures that can be imported apart from each other.

/// An architecture of GGUF files.
#[derive(Debug)]
pub(super) struct Architecture {
    /// `general.architecture`.
    pub name: &'static str,
    /// `model_type` of config.json.
    pub model_type: &'static str,
    /// `architectures` of config.json.
    pub class: &'static str,
    /// Whether llama.cpp reorders the rows of q and k.
    pub permuted: bool,
    /// Whether projections other than q, k and v may have biases, which config.json then says.
    pub bias_everywhere: bool,
    /// Whether norms are stored with 1 added to their weights, which checkpoints leave to the model.
    pub norms_with_one: bool,
    /// The norms of a layer, by their names in the GGUF and in a checkpoint.
    pub norms: &'static [(&'static str, &'static str)],
}

const TWO_NORMS: &[(&str, &str)] = &[("attn_norm", "input_layernorm"), ("ffn_norm", "post_attention_layernorm")];

const LLAMA: Architecture = Architecture {
    name: "llama",
    model_type: "llama",
    class: "LlamaForCausalLM",
    permuted: true,
    bias_everywhere: true,
    norms_with_one: false,
    norms: TWO_NORMS,
};

/// Every architecture that can be imported.
pub(super) const ARCHITECTURES: &[Architecture] = &[
    LLAMA,
    Architecture {
        name: "qwen2",
        model_type: "qwen2",
        class: "Qwen2ForCausalLM",
        permuted: false,
        bias_everywhere: false,
        ..LLAMA
    },
    Architecture {
        name: "qwen3",
        model_type: "qwen3",
        class: "Qwen3ForCausalLM",
        permuted: false,
        bias_everywhere: false,
        norms: &[
            ("attn_norm", "input_layernorm"),
            ("ffn_norm", "post_attention_layernorm"),
            ("attn_q_norm", "self_attn.q_norm"),
            ("attn_k_norm", "self_attn.k_norm"),
        ],
        ..LLAMA
    },
    Architecture {
        name: super::gemma3::NAME,
        model_type: "gemma3_text",
        class: "Gemma3ForCausalLM",
        permuted: false,
        bias_everywhere: false,
        norms_with_one: true,
        norms: &[
            ("attn_norm", "input_layernorm"),
            ("post_attention_norm", "post_attention_layernorm"),
            ("ffn_norm", "pre_feedforward_layernorm"),
            ("post_ffw_norm", "post_feedforward_layernorm"),
            ("attn_q_norm", "self_attn.q_norm"),
            ("attn_k_norm", "self_attn.k_norm"),
        ],
    },
];
