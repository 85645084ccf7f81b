//! A request in the server's words. What the server would not honour is refused by name; nothing is added.

use mesh_core::{
    Dry, Grammar, Knob, Sampling,
    ask::{Ask, Chat, Effort, Subject, ToolChoice},
    node::{Rejection, RejectionKind},
};
use serde_json::{Map, Value, json};

use crate::{
    kind::{Kind, Manners, Thinking},
    wire::{Completion, Logprobs, Message, Prompt, StreamOptions},
};

/// A text that no prompt holds: llama-server takes no empty list of sequence breakers.
const NO_BREAKER: &str = "\u{10ffff}";

/// A request as it goes out, and how its answer is read.
pub(crate) struct Plan<'a> {
    pub path: &'static str,
    pub body: Completion<'a>,
    pub how: How,
}

/// How an answer is read.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct How {
    /// Alternatives to report with each token.
    pub logprobs: Option<u32>,
    /// The answer ends with its first call.
    pub single_call: bool,
    /// What is put in front of it.
    pub echo: Option<String>,
}

/// A field that the server does not honour.
pub(crate) fn unsupported(field: &str, kind: Kind, hint: &str) -> Rejection {
    let what =
        format!("`{field}` is not known to be honoured by the shared server that has this model ({kind}); {hint}");
    let rejection = Rejection::new(RejectionKind::Invalid, "unsupported_parameter", what);
    Rejection { param: Some(field.to_owned()), ..rejection }
}

/// The request for one answer to `ask`.
pub(crate) fn plan<'a>(model: &'a str, manners: &Manners, ask: &'a Ask) -> Result<Plan<'a>, Rejection> {
    let kind = manners.kind;
    let refuse = |field: &str| Err(unsupported(field, kind, &format!("leave `{field}` out")));
    if ask.choices != 1 {
        return refuse("n");
    }
    let honoured = |knob: Knob| manners.knobs.contains(&knob);
    if ask.ranked && !honoured(Knob::Logprobs) {
        return refuse("best_of");
    }
    let sampling = settled(&ask.sampling, manners)?;
    let tokens_min = ask.tokens_min.filter(|&min| min > 0 || honoured(Knob::MinTokens));
    let set = [
        (tokens_min.is_some(), Knob::MinTokens),
        (ask.ignore_eos, Knob::IgnoreEos),
        (ask.logprobs.is_some(), Knob::Logprobs),
    ];
    let grammar = ask.grammar.as_ref().map(|grammar| (true, grammar.knob()));
    if let Some((_, knob)) = set.into_iter().chain(grammar).find(|(set, knob)| *set && !honoured(*knob)) {
        return refuse(knob.field());
    }
    let logprobs = ask.logprobs.or(ask.ranked.then_some(0));
    let is_chat = matches!(ask.subject, Subject::Chat(_));
    let mut body = Completion {
        model,
        stream: Some(true),
        stream_options: Some(StreamOptions { include_usage: true }),
        max_tokens: ask.tokens_max,
        min_tokens: tokens_min,
        ignore_eos: ask.ignore_eos.then_some(true),
        stop: (!ask.stop.is_empty()).then_some(&ask.stop[..]),
        ..Completion::default()
    };
    sample(&mut body, sampling, &ask.sampling, kind);
    if let Some(top) = logprobs {
        // For llama-server 0 means none at all; what is too many is left out when the answer is read.
        let top = if kind == Kind::LlamaServer { top.max(1) } else { top };
        body.logprobs = Some(if is_chat { Logprobs::Chat(true) } else { Logprobs::Text(top) });
        body.top_logprobs = is_chat.then_some(top);
    }
    if let Some(grammar) = &ask.grammar {
        constrain(&mut body, grammar, kind);
    }
    let mut how = How { logprobs: ask.logprobs, ..How::default() };
    let path = match &ask.subject {
        Subject::Chat(chat) => {
            if !manners.chat {
                let what = "this model takes no conversations, as the shared server says";
                let rejection = Rejection::new(RejectionKind::Invalid, "no_chat_template", what);
                return Err(Rejection { param: Some("messages".into()), ..rejection });
            }
            how.single_call = chat.single_call;
            converse(&mut body, chat, manners)?;
            "/v1/chat/completions"
        }
        Subject::Text(_) | Subject::Tokens(_) if !manners.text => {
            let what = "this model continues no texts, as the shared server says";
            let rejection = Rejection::new(RejectionKind::Invalid, "unsupported", what);
            return Err(Rejection { param: Some("prompt".into()), ..rejection });
        }
        Subject::Text(text) => {
            how.echo = ask.echo.then(|| text.clone());
            body.prompt = Some(Prompt::Text(text));
            "/v1/completions"
        }
        Subject::Tokens(_) if ask.echo => return refuse("echo"),
        Subject::Tokens(_) if !manners.token_prompts => {
            return Err(unsupported("prompt", kind, "send the prompt as text, not as token ids"));
        }
        Subject::Tokens(ids) => {
            body.prompt = Some(Prompt::Tokens(ids));
            "/v1/completions"
        }
    };
    Ok(Plan { path, body, how })
}

