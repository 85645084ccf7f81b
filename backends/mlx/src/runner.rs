//! The engine's loop on the device thread: performs what [`schedule`] decides.

use std::{
    collections::BTreeMap,
    sync::{Arc, atomic::Ordering},
    thread,
    time::{Duration, Instant},
};

use mesh_core::{EngineError, Event, FinishReason};
use mesh_graph::{Cache, CausalModel, Footprint, Rows, memory};
use mlx_rs::{Array, error::Exception, transforms};
use tokio::sync::mpsc::{Receiver, error::TryRecvError};

use crate::{
    device::gate,
    engine::{Shared, Work},
    group::Group,
    memory::{CHUNK_BYTES_MAX, FreeMemory, Sizes},
    remember::Remembered,
    sampler::{self, Sampler},
    schedule::{self, Id, Limits, Reading, Step, View, Waiting, Writing},
    sequence::{After, Flow, Outlet, Sequence},
    watchdog::Doing,
};

/// How often readers that do not keep up are looked at while nothing else is to be done.
const READER_POLL: Duration = Duration::from_millis(2);

/// Rows of one forward pass.
const ROWS_MAX: usize = 32;

/// A model and everybody it works for.
pub struct Runner {
    model: Box<dyn CausalModel>,
    shared: Arc<Shared>,
    eos: Vec<u32>,
    limits: Limits,
    footprint: Footprint,
    sizes: Sizes,
    free_memory: FreeMemory,
    remembered: Remembered,
    /// Everybody, by arrival.
    sequences: BTreeMap<Id, Sequence>,
    /// In the order in which they are let in.
    waiting: Vec<Id>,
    reading: Vec<Id>,
    writing: Vec<Group>,
    /// What is over, and not yet taken by its reader.
    leaving: Vec<Outlet>,
    next_id: Id,
    chunks: u64,
    wrote_last: bool,
}

/// What a runner starts with.
pub struct Parts {
    /// The model.
    pub model: Box<dyn CausalModel>,
    /// What both sides of the channel see.
    pub shared: Arc<Shared>,
    /// Tokens that end a generation.
    pub eos: Vec<u32>,
    /// Bounds.
    pub limits: Limits,
    /// What sequences take.
    pub footprint: Footprint,
    /// What passes take.
    pub sizes: Sizes,
    /// Tells what memory is free.
    pub free_memory: FreeMemory,
    /// What is known of earlier sequences.
    pub remembered: Remembered,
}

impl Runner {
    /// A runner that nobody has come to yet.
    pub fn new(parts: Parts) -> Self {
        let Parts { model, shared, eos, limits, footprint, sizes, free_memory, remembered } = parts;
        Self {
            model,
            shared,
            eos,
            limits,
            footprint,
            sizes,
            free_memory,
            remembered,
            sequences: BTreeMap::new(),
            waiting: Vec::new(),
            reading: Vec::new(),
            writing: Vec::new(),
            leaving: Vec::new(),
            next_id: 0,
            chunks: 0,
            wrote_last: false,
        }
    }

    /// Serves until the channel is closed and everybody has left, or until the grace of a drain is over.
    pub fn run(mut self, mut inbox: Receiver<Work>) {
        loop {
            let open = self.take_in(&mut inbox);
            if self.shared.cancelled.load(Ordering::Relaxed) || self.shared.state.borrow().is_over() {
                let all = std::mem::take(&mut self.sequences);
                all.into_values().for_each(|sequence| drop(sequence.fail(EngineError::Stopped)));
                return;
            }
            self.see_who_left();
            self.tell_positions();
            match self.decide() {
                Step::Admit(id) => self.admit(id),
                Step::Preempt(id) => self.preempt(id),
                Step::Read { id, tokens } => {
                    self.wrote_last = false;
                    self.chunks += 1;
                    self.read(id, tokens);
                }
                Step::Write => {
                    self.wrote_last = true;
                    self.write();
                }
                Step::Wait if !self.sequences.is_empty() || !self.leaving.is_empty() => thread::sleep(READER_POLL),
                // Nobody waits: what is remembered may go to files.
                Step::Wait if self.save_some() => {}
                Step::Wait if !open => return,
                Step::Wait => match inbox.blocking_recv() {
                    Some(work) => self.arrive(work),
                    None => return,
                },
            }
        }
    }

