//! What a model's template and tokenizer make of things, without generating anything.

use std::sync::Arc;

use mesh_core::{
    Prompt, SubmitError,
    node::{Question, Rejection, Reply},
};
use mesh_text::{DecoderOptions, Tokenizer};

use super::{Chat, PipelineError, Subject, constraint::Wish, prompt};
use crate::served::ServedModel;

/// A conversation as its template writes it.
pub async fn render(
    model: &Arc<ServedModel>,
    chat: Chat,
    add_generation_prompt: bool,
) -> Result<String, PipelineError> {
    if model.takes_conversations() {
        return match model.handle.reply(Question::Render { chat, add_generation_prompt }).await? {
            Reply::Text(text) => Ok(text),
            other => Err(unasked(&other)),
        };
    }
    in_background(model, move |model| prompt::rendered(model, chat, add_generation_prompt)).await
}

/// The token ids of a text. Special tokens written in it are recognised.
pub async fn tokenize(model: &Arc<ServedModel>, text: String, add_special: bool) -> Result<Vec<u32>, PipelineError> {
    if model.takes_conversations() {
        return Ok(elsewhere(model, text, add_special, false).await?.0);
    }
    ids(model, text, add_special).await
}

/// As [`tokenize`], with the bytes that each token stands for.
pub async fn pieces(
    model: &Arc<ServedModel>,
    text: String,
    add_special: bool,
) -> Result<(Vec<u32>, Vec<Vec<u8>>), PipelineError> {
    if model.takes_conversations() {
        return elsewhere(model, text, add_special, true).await;
    }
    let ids = ids(model, text, add_special).await?;
    let mut pieces = Vec::with_capacity(ids.len());
    match model.own_tokenizer().await? {
        Some(tokenizer) => pieces.extend(ids.iter().map(|id| tokenizer.token_bytes(*id).unwrap_or_default())),
        None => {
            for id in &ids {
                pieces.push(model.handle.detokenize(&[*id]).await?.ok_or(PipelineError::TokensUnknown)?.into_bytes());
            }
        }
    }
    Ok((ids, pieces))
}

/// The text of token ids, special ones included.
pub async fn detokenize(model: &Arc<ServedModel>, ids: Vec<u32>) -> Result<String, PipelineError> {
    if model.takes_conversations() {
        return match model.handle.reply(Question::Detokenize { ids }).await? {
            Reply::Text(text) => Ok(text),
            other => Err(unasked(&other)),
        };
    }
    if model.tokenizer.is_none()
        && let Some(text) = model.handle.detokenize(&ids).await?
    {
        return Ok(text);
    }
    let tokenizer = model.own_tokenizer().await?.ok_or(PipelineError::TokensUnknown)?;
    in_background(model, move |_| decode(&tokenizer, &ids)).await
}

/// How many tokens the prompt of a request has.
pub async fn count(model: &Arc<ServedModel>, subject: Subject) -> Result<usize, PipelineError> {
    if model.takes_conversations() {
        return match model.handle.reply(Question::Count { subject }).await? {
            Reply::Count(count) => Ok(usize::try_from(count).unwrap_or(usize::MAX)),
            other => Err(unasked(&other)),
        };
    }
    match prompt::prepare(model, subject, Wish::default(), false).await?.prompt {
        Prompt::Tokens(ids) => Ok(ids.len()),
        Prompt::Text { text, add_special } => Ok(ids(model, text, add_special).await?.len()),
    }
}

/// Tokens of a text, by who takes conversations.
async fn elsewhere(
    model: &Arc<ServedModel>,
    text: String,
    add_special: bool,
    pieces: bool,
) -> Result<(Vec<u32>, Vec<Vec<u8>>), PipelineError> {
    match model.handle.reply(Question::Tokenize { text, add_special, pieces }).await? {
        Reply::Tokens { ids, pieces: found } if !pieces || ids.len() == found.len() => Ok((ids, found)),
        other => Err(unasked(&other)),
    }
}

/// A reply of another kind than the question's.
pub(super) fn unasked(reply: &Reply) -> PipelineError {
    let kind = match reply {
        Reply::Text(_) => "a text",
        Reply::Tokens { .. } => "tokens",
        Reply::Count(_) => "a count",
        Reply::Vectors(_) => "vectors",
    };
    Rejection::failed(format!("the machine that serves the model answered with {kind}, which nobody asked for")).into()
}

fn decode(tokenizer: &Tokenizer, ids: &[u32]) -> Result<String, PipelineError> {
    let unknown = ids.iter().find(|id| tokenizer.id_to_token(**id).is_none());
    if let Some(&id) = unknown {
        let vocab_size = u32::try_from(tokenizer.vocab_size()).unwrap_or(u32::MAX);
        return Err(SubmitError::UnknownToken { id, vocab_size }.into());
    }
    let mut decoder = tokenizer.decoder_with(DecoderOptions { keep_all: true, ..DecoderOptions::default() });
    let mut text: String = ids.iter().map(|&id| decoder.push(id)).collect();
    text.push_str(&decoder.finish());
    Ok(text)
}

/// An engine that tokenizes by itself is asked first: what it says is what it does.
async fn ids(model: &Arc<ServedModel>, text: String, add_special: bool) -> Result<Vec<u32>, PipelineError> {
    if model.tokenizer.is_none()
        && let Some(ids) = model.handle.tokenize(&text, add_special).await?
    {
        return Ok(ids);
    }
    let tokenizer = model.own_tokenizer().await?.ok_or(PipelineError::TokensUnknown)?;
    in_background(model, move |_| Ok(tokenizer.encode(&text, add_special)?)).await
}

/// Away from the threads that serve connections, and beside the prompts that are being prepared.
async fn in_background<T: Send + 'static>(
    model: &Arc<ServedModel>,
    work: impl FnOnce(&ServedModel) -> Result<T, PipelineError> + Send + 'static,
) -> Result<T, PipelineError> {
    let _permit = model.preparing.acquire().await;
    let model = model.clone();
    tokio::task::spawn_blocking(move || work(&model)).await.unwrap_or(Err(PipelineError::Panicked))
}
