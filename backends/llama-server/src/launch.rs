//! Starts the child and waits until it answers.

use std::{net::TcpListener, path::Path, time::Duration};

use mesh_core::LoadError;
use tokio::time::{Instant, sleep};

use crate::{
    argv::{self, Invocation},
    child::{Ended, Process, Program},
    client::{Client, ClientError, Health, SILENCE_MAX},
    settings::Settings,
};

/// Tries with another port where somebody else took the one that was free a moment ago.
const PORT_TRIES: u32 = 5;
/// First and longest pause between two looks at the child's health.
const POLL: (Duration, Duration) = (Duration::from_millis(5), Duration::from_millis(100));
/// Lines of the child's log that a failed start quotes.
const LINES_QUOTED: usize = 12;

/// What a child is asked to make room for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Shape {
    /// Context of one request, in tokens.
    pub context_tokens: u32,
    /// Requests computed at the same time.
    pub slots: u32,
    /// True if nobody asked for that many: where memory turns out to be short of them, one will do.
    pub slots_chosen: bool,
    /// For remembered prompts, in MiB.
    pub cache_mib: u32,
}

/// A child that is ready.
#[derive(Debug)]
pub(crate) struct Launched {
    pub process: Process,
    pub client: Client,
    /// Requests it computes at the same time.
    pub slots: u32,
    /// Context of one request as the child has it, in tokens.
    pub context_tokens: u32,
    /// Entries in the vocabulary, where the child tells.
    pub vocab_size: Option<u32>,
}

/// Starts `binary` on `model` and waits until it is ready. Dropping the future kills the child.
pub(crate) async fn launch(
    binary: &Path,
    model: &Path,
    name: &str,
    mut shape: Shape,
    settings: &Settings,
) -> Result<Launched, LoadError> {
    let mut tries = 1;
    loop {
        let port = free_port().map_err(|source| other("looking for a free port", source))?;
        let key = uuid::Uuid::new_v4().simple().to_string();
        let Shape { context_tokens, slots, cache_mib, .. } = shape;
        let invocation = Invocation { model, port, context_tokens, parallel: slots, extra: &settings.args };
        let program = Program {
            binary: binary.to_owned(),
            arguments: argv::arguments(&invocation),
            environment: argv::environment(&key, cache_mib),
        };
        let client = Client::new(port, &key, SILENCE_MAX).map_err(|source| other("making an HTTP client", source))?;
        let what = format!("starting {}", binary.display());
        let process = Process::start(program).await.map_err(|source| other(what, source))?;
        tracing::info!(model = name, pid = process.pid, port, context_tokens, slots, cache_mib, "llama-server started");
        match wait(&process, &client, settings.start_timeout()).await {
            Wait::Ready => return ready(process, client, slots, name).await,
            Wait::TimedOut(after) => {
                return Err(LoadError::TimedOut { what: format!("llama-server with {name}"), after });
            }
            Wait::Ended(_) if tries < PORT_TRIES && port_taken(&process) => {
                tracing::info!(port, "the port was taken meanwhile; trying another one");
                tries += 1;
            }
            Wait::Ended(_) if slots > 1 && shape.slots_chosen && memory_short(&process) => {
                tracing::warn!(model = name, slots, "llama-server has no memory for that many slots; trying with one");
                shape.slots = 1;
            }
            Wait::Ended(ended) => return Err(exited(&process, &ended, binary, name)),
        }
    }
}

enum Wait {
    Ready,
    TimedOut(Duration),
    Ended(Ended),
}

async fn wait(process: &Process, client: &Client, limit: Duration) -> Wait {
    let ready = async {
        let mut pause = POLL.0;
        while client.health().await != Health::Ready {
            sleep(pause).await;
            pause = (pause * 2).min(POLL.1);
        }
    };
    let start = Instant::now();
    tokio::select! {
        biased;
        ended = process.ended() => Wait::Ended(ended),
        () = ready => Wait::Ready,
        () = sleep(limit) => Wait::TimedOut(start.elapsed()),
    }
}

async fn ready(process: Process, client: Client, slots: u32, name: &str) -> Result<Launched, LoadError> {
    let asking = |source: ClientError| other(format!("asking llama-server about {name}"), source);
    let context_tokens = client.context_tokens().await.map_err(asking)?;
    // Some builds have no such answer; then unknown tokens are for the child to refuse.
    let vocab_size = client.vocab_size().await.unwrap_or_else(|error| {
        tracing::debug!(%error, "llama-server does not tell the size of the vocabulary");
        None
    });
    Ok(Launched { process, client, slots, context_tokens, vocab_size })
}

/// A port that is free now. It may be taken before the child binds it; then another one is tried.
fn free_port() -> std::io::Result<u16> {
    Ok(TcpListener::bind(("127.0.0.1", 0))?.local_addr()?.port())
}

fn port_taken(process: &Process) -> bool {
    ["couldn't bind", "ddress already in use"].iter().any(|words| process.tail.contains(words))
}

/// Whether the child ended for want of memory, on whatever device it computes: only it knows how much there is.
fn memory_short(process: &Process) -> bool {
    ["out of memory", "ailed to allocate", "nable to allocate", "OutOfDeviceMemory"]
        .iter()
        .any(|words| process.tail.contains(words))
}

fn exited(process: &Process, ended: &Ended, binary: &Path, name: &str) -> LoadError {
    let advice = if ended.illegal_instruction {
        format!(
            "; {} was built for another processor: `mesh-llm backends install llama-server` gets one that fits this one, \
             and --llama-server PATH names one",
            binary.display()
        )
    } else {
        String::new()
    };
    let tail = process.tail.last(LINES_QUOTED);
    let what = format!("llama-server exited with {} while loading {name}{advice}; last lines: {tail}", ended.status);
    LoadError::Exited { what }
}

pub(crate) fn other(what: impl Into<String>, source: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> LoadError {
    LoadError::Other { what: what.into(), source: source.into() }
}
