//! Writing: one token of everybody a step.

use std::collections::BTreeMap;

use mesh_graph::Rows;
use mlx_rs::{Array, error::Exception, transforms};

use super::Runner;
use crate::{
    device::gate,
    group::{Group, Written},
    sampler::{self, Drawn, Known, Mask},
    schedule::{self, Id},
    sequence::{After, Answer, Ending, Sequence},
    threads,
    watchdog::Doing,
};

/// Rows of one forward pass.
const ROWS_MAX: usize = 32;

impl Runner {
    /// One token of everybody who is ready.
    pub(super) fn write(&mut self) {
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
            let group = group.and_then(|group| match self.has_to_see_every_token(&group) {
                true => self.step_by_sight(group),
                false => self.step(group),
            });
            // A first token goes out at once, rather than after another step was submitted.
            let group = match group {
                Some(group) if self.somebody_has_nothing_yet(&group) => self.settle(group),
                group => group,
            };
            self.writing.extend(group);
        }
        // Everybody is longer now.
        self.forget_what_is_in_the_way();
    }

    /// Bytes that groups take after their next step, padding included.
    pub(super) fn written_bytes(&self) -> u64 {
        let groups = self.writing.iter().map(|group| {
            let (_, longest, rows) = group.extent();
            self.footprint.bytes(u64::from(longest) + 1).saturating_mul(rows as u64)
        });
        groups.fold(0, u64::saturating_add)
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
            let spare = self.memory_now.saturating_sub(self.written_bytes()).saturating_sub(self.read_bytes());
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

    /// Whether what somebody may draw depends on the token before, beyond what the device knows of it.
    fn has_to_see_every_token(&self, group: &Group) -> bool {
        group.rows.iter().any(|id| self.sequences.get(id).is_some_and(Sequence::reads_first))
    }

    fn somebody_has_nothing_yet(&self, group: &Group) -> bool {
        group.rows.iter().any(|id| self.sequences.get(id).is_some_and(|sequence| sequence.prefill.is_none()))
    }

    /// Reads what was drawn, and lets go of who ended and of who has to be computed anew.
    pub(super) fn settle(&mut self, mut group: Group) -> Option<Group> {
        let members = group.rows.clone();
        let read = {
            let _gate = gate();
            let _doing = self.shared.doing(Doing::Write);
            group.read()
        };
        match read {
            Ok(read) => {
                let group = self.give_out(group, read)?;
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
            self.logits(&mut group).and_then(|logits| {
                let next = self.draw(&group, &logits, BTreeMap::new())?;
                let read = group.read()?;
                group.feed(next);
                Ok(read)
            })
        };
        match stepped {
            Ok(read) => self.give_out(group, read),
            Err(error) => {
                self.broke(&members, &error);
                None
            }
        }
    }

    /// The same where the draw has to know the token before. A part of the pass keeps the device at work while that is read;
    /// what may follow it is worked out while the rest is submitted, which takes most of a step.
    fn step_by_sight(&mut self, mut group: Group) -> Option<Group> {
        let members = group.rows.clone();
        let shared = self.shared.clone();
        let passed = {
            let _gate = gate();
            let _doing = shared.doing(Doing::Write);
            // Or they would be waited for together with the part.
            group.submit().and_then(|()| {
                let logits = self.logits(&mut group)?;
                group.submit_part()?;
                Ok((logits, group.read()?))
            })
        };
        let drawn = passed.and_then(|(logits, read)| {
            let mut ended = self.hand_over(&group, read);
            if ended.len() == group.rows.len() {
                return Ok(ended);
            }
            let _gate = gate();
            let _doing = shared.doing(Doing::Write);
            let rows = group.rows.iter().enumerate();
            let going: Vec<Id> =
                rows.filter(|(row, _)| ended.iter().all(|(other, _)| other != row)).map(|(_, id)| *id).collect();
            let (submitted, answers) = self.answers_during(&going, || transforms::async_eval([&logits]));
            submitted?;
            let mut masks = BTreeMap::new();
            for (id, answer) in answers {
                match answer {
                    Ok(mask) => drop(masks.insert(id, mask)),
                    Err(ending) => ended.extend(group.rows.iter().position(|row| *row == id).map(|row| (row, ending))),
                }
            }
            if ended.len() < group.rows.len() {
                // Those who ended leave after this: nobody reads what is drawn for them.
                let next = self.draw(&group, &logits, masks)?;
                group.feed(next);
            }
            Ok(ended)
        });
        match drawn {
            Ok(ended) => self.let_go(group, ended),
            Err(error) => {
                self.broke(&members, &error);
                None
            }
        }
    }

    /// What the grammars of some sequences let them write next, worked out beside `work` on other threads.
    fn answers_during<T>(&mut self, ids: &[Id], work: impl FnOnce() -> T) -> (T, Vec<(Id, Answer)>) {
        let vocab_size = self.model.vocab_size();
        let sequences = self.sequences.iter_mut().filter(|(id, _)| ids.contains(id));
        let asked = sequences.filter_map(|(id, one)| Some((*id, one.question()?)));
        threads::beside(asked.collect(), |(id, question)| (id, question.answer(vocab_size)), work)
    }

    /// The pass over everybody's last token, not yet evaluated.
    fn logits(&self, group: &mut Group) -> Result<Array, Exception> {
        self.model.forward(&group.current, &mut group.cache, Rows::Last)
    }

    /// Submits the draw of everybody's next token, within the masks that there are.
    fn draw(&mut self, group: &Group, logits: &Array, mut masks: BTreeMap<Id, Mask>) -> Result<Drawn, Exception> {
        let mut samplers: BTreeMap<Id, &mut Sequence> =
            self.sequences.iter_mut().filter(|(id, _)| group.rows.contains(id)).map(|(id, one)| (*id, one)).collect();
        let mut rows = Vec::with_capacity(group.rows.len());
        for (id, unread) in group.rows.iter().zip(&group.unread) {
            let Some(sequence) = samplers.remove(id) else { return Err(Exception::custom("a row without a sequence")) };
            let known = Known {
                position: sequence.written() + u32::from(*unread),
                losses: sequence.sampler.losses(&sequence.tokens),
                mask: masks.remove(id),
                logprobs: sequence.logprobs,
            };
            rows.push(sampler::Row { sampler: &mut sequence.sampler, known });
        }
        let next = sampler::draw(logits, &group.current, &mut rows, &mut self.masks)?;
        transforms::async_eval(next.arrays())?;
        Ok(next)
    }

    /// Gives tokens that were read to whom they belong; who ends leaves the group.
    fn give_out(&mut self, group: Group, read: Vec<Option<Written>>) -> Option<Group> {
        let ended = self.hand_over(&group, read);
        self.let_go(group, ended)
    }

    /// Gives tokens that were read to whom they belong; answers whose rows end, and how.
    fn hand_over(&mut self, group: &Group, read: Vec<Option<Written>>) -> Vec<(usize, Ending)> {
        let mut ended = Vec::new();
        for (row, token) in read.into_iter().enumerate() {
            if let (Some(token), Some(sequence)) = (token, self.sequences.get_mut(&group.rows[row]))
                && let After::Ends(ending) = sequence.take(token)
            {
                ended.push((row, ending));
            }
        }
        ended
    }

    /// Ends some rows, and keeps the others.
    fn let_go(&mut self, group: Group, ended: Vec<(usize, Ending)>) -> Option<Group> {
        if ended.is_empty() {
            return Some(group);
        }
        let rows: Vec<usize> = ended.iter().map(|(row, _)| *row).collect();
        for (row, ending) in ended {
            self.end(&group, row, ending);
        }
        self.keep_rows(group, |row| !rows.contains(&row))
    }

    pub(super) fn keep_rows(&mut self, group: Group, keep: impl Fn(usize) -> bool) -> Option<Group> {
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
}
