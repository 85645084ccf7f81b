//! `mesh-llm models convert`: a checkpoint of plain floats into one that is quantized, and what that changed.

use std::path::PathBuf;

use clap::Args;
use comfy_table::{Table, presets};
use mesh_backend_mlx::convert::{self, ConvertError, ConvertReport, Converted};
use mesh_core::Hint;
use mesh_llm::slots::StartError;
use mesh_models::{Want, probe};
use serde_json::json;

use crate::cli::{
    commands::explain::{pretty, text},
    failure::{Exit, Failure},
    output::{Output, bytes},
    plan::Setting,
};

/// `mesh-llm models convert`.
#[derive(Clone, Debug, Args)]
pub struct ConvertArgs {
    /// A model with safetensors weights: a path, a catalog name, or a repository
    #[arg(value_name = "MODEL")]
    pub model: String,
    /// The directory to make
    #[arg(value_name = "DIRECTORY")]
    pub out: PathBuf,
    /// What codes mean: affine, mxfp4, mxfp8 or nvfp4
    #[arg(long, value_name = "MODE", default_value = "affine")]
    pub mode: String,
    /// Bits a code; 4 for affine, and what the others have, if absent
    #[arg(long, value_name = "BITS")]
    pub bits: Option<u32>,
    /// Values that share a scale; 64 for affine, and what the others have, if absent
    #[arg(long, value_name = "VALUES")]
    pub group_size: Option<u32>,
    /// Answer in JSON
    #[arg(long)]
    pub json: bool,
}

pub async fn run(setting: &Setting, args: ConvertArgs, output: &Output) -> Result<(), Failure> {
    let ConvertArgs { model, out, mode, bits, group_size, json } = args;
    let scheme = convert::scheme(&mode, bits, group_size).map_err(|error| failure(Exit::Usage, &error))?;
    let progress = output.progress_beside(json);
    let artifact = setting.store.locate(&model, Want::Safetensors, &progress).await?;
    let name = artifact.name.clone();
    let directory = out.clone();
    // MLX's streams belong to a thread, so all of it happens on one.
    let converted = tokio::task::spawn_blocking(move || {
        let profile = probe(&artifact).map_err(|error| Failure::from(&StartError::from(error)))?;
        convert::convert(&profile, &directory, scheme, &progress).map_err(|error| failure(Exit::Model, &error))
    });
    let report = converted
        .await
        .map_err(|error| Failure::new(Exit::Failure, format!("the conversion broke off: {error}")))??;
    let ConvertReport { parts, bytes_before, bytes_after } = &report;
    if json {
        let whole = json!({ "model": name, "directory": out, "mode": mode, "report": report });
        output.line(pretty(&whole)?);
        return Ok(());
    }
    output.line(text([table(parts)]));
    let (before, after) = (bytes(*bytes_before), bytes(*bytes_after));
    output.step("converted", format_args!("{name} at {} ({before} to {after})", out.display()));
    output.step("next", format_args!("mesh-llm --model {} --mlx", out.display()));
    Ok(())
}

fn failure(exit: Exit, error: &ConvertError) -> Failure {
    let failure = Failure::new(exit, error);
    match error.hint() {
        Some(hint) => failure.hint(hint),
        None => failure,
    }
}

fn table(parts: &[Converted]) -> String {
    let mut table = Table::new();
    table.load_style(presets::NOTHING);
    table.set_header(["part", "stored as", "tensors", "parameters", "size", "error (relative RMS)"]);
    for row in parts {
        let error = match row.kept {
            Some(why) => format!("left as it is: {why}"),
            None => format!("{:.2e}", row.relative_rms),
        };
        let size = format!("{} to {}", bytes(row.bytes_before), bytes(row.bytes_after));
        let (tensors, values) = (row.tensors.to_string(), row.values.to_string());
        table.add_row([row.part.to_string(), row.form.clone(), tensors, values, size, error]);
    }
    table.to_string()
}
