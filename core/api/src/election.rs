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
    if let Some((backend, offer)) = best(ballots.iter(), |backend| request.opt_in || backend.opt_in.is_none()) {
        return Ok(elected(backend, offer));
    }
    if let Some((backend, _)) = best(ballots.iter(), |_| true) {
        return Err(ElectionError::NotAskedFor {
            model: request.model.clone(),
            backend: backend.id,
            command: command(backend, &request.model),
        });
    }
    Err(ElectionError::Nobody { model: request.model.clone(), refusals: refusals(&ballots) })
}

/// The highest score, of those that may and would serve.
fn best<'b>(
    ballots: impl Iterator<Item = &'b &'b Ballot>,
    may: impl Fn(&BackendInfo) -> bool,
) -> Option<(&'static BackendInfo, &'b Offer)> {
    let offers = ballots.filter(|ballot| may(ballot.backend)).filter_map(|ballot| match &ballot.verdict {
        Verdict::Serve(offer) => Some((ballot.backend, offer)),
        Verdict::Refuse(_) => None,
    });
    offers.reduce(|best, next| if next.1.score > best.1.score { next } else { best })
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
            let other = best(ballots.iter(), |_| true);
            Err(ElectionError::ForcedRefused {
                model: request.model.clone(),
                backend: ballot.backend.id,
                refusal: refusal.clone(),
                command: other.map(|(backend, _)| command(backend, &request.model)),
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

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;
    use crate::{
        backend::{DeviceKind, OptIn},
        capability::{OutputForm, PromptForm},
    };

    static PLAIN: BackendInfo = BackendInfo { id: "plain", title: "", formats: &[], opt_in: None };
    static OTHER: BackendInfo = BackendInfo { id: "other", title: "", formats: &[], opt_in: None };
    static SHY: BackendInfo =
        BackendInfo { id: "shy", title: "", formats: &[], opt_in: Some(OptIn { flag: "--shy", notice: "careful" }) };

    fn serve(backend: &'static BackendInfo, score: u32) -> Ballot {
        let capabilities = Capabilities {
            prompt: PromptForm::Text,
            output: OutputForm::Text,
            knobs: BTreeSet::new(),
            context_tokens_max: 1,
            requests_parallel_max: 1,
            requests_queued_max: 0,
            prefix_reuse: false,
            embeddings: false,
            vision: false,
        };
        let device = Device { kind: DeviceKind::Cpu, name: String::new(), memory_bytes: None };
        let offer = Offer { capabilities, device, memory_bytes: None, score, reasons: Vec::new() };
        Ballot { backend, verdict: Verdict::Serve(offer) }
    }

    fn refuse(backend: &'static BackendInfo, why: &str) -> Ballot {
        Ballot { backend, verdict: Verdict::Refuse(Refusal::because(Reason::new(why))) }
    }

    fn request(forced: Option<&str>, opt_in: bool) -> ElectionRequest {
        ElectionRequest { model: "a model".into(), forced: forced.map(str::to_owned), opt_in }
    }

    #[test]
    fn the_best_score_wins_and_ties_go_by_name() {
        let id = |ballots: &[Ballot]| elect(ballots, &request(None, false)).map(|elected| elected.backend.id);
        assert_eq!(id(&[serve(&PLAIN, 1), serve(&OTHER, 2)]), Ok("other"));
        assert_eq!(id(&[serve(&PLAIN, 2), serve(&OTHER, 1)]), Ok("plain"));
        assert_eq!(id(&[serve(&PLAIN, 1), serve(&OTHER, 1)]), Ok("other"));
    }

    #[test]
    fn a_backend_that_has_to_be_asked_for_is_not_elected_unasked() {
        let ballots = [refuse(&PLAIN, "no"), serve(&SHY, 9)];
        let error = elect(&ballots, &request(None, false)).unwrap_err();
        let command = "mesh-llm --model 'a model' --shy".to_owned();
        assert_eq!(error, ElectionError::NotAskedFor { model: "a model".into(), backend: "shy", command });
        for asked in [request(Some("shy"), false), request(None, true)] {
            let elected = elect(&ballots, &asked).unwrap();
            assert_eq!((elected.backend.id, elected.notice), ("shy", Some("careful")));
        }
        // Of several, the best is the one to ask for.
        static ASIDE: BackendInfo = BackendInfo { id: "aside", ..SHY };
        let error = elect(&[serve(&ASIDE, 8), serve(&SHY, 9)], &request(None, false)).unwrap_err();
        assert!(matches!(error, ElectionError::NotAskedFor { backend: "shy", .. }), "{error}");
        // A lower score elsewhere still wins while it is not asked for.
        let elected = elect(&[serve(&PLAIN, 1), serve(&SHY, 9)], &request(None, false)).unwrap();
        assert_eq!((elected.backend.id, elected.notice), ("plain", None));
    }

    #[test]
    fn a_forced_backend_that_refuses_is_never_replaced() {
        let ballots = [serve(&PLAIN, 9), refuse(&OTHER, "it is not mine")];
        match elect(&ballots, &request(Some("other"), true)).unwrap_err() {
            ElectionError::ForcedRefused { backend, refusal, command, .. } => {
                assert_eq!((backend, refusal.to_string().as_str()), ("other", "it is not mine"));
                assert_eq!(command.as_deref(), Some("mesh-llm --model 'a model' --backend plain"));
            }
            error => panic!("{error}"),
        }
    }

    #[test]
    fn unknown_names_and_hopeless_models_say_what_there_is() {
        let ballots = [refuse(&PLAIN, "too large"), refuse(&OTHER, "not mine")];
        let unknown = elect(&ballots, &request(Some("abacus"), false)).unwrap_err();
        assert_eq!(unknown.to_string(), "no backend is called `abacus`; there are: other, plain");
        let nobody = elect(&ballots, &request(None, false)).unwrap_err();
        assert_eq!(nobody.to_string(), "no backend can serve a model: other: not mine; plain: too large");
    }
}