    fn save_some(&mut self) -> bool {
        let _gate = gate();
        let _doing = self.shared.doing(Doing::Remember);
        self.remembered.save_some()
    }

    /// Takes in whoever has come; answers whether more may come.
    fn take_in(&mut self, inbox: &mut Receiver<Work>) -> bool {
        loop {
            match inbox.try_recv() {
                Ok(work) => self.arrive(work),
                Err(TryRecvError::Empty) => return true,
                Err(TryRecvError::Disconnected) => return false,
            }
        }
    }

    fn arrive(&mut self, work: Work) {
        let Work { job, prompt, tokens_max, events, place } = work;
        let id = self.next_id;
        self.next_id += 1;
        let long = self.is_long(prompt.len());
        let sequence = Sequence {
            id,
            job: job.id,
            prompt: prompt.len(),
            tokens: prompt,
            tokens_max,
            eos: if job.ignore_eos { Vec::new() } else { self.eos.clone() },
            sampler: Sampler::new(&job.sampling, self.model.vocab_size(), rand::random()),
            landmarks: job.landmarks,
            outlet: Outlet::new(events),
            place: Some(place),
            cache: None,
            long,
            cached: 0,
            turns: 0,
            told_ahead: None,
            started: Instant::now(),
            prefill: None,
        };
        self.sequences.insert(id, sequence);
        self.waiting.push(id);
    }

    /// Whether a sequence of so many tokens is computed as those beyond the model's length limit are.
    fn is_long(&self, tokens: usize) -> bool {
        self.model.length_limit().is_some_and(|limit| tokens > limit as usize)
    }

    /// Hands over what readers have room for, lets go of those who left, and keeps those who do not keep up apart.
    fn see_who_left(&mut self) {
        self.leaving.retain_mut(|outlet| outlet.flush() == Flow::Blocked);
        let flows: Vec<(Id, Flow)> =
            self.sequences.iter_mut().map(|(id, sequence)| (*id, sequence.outlet.flush())).collect();
        let lost: Vec<Id> = flows.iter().filter(|(_, flow)| *flow == Flow::Lost).map(|(id, _)| *id).collect();
        for id in &lost {
            if let Some(sequence) = self.sequences.get(id) {
                tracing::debug!(request = sequence.job, "the client left");
            }
            self.release(*id);
        }
        // Whoever is blocked gets a group of its own, which is not stepped.
        let blocked: Vec<Id> = flows.iter().filter(|(_, flow)| *flow == Flow::Blocked).map(|(id, _)| *id).collect();
        for id in blocked {
            self.set_apart(id);
        }
    }

    fn set_apart(&mut self, id: Id) {
        let Some(at) = self.writing.iter().position(|group| group.rows.len() > 1 && group.rows.contains(&id)) else {
            return;
        };
        let group = self.writing.swap_remove(at);
        let (own, others): (Vec<usize>, Vec<usize>) = (0..group.rows.len()).partition(|row| group.rows[*row] == id);
        let members = group.rows.clone();
        match group.picked(&own).and_then(|apart| Ok((apart, group.only(&others)?))) {
            Ok((apart, rest)) => self.writing.extend([Some(apart), rest].into_iter().flatten()),
            Err(error) => self.broke(&members, &error),
        }
    }

    /// Lets go of a sequence wherever it stands; what was computed of it is remembered.
    fn release(&mut self, id: Id) -> Option<Sequence> {
        let cache = self.withdraw(id);
        let sequence = self.sequences.remove(&id)?;
        if let Some(cache) = cache {
            self.remember(&sequence, &cache);
        }
        Some(sequence)
    }

