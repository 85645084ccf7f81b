//! A model that others serve, as an engine: each request finds its own way.

use std::{sync::Arc, time::Duration};

use async_trait::async_trait;
use futures::{StreamExt, stream};
use iroh::{
    EndpointAddr, EndpointId,
    endpoint::{RecvStream, SendStream},
};
use mesh_core::{
    Capabilities, Engine, EngineError, EngineState, EventStream, Job, OutputForm, PromptForm, SubmitError,
    answer::Part,
    ask::{Ask, Subject},
    node::{ModelOffer, PartStream, Question, Rejection, RejectionKind, Reply},
};
use mesh_peers::{Asked, NodeId, affinity, choose};
use tokio::{sync::watch, time::timeout};

use crate::{
    codec,
    link::{self, Link, Parting, Use},
    node::{Node, endpoint_id},
    wire::{self, CALL_BYTES_MAX, Call, SAID_BYTES_MAX, Said},
};

/// How long a node may take to say whether it admits a request. It may have a long prompt to tokenize.
const ADMISSION_MAX: Duration = Duration::from_secs(30);
/// How long a node that there is no connection to may take to be reached by a request.
const REACH_MAX: Duration = Duration::from_secs(3);
/// Nodes that one request is brought to.
const TRIES_MAX: usize = 4;
/// Nodes that an error names.
const NAMED_MAX: usize = 3;

/// All offers of one model.
pub struct Remote {
    node: Arc<Node>,
    /// As the request calls it: `model` or `model@node`.
    model: String,
    capabilities: Capabilities,
    state: watch::Sender<EngineState>,
}

impl Remote {
    /// The model of that name, with what those promise who offer it.
    pub fn new(node: Arc<Node>, model: &str, offer: &ModelOffer) -> Self {
        let capabilities =
            Capabilities { prompt: PromptForm::Chat, output: OutputForm::Parts, ..offer.capabilities.clone() };
        Self { node, model: model.to_owned(), capabilities, state: watch::Sender::new(EngineState::Ready) }
    }
}

#[async_trait]
impl Engine for Remote {
    fn capabilities(&self) -> &Capabilities {
        &self.capabilities
    }

    fn state(&self) -> watch::Receiver<EngineState> {
        self.state.subscribe()
    }

    async fn submit(&self, _: Job) -> Result<EventStream, SubmitError> {
        Err(SubmitError::WrongForm { wanted: PromptForm::Chat })
    }

    async fn answer(&self, ask: Ask) -> Result<PartStream, Rejection> {
        let mut way = Way::new(self.node.clone(), self.model.clone(), &ask.subject);
        way.answer_tokens_max = ask.tokens_max;
        let begun = way.begin(&ask).await?;
        Ok(stream::unfold(Answering { way, ask, state: At::Before(begun) }, Answering::next).boxed())
    }

    async fn reply(&self, question: Question) -> Result<Reply, Rejection> {
        let subject = match &question {
            Question::Count { subject } => subject.clone(),
            Question::Embed { inputs, .. } => inputs.first().cloned().unwrap_or(Subject::Tokens(Vec::new())),
            Question::Render { .. } | Question::Tokenize { .. } | Question::Detokenize { .. } => {
                Subject::Tokens(Vec::new())
            }
        };
        let mut way = Way::new(self.node.clone(), self.model.clone(), &subject);
        loop {
            let (link, model) = way.next_node().await?;
            let _use = link.used();
            let call = Encoded::of(&Call::Question { model, question: question.clone() })?;
            let said = async {
                let (send, mut recv) = open(&link, &call).await?;
                let said = wire::read::<Said>(&mut recv, SAID_BYTES_MAX, None).await.map_err(|error| error.to_string());
                drop(send);
                said?.ok_or_else(|| "it said nothing".to_owned())
            };
            match said.await {
                Ok(Said::Reply(reply)) => return Ok(reply),
                Ok(Said::Rejected(rejection)) => way.turned_down(&link, rejection)?,
                Ok(_) => return Err(way.nonsense(&link)),
                Err(why) => way.failed(&link, why),
            }
        }
    }

    async fn drain(&self, _: Duration) {
        self.state.send_replace(EngineState::Stopped);
    }
}

/// Where a request goes, and where it has been.
struct Way {
    node: Arc<Node>,
    model: String,
    keys: Vec<(affinity::Key, u32)>,
    prompt_tokens: u32,
    answer_tokens_max: Option<u32>,
    tried: Vec<NodeId>,
    /// Why the last one did not serve it.
    last: Option<Rejection>,
    /// Whether it met a connection that was just given up.
    missed: bool,
}

/// A request that was admitted somewhere.
struct Begun {
    link: Link,
    _use: Use,
    // Kept: the other side takes its end for ours.
    _send: SendStream,
    recv: RecvStream,
}

