//! One generation: the longest cached prefix, prefill in chunks, decode one step ahead of reading.

use std::time::{Duration, Instant};

use mesh_core::{Event, FinishReason, Timings, Usage};
use mesh_graph::{Cache, CausalModel, Rows, memory};
use mlx_rs::{Array, error::Exception, transforms};

use crate::{device::gate, sampler::Sampler};

/// A model with what it remembers of the last generation.
pub struct Session {
    model: Box<dyn CausalModel>,
    cache: Cache,
    /// The tokens that `cache` holds.
    held: Vec<u32>,
    /// The length that `cache` was made for, which matters to models with a length limit.
    expected: usize,
    chunk_tokens: usize,
}

/// What to generate.
pub struct Request<'a> {
    /// The prompt, at least one token.
    pub prompt: &'a [u32],
    /// Most tokens to generate, at least one.
    pub tokens_max: u32,
    /// Tokens that end it.
    pub eos: &'a [u32],
    /// How tokens are chosen.
    pub sampler: Sampler,
}

/// Told of each event; answers whether to go on.
pub trait Listener {
    /// Returns false once nobody listens any more.
    fn event(&mut self, event: Event) -> bool;
    /// Whether anybody still listens.
    fn listening(&self) -> bool;
}

impl Session {
    /// A session that remembers nothing yet; prompts are computed `chunk_tokens` at a time.
    pub fn new(model: Box<dyn CausalModel>, chunk_tokens: u32) -> Self {
        let cache = model.new_cache();
        Self { model, cache, held: Vec::new(), expected: 0, chunk_tokens: chunk_tokens.max(1) as usize }
    }

    /// Forgets everything, as after an error.
    pub fn forget(&mut self) {
        self.cache = self.model.new_cache();
        self.held.clear();
        self.expected = 0;
    }

    /// Generates until the end, or until nobody listens. Every event but the last goes to `listener`; the last is
    /// returned, or `None` if nobody listened to the end.
    pub fn generate(
        &mut self,
        mut request: Request<'_>,
        listener: &mut dyn Listener,
    ) -> Result<Option<Event>, Exception> {
        let started = Instant::now();
        let prompt = request.prompt;
        // The last prompt token is held back: its step gives the first logits.
        let known = self.keep(common_prefix(&self.held, prompt).min(prompt.len() - 1), prompt.len());
        if !self.prefill(&prompt[known..prompt.len() - 1], known, prompt.len(), listener)? {
            return Ok(None);
        }
        let first = Array::from_slice(&prompt[prompt.len() - 1..], &[1, 1]);
        let mut ahead = self.step(&first, &mut request.sampler)?;
        self.held.push(prompt[prompt.len() - 1]);
        let mut prefill = None;
        let mut generated = 0;
        let reason = loop {
            let current = ahead;
            let is_last = generated + 1 == request.tokens_max;
            if !is_last && !self.make_room(listener)? {
                return Ok(None);
            }
            // Submitted before the current token is read, so that the device does not wait for this thread.
            ahead = if is_last { current.clone() } else { self.step(&current, &mut request.sampler)? };
            let id = current.try_item_exact::<u32>().map_err(|error| Exception::custom(error.to_string()))?;
            prefill.get_or_insert_with(|| started.elapsed());
            generated += 1;
            if !is_last {
                self.held.push(id);
            }
            if request.eos.contains(&id) {
                break FinishReason::Stop;
            }
            if !listener.event(Event::Token { id }) {
                return Ok(None);
            }
            if is_last {
                break FinishReason::Length;
            }
        };
        let prefill: Duration = prefill.unwrap_or_default();
        let usage =
            Usage { prompt_tokens: prompt.len() as u32, cached_tokens: known as u32, completion_tokens: generated };
        let timings = Timings { prefill, decode: started.elapsed().saturating_sub(prefill) };
        Ok(Some(Event::Finished { reason, usage, timings }))
    }

    fn prefill(
        &mut self,
        tokens: &[u32],
        known: usize,
        total: usize,
        listener: &mut dyn Listener,
    ) -> Result<bool, Exception> {
        let mut done = known;
        for chunk in tokens.chunks(self.chunk_tokens) {
            if !listener.listening() {
                return Ok(false);
            }
            let input = Array::from_slice(chunk, &[1, chunk.len() as i32]);
            let submitting = gate();
            // The logits are not evaluated, only what later steps read.
            let _ = self.model.forward(&input, &mut self.cache, Rows::Last)?;
            transforms::eval(self.cache.arrays())?;
            memory::clear_cache();
            drop(submitting);
            self.held.extend_from_slice(chunk);
            done += chunk.len();
            if !listener.event(Event::Prefill { done: done as u32, total: total as u32 }) {
                return Ok(false);
            }
        }
        Ok(true)
    }

    fn step(&mut self, token: &Array, sampler: &mut Sampler) -> Result<Array, Exception> {
        let _submitting = gate();
        let logits = self.model.forward(token, &mut self.cache, Rows::Last)?;
        let next = sampler.draw(&logits)?;
        transforms::async_eval([&next])?;
        Ok(next)
    }

    /// Keeps the first `known` tokens of what is held, or fewer where the cache cannot go back that far; answers how
    /// many. `length` is that of the prompt.
    fn keep(&mut self, known: usize, length: usize) -> usize {
        let limit = self.model.length_limit().map_or(usize::MAX, |limit| limit as usize);
        // On both sides of the limit, what is held of the other is of no use.
        let same_side = (length > limit) == (self.expected > limit);
        if !same_side || self.cache.trim(known as i32).is_err() {
            self.forget();
            self.expected = length;
            self.cache.expect(length as i32);
        }
        self.held.truncate(self.cache.len() as usize);
        self.held.len()
    }

    /// Computes what is held anew if one more token takes it over the model's length limit. Answers whether somebody
    /// still listens.
    fn make_room(&mut self, listener: &mut dyn Listener) -> Result<bool, Exception> {
        let Some(limit) = self.model.length_limit().map(|limit| limit as usize) else { return Ok(true) };
        let length = self.cache.len() as usize + 1;
        if length <= limit || self.expected > limit {
            return Ok(true);
        }
        let held = std::mem::take(&mut self.held);
        self.forget();
        self.expected = length;
        self.cache.expect(length as i32);
        self.prefill(&held, 0, held.len(), &mut Silent(listener))
    }
}

/// Reports nothing: clients have seen these tokens computed before.
struct Silent<'a>(&'a mut dyn Listener);

impl Listener for Silent<'_> {
    fn event(&mut self, _: Event) -> bool {
        self.0.listening()
    }

    fn listening(&self) -> bool {
        self.0.listening()
    }
}

fn common_prefix(a: &[u32], b: &[u32]) -> usize {
    a.iter().zip(b).take_while(|(a, b)| a == b).count()
}
