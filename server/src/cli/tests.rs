//! What people read on the command line.

use clap::{CommandFactory, Parser};

use super::args::Cli;

fn help(path: &[&str]) -> String {
    let mut command = Cli::command().term_width(100);
    command.build();
    let mut command = &mut command;
    for name in path {
        command = command.find_subcommand_mut(name).unwrap();
    }
    command.render_help().to_string()
}

#[test]
fn help_of_every_command() {
    for path in
        [&[][..], &["serve"], &["chat"], &["explain"], &["backends"], &["models"], &["models", "download"], &["verify"]]
    {
        let name = if path.is_empty() { "mesh-llm".to_owned() } else { path.join("-") };
        insta::assert_snapshot!(format!("help-{name}"), help(path));
    }
}

#[test]
fn contradictions_are_refused() {
    for line in [
        "mesh-llm --mlx --gguf",
        "mesh-llm --mlx --backend llama-server",
        "mesh-llm --model a --gguf-file b.gguf",
        "mesh-llm --model a --mlx-file b.safetensors",
        "mesh-llm --mlx-file a.safetensors --gguf-file b.gguf",
        "mesh-llm --mlx --gguf-file b.gguf",
        "mesh-llm --gguf --mlx-file b.safetensors",
        "mesh-llm --ctx 0",
        "mesh-llm --max-parallel 0",
        "mesh-llm --max-queue 4097",
        "mesh-llm --port 70000",
        "mesh-llm --model a explain b",
        "mesh-llm chat --url http://127.0.0.1:9337 --mlx",
        "mesh-llm chat --temperature 3",
        "mesh-llm --modle a",
    ] {
        let refused = Cli::try_parse_from(line.split_whitespace());
        assert!(refused.is_err(), "{line} was accepted");
    }
}

#[test]
fn serve_is_what_happens_without_a_command() {
    let short = Cli::try_parse_from(["mesh-llm", "--model", "a", "--mlx", "--port", "1"]).unwrap();
    assert!(short.command.is_none());
    let long = Cli::try_parse_from(["mesh-llm", "serve", "--model", "a", "--mlx", "--port", "1"]).unwrap();
    let Some(super::Command::Serve(long)) = long.command else { panic!("{long:?}") };
    assert_eq!(format!("{:?}", short.serve), format!("{long:?}"));
}
