//! `mesh-llm models import`: a GGUF into an MLX directory, and what became of its weights.

use std::path::PathBuf;

use clap::Args;
use comfy_table::{Table, presets};
use mesh_models::{FetchError, ImportReport, Imported, Manner, import_measured};
use serde_json::json;

use crate::cli::{
    commands::explain::{pretty, text},
    failure::{Exit, Failure},
    output::{Output, bytes},
    plan::Setting,
};

/// `mesh-llm models import`.
#[derive(Clone, Debug, Args)]
pub struct ImportArgs {
    /// A GGUF: a path, a catalog name, or a repository
    #[arg(value_name = "MODEL")]
    pub model: String,
    /// The MLX directory to make
    #[arg(value_name = "DIRECTORY")]
    pub out: PathBuf,
    /// Keep every value: what MLX has no blocks for becomes 32-bit floats, rather than being quantized anew
    #[arg(long)]
    pub exact: bool,
    /// Answer in JSON
    #[arg(long)]
    pub json: bool,
}

pub async fn run(setting: &Setting, args: ImportArgs, output: &Output) -> Result<(), Failure> {
    let ImportArgs { model, out, exact, json } = args;
    let progress = output.progress_beside(json);
    let (name, files) = setting.store.gguf_files(&model, &progress).await?;
    let manner = if exact { Manner::Exact } else { Manner::Compact };
    let directory = out.clone();
    let imported = tokio::task::spawn_blocking(move || import_measured(&files, &directory, manner, &progress)).await;
    let imported = imported.map_err(|error| Failure::new(Exit::Failure, format!("the import broke off: {error}")))?;
    let report = imported.map_err(|error| Failure::from(FetchError::from(error)))?;
    if json {
        let ImportReport { architecture, weight_bytes, parts, .. } = &report;
        output.line(pretty(&json!({
            "model": name, "directory": out, "architecture": architecture, "weight_bytes": weight_bytes, "parts": parts,
        }))?);
        return Ok(());
    }
    output.line(text([table(&report.parts)]));
    output.step("imported", format_args!("{name} at {} ({})", out.display(), bytes(report.weight_bytes)));
    output.step("next", format_args!("mesh-llm --model {} --mlx", out.display()));
    Ok(())
}

fn table(parts: &[Imported]) -> String {
    let mut table = Table::new();
    table.load_style(presets::NOTHING);
    table.set_header(["part", "from", "to", "tensors", "values", "error (relative RMS)"]);
    for part in parts {
        let error = match part.changed {
            0 => "none, the same bits".to_owned(),
            changed => format!("{:.2e}, {changed} values differ", part.relative_rms),
        };
        let (tensors, values) = (part.tensors.to_string(), part.values.to_string());
        table.add_row([part.part.to_string(), part.from.clone(), part.to.clone(), tensors, values, error]);
    }
    table.to_string()
}
