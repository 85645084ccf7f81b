//! `mesh-llm models prune`.

use super::freed;
use crate::cli::{failure::Failure, output::Output, plan::Setting};

pub fn run(setting: &Setting, json: bool, output: &Output) -> Result<(), Failure> {
    freed(&setting.store.prune()?, json, output);
    Ok(())
}
