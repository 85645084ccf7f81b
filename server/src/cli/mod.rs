//! The command line of mesh-llm. The only part that names backends and plugins.

mod access;
mod args;
mod commands;
mod config;
mod failure;
mod linked;
mod mesh;
mod output;
mod plan;
#[cfg(test)]
mod tests;

use clap::{CommandFactory, Parser};

use args::{Cli, Command, LogFormat};
use failure::{Exit, Failure};
use output::{LOG_MODELS, LOG_QUIET, LOG_SERVING, Output};

/// Runs the command line of this process, and returns what it exits with.
pub fn main() -> u8 {
    let cli = Cli::parse();
    let levels = match cli.command {
        None | Some(Command::Serve(_) | Command::Client(_)) => LOG_SERVING,
        Some(Command::Models(_)) => LOG_MODELS,
        _ => LOG_QUIET,
    };
    let log_format = cli.output.log_format;
    let output = Output::set_up(cli.output, levels);
    match run(cli, &output) {
        Ok(()) => 0,
        Err(failure) => {
            match log_format {
                LogFormat::Text => output::report(&failure),
                LogFormat::Json => {
                    tracing::error!(hint = failure.hint, exit = failure.exit as u8, "{}", failure.message)
                }
            }
            failure.exit as u8
        }
    }
}

fn run(cli: Cli, output: &Output) -> Result<(), Failure> {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .map_err(|error| Failure::new(Exit::Failure, format!("no threads could be started: {error}")))?;
    let outcome = runtime.block_on(async {
        match cli.command.unwrap_or(Command::Serve(cli.serve)) {
            Command::Serve(args) => commands::serve::run(args, output).await,
            Command::Client(args) => commands::serve::client(args, output).await,
            Command::Mesh(args) => commands::mesh::run(args, output).await,
            Command::Chat(args) => commands::chat::run(args, output).await,
            Command::Explain(args) => commands::explain::run(args, output).await,
            Command::Backends(args) => commands::backends::run(args, output).await,
            Command::Models(args) => commands::models::run(args, output).await,
            Command::Verify(args) => commands::verify::run(args, output).await,
            Command::Bench(args) => commands::bench::run(args, output).await,
            Command::Completions { shell } => {
                clap_complete::generate(shell, &mut Cli::command(), "mesh-llm", &mut std::io::stdout());
                Ok(())
            }
        }
    });
    // A thread that still waits for a line of input, or for a file, must not hold up the end.
    runtime.shutdown_background();
    outcome
}
