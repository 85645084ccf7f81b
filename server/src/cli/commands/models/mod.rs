//! `mesh-llm models`: one file a command.

pub mod convert;
mod download;
pub mod import;
mod list;
mod prune;
mod remove;
mod search;
pub mod show;
mod verify;

use comfy_table::{Table, presets};
use mesh_models::{Freed, catalog::Entry};
use serde_json::{Value, json};

use crate::cli::{
    args::{ModelsArgs, ModelsCommand},
    failure::Failure,
    output::{Output, bytes},
    plan::Setting,
};

pub async fn run(args: ModelsArgs, output: &Output) -> Result<(), Failure> {
    let setting = Setting::new(&args.environment)?;
    match args.command.unwrap_or(ModelsCommand::List { json: false }) {
        ModelsCommand::List { json } => list::run(&setting, json, output),
        ModelsCommand::Search { words, json } => search::run(&setting, &words.join(" "), json, output).await,
        ModelsCommand::Import(args) => import::run(&setting, args, output).await,
        ModelsCommand::Convert(args) => convert::run(&setting, args, output).await,
        ModelsCommand::Show(args) => show::run(&setting, args, output).await,
        ModelsCommand::Download { model, mlx, gguf } => download::run(&setting, &model, (mlx, gguf), output).await,
        ModelsCommand::Remove { model, json } => remove::run(&setting, &model, json, output),
        ModelsCommand::Prune { json } => prune::run(&setting, json, output),
        ModelsCommand::Verify { model, json } => verify::run(&setting, model.as_deref(), json, output).await,
    }
}

/// A table without lines, for people and their pipes.
fn print(rows: impl IntoIterator<Item = Vec<String>>, header: &[&str], output: &Output) {
    let mut table = Table::new();
    table.load_style(presets::NOTHING);
    table.set_header(header);
    table.add_rows(rows);
    for line in table.to_string().lines() {
        output.line(line.trim_end());
    }
}

/// What the catalog says of a model, for programs.
fn facts(entry: &Entry) -> Value {
    let capabilities: Vec<String> = entry.capabilities.iter().map(ToString::to_string).collect();
    json!({
        "repo": entry.repo,
        "file": entry.file,
        "parameters": entry.parameters,
        "active_parameters": entry.active_parameters,
        "context_tokens": entry.context,
        "licence": entry.licence,
        "capabilities": capabilities,
    })
}

/// What was removed, and how much room that makes.
fn freed(freed: &Freed, json: bool, output: &Output) {
    if json {
        output.line(json!({ "freed_bytes": freed.bytes, "removed": freed.what }));
        return;
    }
    freed.what.iter().for_each(|what| output.step("removed", what));
    output.step("freed", bytes(freed.bytes));
}
