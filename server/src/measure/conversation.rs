//! A conversation, each turn of which repeats all before it.

use mesh_core::{Engine, Job, Landmarks};
use serde::Serialize;

use super::{MeasureError, Spread, Timed, job, time, tokens};

/// A conversation to be had.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Conversation {
    /// How many turns.
    pub turns: u32,
    /// Tokens of the whole, the last answer included.
    pub tokens: u32,
    /// Tokens of each answer.
    pub answer_tokens: u32,
    /// Tokens are drawn below this id.
    pub vocab_size: u32,
}

/// How often the last turn's prompt is asked again, and an unknown one: a first time may be slower for what is made then.
const TIMES: u32 = 3;

/// One turn.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Turn {
    /// Tokens of its prompt.
    pub prompt_tokens: u32,
    /// Of those, how many stood in the turn before, its answer included.
    pub shared_tokens: u32,
    /// How many were not computed again.
    pub cached_tokens: u32,
    /// Time to the first token, in seconds.
    pub ttft_s: f64,
}

/// A conversation that was had.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct ConversationRun {
    /// Its turns.
    pub turns: Vec<Turn>,
    /// The time that the last turn's prompt takes when it is asked again, in seconds: the median of three.
    pub warm_ttft_s: f64,
    /// The time that an unknown prompt of the same length takes, in seconds: the median of three.
    pub cold_ttft_s: f64,
    /// The last turn's prompt, for another engine.
    #[serde(skip)]
    pub last_prompt: Vec<u32>,
}

impl ConversationRun {
    /// The least share of what a turn has in common with the one before that was not computed again.
    pub fn reused_min(&self) -> f64 {
        let shares = self.turns.iter().filter(|turn| turn.shared_tokens > 0);
        shares.map(|turn| f64::from(turn.cached_tokens) / f64::from(turn.shared_tokens)).fold(1.0, f64::min)
    }
}

/// Has the conversation, then asks its last turn again, and an unknown prompt of that length.
pub async fn measure_conversation(
    engine: &dyn Engine,
    conversation: Conversation,
) -> Result<ConversationRun, MeasureError> {
    let Conversation { turns, answer_tokens, vocab_size, .. } = conversation;
    let message = (conversation.tokens / turns.max(1)).saturating_sub(answer_tokens).max(1);
    let (mut history, mut had) = (Vec::new(), Vec::new());
    // Whatever is made at first use is made now.
    let first = tokens(64.min(conversation.tokens), vocab_size, u32::MAX);
    for _ in 0..2 {
        ask(engine, &first, 2).await?;
    }
    let mut last_prompt = Vec::new();
    for turn in 0..turns {
        let shared_tokens = history.len() as u32;
        let prompt = [history, tokens(message, vocab_size, turn)].concat();
        let timed = ask(engine, &prompt, answer_tokens).await?;
        had.push(Turn {
            prompt_tokens: prompt.len() as u32,
            shared_tokens,
            cached_tokens: timed.usage.cached_tokens,
            ttft_s: (timed.first - timed.started).as_secs_f64(),
        });
        history = [&prompt[..], &timed.tokens].concat();
        last_prompt = prompt;
    }
    let (mut warm, mut cold) = (Vec::new(), Vec::new());
    for time in 0..TIMES {
        warm.push(resume_conversation(engine, &last_prompt).await?.0);
        let unknown = tokens(last_prompt.len() as u32, vocab_size, u32::MAX - 1 - time);
        cold.push(resume_conversation(engine, &unknown).await?.0);
    }
    let [warm_ttft_s, cold_ttft_s] = [warm, cold].map(|times| Spread::of(times).median);
    Ok(ConversationRun { turns: had, warm_ttft_s, cold_ttft_s, last_prompt })
}

/// Asks a prompt that may be known: the time to its first token, in seconds, and how many tokens were not computed.
pub async fn resume_conversation(engine: &dyn Engine, prompt: &[u32]) -> Result<(f64, u32), MeasureError> {
    let timed = ask(engine, prompt, 2).await?;
    Ok(((timed.first - timed.started).as_secs_f64(), timed.usage.cached_tokens))
}

async fn ask(engine: &dyn Engine, prompt: &[u32], answer_tokens: u32) -> Result<Timed, MeasureError> {
    let landmarks = Landmarks { message_ends: vec![prompt.len() as u32], preamble_end: None };
    let id = format!("bench-{}", prompt.len());
    time(engine, Job { landmarks, ..job(id, prompt.to_vec(), answer_tokens) }).await
}
