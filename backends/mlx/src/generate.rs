//! One generation: the longest cached prefix, prefill in chunks, decode one step ahead of reading.

use std::time::{Duration, Instant};

use mesh_core::{Event, FinishReason, Timings, Usage};
use mesh_graph::{CausalModel, LayerCache, Rows, memory};
use mlx_rs::{Array, error::Exception, transforms};

use crate::{device::gate, sampler::Sampler};

/// A model with what it remembers of the last generation.
pub struct Session {
    model: Box<dyn CausalModel>,
    cache: Vec<LayerCache>,
    /// The tokens that `cache` holds.
    held: Vec<u32>,
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
        Self { model, cache, held: Vec::new(), chunk_tokens: chunk_tokens.max(1) as usize }
    }

    /// Forgets everything, as after an error.
    pub fn forget(&mut self) {
        self.cache = self.model.new_cache();
        self.held.clear();
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
        let known = common_prefix(&self.held, prompt).min(prompt.len() - 1);
        self.truncate(known);
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
            transforms::eval(self.cache.iter().flat_map(LayerCache::arrays))?;
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

    fn truncate(&mut self, length: usize) {
        self.held.truncate(length);
        for layer in &mut self.cache {
            layer.trim(length as i32);
        }
    }
}

fn common_prefix(a: &[u32], b: &[u32]) -> usize {
    a.iter().zip(b).take_while(|(a, b)| a == b).count()
}
