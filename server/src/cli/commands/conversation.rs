//! Who answers in `mesh-llm chat`: a model in this process, or a server.

use eventsource_stream::Eventsource;
use futures::{Stream, StreamExt, future, stream::BoxStream};
use mesh_core::{Hint, Sampling, chat::Message};
use mesh_llm::{
    lease::Lease,
    openai::response::{ChatChunk, ErrorBody},
    pipeline::{self, Ask, Chat, Part, Subject},
    slots::{Slot, Slots},
};
use mesh_text::Delta;
use serde_json::{Value, json};

use crate::cli::failure::{Exit, Failure};

/// A piece of an answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Piece {
    /// Text of the reasoning.
    Reasoning(String),
    /// Text of the answer.
    Content(String),
}

/// How answers are made.
#[derive(Clone, Copy, Debug, Default)]
pub struct Manner {
    /// Most tokens of an answer.
    pub tokens_max: Option<u32>,
    /// Randomness.
    pub temperature: Option<f32>,
}

/// Who answers.
pub enum Partner {
    /// A model in this process.
    Here {
        /// Its slot, the only one.
        slots: Slots,
    },
    /// A model of a server.
    There {
        /// The client.
        client: reqwest::Client,
        /// The server, without a slash at its end.
        url: String,
        /// The model's name.
        model: String,
    },
}

impl Partner {
    /// The model of that name on a server, or its first one.
    pub async fn there(url: &str, model: Option<String>) -> Result<Self, Failure> {
        let url = url.trim_end_matches('/').trim_end_matches("/v1").to_owned();
        let client = reqwest::Client::new();
        let model = match model {
            Some(model) => model,
            None => first_model(&client, &url).await?,
        };
        Ok(Self::There { client, url, model })
    }

    /// The model's name.
    pub fn name(&self) -> String {
        match self {
            Self::Here { slots } => slots.iter().next().map(Slot::name).unwrap_or_default(),
            Self::There { model, .. } => model.clone(),
        }
    }

    /// The next message of a conversation. Dropping the stream stops the answer.
    pub async fn answer(
        &self,
        messages: &[Message],
        manner: Manner,
    ) -> Result<BoxStream<'static, Result<Piece, Failure>>, Failure> {
        match self {
            Self::Here { slots } => {
                let slot = slots.iter().next().ok_or_else(|| Failure::new(Exit::Failure, "no model is loaded"))?;
                let model = slot.model(None).await.map_err(|error| hinted(&error))?;
                here(model, messages, manner).await
            }
            Self::There { client, url, model } => there(client, url, model, messages, manner).await,
        }
    }
}

fn hinted(error: &(impl std::fmt::Display + Hint)) -> Failure {
    let failure = Failure::new(Exit::Failure, error);
    match error.hint() {
        Some(hint) => failure.hint(hint),
        None => failure,
    }
}

async fn here(
    model: Lease,
    messages: &[Message],
    manner: Manner,
) -> Result<BoxStream<'static, Result<Piece, Failure>>, Failure> {
    let chat = Chat { messages: messages.to_vec(), ..Chat::default() };
    let ask = Ask {
        sampling: Sampling { temperature: manner.temperature, ..Sampling::default() },
        tokens_max: manner.tokens_max,
        ..Ask::new("chat", Subject::Chat(chat))
    };
    let parts = pipeline::open(model, ask).await.map_err(|error| hinted(&error))?;
    let pieces = parts.filter_map(|part| {
        future::ready(match part {
            Ok(Part::Delta(delta)) => Some(Ok(match delta {
                Delta::Reasoning(text) => Piece::Reasoning(text),
                Delta::Content(text) | Delta::Malformed { text } => Piece::Content(text),
                Delta::ToolCall { name, arguments, .. } => Piece::Content(format!("{name}({arguments})")),
            })),
            Ok(Part::Queued { .. } | Part::Prefill { .. } | Part::Tokens(_) | Part::Finished(_)) => None,
            Err(error) => Some(Err(Failure::new(Exit::Failure, error))),
        })
    });
    Ok(pieces.boxed())
}

async fn first_model(client: &reqwest::Client, url: &str) -> Result<String, Failure> {
    let response = client.get(format!("{url}/v1/models")).send().await.map_err(|error| unreachable(url, &error))?;
    let list: Value = checked(response).await?.json().await.map_err(|error| unreachable(url, &error))?;
    let name = list.pointer("/data/0/id").and_then(Value::as_str);
    name.map(str::to_owned).ok_or_else(|| Failure::new(Exit::Model, format!("{url} serves no model")))
}

