//! `mesh-llm models download`.

use mesh_models::Want;

use crate::cli::{failure::Failure, output::Output, plan::Setting};

pub async fn run(setting: &Setting, model: &str, (mlx, gguf): (bool, bool), output: &Output) -> Result<(), Failure> {
    let want = match (mlx, gguf) {
        (true, _) => Want::Safetensors,
        (_, true) => Want::Gguf,
        _ => Want::Any,
    };
    let artifact = setting.store.locate(model, want, &output.progress()).await?;
    output.step("ready", format_args!("{} ({}) at {}", artifact.name, artifact.format, artifact.root.display()));
    Ok(())
}
