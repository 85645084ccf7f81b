//! `mesh-llm models`: one file a command.

pub mod convert;
mod download;
pub mod import;
mod list;
pub mod show;

use crate::cli::{
    args::{ModelsArgs, ModelsCommand},
    failure::Failure,
    output::Output,
    plan::Setting,
};

pub async fn run(args: ModelsArgs, output: &Output) -> Result<(), Failure> {
    let setting = Setting::new(&args.environment)?;
    match args.command.unwrap_or(ModelsCommand::List) {
        ModelsCommand::List => list::run(&setting, output),
        ModelsCommand::Import(args) => import::run(&setting, args, output).await,
        ModelsCommand::Convert(args) => convert::run(&setting, args, output).await,
        ModelsCommand::Show(args) => show::run(&setting, args, output).await,
        ModelsCommand::Download { model, mlx, gguf } => download::run(&setting, &model, (mlx, gguf), output).await,
    }
}