impl Way {
    fn new(node: Arc<Node>, model: String, subject: &Subject) -> Self {
        let (keys, prompt_tokens) = (affinity::keys(subject), affinity::prompt_tokens(subject));
        Self { node, model, keys, prompt_tokens, answer_tokens_max: None, tried: Vec::new(), last: None, missed: false }
    }

    /// The node to ask next and what the model is called there, with a connection to it.
    async fn next_node(&mut self) -> Result<(Link, String), Rejection> {
        loop {
            let chosen = {
                let now = self.node.now();
                let state = self.node.state();
                let mut candidates = state.directory.offers(&self.model, now);
                state.affinity.mark(&mut candidates, &self.keys, &self.model);
                let asked = Asked {
                    prompt_tokens: self.prompt_tokens,
                    answer_tokens_max: self.answer_tokens_max,
                    excluded: &self.tried,
                };
                let choice = choose(&candidates, &asked, &self.node.policy, self.node.incarnation);
                choice.and_then(|choice| {
                    let candidate = candidates.iter().find(|candidate| candidate.node == choice.node)?;
                    let link = endpoint_id(choice.node).and_then(|id| state.links.get(&id).cloned());
                    Some((choice.node, candidate.name.clone(), candidate.offer.name.clone(), choice.reasons, link))
                })
            };
            let Some((id, name, model, reasons, link)) = chosen.filter(|_| self.tried.len() < TRIES_MAX) else {
                return Err(self.last.take().unwrap_or_else(|| self.nobody()));
            };
            tracing::debug!(model = self.model, node = name, ?reasons, "the request goes there");
            self.tried.push(id);
            let link = match (link, endpoint_id(id)) {
                (Some(link), _) => Ok(link),
                (None, Some(endpoint)) => {
                    let dialled = timeout(REACH_MAX, link::dial(&self.node, EndpointAddr::new(endpoint))).await;
                    match dialled {
                        Ok(dialled) => dialled.map_err(|error| error.to_string()),
                        Err(_) => Err(format!("it was not reached within {} s", REACH_MAX.as_secs())),
                    }
                }
                (None, None) => Err("it has no such id".to_owned()),
            };
            match link {
                Ok(link) => {
                    let (again, over) = (self.tried.len() > 1, link.connection.remote_id());
                    self.node.counts.add(over, |count| {
                        count.sent += 1;
                        count.failed_over += u64::from(again);
                    });
                    return Ok((link, model));
                }
                Err(why) => {
                    tracing::info!(node = name, why, "the node is not reached");
                    // For this node alone: others may reach it.
                    let now = self.node.now();
                    self.node.state().directory.lost(id, now);
                    self.last = Some(self.unreached(&name));
                }
            }
        }
    }

    /// Finds a node that admits the request.
    async fn begin(&mut self, ask: &Ask) -> Result<Begun, Rejection> {
        loop {
            let (link, model) = self.next_node().await?;
            let used = link.used();
            let call = Encoded::of(&Call::Ask { model, ask: Box::new(ask.clone()) })?;
            let admission = async {
                let (send, mut recv) = open(&link, &call).await?;
                let said =
                    wire::read::<Said>(&mut recv, SAID_BYTES_MAX, None).await.map_err(|error| error.to_string())?;
                Ok::<_, String>((send, recv, said))
            };
            match timeout(ADMISSION_MAX, admission).await {
                Ok(Ok((send, recv, Some(Said::Admitted)))) => return Ok(Begun { _use: used, link, _send: send, recv }),
                Ok(Ok((.., Some(Said::Rejected(rejection))))) => self.turned_down(&link, rejection)?,
                Ok(Ok((.., None))) => self.failed(&link, "it said nothing".into()),
                Ok(Ok(_)) => return Err(self.nonsense(&link)),
                Ok(Err(why)) => self.failed(&link, why),
                Err(_) => self.failed(&link, format!("it did not admit it within {} s", ADMISSION_MAX.as_secs())),
            }
        }
    }

    /// The node has read the prompt.
    fn noted(&self, link: &Link) {
        let id = crate::node::node_id(link.connection.remote_id());
        self.node.state().affinity.note(&self.keys, self.base_name(), id);
    }

    fn base_name(&self) -> &str {
        &self.model
    }

    fn turned_down(&mut self, link: &Link, rejection: Rejection) -> Result<(), Rejection> {
        if !rejection.may_go_elsewhere() {
            return Err(rejection);
        }
        tracing::debug!(node = %link.connection.remote_id().fmt_short(), why = rejection.message, "turned down there");
        self.last = Some(rejection);
        Ok(())
    }

