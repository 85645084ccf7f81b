//! Reading prompts: places, what is known, chunks.

use mesh_core::Event;
use mesh_graph::{Rows, memory};
use mlx_rs::{Array, error::Exception, transforms};

use super::Runner;
use crate::{device::gate, group::Group, memory::CHUNK_BYTES_MAX, schedule::Id, sequence::Sequence, watchdog::Doing};

/// Freed buffers that may stay for the next chunk, in bytes: those of a short one. What a long chunk leaves behind fits
/// nothing else; but buffers that go back to the system have to be mapped anew, which on CUDA takes longer than to compute
/// a short chunk.
const FREED_BYTES_MAX: u64 = 64 << 20;

impl Runner {
    pub(super) fn admit(&mut self, id: Id) {
        self.waiting.retain(|other| *other != id);
        let Some(sequence) = self.sequences.get_mut(&id) else { return };
        sequence.turns = 0;
        self.reading.push(id);
        let running = self.reading.len() + self.writing.iter().map(|group| group.rows.len()).sum::<usize>();
        let own_bytes = self.footprint.bytes(sequence.tokens.len() as u64);
        tracing::debug!(
            request = sequence.job,
            tokens = sequence.tokens.len(),
            own_bytes,
            running,
            waiting = self.waiting.len(),
            remembered_bytes = self.remembered.bytes(),
            memory_bytes = self.limits.memory_bytes,
            "let in"
        );
        self.forget_what_is_in_the_way();
        // A prompt that is known up to its last token, or has no other, is read already.
        if let Err(error) = self.look_up(id) {
            self.broke(&[id], &error);
        }
    }

    /// Keeps what is remembered within the memory that sequences leave.
    pub(super) fn forget_what_is_in_the_way(&mut self) {
        let room = self.room_to_remember();
        if self.remembered.bytes() > room {
            // What goes to a file is read from the device.
            let _gate = gate();
            let _doing = self.shared.doing(Doing::Remember);
            self.remembered.evict(room);
        }
    }

    /// Bytes that sequences leave to what is remembered.
    pub(super) fn room_to_remember(&self) -> u64 {
        let sequences = self.read_bytes().saturating_add(self.written_bytes());
        self.memory_now.saturating_sub(sequences).min(self.limits.remembered_bytes_max)
    }

    /// Bytes that prompts take once they are read, and texts once they are vectors.
    pub(super) fn read_bytes(&self) -> u64 {
        let reading = self.reading.iter().filter_map(|id| self.sequences.get(id));
        let reading = reading.map(|sequence| self.footprint.bytes(sequence.tokens.len() as u64));
        let embedding = self.next_embedding().map_or(0, |next| next.bytes);
        reading.fold(embedding, u64::saturating_add)
    }

    pub(super) fn preempt(&mut self, id: Id) {
        // The token that was drawn for it is read first, or it would be lost.
        if let Some(at) = self.writing.iter().position(|group| group.rows.contains(&id)) {
            let group = self.writing.swap_remove(at);
            if let Some(group) = self.settle(group) {
                self.writing.push(group);
            }
        }
        let cache = self.withdraw(id);
        let Some(sequence) = self.sequences.remove(&id) else { return };
        tracing::info!(request = sequence.job, tokens = sequence.tokens.len(), "memory is short: it waits again");
        if let Some(cache) = cache {
            self.remember(&sequence, &cache);
        }
        // What it finds known later, it has computed itself.
        self.sequences.insert(id, Sequence { computed_before: true, ..sequence });
        self.waiting.insert(0, id);
        self.forget_what_is_in_the_way();
    }

    /// Takes over what is known of a sequence's tokens, if that is more than it has.
    pub(super) fn look_up(&mut self, id: Id) -> Result<(), Exception> {
        let Some(sequence) = self.sequences.get_mut(&id) else { return Ok(()) };
        let has = sequence.cache.as_ref().map_or(0, |cache| cache.len() as usize);
        if self.remembered.known(&sequence.tokens, sequence.long) > has {
            let _gate = gate();
            let _doing = self.shared.doing(Doing::Recall);
            let since = std::time::Instant::now();
            match self.remembered.recall(&sequence.tokens, sequence.long) {
                Ok(Some(mut cache)) => {
                    let known = cache.len() as usize;
                    let ms = since.elapsed().as_secs_f64() * 1000.0;
                    tracing::debug!(request = sequence.job, known, ms, "taken up");
                    cache.expect(sequence.tokens.len() as i32);
                    sequence.cached += if sequence.computed_before { 0 } else { known.saturating_sub(has) };
                    sequence.cache = Some(cache);
                }
                Ok(None) => {}
                // It is computed as if it had not been known.
                Err(error) => tracing::warn!(request = sequence.job, "not taken up: {}", error.what()),
            }
        }
        self.forget_what_is_in_the_way();
        let Some(sequence) = self.sequences.get_mut(&id) else { return Ok(()) };
        if sequence.written() == 0 {
            let done = sequence.cache.as_ref().map_or(0, |cache| cache.len() as u32);
            let cached = sequence.cached as u32;
            sequence.outlet.tell(Event::Prefill { done, total: sequence.prompt as u32, cached });
        }
        self.begin_writing_if_read(id)
    }