    /// Takes a sequence out of where it stands, with its own cache if it has one.
    fn withdraw(&mut self, id: Id) -> Option<Cache> {
        self.waiting.retain(|other| *other != id);
        self.reading.retain(|other| *other != id);
        let read = self.sequences.get_mut(&id).and_then(|sequence| sequence.cache.take());
        let Some(at) = self.writing.iter().position(|group| group.rows.contains(&id)) else { return read };
        let group = self.writing.swap_remove(at);
        let (own, others): (Vec<usize>, Vec<usize>) = (0..group.rows.len()).partition(|row| group.rows[*row] == id);
        let members = group.rows.clone();
        match group.cache.select(&own).and_then(|own| Ok((own, group.only(&others)?))) {
            Ok((own, rest)) => {
                self.writing.extend(rest);
                Some(own)
            }
            Err(error) => {
                self.broke(&members, &error);
                None
            }
        }
    }

    fn tell_positions(&mut self) {
        for (ahead, id) in (0..).zip(&self.waiting) {
            if let Some(sequence) = self.sequences.get_mut(id)
                // Whoever has had events before waits for memory, not in the queue.
                && sequence.prefill.is_none()
                && sequence.told_ahead != Some(ahead)
                && sequence.started.elapsed() > READER_POLL
            {
                sequence.told_ahead = Some(ahead);
                sequence.outlet.tell(Event::Queued { ahead });
            }
        }
    }

    fn decide(&self) -> Step {
        let tokens = |id: &Id| self.sequences.get(id).map_or(0, |sequence| sequence.tokens.len() as u32);
        let waiting: Vec<Waiting> = self.waiting.iter().map(|id| Waiting { id: *id, tokens: tokens(id) }).collect();
        let turns = |id: &Id| self.sequences.get(id).map_or(0, |sequence| sequence.turns);
        let reading: Vec<Reading> =
            self.reading.iter().map(|id| Reading { id: *id, turns: turns(id), tokens: tokens(id) }).collect();
        let writing: Vec<Writing> = self.writing.iter().map(|group| self.view_of(group)).collect();
        let mut view = View {
            waiting: &waiting,
            reading: &reading,
            writing: &writing,
            wrote_last: self.wrote_last,
            chunks: self.chunks,
            memory_bytes: self.limits.memory_bytes,
        };
        if !waiting.is_empty() {
            // What is remembered can be forgotten, so it counts as free.
            let held = schedule::used_bytes(&view, &self.footprint, 0).saturating_add(self.remembered.bytes());
            view.memory_bytes = self.free_memory.limit(self.limits.memory_bytes, held);
        }
        schedule::next(&view, &self.limits, &self.footprint)
    }

    fn view_of(&self, group: &Group) -> Writing {
        let lengths = group.cache.lengths();
        let rows = group.rows.iter().copied().zip(lengths.into_iter().map(|length| length as u32)).collect();
        let clear = |id: &Id| self.sequences.get(id).is_some_and(|sequence| sequence.outlet.is_clear());
        Writing { rows, ready: group.rows.iter().all(clear) }
    }

