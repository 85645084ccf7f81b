//! Who is asked: the peer from which the answer's first token is expected soonest; and whether a peer is asked at all.

#[cfg(test)]
mod tests;

use std::{cmp::Ordering, sync::Arc, time::Duration};

use mesh_core::node::ModelOffer;
use serde::{Deserialize, Serialize};

use crate::NodeId;

/// An offer that may be routed to.
#[derive(Clone, Debug, PartialEq)]
pub struct Candidate {
    /// Whose.
    pub node: NodeId,
    /// What the node is called.
    pub name: String,
    /// The offer.
    pub offer: Arc<ModelOffer>,
    /// How long a message goes there and back, if that is known.
    pub round_trip: Option<Duration>,
    /// Time since the node was last heard.
    pub silent: Duration,
    /// How late the next pulse of a connected node is.
    pub overdue: Duration,
    /// Whether there is a connection.
    pub connected: bool,
    /// Tokens of the prompt that it probably has read before.
    pub cached_tokens: u32,
}

/// What is asked for.
#[derive(Clone, Copy, Debug, Default)]
pub struct Asked<'a> {
    /// Tokens of the prompt, about.
    pub prompt_tokens: u32,
    /// Most tokens of the answer, if the request says.
    pub answer_tokens_max: Option<u32>,
    /// Nodes that must not be asked, such as those that have failed this request.
    pub excluded: &'a [NodeId],
}

/// Who goes first, of this machine and others.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Prefer {
    /// This machine, if the model is ready here.
    #[default]
    LocalReady,
    /// Whoever is expected to answer sooner.
    Fastest,
}

/// What comes first where the model is here and not loaded.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Cold {
    /// A peer that has it ready.
    #[default]
    PeersFirst,
    /// Loading it.
    LocalFirst,
}

/// All numbers that decide.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Policy {
    /// Who goes first, of this machine and others.
    pub prefer: Prefer,
    /// What comes first where the model is here and not loaded.
    pub cold: Cold,
    /// Prompt tokens a second, before any were measured.
    pub prefill_per_s: f32,
    /// Answer tokens a second, before any were measured.
    pub decode_per_s: f32,
    /// The round trip to a node that was never measured, in milliseconds.
    pub round_trip_ms: f32,
    /// Tokens of the prompts that others wait with.
    pub prompt_tokens: f32,
    /// Tokens of the answers that others wait for.
    pub answer_tokens: f32,
    /// How much slower a prompt is read where all places are taken: 0.5 is half as long again.
    pub company: f32,
    /// What a token that was probably read before counts: 1 as if it need not be read at all, 0 nothing.
    pub affinity: f32,
    /// How much of the answer's own time counts: 0 decides by the first token alone, 1 by the last.
    pub answer: f32,
    /// What asking a dead node costs, in milliseconds.
    pub failed_try_ms: f32,
    /// How probably a node dies in a second of silence.
    pub hazard_per_s: f32,
    /// The same, of a second by which a pulse is late.
    pub overdue_hazard_per_s: f32,
    /// Differences below this part are none: 0.1 is a tenth. The salt decides then, so that not everybody goes to the same
    /// node.
    pub tie: f32,
    /// Differences below this are none, in milliseconds.
    pub tie_ms: f32,
}

impl Default for Policy {
    fn default() -> Self {
        Self {
            prefer: Prefer::default(),
            cold: Cold::default(),
            prefill_per_s: 500.0,
            decode_per_s: 20.0,
            round_trip_ms: 50.0,
            prompt_tokens: 500.0,
            answer_tokens: 200.0,
            company: 0.5,
            affinity: 1.0,
            answer: 0.1,
            failed_try_ms: 2000.0,
            hazard_per_s: 0.002,
            overdue_hazard_per_s: 2.0,
            tie: 0.1,
            tie_ms: 5.0,
        }
    }
}

/// How long a candidate is expected to take.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Expected {
    /// To ask it: a round trip, and one more where a connection has to be made.
    pub travel: Duration,
    /// Until a place is free.
    pub wait: Duration,
    /// Reading what it has not read before.
    pub prefill: Duration,
    /// What counts of the time that the answer itself takes.
    pub answer: Duration,
    /// What asking a dead node costs, times the probability that it is dead.
    pub risk: Duration,
    /// All of that.
    pub total: Duration,
    /// Nobody may wait there any more, or the prompt is too long: it is asked last.
    pub full: bool,
}

/// The longest time that is expected: numbers from others stay small enough to be added.
const EXPECTED_MAX: Duration = Duration::from_secs(24 * 3600);

