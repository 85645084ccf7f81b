//! Reading prompts: places, what is known, chunks.

use mesh_core::Event;
use mesh_graph::{Rows, memory};
use mlx_rs::{Array, error::Exception, transforms};

use super::Runner;
use crate::{device::gate, group::Group, memory::CHUNK_BYTES_MAX, schedule::Id, watchdog::Doing};

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
        let reading = self.reading.iter().filter_map(|id| self.sequences.get(id));
        let read: u64 = reading.map(|sequence| self.footprint.bytes(sequence.tokens.len() as u64)).sum();
        let left = self.limits.memory_bytes.saturating_sub(read).saturating_sub(self.written_bytes());
        self.remembered.evict(left.min(self.limits.remembered_bytes_max));
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
        self.sequences.insert(id, sequence);
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
            if let Some(mut cache) = self.remembered.recall(&sequence.tokens, sequence.long)? {
                let known = cache.len() as usize;
                cache.expect(sequence.tokens.len() as i32);
                sequence.cached += known - has;
                sequence.cache = Some(cache);
            }
        }
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
        let read = {
            let _gate = gate();
            let _doing = self.shared.doing(Doing::Read);
            cache.expect(sequence.tokens.len() as i32);
            let input = Array::from_slice(chunk, &[1, chunk.len() as i32]);
            // The logits are not evaluated, only what later steps read.
            let read =
                self.model.forward(&input, &mut cache, Rows::Last).and_then(|_| transforms::eval(cache.arrays()));
            memory::clear_cache();
            read
        };
        read?;
        let (sequence, shared) = (&*sequence, &self.shared);
        sequence.outlet.tell(Event::Prefill {
            done: end.min(sequence.prompt) as u32,
            total: sequence.prompt as u32,
            cached: sequence.cached as u32,
        });
        {
            let _gate = gate();
            let _doing = shared.doing(Doing::Remember);
            let (tokens, long) = (&sequence.tokens[..end], sequence.long);
            self.remembered.keep(tokens, long, &cache)?;
            // A chunk's end is worth a point only until the next one.
            if self.remembered.needs_points && done > 0 && !sequence.is_landmark(done) {
                self.remembered.drop_point(&tokens[..done], long);
            }
            if sequence.landmarks.preamble_end.is_some_and(|preamble| (done..=end).contains(&(preamble as usize))) {
                let preamble = sequence.landmarks.preamble_end.unwrap_or(0) as usize;
                self.remembered.pin(&tokens[..preamble], long)?;
            }
        }
        if let Some(sequence) = self.sequences.get_mut(&id) {
            sequence.cache = Some(cache);
        }
        self.forget_what_is_in_the_way();
        self.begin_writing_if_read(id)
    }
}
