//! The choice of a backend: pure, explainable, and never a silent fallback.

use std::fmt;

use serde::Serialize;

use crate::{
    backend::{BackendInfo, Device},
    capability::Capabilities,
    error::ElectionError,
    profile::Source,
};

/// One reason behind a verdict, with the fact it rests on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Reason {
    /// A clause such as "`model_type` is `gemma3_text`".
    pub text: String,
    /// Where that is known from.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub source: Option<Source>,
}

impl Reason {
    /// A reason that rests on no file.
    pub fn new(text: impl Into<String>) -> Self {
        Self { text: text.into(), source: None }
    }

    /// A reason that rests on a fact.
    pub fn from_fact(text: impl Into<String>, source: &Source) -> Self {
        Self { text: text.into(), source: Some(source.clone()) }
    }
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.source {
            Some(source) => write!(f, "{} ({source})", self.text),
            None => f.write_str(&self.text),
        }
    }
}

/// "I would serve it like this." What a node advertises is an offer that became ready.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Offer {
    /// What requests may ask of it.
    pub capabilities: Capabilities,
    /// What it would run on.
    pub device: Device,
    /// Memory for weights and one full context, in bytes, where it can be told.
    pub memory_bytes: Option<u64>,
    /// Higher is better; comparable over backends.
    pub score: u32,
    /// Why.
    pub reasons: Vec<Reason>,
}

/// "I cannot serve it."
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Refusal {
    /// Why not.
    pub reasons: Vec<Reason>,
    /// What would help.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub hint: Option<String>,
}

impl Refusal {
    /// A refusal for one reason.
    pub fn because(reason: Reason) -> Self {
        Self { reasons: vec![reason], hint: None }
    }

    /// Adds what would help.
    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let reasons: Vec<_> = self.reasons.iter().map(Reason::to_string).collect();
        f.write_str(&reasons.join("; "))
    }
}

/// A backend's judgement of a model.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Verdict {
    /// It would serve the model.
    Serve(Offer),
    /// It would not.
    Refuse(Refusal),
}

/// One backend's vote.
#[derive(Clone, Debug, Serialize)]
pub struct Ballot {
    /// Whose.
    pub backend: &'static BackendInfo,
    /// The vote.
    pub verdict: Verdict,
}

/// What the user asked of the election.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ElectionRequest {
    /// The model as the user spelled it; quoted in the commands that errors suggest.
    pub model: String,
    /// The one backend that may serve it.
    pub forced: Option<String>,
    /// Whether backends that have to be asked for may be chosen unasked.
    pub opt_in: bool,
}

/// The outcome.
#[derive(Clone, Debug, Serialize)]
pub struct Elected {
    /// Who serves.
    pub backend: &'static BackendInfo,
    /// What it offered.
    pub offer: Offer,
    /// To be printed once, for a backend that had to be asked for.
    pub notice: Option<&'static str>,
}

/// Elects the backend with the highest score among those that may and would serve; ties go to the id that sorts first.
pub fn elect(ballots: &[Ballot], request: &ElectionRequest) -> Result<Elected, ElectionError> {
    let mut ballots: Vec<&Ballot> = ballots.iter().collect();
    ballots.sort_by_key(|ballot| ballot.backend.id);
    if let Some(name) = &request.forced {
        return elect_forced(&ballots, name, request);
    }
    let may = |ballot: &Ballot| request.opt_in || ballot.backend.opt_in.is_none();
    let best = ballots
        .iter()
        .filter(|ballot| may(ballot))
        .filter_map(|ballot| match &ballot.verdict {
            Verdict::Serve(offer) => Some((ballot.backend, offer)),
            Verdict::Refuse(_) => None,
        })
        .reduce(|best, next| if next.1.score > best.1.score { next } else { best });
    if let Some((backend, offer)) = best {
        return Ok(elected(backend, offer));
    }
    if let Some(ballot) = ballots.iter().find(|ballot| matches!(ballot.verdict, Verdict::Serve(_))) {
        return Err(ElectionError::NotAskedFor {
            model: request.model.clone(),
            backend: ballot.backend.id,
            command: command(ballot.backend, &request.model),
        });
    }
    Err(ElectionError::Nobody { model: request.model.clone(), refusals: refusals(&ballots) })
}

fn elect_forced(ballots: &[&Ballot], name: &str, request: &ElectionRequest) -> Result<Elected, ElectionError> {
    let Some(ballot) = ballots.iter().find(|ballot| ballot.backend.id == name) else {
        return Err(ElectionError::UnknownBackend {
            name: name.to_owned(),
            known: ballots.iter().map(|ballot| ballot.backend.id).collect(),
        });
    };
    match &ballot.verdict {
        Verdict::Serve(offer) => Ok(elected(ballot.backend, offer)),
        Verdict::Refuse(refusal) => {
            let other = ballots.iter().find(|ballot| matches!(ballot.verdict, Verdict::Serve(_)));
            Err(ElectionError::ForcedRefused {
                model: request.model.clone(),
                backend: ballot.backend.id,
                refusal: refusal.clone(),
                command: other.map(|ballot| command(ballot.backend, &request.model)),
            })
        }
    }
}

fn elected(backend: &'static BackendInfo, offer: &Offer) -> Elected {
    Elected { backend, offer: offer.clone(), notice: backend.opt_in.map(|opt_in| opt_in.notice) }
}

fn refusals(ballots: &[&Ballot]) -> Vec<(&'static str, Refusal)> {
    ballots
        .iter()
        .filter_map(|ballot| match &ballot.verdict {
            Verdict::Refuse(refusal) => Some((ballot.backend.id, refusal.clone())),
            Verdict::Serve(_) => None,
        })
        .collect()
}

/// The command line that serves `model` with `backend`, quoted for a shell where it has to be.
pub fn command(backend: &BackendInfo, model: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_./:@~+=".contains(c);
    let model = if model.chars().all(plain) { model.to_owned() } else { format!("'{}'", model.replace('\'', r"'\''")) };
    match backend.opt_in {
        Some(opt_in) => format!("mesh-llm --model {model} {}", opt_in.flag),
        None => format!("mesh-llm --model {model} --backend {}", backend.id),
    }
}