fn seconds(seconds: f64) -> Duration {
    // Not a number becomes zero here, which `max` does.
    Duration::try_from_secs_f64(seconds.max(0.0)).unwrap_or(EXPECTED_MAX).min(EXPECTED_MAX)
}

fn speed(measured: Option<f32>, assumed: f32) -> f64 {
    let assumed = f64::from(assumed).max(f64::from(f32::MIN_POSITIVE));
    measured.map(f64::from).filter(|speed| speed.is_finite() && *speed > 0.0).unwrap_or(assumed)
}

/// How long a place is taken by somebody else's request, in seconds.
fn service_s(prefill_per_s: f64, decode_per_s: f64, policy: &Policy) -> f64 {
    f64::from(policy.prompt_tokens) / prefill_per_s + f64::from(policy.answer_tokens) / decode_per_s
}

/// How long the next one waits for a place, in seconds.
fn wait_s(running: u32, waiting: u32, parallel: u32, service_s: f64) -> f64 {
    let (present, parallel) = (u64::from(running) + u64::from(waiting), u64::from(parallel.max(1)));
    let before = (present + 1).saturating_sub(parallel);
    before as f64 * service_s / parallel as f64
}

/// How long a candidate is expected to take.
pub fn expect(candidate: &Candidate, asked: &Asked, policy: &Policy) -> Expected {
    let ModelOffer { load, capabilities, .. } = &*candidate.offer;
    let prefill_per_s = speed(load.prefill_per_s, policy.prefill_per_s);
    let decode_per_s = speed(load.decode_per_s, policy.decode_per_s);

    let round_trip = candidate.round_trip.unwrap_or_else(|| seconds(f64::from(policy.round_trip_ms) / 1e3));
    let travel = (round_trip * if candidate.connected { 1 } else { 2 }).min(EXPECTED_MAX);

    let parallel = capabilities.requests_parallel_max.max(1);
    let service_s = service_s(prefill_per_s, decode_per_s, policy);
    let wait = seconds(wait_s(load.running, load.waiting, parallel, service_s));

    let cached = if capabilities.prefix_reuse { candidate.cached_tokens.min(asked.prompt_tokens) } else { 0 };
    let read = f64::from(asked.prompt_tokens) - f64::from(cached) * f64::from(policy.affinity.clamp(0.0, 1.0));
    let company = f64::from(load.running.min(parallel)) / f64::from(parallel) * f64::from(policy.company.max(0.0));
    let prefill = seconds(read / prefill_per_s * (1.0 + company));

    let answer_tokens =
        asked.answer_tokens_max.map_or(policy.answer_tokens, |max| policy.answer_tokens.min(max as f32));
    let answer = seconds(f64::from(policy.answer) * f64::from(answer_tokens) / decode_per_s);

    let hazard = f64::from(policy.hazard_per_s) * candidate.silent.as_secs_f64()
        + f64::from(policy.overdue_hazard_per_s) * candidate.overdue.as_secs_f64();
    let risk = seconds((1.0 - (-hazard.max(0.0)).exp()) * f64::from(policy.failed_try_ms) / 1e3);

    let no_place = load.running >= parallel && load.waiting >= capabilities.requests_queued_max;
    let too_long = asked.prompt_tokens > capabilities.context_tokens_max;
    let total = (travel + wait + prefill + answer + risk).min(EXPECTED_MAX);
    Expected { travel, wait, prefill, answer, risk, total, full: no_place || too_long }
}

/// Who is asked.
#[derive(Clone, Debug, PartialEq)]
pub struct Choice {
    /// The one.
    pub node: NodeId,
    /// All, best first: should one fail before its first token, the next may be asked.
    pub ranked: Vec<(NodeId, Expected)>,
    /// Why, a line for each of the first few.
    pub reasons: Vec<String>,
}

/// Candidates that get a line of reasons.
const REASONS_MAX: usize = 5;

/// Who is asked, if there is anybody. What `salt` is decides among equals: each node should have its own, and may change it
/// from request to request.
pub fn choose(candidates: &[Candidate], asked: &Asked, policy: &Policy, salt: u64) -> Option<Choice> {
    let wanted = candidates.iter().filter(|candidate| !asked.excluded.contains(&candidate.node));
    let mut all: Vec<_> = wanted
        .map(|candidate| {
            let expected = expect(candidate, asked, policy);
            let key = (expected.full, step(expected.total, policy), mix(&candidate.node, salt));
            (key, candidate, expected)
        })
        .collect();
    all.sort_by(|(one, a, _), (other, b, _)| one.cmp(other).then_with(|| a.node.cmp(&b.node)));
    let reasons = all.iter().take(REASONS_MAX).map(|(_, candidate, expected)| reason(candidate, expected)).collect();
    let ranked: Vec<_> = all.iter().map(|(_, candidate, expected)| (candidate.node, *expected)).collect();
    Some(Choice { node: ranked.first()?.0, ranked, reasons })
}

