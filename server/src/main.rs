//! `mesh-llm`: serves local language models over an OpenAI-compatible API.

mod cli;

use std::process::ExitCode;

fn main() -> ExitCode {
    cli::main()
}
