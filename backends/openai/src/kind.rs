//! The kinds of servers, and what each honours. The tables say what a server of that kind documents; what differs between its
//! versions or its models is found out by looking (`look`) and asking (`probe`).

use std::{collections::BTreeSet, fmt};

use mesh_core::Knob;
use serde::Serialize;

/// What kind of server it is, told from its answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Kind {
    /// vLLM: its models are owned by `vllm`, and `/version` tells its version.
    Vllm,
    /// llama.cpp's server: its models are owned by `llamacpp`, or `/props` has its settings.
    LlamaServer,
    /// Ollama: `/` says so.
    Ollama,
    /// LM Studio: `/api/v0/models` lists its models.
    LmStudio,
    /// Another mesh-llm: its models are owned by `mesh-llm`.
    MeshLlm,
    /// Any other server that has `/v1/models`.
    Other,
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Vllm => "vLLM",
            Self::LlamaServer => "llama-server",
            Self::Ollama => "Ollama",
            Self::LmStudio => "LM Studio",
            Self::MeshLlm => "mesh-llm",
            Self::Other => "a server of unknown kind",
        })
    }
}

/// Which routes tell of tokens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum TokenRoutes {
    None,
    /// `/tokenize` takes `content` and gives pieces, `/apply-template` renders.
    LlamaServer,
    /// `/tokenize` takes `prompt` or `messages`; what a token stands for is not told as bytes.
    Vllm,
}

/// How reasoning is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Thinking {
    /// It cannot be, or it is not known how.
    None,
    /// By the fields that a request had: the server refuses by itself what the model cannot do.
    Fields,
    /// By these variables of the model's template, where it mentions them.
    Variables {
        /// `enable_thinking`
        switch: bool,
        /// `reasoning_effort`
        effort: bool,
    },
    /// By `reasoning_effort` alone, of which `none` switches it off.
    Effort,
}

/// What a model of a server honours.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Manners {
    pub kind: Kind,
    pub knobs: BTreeSet<Knob>,
    /// Conversations.
    pub chat: bool,
    /// Texts to be continued.
    pub text: bool,
    pub embeddings: bool,
    pub tools: bool,
    /// `tool_choice`: `required`.
    pub required: bool,
    /// `tool_choice`: a function.
    pub named: bool,
    /// `chat_template_kwargs`
    pub kwargs: bool,
    pub thinking: Thinking,
    /// Prompts may be token ids.
    pub token_prompts: bool,
    pub token_routes: TokenRoutes,
}

/// What every server is held to take: without these it would not be called compatible.
const PLAIN: &[Knob] = &[Knob::Temperature, Knob::TopP];

const VLLM: &[Knob] = &[
    Knob::Temperature,
    Knob::TopP,
    Knob::TopK,
    Knob::MinP,
    Knob::Seed,
    Knob::RepetitionPenalty,
    Knob::PresencePenalty,
    Knob::FrequencyPenalty,
    Knob::LogitBias,
    Knob::IgnoreEos,
    Knob::MinTokens,
    Knob::Logprobs,
    Knob::JsonSchema,
];

const LLAMA_SERVER: &[Knob] = &[
    Knob::Temperature,
    Knob::TopP,
    Knob::TopK,
    Knob::MinP,
    Knob::TypicalP,
    Knob::Xtc,
    Knob::Dry,
    Knob::Seed,
    Knob::RepetitionPenalty,
    Knob::PresencePenalty,
    Knob::FrequencyPenalty,
    Knob::LogitBias,
    Knob::IgnoreEos,
    Knob::Logprobs,
    Knob::JsonSchema,
];

const OLLAMA: &[Knob] =
    &[Knob::Temperature, Knob::TopP, Knob::Seed, Knob::PresencePenalty, Knob::FrequencyPenalty, Knob::JsonSchema];

const LM_STUDIO: &[Knob] = &[
    Knob::Temperature,
    Knob::TopP,
    Knob::TopK,
    Knob::Seed,
    Knob::RepetitionPenalty,
    Knob::PresencePenalty,
    Knob::FrequencyPenalty,
    Knob::LogitBias,
    Knob::JsonSchema,
];