    fn failed(&mut self, link: &Link, why: String) {
        let id = link.connection.remote_id();
        let given_up = [Parting::Unneeded, Parting::Duplicate].iter().any(|why| why.ended(&link.connection));
        if given_up && !std::mem::replace(&mut self.missed, true) {
            // The node is there, and may be asked over a new connection.
            self.tried.pop();
            return;
        }
        tracing::info!(node = %id.fmt_short(), why, "the request failed there before its answer began");
        self.node.counts.add(id, |count| count.failed += 1);
        self.last = Some(self.unreached(&self.name(id)));
    }

    fn name(&self, id: EndpointId) -> String {
        let state = self.node.state();
        let node = crate::node::node_id(id);
        let rows = state.directory.nodes(self.node.now());
        rows.into_iter().find(|row| row.id == node).map_or_else(|| node.short(), |row| row.name)
    }

    fn nonsense(&self, link: &Link) -> Rejection {
        let name = self.name(link.connection.remote_id());
        Rejection::failed(format!(
            "node {name} answered something that nobody asked for; its version may be too old or too new"
        ))
    }

    fn unreached(&self, name: &str) -> Rejection {
        let what = format!("node {name}, which serves `{}`, does not answer; try again", self.model);
        Rejection::unavailable("node_unreachable", what, Duration::from_secs(1))
    }

    fn nobody(&self) -> Rejection {
        let lost = self.node.state().directory.lost_offers(&self.model, self.node.now());
        let lost: Vec<String> = lost.into_iter().map(|(name, _)| name).take(NAMED_MAX).collect();
        let why = if lost.is_empty() { String::new() } else { format!(" ({} does not answer)", lost.join(", ")) };
        let what = format!("no node serves `{}` at the moment{why}; try again, or see GET /v1/models", self.model);
        Rejection {
            retry_after: Some(Duration::from_secs(2)),
            ..Rejection::new(RejectionKind::Unavailable, "model_gone", what)
        }
    }
}

async fn open(link: &Link, call: &Encoded) -> Result<(SendStream, RecvStream), String> {
    let (mut send, recv) = link.connection.open_bi().await.map_err(|error| error.to_string())?;
    wire::write_encoded(&mut send, &call.0).await.map_err(|error| error.to_string())?;
    send.finish().map_err(|error| error.to_string())?;
    Ok((send, recv))
}

/// A request as it is sent, no larger than it is read.
struct Encoded(Vec<u8>);

impl Encoded {
    fn of(call: &Call) -> Result<Self, Rejection> {
        let bytes = codec::encode(call);
        if bytes.len() <= CALL_BYTES_MAX {
            return Ok(Self(bytes));
        }
        let what = format!(
            "the request has {} bytes, and another machine takes {CALL_BYTES_MAX}; ask the machine itself, or shorten it",
            bytes.len()
        );
        Err(Rejection::new(RejectionKind::Invalid, "request_too_large", what))
    }
}

/// An answer under way.
struct Answering {
    way: Way,
    ask: Ask,
    state: At,
}

enum At {
    /// Nothing of the answer has come: another node may be asked.
    Before(Begun),
    /// Something has.
    Within(Begun),
    Over,
}

impl Answering {
    async fn next(mut self) -> Option<(Result<Part, EngineError>, Self)> {
        loop {
            let (mut begun, within) = match std::mem::replace(&mut self.state, At::Over) {
                At::Before(begun) => (begun, false),
                At::Within(begun) => (begun, true),
                At::Over => return None,
            };
            let why = match wire::read::<Said>(&mut begun.recv, SAID_BYTES_MAX, None).await {
                Ok(Some(Said::Part(part))) => {
                    let counts = !matches!(part, Part::Queued { .. } | Part::Prefill { .. });
                    if counts && !within {
                        self.way.noted(&begun.link);
                    }
                    self.state = match (&part, within || counts) {
                        (Part::Finished(_), _) => At::Over,
                        (_, true) => At::Within(begun),
                        (_, false) => At::Before(begun),
                    };
                    return Some((Ok(part), self));
                }
                Ok(Some(Said::Broke(error))) => error.to_string(),
                Ok(Some(_)) => "it said something that belongs to no answer".into(),
                Ok(None) => "its answer ended before it was whole".into(),
                Err(error) => error.to_string(),
            };
            let name = self.way.name(begun.link.connection.remote_id());
            self.way.failed(&begun.link, why.clone());
            if within {
                let what = format!("node {name} did not finish the answer: {why}");
                return Some((Err(EngineError::Failed { what: what.into() }), self));
            }
            match self.way.begin(&self.ask).await {
                Ok(begun) => self.state = At::Before(begun),
                Err(rejection) => {
                    let what = format!(
                        "node {name} failed before it answered ({why}), and no other took the request: {rejection}"
                    );
                    return Some((Err(EngineError::Failed { what: what.into() }), self));
                }
            }
        }
    }
}