    /// Moves a sequence whose tokens are all read but the last to those who write.
    pub(super) fn begin_writing_if_read(&mut self, id: Id) -> Result<(), Exception> {
        let Some(sequence) = self.sequences.get_mut(&id) else { return Ok(()) };
        let done = sequence.cache.as_ref().map_or(0, |cache| cache.len() as usize);
        let Some((last, before)) = sequence.tokens.split_last() else { return Ok(()) };
        if done < before.len() {
            return Ok(());
        }
        sequence.sampler.begin(before, sequence.prompt);
        let cache = sequence.cache.take().unwrap_or_else(|| self.model.new_cache());
        self.writing.push(Group::new(id, cache, *last));
        self.reading.retain(|other| *other != id);
        Ok(())
    }

    pub(super) fn read(&mut self, id: Id, tokens: u32) {
        let result = self.look_up(id).and_then(|()| self.read_chunk(id, tokens));
        if let Err(error) = result {
            self.broke(&[id], &error);
        }
    }

    fn read_chunk(&mut self, id: Id, tokens: u32) -> Result<(), Exception> {
        if !self.reading.contains(&id) {
            return Ok(());
        }
        let room = self.room_to_remember();
        let Some(sequence) = self.sequences.get_mut(&id) else { return Ok(()) };
        sequence.turns += 1;
        let mut cache = sequence.cache.take().unwrap_or_else(|| self.model.new_cache());
        let done = cache.len() as usize;
        // The last token is held back: its step gives the first logits.
        let tokens = self.sizes.chunk_within(tokens, sequence.tokens.len() as u64, CHUNK_BYTES_MAX);
        let mut end = (done + tokens as usize).min(sequence.tokens.len() - 1);
        if self.remembered.needs_points
            && let Some(landmark) = sequence.next_landmark(done)
        {
            end = end.min(landmark);
        }
        let chunk = &sequence.tokens[done..end];
        let since = std::time::Instant::now();
        let read = {
            let _gate = gate();
            let _doing = self.shared.doing(Doing::Read);
            cache.expect(sequence.tokens.len() as i32);
            let input = Array::from_slice(chunk, &[1, chunk.len() as i32]);
            // The logits are not evaluated, only what later steps read.
            let read =
                self.model.forward(&input, &mut cache, Rows::Last).and_then(|_| transforms::eval(cache.arrays()));
            memory::clear_cache_beyond(FREED_BYTES_MAX);
            read
        };
        read?;
        let read_ms = since.elapsed().as_secs_f64() * 1000.0;
        let (sequence, shared) = (&*sequence, &self.shared);
        sequence.outlet.tell(Event::Prefill {
            done: end.min(sequence.prompt) as u32,
            total: sequence.prompt as u32,
            cached: sequence.cached as u32,
        });
        let mut own_point = None;
        {
            let _gate = gate();
            let _doing = shared.doing(Doing::Remember);
            let (tokens, long) = (&sequence.tokens[..end], sequence.long);
            let kept = self.remembered.keep(tokens, long, &cache, room).and_then(|kept| {
                // A chunk's end is worth a point only until the next one; others' points are not ours to drop.
                if let Some(own) = sequence.own_point.filter(|_| kept) {
                    self.remembered.drop_point(&tokens[..own], long);
                }
                own_point = (kept && self.remembered.needs_points && !sequence.is_landmark(end)).then_some(end);
                match sequence.landmarks.preamble_end.map(|preamble| preamble as usize) {
                    Some(preamble) if (done..=end).contains(&preamble) => {
                        self.remembered.pin(&tokens[..preamble], long)
                    }
                    _ => Ok(()),
                }
            });
            // That it is not remembered is no fault of the answer.
            if let Err(error) = kept {
                tracing::warn!(request = sequence.job, "not remembered: {}", error.what());
            }
        }
        if let Some(sequence) = self.sequences.get_mut(&id) {
            let kept_ms = since.elapsed().as_secs_f64() * 1000.0 - read_ms;
            tracing::debug!(request = sequence.job, from = done, to = end, read_ms, kept_ms, "a chunk is read");
            sequence.cache = Some(cache);
            sequence.own_point = own_point;
        }
        self.forget_what_is_in_the_way();
        self.begin_writing_if_read(id)
    }
}
