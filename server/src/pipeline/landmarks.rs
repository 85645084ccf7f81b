//! Where other prompts are likely to part from a prompt, found by rendering and not by guessing what markers mean: other
//! conversations are rendered beside it, and how far they agree is measured.

use mesh_core::Landmarks;
use serde_json::{Value, json};

/// Shortest prompt that is worth it, in bytes: computing less anew is cheaper than looking.
pub(super) const PROMPT_BYTES_MIN: usize = 1024;
/// Most messages from the end whose ends are looked for by leaving out those that follow.
const TRUNCATED_MAX: usize = 2;

/// Landmarks of `prompt`, the rendering of `messages` with what makes the assistant speak. `token_ends` are the ends of its
/// tokens in bytes. `render` renders other messages without that, and with the same tools and variables, of which `tools`
/// says whether there are any; what it refuses is not a landmark.
///
/// Six renderings at most.
pub(super) fn find(
    messages: &[Value],
    tools: bool,
    prompt: &str,
    token_ends: &[usize],
    render: impl Fn(Vec<Value>) -> Option<String>,
) -> Landmarks {
    let agrees = |other: Vec<Value>| {
        let rendered = render(other)?;
        let end = common_prefix(prompt, &rendered);
        let tokens = token_ends.iter().take_while(|token_end| **token_end <= end).count();
        // The last token is never read ahead: its step gives the first logits.
        u32::try_from(tokens.min(token_ends.len().saturating_sub(1))).ok().filter(|tokens| *tokens > 0)
    };
    let role = |message: &Value, role: &str| message.get("role").and_then(Value::as_str) == Some(role);

    let answered = messages.last().is_some_and(|message| role(message, "assistant"));
    let mut ends: Vec<u32> = agrees(next_turn(messages, answered)).into_iter().collect();
    if tools && !answered {
        ends.extend(agrees(tool_called(messages)));
    }
    let last_user = messages.iter().rposition(|message| role(message, "user")).map(|at| at + 1);
    let mut lengths: Vec<usize> = (1..=messages.len()).rev().take(TRUNCATED_MAX).chain(last_user).collect();
    lengths.sort_unstable();
    lengths.dedup();
    ends.extend(lengths.into_iter().filter_map(|length| agrees(messages[..length].to_vec())));
    ends.sort_unstable();
    ends.dedup();

    let preamble = messages.iter().take_while(|message| role(message, "system") || role(message, "developer"));
    let mut other: Vec<Value> = preamble.cloned().collect();
    let spoken = messages.get(other.len()).and_then(|message| message.get("content")).and_then(Value::as_str);
    other.push(json!({ "role": "user", "content": unlike(spoken.unwrap_or_default()) }));
    Landmarks { message_ends: ends, preamble_end: agrees(other) }
}

/// The conversation as it will be a turn later: with an answer and another question. Templates that drop old reasoning, or
/// show tools before the last question, do so here as they will then.
fn next_turn(messages: &[Value], answered: bool) -> Vec<Value> {
    let mut later = messages.to_vec();
    if !answered {
        later.push(json!({ "role": "assistant", "content": "x" }));
    }
    later.push(json!({ "role": "user", "content": "x" }));
    later
}

/// The conversation as it will be once a tool was called.
fn tool_called(messages: &[Value]) -> Vec<Value> {
    // Some templates take no other length of an id.
    let id = "xxxxxxxxx";
    let call = json!({ "id": id, "type": "function", "function": { "name": "x", "arguments": {} } });
    let mut later = messages.to_vec();
    later.push(json!({ "role": "assistant", "content": null, "tool_calls": [call] }));
    later.push(json!({ "role": "tool", "tool_call_id": id, "content": "x" }));
    later
}

/// Words that part from `text` at the first letter.
fn unlike(text: &str) -> &'static str {
    if text.trim_start().starts_with('x') { "y" } else { "x" }
}

/// How many bytes two texts have in common at the start.
fn common_prefix(one: &str, two: &str) -> usize {
    one.bytes().zip(two.bytes()).take_while(|(one, two)| one == two).count()
}

#[cfg(test)]
#[path = "landmarks_tests.rs"]
mod tests;