/// The sampling parameters that go out. What is not honoured and would change nothing is left out: clients send such values
/// unasked.
fn settled(asked: &Sampling, manners: &Manners) -> Result<Sampling, Rejection> {
    let mut sampling = asked.clone();
    for knob in asked.knobs() {
        if manners.knobs.contains(&knob) {
            continue;
        }
        let neutral = match knob {
            Knob::Temperature => sampling.temperature.take() == Some(1.0),
            Knob::TopP => sampling.top_p.take() == Some(1.0),
            Knob::TopK => sampling.top_k.take() == Some(0),
            Knob::MinP => sampling.min_p.take() == Some(0.0),
            Knob::TypicalP => sampling.typical_p.take() == Some(1.0),
            Knob::RepetitionPenalty => sampling.repetition_penalty.take() == Some(1.0),
            Knob::PresencePenalty => sampling.presence_penalty.take() == Some(0.0),
            Knob::FrequencyPenalty => sampling.frequency_penalty.take() == Some(0.0),
            _ => false,
        };
        if !neutral {
            let field = knob.field();
            return Err(unsupported(field, manners.kind, &format!("leave `{field}` out")));
        }
    }
    Ok(sampling)
}

fn sample<'a>(body: &mut Completion<'a>, settled: Sampling, asked: &'a Sampling, kind: Kind) {
    body.temperature = settled.temperature;
    body.top_p = settled.top_p;
    body.top_k = settled.top_k;
    body.min_p = settled.min_p;
    body.typical_p = settled.typical_p;
    body.xtc_probability = settled.xtc.map(|xtc| xtc.probability);
    body.xtc_threshold = settled.xtc.map(|xtc| xtc.threshold);
    body.seed = settled.seed;
    body.presence_penalty = settled.presence_penalty;
    body.frequency_penalty = settled.frequency_penalty;
    let bias = settled.logit_bias.iter().map(|(id, bias)| (id.to_string(), *bias));
    body.logit_bias = (!settled.logit_bias.is_empty()).then(|| bias.collect());
    match kind {
        Kind::LlamaServer => {
            body.repeat_penalty = settled.repetition_penalty;
            // It penalises the last 64 tokens unless told of all.
            body.repeat_last_n = settled.repetition_penalty.map(|_| -1);
        }
        Kind::LmStudio => body.repeat_penalty = settled.repetition_penalty,
        _ => body.repetition_penalty = settled.repetition_penalty,
    }
    if let Some(Dry { multiplier, base, allowed_length, last_n, sequence_breakers, .. }) = &asked.dry {
        body.dry_multiplier = Some(*multiplier);
        body.dry_base = Some(*base);
        body.dry_allowed_length = Some(*allowed_length);
        body.dry_penalty_last_n = Some(last_n.map_or(-1, i64::from));
        let breakers = sequence_breakers.iter().map(String::as_str);
        let none = sequence_breakers.is_empty() && kind == Kind::LlamaServer;
        body.dry_sequence_breakers = Some(breakers.chain(none.then_some(NO_BREAKER)).collect());
    }
}

