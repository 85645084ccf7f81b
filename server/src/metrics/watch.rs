//! Who looks on while an answer is made: the one place where answers are counted and timed, whatever surface asked for them.

use std::{sync::Arc, time::Instant};

use mesh_core::{Event, Usage};

use super::tally::{End, Tally};
use crate::{pipeline::Finished, record::Record, served::ServedModel};

/// Most times that one event counts as: an engine that claims more tokens says nothing about each.
const TOKENS_PER_EVENT_MAX: u32 = 64;

/// Watches one answer. Dropped before its end, the answer counts as cancelled.
pub(crate) struct Watch {
    tally: Option<Arc<Tally>>,
    record: Option<Arc<Record>>,
    began: Instant,
    last: Option<Instant>,
    waiting: bool,
    usage: Usage,
    over: bool,
}

impl Watch {
    /// An answer of `model` begins.
    pub fn begin(model: &ServedModel) -> Self {
        let (tally, record) = (model.tally().map(|(_, tally)| tally.clone()), Record::current());
        let began = record.as_ref().map_or_else(Instant::now, |record| record.began);
        if let Some(record) = &record {
            let name = model.tally().map_or_else(|| model.profile.name.clone(), |(name, _)| name.clone());
            record.note(|noted| {
                noted.model = Some(name);
                noted.answers += 1;
            });
        }
        if let Some(tally) = &tally {
            tally.running.inc();
        }
        Self { tally, record, began, last: None, waiting: false, usage: Usage::default(), over: false }
    }

    /// The engine said something.
    pub fn event(&mut self, event: &Event) {
        self.moved(matches!(event, Event::Queued { .. }));
        match event {
            Event::Prefill { total, cached, .. } => {
                (self.usage.prompt_tokens, self.usage.cached_tokens) = (*total, *cached);
            }
            Event::Token { .. } => self.written(1),
            Event::Text { tokens, .. } => self.written(*tokens),
            Event::Queued { .. } | Event::Finished { .. } => {}
        }
    }

    /// A piece of the answer, as the model wrote it.
    pub fn text(&mut self, text: &str) {
        if let Some(record) = &self.record {
            record.answered(text);
        }
    }

    /// The answer is whole.
    pub fn finished(&mut self, finished: &Finished) {
        self.usage = finished.usage;
        if let (Some(tally), Some(timings)) = (&self.tally, finished.timings) {
            tally.timed(finished.usage, timings);
        }
        self.end(finished.finish.into());
    }

    /// The engine broke.
    pub fn broke(&mut self) {
        self.end(End::Error);
    }

    /// Another engine was handed the request, and another watch has begun there.
    pub fn handed_on(&mut self) {
        if std::mem::replace(&mut self.over, true) {
            return;
        }
        self.leave();
        if let Some(record) = &self.record {
            record.note(|noted| noted.answers = noted.answers.saturating_sub(1));
        }
    }

    fn leave(&self) {
        if let Some(tally) = &self.tally {
            if self.waiting { &tally.waiting } else { &tally.running }.dec();
        }
    }

    /// In line or out of it.
    fn moved(&mut self, waiting: bool) {
        if self.over || std::mem::replace(&mut self.waiting, waiting) == waiting {
            return;
        }
        if let Some(tally) = &self.tally {
            let (from, to) = if waiting { (&tally.running, &tally.waiting) } else { (&tally.waiting, &tally.running) };
            from.dec();
            to.inc();
        }
    }

    fn written(&mut self, tokens: u32) {
        self.usage.completion_tokens = self.usage.completion_tokens.saturating_add(tokens);
        let now = Instant::now();
        let last = self.last.replace(now);
        if last.is_none() {
            let first = now - self.began;
            if let Some(record) = &self.record {
                record.note(|noted| noted.first_token = noted.first_token.or(Some(first)));
            }
            if let Some(tally) = &self.tally {
                tally.first_token.observe(first.as_secs_f64());
            }
        }
        if let (Some(last), Some(tally)) = (last, &self.tally) {
            // Tokens that come together took their time together.
            let each = (now - last).as_secs_f64() / f64::from(tokens.max(1));
            (0..tokens.min(TOKENS_PER_EVENT_MAX)).for_each(|_| tally.next_token.observe(each));
        }
    }

    fn end(&mut self, end: End) {
        if std::mem::replace(&mut self.over, true) {
            return;
        }
        self.leave();
        if let Some(tally) = &self.tally {
            tally.end(end, self.usage);
            if !matches!(end, End::Cancelled | End::Error) {
                tally.answer.observe(self.began.elapsed().as_secs_f64());
            }
        }
        if let Some(record) = &self.record {
            record.note(|noted| {
                let sum = &mut noted.usage;
                sum.prompt_tokens = sum.prompt_tokens.saturating_add(self.usage.prompt_tokens);
                sum.cached_tokens = sum.cached_tokens.saturating_add(self.usage.cached_tokens);
                sum.completion_tokens = sum.completion_tokens.saturating_add(self.usage.completion_tokens);
                noted.finish.push(end.word());
            });
        }
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.end(End::Cancelled);
    }
}