async fn there(
    client: &reqwest::Client,
    url: &str,
    model: &str,
    messages: &[Message],
    manner: Manner,
) -> Result<BoxStream<'static, Result<Piece, Failure>>, Failure> {
    let mut body = json!({ "model": model, "messages": messages, "stream": true });
    if let Some(tokens) = manner.tokens_max {
        body["max_tokens"] = tokens.into();
    }
    if let Some(temperature) = manner.temperature {
        body["temperature"] = temperature.into();
    }
    let request = client.post(format!("{url}/v1/chat/completions")).json(&body);
    let response = checked(request.send().await.map_err(|error| unreachable(url, &error))?).await?;
    Ok(pieces(response.bytes_stream()).boxed())
}

/// An error answer becomes a failure with the server's own words.
async fn checked(response: reqwest::Response) -> Result<reqwest::Response, Failure> {
    let status = response.status();
    if status.is_success() {
        return Ok(response);
    }
    let said = response.json::<ErrorBody>().await.map(|body| body.error.message);
    Err(Failure::new(Exit::Failure, said.unwrap_or_else(|_| format!("the server answered {status}"))))
}

fn unreachable(url: &str, error: &reqwest::Error) -> Failure {
    Failure::new(Exit::Failure, format!("{url}: {error}"))
        .hint("is a server running there? `mesh-llm serve` starts one")
}

fn pieces<B, E>(
    bytes: impl Stream<Item = Result<B, E>> + Send + 'static,
) -> impl Stream<Item = Result<Piece, Failure>> + Send + 'static
where
    B: AsRef<[u8]> + Send + 'static,
    E: std::fmt::Display + Send + 'static,
{
    let events = bytes
        .eventsource()
        .take_while(|event| future::ready(!event.as_ref().is_ok_and(|event| event.data == "[DONE]")));
    events.flat_map(|event| {
        futures::stream::iter(match event {
            Err(error) => vec![Err(Failure::new(Exit::Failure, format!("the answer broke off: {error}")))],
            Ok(event) => read(&event.event, &event.data),
        })
    })
}

fn read(event: &str, data: &str) -> Vec<Result<Piece, Failure>> {
    if event == "error" {
        let said = serde_json::from_str::<ErrorBody>(data).map(|body| body.error.message);
        return vec![Err(Failure::new(Exit::Failure, said.unwrap_or_else(|_| data.to_owned())))];
    }
    let chunk = match serde_json::from_str::<ChatChunk>(data) {
        Ok(chunk) => chunk,
        Err(error) => return vec![Err(Failure::new(Exit::Failure, format!("the server sent no chunk: {error}")))],
    };
    let mut pieces = Vec::new();
    for choice in chunk.choices {
        pieces.extend(choice.delta.reasoning_content.or(choice.delta.reasoning).map(|text| Ok(Piece::Reasoning(text))));
        pieces.extend(choice.delta.content.filter(|text| !text.is_empty()).map(|text| Ok(Piece::Content(text))));
        for call in choice.delta.tool_calls {
            let text = format!("{}({})", call.function.name, call.function.arguments);
            pieces.push(Ok(Piece::Content(text)));
        }
    }
    pieces
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn events_become_pieces_however_they_are_cut() {
        let chunk = |delta: &str| {
            format!(
                "data: {{\"id\":\"x\",\"object\":\"chat.completion.chunk\",\"created\":1,\"model\":\"m\",\"choices\":\
                 [{{\"index\":0,\"delta\":{delta},\"finish_reason\":null}}]}}\n\n"
            )
        };
        let text = [
            chunk("{\"role\":\"assistant\",\"content\":\"\"}"),
            chunk("{\"reasoning_content\":\"Hm\"}"),
            ":\n\n".to_owned(),
            chunk("{\"content\":\"é!\"}"),
            "data: [DONE]\n\n".to_owned(),
        ]
        .concat();
        for size in [1, 3, 7, 1000] {
            let cut: Vec<_> = text.as_bytes().chunks(size).map(|cut| Ok::<_, std::io::Error>(cut.to_vec())).collect();
            let all: Vec<_> = pieces(futures::stream::iter(cut)).map(Result::unwrap).collect().await;
            assert_eq!(all, [Piece::Reasoning("Hm".into()), Piece::Content("é!".into())], "cut by {size}");
        }
    }

    #[tokio::test]
    async fn an_error_event_is_the_servers_own_words() {
        let text = "event: error\ndata: {\"error\":{\"message\":\"it broke\",\"type\":\"server_error\"}}\n\n";
        let cut = vec![Ok::<_, std::io::Error>(text.as_bytes().to_vec())];
        let all: Vec<_> = pieces(futures::stream::iter(cut)).collect().await;
        assert_eq!(all, [Err(Failure::new(Exit::Failure, "it broke"))]);
    }
}
