//! Requests of other nodes, answered here and nowhere else: what comes from elsewhere is never passed on.

use std::sync::Arc;

use futures::StreamExt;
use iroh::endpoint::{RecvStream, SendStream};
use mesh_core::{
    answer::Part,
    node::{Local, Rejection, RejectionKind},
};

use crate::{
    link::Link,
    node::Node,
    wire::{self, CALL_BYTES_MAX, Call, Said, WireError},
};

/// Answers one request. An asker who leaves stops its answer.
pub async fn serve(node: Arc<Node>, link: Link, send: SendStream, recv: RecvStream) {
    let (asker, _use) = (link.connection.remote_id(), link.used());
    match answer(&node, send, recv).await {
        Ok(true) => node.counts.add(asker, |count| count.served += 1),
        Ok(false) => {}
        Err(error) => tracing::debug!(node = %asker.fmt_short(), %error, "a request was not answered to its end"),
    }
}

/// Whether the request was answered, whole.
async fn answer(node: &Arc<Node>, mut send: SendStream, mut recv: RecvStream) -> Result<bool, WireError> {
    let Some(call) = wire::read::<Call>(&mut recv, CALL_BYTES_MAX, Some(&node.budget)).await? else {
        return Ok(false);
    };
    let Some(local) = node.local.get().cloned() else {
        return say(&mut send, &Said::Rejected(nothing_here())).await;
    };
    let stopped = send.stopped();
    let work = async {
        match call {
            Call::Ask { model, ask } => ask_of(&*local, &model, *ask, &mut send).await,
            Call::Question { model, question } => {
                let said = match local.reply(&model, question).await {
                    Ok(reply) => Said::Reply(reply),
                    Err(rejection) => Said::Rejected(rejection),
                };
                say(&mut send, &said).await
            }
        }
    };
    let answered = tokio::select! {
        done = work => done?,
        // Dropping the work is what cancels it.
        _ = stopped => return Err(WireError::Ended("nobody listens any more".into())),
        () = node.over.cancelled() => return Err(WireError::Ended("this node goes".into())),
    };
    send.finish().ok();
    Ok(answered)
}

async fn ask_of(
    local: &dyn Local,
    model: &str,
    ask: mesh_core::ask::Ask,
    send: &mut SendStream,
) -> Result<bool, WireError> {
    let mut parts = match local.answer(model, ask).await {
        Ok(parts) => parts,
        Err(rejection) => return say(send, &Said::Rejected(rejection)).await,
    };
    say(send, &Said::Admitted).await?;
    while let Some(part) = parts.next().await {
        let said = match part {
            Ok(part) => Said::Part(part),
            Err(error) => Said::Broke(error),
        };
        let last = matches!(said, Said::Part(Part::Finished(_)) | Said::Broke(_));
        let whole = say(send, &said).await?;
        // Who has heard the end listens no longer.
        if last {
            return Ok(whole);
        }
    }
    Ok(false)
}

/// Says something; whether that makes an answer whole.
async fn say(send: &mut SendStream, said: &Said) -> Result<bool, WireError> {
    wire::write(send, said).await?;
    Ok(matches!(said, Said::Part(Part::Finished(_)) | Said::Reply(_)))
}

/// For requests that come before there is anything, or after.
fn nothing_here() -> Rejection {
    Rejection::new(RejectionKind::NotFound, "model_not_found", "no model is served there")
}
