//! `/tokenize`, `/detokenize` and `/apply-template`.

use std::sync::Arc;

use warp::{Reply, reply::Response};

use super::{Call, Door, open::on_model, route::Route};
use crate::{
    error::ApiError,
    lease::Lease,
    openai::{
        BadRequest, parse,
        tokens::{
            DetokenizeRequest, Detokenized, TemplateRequest, Templated, Tokenizable, TokenizeRequest, Tokenized,
            WireToken,
        },
    },
    pipeline::tokens,
};

pub(super) fn routes() -> Vec<Route> {
    vec![
        Route::post("/tokenize", tokenize)
            .says("The token ids of a text or a conversation.")
            .takes::<TokenizeRequest>()
            .gives::<Tokenized>(),
        Route::post("/detokenize", detokenize)
            .says("The text of token ids, special ones included.")
            .takes::<DetokenizeRequest>()
            .gives::<Detokenized>(),
        Route::post("/apply-template", apply_template)
            .says("A conversation as the model's template writes it.")
            .takes::<TemplateRequest>()
            .gives::<Templated>(),
    ]
}

async fn tokenize(door: Arc<Door>, mut call: Call) -> Result<Response, ApiError> {
    let request: TokenizeRequest = parse(&call.read().await?)?;
    let model = door.model_or_only(request.model.clone())?;
    let asked = &request.check()?;
    let work = |lease: Lease| async move {
        let max_model_len = lease.handle.capabilities().context_tokens_max;
        let text = match asked.what.clone() {
            Tokenizable::Text(text) => text,
            Tokenizable::Chat(chat, speak) => tokens::render(&lease, chat, speak).await?,
        };
        let (ids, pieces) = if asked.pieces || asked.strings {
            tokens::pieces(&lease, text, asked.add_special).await?
        } else {
            (tokens::tokenize(&lease, text, asked.add_special).await?, Vec::new())
        };
        Ok((max_model_len, ids, pieces))
    };
    let (_, (max_model_len, ids, pieces)) = on_model(&door.slots, &model, work).await?;
    let token_strs =
        asked.strings.then(|| pieces.iter().map(|piece| String::from_utf8_lossy(piece).into_owned()).collect());
    let count = ids.len();
    let tokens = if asked.pieces {
        ids.into_iter().zip(pieces).map(|(id, piece)| WireToken::Piece { id, piece: piece.into() }).collect()
    } else {
        ids.into_iter().map(WireToken::Id).collect()
    };
    Ok(warp::reply::json(&Tokenized { tokens, count, max_model_len, token_strs }).into_response())
}

async fn detokenize(door: Arc<Door>, mut call: Call) -> Result<Response, ApiError> {
    let request: DetokenizeRequest = parse(&call.read().await?)?;
    let model = door.model_or_only(request.model)?;
    let ids = request.tokens.ok_or_else(|| BadRequest::missing("tokens"))?;
    let ids = &ids;
    let work = |lease: Lease| async move { tokens::detokenize(&lease, ids.clone()).await };
    let (_, text) = on_model(&door.slots, &model, work).await.map_err(|error| error.prompt_in("tokens"))?;
    Ok(warp::reply::json(&Detokenized { content: text.clone(), prompt: text }).into_response())
}

async fn apply_template(door: Arc<Door>, mut call: Call) -> Result<Response, ApiError> {
    let request: TemplateRequest = parse(&call.read().await?)?;
    let model = door.model_or_only(request.model.clone())?;
    let (chat, speak) = &request.check()?;
    let work = |lease: Lease| async move { tokens::render(&lease, chat.clone(), *speak).await };
    let (_, prompt) = on_model(&door.slots, &model, work).await?;
    Ok(warp::reply::json(&Templated { prompt }).into_response())
}
