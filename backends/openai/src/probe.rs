//! What a server honours, by asking. Servers pass over fields that they do not know, so that a field is sent with a value that
//! whoever reads it has to refuse. A refusal is the evidence; everything else is none.
//!
//! Asked is for a model that does not exist, where the server then says so: nothing is loaded and nothing computed. Servers
//! with one model do not look at the name; they get requests for one token of theirs.

use std::time::Duration;

use serde_json::{Map, Value, json};

use crate::{
    client::Upstream,
    error::Trouble,
    kind::{Asked, Kind},
};

/// A model that no server has.
const NOBODY: &str = "mesh-llm-asks-what-is-honoured";
/// No field of these takes it: it is neither a number, a list, an object nor a word that means something.
const IMPOSSIBLE: &str = "impossible";
/// Largest answer that is read, in bytes.
const BYTES_MAX: usize = 256 << 10;

/// The questions of `kind` to which the answer is yes.
pub(crate) async fn honoured(
    upstream: &Upstream,
    kind: Kind,
    model: &str,
    within: Duration,
) -> Result<Vec<Asked>, Trouble> {
    let questions = kind.open_questions();
    if questions.is_empty() {
        return Ok(Vec::new());
    }
    let nobody = asked(upstream, NOBODY, None, within).await?;
    // One that answers for a model that it does not have does not look at names.
    let model = if matches!(nobody, Answer::Accepted) { model } else { NOBODY };
    if matches!(nobody, Answer::Unclear) {
        return Ok(Vec::new());
    }
    let mut yes = Vec::new();
    for question in questions {
        let field = question.field();
        let read = match asked(upstream, model, Some(field), within).await? {
            Answer::Refused { mentions: true } => true,
            // The field is all that differs.
            Answer::Refused { mentions: false } => !matches!(nobody, Answer::Refused { .. }),
            Answer::Accepted | Answer::Missing => false,
            // A server that does not answer one question is not asked the next.
            Answer::Unclear => break,
        };
        if read {
            yes.push(*question);
        }
    }
    Ok(yes)
}

/// What a server made of a request.
enum Answer {
    Accepted,
    /// It calls the request wrong, and names the field or does not.
    Refused {
        mentions: bool,
    },
    /// There is no such model.
    Missing,
    /// It broke, was busy, or asks for a key.
    Unclear,
}

async fn asked(
    upstream: &Upstream,
    model: &str,
    field: Option<&'static str>,
    within: Duration,
) -> Result<Answer, Trouble> {
    let mut body = Map::new();
    body.insert("model".into(), json!(model));
    body.insert("messages".into(), json!([{ "role": "user", "content": "a" }]));
    body.insert("max_tokens".into(), json!(1));
    body.insert("stream".into(), json!(false));
    if let Some(field) = field {
        body.insert(field.into(), json!(IMPOSSIBLE));
    }
    match upstream.post::<Value>("/v1/chat/completions", &body, within, BYTES_MAX).await {
        Ok(_) => Ok(Answer::Accepted),
        Err(Trouble::Refused { status: 400 | 422, said, .. }) => {
            let names = |text: &str| field.is_some_and(|field| text.contains(field));
            Ok(Answer::Refused { mentions: names(&said.message) || said.param.as_deref().is_some_and(names) })
        }
        Err(Trouble::Refused { status: 404, .. }) => Ok(Answer::Missing),
        Err(error @ (Trouble::Unreachable(_) | Trouble::Broke(_))) => Err(error),
        Err(_) => Ok(Answer::Unclear),
    }
}
