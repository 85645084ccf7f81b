//! `mesh-llm models remove`.

use super::freed;
use crate::cli::{failure::Failure, output::Output, plan::Setting};

pub fn run(setting: &Setting, model: &str, json: bool, output: &Output) -> Result<(), Failure> {
    freed(&setting.store.remove(model)?, json, output);
    Ok(())
}
