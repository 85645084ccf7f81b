//! What constraints cost: an engine whose every job has one.

use std::{path::Path, time::Duration};

use async_trait::async_trait;
use mesh_core::{Capabilities, Constraint, Engine, EngineState, EventStream, Grammar, Job, SubmitError};
use mesh_text::{Tokenizer, Vocabulary};
use tokio::sync::watch;

use crate::cli::failure::{Exit, Failure};

/// An engine, and what its answers have to be.
pub struct Constrained<'a> {
    engine: &'a dyn Engine,
    constraint: Constraint,
}

impl<'a> Constrained<'a> {
    /// Answers are texts of `grammar`, in the tokens of the tokenizer at `path`.
    pub fn new(engine: &'a dyn Engine, path: &Path, grammar: Grammar) -> Result<Self, Failure> {
        let failed = |error: &dyn std::fmt::Display| Failure::new(Exit::Usage, error);
        let tokenizer = Tokenizer::from_file(path).map_err(|error| failed(&error))?;
        // Which token would end an answer does not matter: it is as long as was asked for.
        let end = tokenizer.ids().saturating_sub(1);
        let vocabulary = Vocabulary::new(&tokenizer, &[], &[end]).map_err(|error| failed(&error))?;
        let rules = Some(vocabulary.rules(&grammar).map_err(|error| failed(&error))?);
        Ok(Self { engine, constraint: Constraint { grammar, rules } })
    }
}

#[async_trait]
impl Engine for Constrained<'_> {
    fn capabilities(&self) -> &Capabilities {
        self.engine.capabilities()
    }

    fn state(&self) -> watch::Receiver<EngineState> {
        self.engine.state()
    }

    async fn submit(&self, job: Job) -> Result<EventStream, SubmitError> {
        self.engine.submit(Job { constraint: Some(self.constraint.clone()), ..job }).await
    }

    async fn drain(&self, grace: Duration) {
        self.engine.drain(grace).await;
    }
}