/// All of them. Another mesh-llm names those that a model of it honours once that is known; until then it refuses others itself.
const ALL: &[Knob] = &[
    Knob::Temperature,
    Knob::TopP,
    Knob::TopK,
    Knob::MinP,
    Knob::TypicalP,
    Knob::Xtc,
    Knob::Dry,
    Knob::Seed,
    Knob::RepetitionPenalty,
    Knob::PresencePenalty,
    Knob::FrequencyPenalty,
    Knob::LogitBias,
    Knob::IgnoreEos,
    Knob::MinTokens,
    Knob::Logprobs,
    Knob::JsonSchema,
    Knob::Regex,
    Knob::Lark,
];

impl Kind {
    /// What a model of it honours as far as the kind tells.
    pub(crate) fn manners(self) -> Manners {
        let known = |knobs: &[Knob]| Manners {
            kind: self,
            knobs: knobs.iter().copied().collect(),
            chat: true,
            text: true,
            embeddings: false,
            tools: true,
            required: true,
            named: true,
            kwargs: true,
            thinking: Thinking::None,
            token_prompts: true,
            token_routes: TokenRoutes::None,
        };
        match self {
            Self::Vllm => Manners { token_routes: TokenRoutes::Vllm, ..known(VLLM) },
            // A `tool_choice` that is an object is passed over there.
            Self::LlamaServer => {
                Manners { named: false, token_routes: TokenRoutes::LlamaServer, ..known(LLAMA_SERVER) }
            }
            // Texts are put into the model's template there, which is what `/v1/completions` means to its users.
            Self::Ollama => {
                Manners { required: false, named: false, kwargs: false, token_prompts: false, ..known(OLLAMA) }
            }
            Self::LmStudio => Manners { named: false, kwargs: false, token_prompts: false, ..known(LM_STUDIO) },
            Self::MeshLlm => {
                Manners { thinking: Thinking::Fields, token_routes: TokenRoutes::LlamaServer, ..known(ALL) }
            }
            Self::Other => Manners {
                tools: false,
                required: false,
                named: false,
                kwargs: false,
                token_prompts: false,
                ..known(PLAIN)
            },
        }
    }

    /// Fields that are asked about, since the kind does not tell; with what the answer is worth.
    pub(crate) fn open_questions(self) -> &'static [Asked] {
        match self {
            Self::Vllm => &[Asked::Knob(Knob::Regex, "structured_outputs")],
            Self::Ollama => &[Asked::Knob(Knob::Logprobs, "logprobs"), Asked::ToolChoice],
            Self::Other => &[
                Asked::Knob(Knob::TopK, "top_k"),
                Asked::Knob(Knob::MinP, "min_p"),
                Asked::Knob(Knob::TypicalP, "typical_p"),
                Asked::Knob(Knob::Seed, "seed"),
                Asked::Knob(Knob::RepetitionPenalty, "repetition_penalty"),
                Asked::Knob(Knob::PresencePenalty, "presence_penalty"),
                Asked::Knob(Knob::FrequencyPenalty, "frequency_penalty"),
                Asked::Knob(Knob::LogitBias, "logit_bias"),
                Asked::Knob(Knob::IgnoreEos, "ignore_eos"),
                Asked::Knob(Knob::MinTokens, "min_tokens"),
                Asked::Knob(Knob::Logprobs, "logprobs"),
                Asked::Knob(Knob::JsonSchema, "response_format"),
                Asked::Tools,
                Asked::ToolChoice,
                Asked::Kwargs,
            ],
            Self::LlamaServer | Self::LmStudio | Self::MeshLlm => &[],
        }
    }
}

/// A question whether a field is honoured.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Asked {
    Knob(Knob, &'static str),
    Tools,
    ToolChoice,
    Kwargs,
}

impl Asked {
    pub fn field(self) -> &'static str {
        match self {
            Self::Knob(_, field) => field,
            Self::Tools => "tools",
            Self::ToolChoice => "tool_choice",
            Self::Kwargs => "chat_template_kwargs",
        }
    }

    /// It is.
    pub fn settle(self, manners: &mut Manners) {
        match self {
            Self::Knob(knob, _) => drop(manners.knobs.insert(knob)),
            Self::Tools => manners.tools = true,
            Self::ToolChoice => (manners.required, manners.named) = (true, true),
            Self::Kwargs => manners.kwargs = true,
        }
    }
}

/// The knob that another mesh-llm calls so.
pub(crate) fn knob(field: &str) -> Option<Knob> {
    // What answers can be held to has a list of its own.
    ALL.iter().copied().find(|knob| knob.field() == field && field != Knob::JsonSchema.field())
}
