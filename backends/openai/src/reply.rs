//! Questions that can be answered without generating, by the routes that the server has.

use mesh_core::{
    Embedded, Pooling,
    ask::{Chat, Subject},
    node::{Question, Rejection, RejectionKind, Reply},
};

use crate::{
    client::Upstream,
    error::Trouble,
    kind::{Manners, TokenRoutes},
    request::{kwargs, messages, unsupported},
    wire::{Detokenized, EmbeddingList, Embeddings, Piece, Prompt, Token, Tokenized, Tokens},
};

/// Why a question is not answered.
#[derive(Debug)]
pub(crate) enum Unanswered {
    /// It is refused here.
    Rejected(Rejection),
    /// The server could not be asked, or refused it.
    Trouble(Trouble),
}

impl From<Trouble> for Unanswered {
    fn from(trouble: Trouble) -> Self {
        Self::Trouble(trouble)
    }
}

impl From<Rejection> for Unanswered {
    fn from(rejection: Rejection) -> Self {
        Self::Rejected(rejection)
    }
}

pub(crate) async fn reply(
    upstream: &Upstream,
    model: &str,
    manners: &Manners,
    question: &Question,
) -> Result<Reply, Unanswered> {
    let asked = Asked { upstream, model, manners };
    match question {
        Question::Render { chat, add_generation_prompt } => {
            asked.render(chat, *add_generation_prompt).await.map(Reply::Text)
        }
        Question::Tokenize { text, add_special, pieces } => asked.tokenize(text, *add_special, *pieces).await,
        Question::Detokenize { ids } => asked.detokenize(ids).await.map(Reply::Text),
        Question::Count { subject } => asked.count(subject).await.map(Reply::Count),
        Question::Embed { inputs, pooling, .. } => asked.embed(inputs, *pooling).await.map(Reply::Vectors),
    }
}

struct Asked<'a> {
    upstream: &'a Upstream,
    model: &'a str,
    manners: &'a Manners,
}

impl<'a> Asked<'a> {
    fn untold(&self, what: &str) -> Unanswered {
        let what = format!("the shared server that has this model ({}) does not tell {what}", self.manners.kind);
        let rejection = Rejection::new(RejectionKind::Invalid, "unsupported", what);
        Rejection { param: Some("model".into()), ..rejection }.into()
    }

