//! The engine's loop on the device thread: performs what [`schedule`] decides.

mod embed;
mod leave;
mod read;
mod write;

use std::{
    collections::{BTreeMap, VecDeque},
    sync::{Arc, atomic::Ordering},
    thread,
    time::{Duration, Instant},
};

use mesh_core::{EngineError, Event};
use mesh_graph::{CausalModel, Footprint};
use tokio::sync::mpsc::{Receiver, error::TryRecvError};

use crate::{
    device::gate,
    engine::{Generation, Shared, Work},
    group::Group,
    memory::{FreeMemory, Sizes},
    remember::Remembered,
    sampler::{Masks, Sampler},
    schedule::{self, Id, Limits, Reading, Step, View, Waiting, Writing},
    sequence::{Outlet, Sequence},
    watchdog::Doing,
};
use embed::Embedding;

/// How long nobody has to come before remembered prefixes go to files: between the turns of a conversation there is less.
const IDLE_BEFORE_SAVING: Duration = Duration::from_secs(2);

/// How often readers that do not keep up are looked at while nothing else is to be done.
const READER_POLL: Duration = Duration::from_millis(2);

/// A model and everybody it works for.
pub struct Runner {
    model: Box<dyn CausalModel>,
    shared: Arc<Shared>,
    eos: Arc<[u32]>,
    limits: Limits,
    /// Bytes for sequences at the last look: the limit, or less while other programs hold memory.
    memory_now: u64,
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
    masks: Masks,
    /// Texts to be turned into vectors, those whose turn is next first.
    embeds: VecDeque<Embedding>,
    /// What is over, and not yet taken by its reader.
    leaving: Vec<Outlet>,
    next_id: Id,
    chunks: u64,
    wrote_last: bool,
    embedded_last: bool,
    /// Whether what files held at the start is in memory, as far as there is room.
    thawed: bool,
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
            eos: eos.into(),
            memory_now: limits.memory_bytes,
            limits,
            footprint,
            sizes,
            free_memory,
            remembered,
            sequences: BTreeMap::new(),
            waiting: Vec::new(),
            reading: Vec::new(),
            writing: Vec::new(),
            masks: Masks::default(),
            embeds: VecDeque::new(),
            leaving: Vec::new(),
            next_id: 0,
            chunks: 0,
            wrote_last: false,
            embedded_last: false,
            thawed: false,
        }
    }

    /// Serves until the channel is closed and everybody has left, or until the grace of a drain is over.
    ///
    /// Whoever calls it keeps runner and inbox: should this panic, their channels are to close only after the reason is
    /// known.
    pub fn run(&mut self, inbox: &mut Receiver<Work>) {
        loop {
            let open = self.take_in(inbox);
            if self.shared.cancelled.load(Ordering::Relaxed) || self.shared.state.borrow().is_over() {
                let all = std::mem::take(&mut self.sequences);
                all.into_values().for_each(|sequence| drop(sequence.fail(EngineError::Stopped)));
                self.embeds.drain(..).for_each(|embed| embed.answer(Err(EngineError::Stopped)));
                return;
            }
            self.see_who_left();
            self.tell_positions();
            match self.decide() {
                Step::Admit(id) => {
                    self.embedded_last = false;
                    self.admit(id);
                }
                Step::Preempt(id) => self.preempt(id),
                Step::Read { id, tokens } => {
                    (self.wrote_last, self.embedded_last) = (false, false);
                    self.chunks += 1;
                    self.read(id, tokens);
                }
                Step::Embed { tokens } => {
                    (self.wrote_last, self.embedded_last) = (false, true);
                    self.embed(tokens);
                }
                Step::Write => {
                    self.wrote_last = true;
                    self.write();
                }
                Step::Wait if !self.sequences.is_empty() || !self.leaving.is_empty() => thread::sleep(READER_POLL),
                Step::Wait if !open => {
                    self.save_some(|_| false);
                    return;
                }
                Step::Wait => {
                    // Nobody at all, if the channel is closed: the next look at it tells.
                    if let Some(work) = self.next_arrival(inbox) {
                        self.arrive(work);
                    }
                }
            }
        }
    }

    /// Waits for somebody to come. Once nobody has for a while, what is remembered goes to files, if there are any; whoever
    /// comes meanwhile waits for one of them at most.
    fn next_arrival(&mut self, inbox: &mut Receiver<Work>) -> Option<Work> {
        let mut arrival = None;
        if self.remembered.has_files() {
            let mut arrived = |inbox: &mut Receiver<Work>| {
                arrival = inbox.try_recv().ok();
                arrival.is_some() || inbox.is_closed()
            };
            if !self.thaw(|| arrived(inbox)) {
                return arrival;
            }
            let since = Instant::now();
            while since.elapsed() < IDLE_BEFORE_SAVING {
                if arrived(inbox) {
                    return arrival;
                }
                thread::sleep(READER_POLL);
            }
            self.save_some(|_| arrived(inbox));
            if arrival.is_some() {
                return arrival;
            }
        }
        inbox.blocking_recv()
    }

    /// Brings what earlier engines left in files to memory, once, so that conversations go on after a restart as if there had
    /// been none. Answers whether that is over; `enough` stops it for now.
    fn thaw(&mut self, mut enough: impl FnMut() -> bool) -> bool {
        while !self.thawed {
            if enough() {
                return false;
            }
            let room = self.room_to_remember();
            let _gate = gate();
            let _doing = self.shared.doing(Doing::Recall);
            self.thawed = !self.remembered.thaw_some(room);
        }
        true
    }

    /// Writes what no file has yet, until all is written, the grace of a drain is over, or `enough` says so.
    fn save_some(&mut self, mut enough: impl FnMut(&Self) -> bool) {
        while !self.shared.cancelled.load(Ordering::Relaxed) && !enough(self) {
            let _gate = gate();
            let _doing = self.shared.doing(Doing::Remember);
            if !self.remembered.save_some() {
                return;
            }
        }
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
        let Generation { job, prompt, tokens_max, events, place } = match work {
            Work::Generate(generation) => *generation,
            Work::Embed(vectors) => return self.embeds.push_back(Embedding::new(vectors)),
        };
        let id = self.next_id;
        self.next_id += 1;
        let long = self.is_long(prompt.len());
        let sequence = Sequence {
            id,
            job: job.id,
            prompt: prompt.len(),
            tokens: prompt,
            tokens_max,
            tokens_min: job.tokens_min.unwrap_or(0),
            eos: self.eos.clone(),
            ignore_eos: job.ignore_eos,
            sampler: Sampler::new(&job.sampling, self.model.vocab_size(), rand::random())
                .with_least(job.tokens_min, &self.eos),
            follower: job.constraint.and_then(|constraint| constraint.rules).map(|rules| rules.follow()),
            logprobs: job.logprobs,
            landmarks: job.landmarks,
            outlet: Outlet::new(events),
            place: Some(place),
            cache: None,
            long,
            cached: 0,
            computed_before: false,
            own_point: None,
            turns: 0,
            told_ahead: None,
            told_why: false,
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

    fn decide(&mut self) -> Step {
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
            embedding: self.next_embedding(),
            wrote_last: self.wrote_last,
            embedded_last: self.embedded_last,
            chunks: self.chunks,
            memory_bytes: self.limits.memory_bytes,
        };
        let used = schedule::used_bytes(&view, &self.footprint, 0);
        // What is held now, and not what is promised: that is still among what is free. What is remembered can be forgotten.
        let read = self.reading.iter().filter_map(|id| self.sequences.get(id)?.cache.as_ref());
        let read: u64 = read.map(|cache| self.footprint.bytes(cache.len() as u64)).sum();
        let held = read.saturating_add(self.written_bytes()).saturating_add(self.remembered.bytes());
        let held = held.saturating_add(self.embedding_bytes());
        self.shared.held_bytes.store(held, Ordering::Relaxed);
        if !waiting.is_empty() || !self.embeds.is_empty() {
            self.memory_now = self.free_memory.limit(self.limits.memory_bytes, held);
            self.shared.memory_now.store(self.memory_now, Ordering::Relaxed);
        }
        view.memory_bytes = self.memory_now;
        let step = schedule::next(&view, &self.limits, &self.footprint);
        if let (Some(first), false) = (waiting.first(), matches!(step, Step::Admit(_)))
            && let Some(sequence) = self.sequences.get_mut(&first.id)
            && !std::mem::replace(&mut sequence.told_why, true)
        {
            tracing::info!(
                request = sequence.job,
                tokens = first.tokens,
                own_bytes = self.footprint.bytes(first.tokens.into()),
                used_bytes = used,
                memory_bytes = view.memory_bytes,
                running = reading.len() + writing.iter().map(|group| group.rows.len()).sum::<usize>(),
                parallel_max = self.limits.parallel_max,
                "waits for a place"
            );
        }
        step
    }

    fn view_of(&self, group: &Group) -> Writing {
        let lengths = group.cache.lengths();
        let rows = group.rows.iter().copied().zip(lengths.into_iter().map(|length| length as u32)).collect();
        let clear = |id: &Id| self.sequences.get(id).is_some_and(|sequence| sequence.outlet.is_clear());
        Writing { rows, ready: group.rows.iter().all(clear) }
    }
}