    fn admit(&mut self, id: Id) {
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
    fn forget_what_is_in_the_way(&mut self) {
        let reading = self.reading.iter().filter_map(|id| self.sequences.get(id));
        let read: u64 = reading.map(|sequence| self.footprint.bytes(sequence.tokens.len() as u64)).sum();
        let written: u64 = self
            .writing
            .iter()
            .map(|group| {
                let (_, longest, rows) = group.extent();
                self.footprint.bytes(u64::from(longest) + 1) * rows as u64
            })
            .sum();
        let left = self.limits.memory_bytes.saturating_sub(read).saturating_sub(written);
        self.remembered.evict(left.min(self.limits.remembered_bytes_max));
    }

    fn preempt(&mut self, id: Id) {
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
    fn look_up(&mut self, id: Id) -> Result<(), Exception> {
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
    fn begin_writing_if_read(&mut self, id: Id) -> Result<(), Exception> {
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

    fn read(&mut self, id: Id, tokens: u32) {
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

    /// One token of everybody who is ready.
    fn write(&mut self) {
        self.join_groups();
        for group in std::mem::take(&mut self.writing) {
            if !self.view_of(&group).ready {
                self.writing.push(group);
                continue;
            }
            let group = match self.has_to_be_read_first(&group) {
                true => self.settle(group),
                false => Some(group),
            };
            if let Some(group) = group.and_then(|group| self.step(group)) {
                self.writing.push(group);
            }
        }
    }

    fn join_groups(&mut self) {
        // What holds nothing yet cannot be part of a batch, and who does not read waits apart.
        loop {
            let ready: Vec<usize> = (0..self.writing.len())
                .filter(|at| !self.writing[*at].cache.is_empty() && self.view_of(&self.writing[*at]).ready)
                .collect();
            if ready.len() < 2 {
                return;
            }
            let extents: Vec<_> = ready.iter().map(|at| self.writing[*at].extent()).collect();
            let used: u64 = self
                .writing
                .iter()
                .map(|group| {
                    let (_, longest, rows) = group.extent();
                    self.footprint.bytes(u64::from(longest) + 1) * rows as u64
                })
                .sum();
            let spare = self.limits.memory_bytes.saturating_sub(used);
            let Some((a, b)) = schedule::joinable(&extents, ROWS_MAX, spare, &self.footprint) else { return };
            // The later one first, so that the other keeps its place.
            let second = self.writing.remove(ready[b]);
            let first = self.writing.remove(ready[a]);
            let members = [&first.rows[..], &second.rows].concat();
            match first.join(second) {
                Ok(joined) => self.writing.push(joined),
                Err(error) => self.broke(&members, &error),
            }
        }
    }

    /// Whether what was drawn has to be known before the next step: because nobody may need that step, or because it
    /// takes somebody beyond the model's length limit.
    fn has_to_be_read_first(&self, group: &Group) -> bool {
        let rows = || group.rows.iter().filter_map(|id| self.sequences.get(id)).zip(&group.unread);
        let last = rows().all(|(sequence, unread)| *unread && sequence.written() + 1 >= sequence.tokens_max);
        last || group
            .cache
            .lengths()
            .iter()
            .zip(rows())
            .any(|(length, (sequence, _))| !sequence.long && self.is_long(*length as usize + 1))
    }

    /// Reads what was drawn, and lets go of who ended and of who has to be computed anew.
    fn settle(&mut self, mut group: Group) -> Option<Group> {
        let members = group.rows.clone();
        let read = {
            let _gate = gate();
            let _doing = self.shared.doing(Doing::Write);
            group.read()
        };
        match read {
            Ok(read) => {
                let group = self.give_out(group, &read)?;
                self.make_room(group)
            }
            Err(error) => {
                self.broke(&members, &error);
                None
            }
        }
    }

    /// Takes those out whose next token would be beyond the model's length limit: they are read anew.
    fn make_room(&mut self, group: Group) -> Option<Group> {
        let beyond: Vec<usize> = group
            .cache
            .lengths()
            .iter()
            .enumerate()
            .filter(|(row, length)| {
                self.sequences.get(&group.rows[*row]).is_some_and(|sequence| !sequence.long)
                    && self.is_long(**length as usize + 1)
            })
            .map(|(row, _)| row)
            .collect();
        if beyond.is_empty() {
            return Some(group);
        }
        for row in &beyond {
            if let Some(sequence) = self.sequences.get_mut(&group.rows[*row]) {
                sequence.long = true;
                sequence.cache = None;
                self.reading.push(sequence.id);
            }
        }
        self.keep_rows(group, |row| !beyond.contains(&row))
    }

    /// Submits the next step, then reads the one before while the device works.
    fn step(&mut self, mut group: Group) -> Option<Group> {
        let members = group.rows.clone();
        let stepped = {
            let _gate = gate();
            let shared = self.shared.clone();
            let _doing = shared.doing(Doing::Write);
            self.submit(&mut group).and_then(|next| {
                let read = group.read()?;
                group.current = next;
                group.unread.fill(true);
                Ok(read)
            })
        };
        match stepped {
            Ok(read) => self.give_out(group, &read),
            Err(error) => {
                self.broke(&members, &error);
                None
            }
        }
    }

    fn submit(&mut self, group: &mut Group) -> Result<Array, Exception> {
        let logits = self.model.forward(&group.current, &mut group.cache, Rows::Last)?;
        let mut samplers: BTreeMap<Id, &mut Sequence> =
            self.sequences.iter_mut().filter(|(id, _)| group.rows.contains(id)).map(|(id, one)| (*id, one)).collect();
        let mut rows = Vec::with_capacity(group.rows.len());
        for (id, unread) in group.rows.iter().zip(&group.unread) {
            let Some(sequence) = samplers.remove(id) else { return Err(Exception::custom("a row without a sequence")) };
            let written = *unread || sequence.written() > 0;
            rows.push(sampler::Row { sampler: &mut sequence.sampler, written });
        }
        let next = sampler::draw(&logits, &group.current, &mut rows)?;
        transforms::async_eval([&next])?;
        Ok(next)
    }

    /// Gives tokens that were read to whom they belong; who ends leaves the group.
    fn give_out(&mut self, group: Group, read: &[Option<u32>]) -> Option<Group> {
        let mut ended = Vec::new();
        for (row, token) in read.iter().enumerate() {
            if let (Some(token), Some(sequence)) = (token, self.sequences.get_mut(&group.rows[row]))
                && let After::Ends(reason) = sequence.take(*token)
            {
                ended.push((row, reason));
            }
        }
        if ended.is_empty() {
            return Some(group);
        }
        for (row, reason) in &ended {
            self.end(&group, *row, *reason);
        }
        self.keep_rows(group, |row| ended.iter().all(|(other, _)| *other != row))
    }

    fn keep_rows(&mut self, group: Group, keep: impl Fn(usize) -> bool) -> Option<Group> {
        let kept: Vec<usize> = (0..group.rows.len()).filter(|row| keep(*row)).collect();
        let members: Vec<Id> = kept.iter().map(|row| group.rows[*row]).collect();
        match group.only(&kept) {
            Ok(group) => group,
            Err(error) => {
                self.broke(&members, &error);
                None
            }
        }
    }

    fn end(&mut self, group: &Group, row: usize, reason: FinishReason) {
        let Some(sequence) = self.sequences.remove(&group.rows[row]) else { return };
        match group.cache.select(&[row]) {
            Ok(cache) => self.remember(&sequence, &cache),
            Err(error) => tracing::warn!(request = sequence.job, "not remembered: {}", error.what()),
        }
        self.leave(sequence.finish(reason));
    }

    fn leave(&mut self, mut outlet: Outlet) {
        if outlet.flush() == Flow::Blocked {
            self.leaving.push(outlet);
        }
    }

    /// Remembers what was computed of a sequence. That it could not be is no fault of anybody's answer.
    fn remember(&mut self, sequence: &Sequence, cache: &Cache) {
        let length = cache.len() as usize;
        if length == 0 || length > sequence.tokens.len() {
            return;
        }
        {
            let _gate = gate();
            let _doing = self.shared.doing(Doing::Remember);
            if let Err(error) = self.remembered.keep(&sequence.tokens[..length], sequence.long, cache) {
                tracing::warn!(request = sequence.job, "not remembered: {}", error.what());
            }
        }
        self.forget_what_is_in_the_way();
    }

    /// Ends those whom an error of the device concerns; everybody else goes on.
    fn broke(&mut self, members: &[Id], error: &Exception) {
        memory::clear_cache();
        for id in members {
            self.waiting.retain(|other| other != id);
            self.reading.retain(|other| other != id);
            for group in &self.writing {
                debug_assert!(!group.rows.contains(id), "whose group broke has left it");
            }
            if let Some(sequence) = self.sequences.remove(id) {
                tracing::error!(request = sequence.job, "generation failed: {}", error.what());
                let outlet = sequence.fail(EngineError::Failed { what: error.what().into() });
                self.leave(outlet);
            }
        }
    }
}