    fn body(&self) -> Tokens<'a> {
        Tokens { model: self.model, ..Tokens::default() }
    }

    fn conversation(&self, chat: &'a Chat, speak: bool) -> Result<Tokens<'a>, Unanswered> {
        let kwargs = kwargs(chat, self.manners)?;
        // The routes take no fields of the reasoning.
        if chat.effort.is_some() && kwargs == chat.kwargs {
            return Err(self.untold("what a conversation becomes with `reasoning_effort` or `enable_thinking`"));
        }
        Ok(Tokens {
            messages: Some(messages(chat, self.manners.kind)),
            tools: (!chat.tools.is_empty()).then_some(&chat.tools[..]),
            chat_template_kwargs: Some(kwargs).filter(|kwargs| !kwargs.is_empty()),
            add_generation_prompt: Some(speak),
            ..self.body()
        })
    }

    async fn render(&self, chat: &Chat, speak: bool) -> Result<String, Unanswered> {
        match self.manners.token_routes {
            TokenRoutes::LlamaServer => {
                let body = self.conversation(chat, speak)?;
                let made: Detokenized = self.upstream.ask("/apply-template", &body).await?;
                Ok(made.prompt.ok_or_else(|| Trouble::Malformed("no `prompt`".into()))?)
            }
            TokenRoutes::Vllm | TokenRoutes::None => {
                Err(self.untold("what a conversation becomes by the model's template"))
            }
        }
    }

    async fn tokenize(&self, text: &str, add_special: bool, pieces: bool) -> Result<Reply, Unanswered> {
        let body = match self.manners.token_routes {
            TokenRoutes::LlamaServer => Tokens {
                content: Some(text),
                add_special: Some(add_special),
                parse_special: Some(true),
                with_pieces: pieces.then_some(true),
                ..self.body()
            },
            TokenRoutes::Vllm if pieces => return Err(self.untold("the bytes of its tokens")),
            TokenRoutes::Vllm => Tokens { prompt: Some(text), add_special_tokens: Some(add_special), ..self.body() },
            TokenRoutes::None => return Err(self.untold("what its tokens are")),
        };
        let made: Tokenized = self.upstream.ask("/tokenize", &body).await?;
        let (mut ids, mut bytes) = (Vec::with_capacity(made.tokens.len()), Vec::new());
        for token in made.tokens {
            match token {
                Token::Id(_) if pieces => return Err(Trouble::Malformed("tokens without pieces".into()).into()),
                Token::Id(id) => ids.push(id),
                Token::Piece { id, piece } => {
                    ids.push(id);
                    bytes.extend(pieces.then_some(match piece {
                        Piece::Text(text) => text.into_bytes(),
                        Piece::Bytes(bytes) => bytes,
                    }));
                }
            }
        }
        Ok(Reply::Tokens { ids, pieces: bytes })
    }

    async fn detokenize(&self, ids: &[u32]) -> Result<String, Unanswered> {
        if self.manners.token_routes == TokenRoutes::None {
            return Err(self.untold("what its tokens are"));
        }
        let made: Detokenized = self.upstream.ask("/detokenize", &Tokens { tokens: Some(ids), ..self.body() }).await?;
        Ok(made.content.or(made.prompt).ok_or_else(|| Trouble::Malformed("no text".into()))?)
    }

    async fn count(&self, subject: &Subject) -> Result<u64, Unanswered> {
        let count = |reply: Reply| match reply {
            Reply::Tokens { ids, .. } => ids.len() as u64,
            _ => 0,
        };
        match (subject, self.manners.token_routes) {
            (Subject::Tokens(ids), _) => Ok(ids.len() as u64),
            (Subject::Text(text), _) => self.tokenize(text, true, false).await.map(count),
            (Subject::Chat(chat), TokenRoutes::LlamaServer) => {
                let text = self.render(chat, true).await?;
                // A template that writes its own begin-of-text token has it taken off by llama-server; another mesh-llm
                // leaves it there.
                let add_special = self.manners.kind == crate::Kind::LlamaServer;
                self.tokenize(&text, add_special, false).await.map(count)
            }
            (Subject::Chat(chat), TokenRoutes::Vllm) => {
                let made: Tokenized = self.upstream.ask("/tokenize", &self.conversation(chat, true)?).await?;
                Ok(made.tokens.len() as u64)
            }
            (Subject::Chat(_), TokenRoutes::None) => Err(self.untold("how many tokens a conversation has")),
        }
    }

    async fn embed(&self, inputs: &[Subject], pooling: Pooling) -> Result<Embedded, Unanswered> {
        if !self.manners.embeddings {
            return Err(self.untold("embeddings"));
        }
        let mesh = self.manners.kind == crate::Kind::MeshLlm;
        let pooling = match pooling {
            // What a request means that does not say; models are pooled as they are made to be.
            Pooling::Mean => None,
            Pooling::Last if mesh => Some("last"),
            Pooling::Last => return Err(unsupported("pooling", self.manners.kind, "leave `pooling` out").into()),
        };
        let wrong = |what: &str| {
            let rejection = Rejection::new(RejectionKind::Invalid, "unsupported", what);
            Unanswered::Rejected(Rejection { param: Some("input".into()), ..rejection })
        };
        let mut input = Vec::with_capacity(inputs.len());
        for subject in inputs {
            input.push(match subject {
                Subject::Text(text) => Prompt::Text(text),
                Subject::Tokens(ids) if self.manners.token_prompts => Prompt::Tokens(ids),
                Subject::Tokens(_) => return Err(wrong("the shared server takes texts only, no token ids")),
                Subject::Chat(_) => return Err(wrong("conversations have no embeddings; send texts")),
            });
        }
        let texts = inputs.iter().filter(|input| matches!(input, Subject::Text(_))).count();
        if texts != 0 && texts != inputs.len() {
            return Err(wrong("texts and token ids cannot be mixed; send them apart"));
        }
        let body = Embeddings { model: self.model, input, encoding_format: "float", pooling };
        let list: EmbeddingList = self.upstream.ask("/v1/embeddings", &body).await?;
        Ok(vectors(list, inputs.len())?)
    }
}

/// The vectors in the order of their inputs, each of length 1.
fn vectors(list: EmbeddingList, asked: usize) -> Result<Embedded, Trouble> {
    let malformed = |what: String| Err(Trouble::Malformed(what));
    if list.data.len() != asked {
        return malformed(format!("{} vectors for {asked} inputs", list.data.len()));
    }
    let mut vectors = vec![Vec::new(); asked];
    for (place, embedding) in list.data.into_iter().enumerate() {
        let index = embedding.index.unwrap_or(place);
        let mut vector = embedding.embedding;
        let norm = vector.iter().map(|value| f64::from(*value).powi(2)).sum::<f64>().sqrt();
        if !norm.is_finite() || norm == 0.0 {
            return malformed(format!("vector {index} has no direction"));
        }
        vector.iter_mut().for_each(|value| *value = (f64::from(*value) / norm) as f32);
        match vectors.get_mut(index) {
            Some(slot) if slot.is_empty() => *slot = vector,
            _ => return malformed(format!("there is no or more than one vector {index}")),
        }
    }
    Ok(Embedded { vectors, prompt_tokens: list.usage.prompt_tokens })
}
