//! `mesh-llm verify`: whether a model is computed as it should be. A directory is compared with its own reference, a GGUF
//! with what llama-server makes of it.

mod directory;
mod gguf;

use std::path::Path;

use mesh_core::WeightFormat;
use mesh_models::{FetchError, Store, StoreOptions, Want};

use crate::cli::{args::VerifyArgs, failure::Failure, output::Output};

pub async fn run(args: VerifyArgs, output: &Output) -> Result<(), Failure> {
    match is_directory(&args.model, output).await? {
        true => directory::run(args, output).await,
        false => gguf::run(args, output).await,
    }
}

/// Whether what is named is safetensors on disk. Everything else is, or names, a GGUF.
async fn is_directory(model: &str, output: &Output) -> Result<bool, Failure> {
    let path = Path::new(model);
    if !path.is_dir() {
        return Ok(path.is_file() && path.extension().is_none_or(|extension| !extension.eq_ignore_ascii_case("gguf")));
    }
    let store = Store::new(StoreOptions { offline: true, ..StoreOptions::default() })?;
    match store.locate(model, Want::Safetensors, &output.progress()).await {
        Err(FetchError::WrongFormat { has: Some(WeightFormat::Gguf), .. }) => Ok(false),
        // What is wrong with it is said by whoever reads it.
        _ => Ok(true),
    }
}
