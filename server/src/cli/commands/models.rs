//! `mesh-llm models`.

use comfy_table::{Table, presets};
use mesh_models::{Origin, Want};

use crate::cli::{
    args::{ModelsArgs, ModelsCommand},
    failure::Failure,
    output::{Output, bytes},
    plan::Setting,
};

pub async fn run(args: ModelsArgs, output: &Output) -> Result<(), Failure> {
    let setting = Setting::new(&args.environment)?;
    match args.command.unwrap_or(ModelsCommand::List) {
        ModelsCommand::List => list(&setting, output),
        ModelsCommand::Download { model, mlx, gguf } => {
            let want = match (mlx, gguf) {
                (true, _) => Want::Safetensors,
                (_, true) => Want::Gguf,
                _ => Want::Any,
            };
            let artifact = setting.store.locate(&model, want, &output.progress()).await?;
            output
                .step("ready", format_args!("{} ({}) at {}", artifact.name, artifact.format, artifact.root.display()));
            Ok(())
        }
    }
}

fn list(setting: &Setting, output: &Output) -> Result<(), Failure> {
    let mut table = Table::new();
    table.load_style(presets::NOTHING);
    table.set_header(["model", "from", "format", "size", "on disk", "about"]);
    for model in setting.store.list()? {
        let origin = match model.origin {
            Origin::Catalog => "catalog",
            Origin::Imported => "imported",
            Origin::Hub => "hub",
        };
        table.add_row([
            model.reference,
            origin.to_owned(),
            model.format.to_string(),
            model.weight_bytes.map(bytes).unwrap_or_default(),
            if model.root.is_some() { "yes" } else { "no" }.to_owned(),
            model.about,
        ]);
    }
    for line in table.to_string().lines() {
        output.line(line.trim_end());
    }
    Ok(())
}
