//! How commands fail: a message, a hint, an exit code.

use std::fmt::Display;

use mesh_core::Hint;
use mesh_llm::slots::StartError;
use mesh_models::FetchError;

/// Exit codes. `--help` lists them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exit {
    /// Anything that is none of the others.
    Failure = 1,
    /// Wrong usage or configuration.
    Usage = 2,
    /// The model cannot be found, fetched or read.
    Model = 3,
    /// No backend can serve the model.
    Backend = 4,
    /// The address cannot be listened on.
    Address = 5,
    /// The backend could not load the model.
    Load = 6,
    /// The mesh cannot be joined or used.
    Mesh = 7,
}

/// A command that failed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failure {
    /// What was wrong.
    pub message: String,
    /// What to do next.
    pub hint: Option<String>,
    /// What the process exits with.
    pub exit: Exit,
}

impl Failure {
    /// A failure without a hint.
    pub fn new(exit: Exit, message: impl Display) -> Self {
        Self { message: message.to_string(), hint: None, exit }
    }

    /// Adds what to do next.
    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }

    fn hinted(exit: Exit, error: &(impl Display + Hint)) -> Self {
        Self { message: error.to_string(), hint: error.hint(), exit }
    }
}

impl From<&StartError> for Failure {
    fn from(error: &StartError) -> Self {
        let exit = match error {
            StartError::Fetch(_) | StartError::Probe(_) | StartError::Voice(_) => Exit::Model,
            StartError::Election(_) => Exit::Backend,
            StartError::Load(_) | StartError::Room(_) => Exit::Load,
            StartError::Engine { .. } | StartError::Panicked { .. } => Exit::Failure,
        };
        Self::hinted(exit, error)
    }
}

impl From<FetchError> for Failure {
    fn from(error: FetchError) -> Self {
        Self::hinted(Exit::Model, &error)
    }
}

impl From<mesh_core::RegistryError> for Failure {
    fn from(error: mesh_core::RegistryError) -> Self {
        Self::new(Exit::Failure, error).hint("this binary was put together wrongly; build it again from clean sources")
    }
}
