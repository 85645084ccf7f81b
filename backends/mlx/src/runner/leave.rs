//! Who leaves, and what is remembered of them.

use mesh_core::EngineError;
use mesh_graph::{Cache, memory};
use mlx_rs::error::Exception;

use super::Runner;
use crate::{
    device::gate,
    group::Group,
    schedule::Id,
    sequence::{Ending, Flow, Outlet, Sequence},
    watchdog::Doing,
};

impl Runner {
    /// Hands over what readers have room for, lets go of those who left, and keeps those who do not keep up apart.
    pub(super) fn see_who_left(&mut self) {
        self.embeds.retain(|embed| !embed.is_given_up());
        self.leaving.retain_mut(|outlet| outlet.flush() == Flow::Blocked && outlet.has_backlog());
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
    pub(super) fn withdraw(&mut self, id: Id) -> Option<Cache> {
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

    pub(super) fn end(&mut self, group: &Group, row: usize, ending: Ending) {
        let Some(sequence) = self.sequences.remove(&group.rows[row]) else { return };
        match group.cache.select(&[row]) {
            Ok(cache) => self.remember(&sequence, &cache),
            Err(error) => tracing::warn!(request = sequence.job, "not remembered: {}", error.what()),
        }
        let outlet = match ending {
            Ending::Finished(reason) => sequence.finish(reason),
            Ending::Failed(what) => {
                tracing::warn!(request = sequence.job, "generation failed: {what}");
                sequence.fail(EngineError::Failed { what: what.into() })
            }
        };
        self.leave(outlet);
    }

    pub(super) fn leave(&mut self, mut outlet: Outlet) {
        if outlet.flush() == Flow::Blocked && outlet.has_backlog() {
            self.leaving.push(outlet);
        }
    }

    /// Remembers what was computed of a sequence. That it could not be is no fault of anybody's answer.
    pub(super) fn remember(&mut self, sequence: &Sequence, cache: &Cache) {
        let length = cache.len() as usize;
        if length == 0 || length > sequence.tokens.len() {
            return;
        }
        {
            let room = self.room_to_remember();
            let _gate = gate();
            let _doing = self.shared.doing(Doing::Remember);
            if let Err(error) = self.remembered.keep(&sequence.tokens[..length], sequence.long, cache, room) {
                tracing::warn!(request = sequence.job, "not remembered: {}", error.what());
            }
        }
        self.forget_what_is_in_the_way();
    }

    /// Ends those whom an error of the device concerns; everybody else goes on.
    pub(super) fn broke(&mut self, members: &[Id], error: &Exception) {
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
