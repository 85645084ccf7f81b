//! Finds a model and prints what is known about it: `cargo run -p mesh-models --example locate -- MODEL [--mlx|--gguf]`.

use mesh_core::{Hint, ProgressSink};
use mesh_models::{DEFAULT_MODEL, FetchError, Store, StoreOptions, Want, probe};

#[tokio::main]
async fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let flag = |name: &str| arguments.iter().any(|argument| argument == name);
    let want = if flag("--mlx") {
        Want::Safetensors
    } else if flag("--gguf") {
        Want::Gguf
    } else {
        Want::Any
    };
    let reference = arguments.iter().find(|argument| !argument.starts_with("--")).map_or(DEFAULT_MODEL, String::as_str);
    if let Err(error) = show(reference, want, flag("--offline")).await {
        eprintln!("error: {error}");
        if let Some(hint) = error.hint() {
            eprintln!("hint: {hint}");
        }
        std::process::exit(1);
    }
}

async fn show(reference: &str, want: Want, offline: bool) -> Result<(), FetchError> {
    let store = Store::new(StoreOptions { offline, ..StoreOptions::default() })?;
    let progress =
        ProgressSink::new(|progress| eprint!("\r{:?} {} of {:?}  ", progress.stage, progress.done, progress.total));
    let artifact = store.locate(reference, want, &progress).await?;
    println!("\n{} at {}", artifact.name, artifact.root.display());
    for (name, value, source) in probe(&artifact)?.facts() {
        println!("{name:20} {value}  ({source})");
    }
    Ok(())
}