/// Times that are as good as equal are in the same step. (Comparing each with each by a tolerance would be no order.)
fn step(total: Duration, policy: &Policy) -> u64 {
    let (total, least) = (total.as_secs_f64() * 1e3, f64::from(policy.tie_ms.max(0.0)));
    if policy.tie <= 0.0 {
        return (total * 1e6) as u64;
    }
    ((total + 1e-6) / (least + 1e-6)).ln().max(0.0).div_euclid(f64::from(policy.tie).ln_1p()) as u64
}

/// A node's place among equals.
fn mix(node: &NodeId, salt: u64) -> u64 {
    let hash = blake3::Hasher::new().update(&node.0).update(&salt.to_le_bytes()).finalize();
    u64::from_le_bytes(hash.as_bytes()[..8].try_into().expect("eight bytes"))
}

fn reason(candidate: &Candidate, expected: &Expected) -> String {
    let parts = [
        ("on the way", expected.travel),
        ("in line", expected.wait),
        ("reading", expected.prefill),
        ("writing", expected.answer),
        ("at risk", expected.risk),
    ];
    let parts = parts.iter().filter(|(_, time)| !time.is_zero());
    let parts: Vec<String> = parts.map(|(what, time)| format!("{} ms {what}", time.as_millis())).collect();
    let full = if expected.full { ", full" } else { "" };
    let cached = match candidate.cached_tokens {
        0 => String::new(),
        tokens => format!(", about {tokens} tokens read before"),
    };
    let total = expected.total.as_millis();
    format!("{} ({}): {total} ms ({}){cached}{full}", candidate.name, candidate.node.short(), parts.join(", "))
}

/// How the model is on this machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LocalState {
    /// It is not there.
    NotHere,
    /// It is there and not loaded.
    Cold,
    /// It is loaded.
    Ready {
        /// Requests that are computed.
        running: u32,
        /// Requests in line.
        waiting: u32,
        /// Requests that are computed at the same time.
        parallel: u32,
    },
}

/// Where a request goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// To this machine's engine.
    Here,
    /// To a peer.
    There,
    /// To this machine, which has to load the model.
    LoadHere,
    /// Nobody can serve it.
    Nowhere,
}

/// Where a request goes, and why. `best` is what is expected of the best peer, if there is one.
pub fn place(local: LocalState, best: Option<&Expected>, policy: &Policy) -> (Place, String) {
    let with_place = best.filter(|best| !best.full);
    match (local, best) {
        (LocalState::Ready { running, waiting, parallel }, _) => {
            let (prefill_per_s, decode_per_s) = (speed(None, policy.prefill_per_s), speed(None, policy.decode_per_s));
            let wait = seconds(wait_s(running, waiting, parallel, service_s(prefill_per_s, decode_per_s, policy)));
            match (policy.prefer, with_place) {
                // Reading and writing take as long here as there, as far as anybody knows.
                (Prefer::Fastest, Some(best)) if (best.travel + best.wait + best.risk).cmp(&wait) == Ordering::Less => {
                    let there = (best.travel + best.wait + best.risk).as_millis();
                    (Place::There, format!("a peer begins in {there} ms, this machine in {} ms", wait.as_millis()))
                }
                (Prefer::Fastest, _) => (Place::Here, format!("ready here, and free in {} ms", wait.as_millis())),
                (Prefer::LocalReady, _) => (Place::Here, "ready here".to_owned()),
            }
        }
        (LocalState::Cold, _) => match (policy.cold, with_place, best) {
            (Cold::PeersFirst, Some(best), _) => {
                (Place::There, format!("ready at a peer in {} ms, not loaded here", best.total.as_millis()))
            }
            (Cold::PeersFirst, None, Some(_)) => {
                (Place::LoadHere, "not loaded here, and the peers are full".to_owned())
            }
            (Cold::PeersFirst, None, None) => (Place::LoadHere, "not loaded here, and no peer has it ready".to_owned()),
            (Cold::LocalFirst, ..) => (Place::LoadHere, "not loaded here, which goes before peers".to_owned()),
        },
        (LocalState::NotHere, Some(best)) => {
            (Place::There, format!("not on this machine, ready at a peer in {} ms", best.total.as_millis()))
        }
        (LocalState::NotHere, None) => (Place::Nowhere, "not on this machine, and no peer has it ready".to_owned()),
    }
}