fn constrain(body: &mut Completion<'_>, grammar: &Grammar, kind: Kind) {
    let schema = |schema: &Value| {
        let named = json!({ "name": "answer", "strict": true, "schema": schema });
        Some(json!({ "type": "json_schema", "json_schema": named }))
    };
    match grammar {
        // The only format that LM Studio has.
        Grammar::JsonObject if kind == Kind::LmStudio => body.response_format = schema(&json!({ "type": "object" })),
        Grammar::JsonObject => body.response_format = Some(json!({ "type": "json_object" })),
        Grammar::JsonSchema(asked) => body.response_format = schema(asked),
        Grammar::Regex(pattern) if kind == Kind::Vllm => body.structured_outputs = Some(json!({ "regex": pattern })),
        Grammar::Regex(pattern) => body.response_format = Some(json!({ "type": "regex", "pattern": pattern })),
        Grammar::Lark(grammar) => body.response_format = Some(json!({ "type": "lark", "grammar": grammar })),
    }
}

fn converse<'a>(body: &mut Completion<'a>, chat: &'a Chat, manners: &Manners) -> Result<(), Rejection> {
    let kind = manners.kind;
    let refuse = |field: &str| Err(unsupported(field, kind, &format!("leave `{field}` out")));
    if !chat.tools.is_empty() {
        if !manners.tools {
            return refuse("tools");
        }
        body.tools = Some(&chat.tools);
        body.tool_choice = match &chat.tool_choice {
            ToolChoice::Auto => None,
            ToolChoice::Required if manners.required => Some(json!("required")),
            ToolChoice::Named(name) if manners.named => {
                Some(json!({ "type": "function", "function": { "name": name } }))
            }
            ToolChoice::Required | ToolChoice::Named(_) => return refuse("tool_choice"),
        };
        // Unless told, llama-server stops at one call. Elsewhere several are what is usual.
        body.parallel_tool_calls = (kind == Kind::LlamaServer).then_some(!chat.single_call);
    }
    body.chat_template_kwargs = Some(kwargs(chat, manners)?).filter(|kwargs| !kwargs.is_empty());
    match (&chat.effort, manners.thinking) {
        (Some(Effort::Switch(on)), Thinking::Fields) => body.enable_thinking = Some(*on),
        (Some(Effort::Level(level)), Thinking::Fields | Thinking::Effort) => body.reasoning_effort = Some(level),
        (Some(Effort::Switch(false)), Thinking::Effort) => body.reasoning_effort = Some("none"),
        // What is a variable was put among those; and Ollama's models that reason do so unless told not to.
        _ => {}
    }
    match chat.thinking_tokens_max {
        Some(_) if manners.thinking != Thinking::Fields => return refuse("thinking_budget"),
        max => body.thinking_budget = max,
    }
    body.messages = Some(messages(chat, kind));
    Ok(())
}

pub(crate) fn messages(chat: &Chat, kind: Kind) -> Vec<Message<'_>> {
    chat.messages.iter().map(|message| Message::new(message, kind == Kind::Ollama)).collect()
}

/// The variables of the model's template, those of the reasoning among them.
pub(crate) fn kwargs(chat: &Chat, manners: &Manners) -> Result<Map<String, Value>, Rejection> {
    let kind = manners.kind;
    if !chat.kwargs.is_empty() && !manners.kwargs {
        return Err(unsupported("chat_template_kwargs", kind, "leave `chat_template_kwargs` out"));
    }
    let mut kwargs = chat.kwargs.clone();
    let hint = |field: &str| match manners.kwargs {
        true => format!("leave `{field}` out, or set the template's own variable in `chat_template_kwargs`"),
        false => format!("leave `{field}` out"),
    };
    match (&chat.effort, manners.thinking) {
        (None, _) | (Some(_), Thinking::Fields | Thinking::Effort) => {}
        (Some(Effort::Switch(on)), Thinking::Variables { switch: true, .. }) => {
            kwargs.insert("enable_thinking".into(), json!(on));
        }
        (Some(Effort::Level(level)), Thinking::Variables { switch: true, .. }) if level == "none" => {
            kwargs.insert("enable_thinking".into(), json!(false));
        }
        (Some(Effort::Level(level)), Thinking::Variables { effort: true, .. }) => {
            kwargs.insert("reasoning_effort".into(), json!(level));
        }
        (Some(Effort::Switch(_)), _) => return Err(unsupported("enable_thinking", kind, &hint("enable_thinking"))),
        (Some(Effort::Level(_)), _) => return Err(unsupported("reasoning_effort", kind, &hint("reasoning_effort"))),
    }
    Ok(kwargs)
}
