//! What is read at each scrape: the models, their memory, and the process.

use std::fmt::Error;

use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeMetric},
    metrics::{MetricType, gauge::ConstGauge},
    registry::Unit,
};

use super::tally::{End, Tally};
use crate::slots::{SlotState, Slots};

/// The models of a server.
#[derive(Debug)]
pub(super) struct Models(pub Slots);

/// One kind of numbers that there are of every model.
struct Kind {
    name: &'static str,
    help: &'static str,
    unit: Option<Unit>,
}

impl Kind {
    const fn new(name: &'static str, help: &'static str) -> Self {
        Self { name, help, unit: None }
    }

    const fn seconds(name: &'static str, help: &'static str) -> Self {
        Self { name, help, unit: Some(Unit::Seconds) }
    }
}

impl Models {
    fn each<M: EncodeMetric>(
        &self,
        encoder: &mut DescriptorEncoder<'_>,
        kind: Kind,
        metric: impl Fn(&Tally) -> &M,
    ) -> Result<(), Error> {
        let tallies = self.0.tallies();
        let Some((_, first)) = tallies.first() else { return Ok(()) };
        let of = metric(first).metric_type();
        let mut family = encoder.encode_descriptor(kind.name, kind.help, kind.unit.as_ref(), of)?;
        for (model, tally) in &tallies {
            metric(tally).encode(family.encode_family(&[("model", model)])?)?;
        }
        Ok(())
    }

    fn ends(&self, encoder: &mut DescriptorEncoder<'_>) -> Result<(), Error> {
        let mut family =
            encoder.encode_descriptor("answers", "Answers that are over, by why", None, MetricType::Counter)?;
        for (model, tally) in self.0.tallies() {
            for end in End::ALL {
                let labels = [("model", model.as_str()), ("reason", end.word())];
                tally.ended[end as usize].encode(family.encode_family(&labels)?)?;
            }
        }
        Ok(())
    }

    fn states(&self, encoder: &mut DescriptorEncoder<'_>) -> Result<(), Error> {
        let help = "1 for the state that a model is in, 0 for the others";
        let mut family = encoder.encode_descriptor("model_state", help, None, MetricType::Gauge)?;
        for slot in self.0.iter() {
            let now = slot.state();
            for state in SlotState::WORDS {
                let labels = [("model", slot.name()), ("state", state.to_owned())];
                gauge(i64::from(now.word() == state)).encode(family.encode_family(&labels)?)?;
            }
        }
        Ok(())
    }

    fn memory(&self, encoder: &mut DescriptorEncoder<'_>) -> Result<(), Error> {
        let (bytes, of) = (Unit::Bytes, MetricType::Gauge);
        let help = "Memory that is set aside for a model";
        let mut family = encoder.encode_descriptor("model_reserved", help, Some(&bytes), of)?;
        for slot in self.0.iter() {
            count(slot.reserved_bytes()).encode(family.encode_family(&[("model", slot.name())])?)?;
        }
        let pools = self.0.memory();
        let help = "Memory that is set aside for models";
        let mut family = encoder.encode_descriptor("memory_reserved", help, Some(&bytes), of)?;
        for pool in &pools {
            count(pool.reserved_bytes).encode(family.encode_family(&[("pool", pool.pool.word())])?)?;
        }
        let help = "Memory that models may have";
        let mut family = encoder.encode_descriptor("memory_budget", help, Some(&bytes), of)?;
        for pool in &pools {
            if let Some(budget) = pool.budget_bytes {
                count(budget).encode(family.encode_family(&[("pool", pool.pool.word())])?)?;
            }
        }
        Ok(())
    }
}

impl Collector for Models {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), Error> {
        let to = &mut encoder;
        self.each(to, Kind::new("requests_running", "Answers that are being read for or written"), |tally| {
            &tally.running
        })?;
        self.each(to, Kind::new("requests_waiting", "Answers that wait for a place"), |tally| &tally.waiting)?;
        self.each(to, Kind::new("prompt_tokens", "Tokens of prompts, cached ones included"), |tally| {
            &tally.prompt_tokens
        })?;
        self.each(to, Kind::new("cached_prompt_tokens", "Tokens of prompts that were not computed again"), |tally| {
            &tally.cached_tokens
        })?;
        self.each(to, Kind::new("completion_tokens", "Tokens of answers"), |tally| &tally.completion_tokens)?;
        self.each(to, Kind::new("prefix_cache_hits", "Answers whose prompt was known in part"), |tally| {
            &tally.cache_hits
        })?;
        let first = "From a request's head to its first token, waiting and loading included";
        self.each(to, Kind::seconds("time_to_first_token", first), |tally| &tally.first_token)?;
        self.each(to, Kind::seconds("inter_token_latency", "Between two tokens of an answer"), |tally| {
            &tally.next_token
        })?;
        let whole = "From a request's head to the end of its answer, for answers that are whole";
        self.each(to, Kind::seconds("e2e_request_latency", whole), |tally| &tally.answer)?;
        self.ends(to)?;
        self.states(to)?;
        self.memory(to)
    }
}

/// This process, under the names that all exporters have for theirs.
#[derive(Debug)]
pub(super) struct Process;

impl Collector for Process {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), Error> {
        let Some(resident) = resident_bytes() else { return Ok(()) };
        let help = "Memory that this process holds, child processes not included";
        let encoder =
            encoder.encode_descriptor("process_resident_memory", help, Some(&Unit::Bytes), MetricType::Gauge)?;
        count(resident).encode(encoder)
    }
}

fn gauge(value: i64) -> ConstGauge {
    ConstGauge::new(value)
}

fn count(bytes: u64) -> ConstGauge {
    gauge(i64::try_from(bytes).unwrap_or(i64::MAX))
}

/// Memory that this process holds, where the system says so in a file.
fn resident_bytes() -> Option<u64> {
    let statm = std::fs::read_to_string("/proc/self/statm").ok()?;
    let pages: u64 = statm.split_whitespace().nth(1)?.parse().ok()?;
    #[cfg(unix)]
    // SAFETY: a plain question to the system.
    let page = unsafe { libc::sysconf(libc::_SC_PAGESIZE) };
    #[cfg(not(unix))]
    let page = 0i64;
    pages.checked_mul(u64::try_from(page).ok().filter(|page| *page > 0)?)
}
