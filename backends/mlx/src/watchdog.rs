//! Notices a device that does not get on: the thread that waits for it cannot.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU8, AtomicU32, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use mesh_core::EngineState;

use crate::engine::Shared;

/// What the device thread is at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Doing {
    /// A chunk of a prompt.
    Read,
    /// A token of everybody.
    Write,
    /// Taking up what was remembered.
    Recall,
    /// Remembering.
    Remember,
    /// First tokens of a model that was just loaded.
    Load,
    /// A chunk of texts that are turned into vectors.
    Embed,
}

impl Doing {
    const ALL: [Self; 6] = [Self::Read, Self::Write, Self::Recall, Self::Remember, Self::Load, Self::Embed];

    fn words(self) -> &'static str {
        match self {
            Self::Read => "reading a chunk of a prompt",
            Self::Write => "writing a token",
            Self::Recall => "taking up a known prefix",
            Self::Remember => "remembering a prefix",
            Self::Load => "computing first tokens",
            Self::Embed => "turning texts into vectors",
        }
    }
}

/// When the step under way began. Written by the device thread alone.
#[derive(Debug)]
pub struct Pulse {
    epoch: Instant,
    /// Milliseconds since the epoch, plus one; 0 between steps.
    since: AtomicU64,
    doing: AtomicU8,
    given_up: AtomicBool,
}

/// Steps that were given up and have not ended: they hold the device.
static HANGING: AtomicU32 = AtomicU32::new(0);

/// Whether a step that was given up holds the device.
pub fn hangs() -> bool {
    HANGING.load(Ordering::Relaxed) > 0
}

/// A step under way; over when dropped.
pub struct Step<'a>(&'a Pulse);

impl Default for Pulse {
    fn default() -> Self {
        Self {
            epoch: Instant::now(),
            since: AtomicU64::new(0),
            doing: AtomicU8::new(0),
            given_up: AtomicBool::new(false),
        }
    }
}

impl Pulse {
    /// Begins a step.
    pub fn begin(&self, doing: Doing) -> Step<'_> {
        self.doing.store(doing as u8, Ordering::Relaxed);
        self.since.store(self.now() + 1, Ordering::Release);
        Step(self)
    }

    fn now(&self) -> u64 {
        u64::try_from(self.epoch.elapsed().as_millis()).unwrap_or(u64::MAX - 1)
    }

    /// For how long the step under way has gone on, and what it is.
    pub fn under_way(&self) -> Option<(Duration, Doing)> {
        let since = self.since.load(Ordering::Acquire).checked_sub(1)?;
        let doing = Doing::ALL.get(usize::from(self.doing.load(Ordering::Relaxed)))?;
        Some((Duration::from_millis(self.now().saturating_sub(since)), *doing))
    }
}

impl Drop for Step<'_> {
    fn drop(&mut self) {
        self.0.since.store(0, Ordering::Release);
        if self.0.given_up.swap(false, Ordering::Relaxed) {
            HANGING.fetch_sub(1, Ordering::Relaxed);
        }
    }
}

/// Fails the engine once a step takes longer than `step_max`. Its streams end with that error, and whoever holds the
/// engine may start another; the thread ends itself if the device ever answers.
pub async fn watch(shared: Arc<Shared>, step_max: Duration) {
    let mut state = shared.state.subscribe();
    let pause = (step_max / 4).clamp(Duration::from_millis(10), Duration::from_secs(5));
    loop {
        tokio::select! {
            _ = state.wait_for(EngineState::is_over) => return,
            () = tokio::time::sleep(pause) => {}
        }
        if let Some((taken, doing)) = shared.pulse.under_way().filter(|(taken, _)| *taken > step_max) {
            let what = format!("the device made no progress for {} s while {}", taken.as_secs(), doing.words());
            tracing::error!("{what}; the engine is given up");
            HANGING.fetch_add(1, Ordering::Relaxed);
            shared.pulse.given_up.store(true, Ordering::Relaxed);
            // It may have ended just now, and not have seen that.
            if shared.pulse.under_way().is_none() && shared.pulse.given_up.swap(false, Ordering::Relaxed) {
                HANGING.fetch_sub(1, Ordering::Relaxed);
            }
            shared.state.send_if_modified(|state| {
                let alive = !state.is_over();
                if alive {
                    *state = EngineState::Failed(what.as_str().into());
                }
                alive
            });
            return;
        }
    }
}
