//! The command line.

use std::{net::IpAddr, path::PathBuf};

use bytesize::ByteSize;
use clap::{Args, Parser, Subcommand, ValueEnum};

use super::{
    access::AccessArgs,
    commands::models::{convert::ConvertArgs, import::ImportArgs, show::ShowArgs},
    mesh::MeshArgs,
};

/// Serves local language models over an OpenAI-compatible API
#[derive(Debug, Parser)]
#[command(
    name = "mesh-llm",
    version,
    max_term_width = 100,
    args_conflicts_with_subcommands = true,
    after_help = "Without a command, mesh-llm serves: `mesh-llm --model M` is `mesh-llm serve --model M`.

Exit codes:
  0  done
  1  failure
  2  wrong usage or configuration
  3  the model cannot be found, fetched or read
  4  no backend can serve the model
  5  the address cannot be listened on
  6  the backend could not load the model
  7  the mesh cannot be joined or used"
)]
pub struct Cli {
    #[command(subcommand)]
    pub command: Option<Command>,
    #[command(flatten)]
    pub serve: ServeArgs,
    #[command(flatten)]
    pub output: OutputArgs,
}

/// Everything mesh-llm does. A new command is a variant here and a file in `commands/`.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Serve a model over HTTP
    Serve(ServeArgs),
    /// Serve the models of a mesh's other machines here, and none of this one's
    Client(ClientArgs),
    /// Create a mesh of machines that serve for one another, let others in, look at it, leave it
    Mesh(super::commands::mesh::MeshArgs),
    /// Talk with a model in the terminal
    Chat(ChatArgs),
    /// Say what is known about a model, and which backend would serve it and why
    Explain(ExplainArgs),
    /// List backends, or install what one needs
    Backends(BackendsArgs),
    /// List, find, download, check and remove models
    Models(ModelsArgs),
    /// Check that a model is computed as it should be
    Verify(VerifyArgs),
    /// Measure how fast a model, or random weights of a model's shape, reads and writes
    Bench(BenchArgs),
    /// Print a shell's completion script
    Completions {
        /// The shell
        shell: clap_complete::Shell,
    },
}

/// How mesh-llm talks.
#[derive(Clone, Copy, Debug, Args)]
#[command(next_help_heading = "Output")]
pub struct OutputArgs {
    /// Form of the log on standard error: text, or lines of JSON with the names of OpenTelemetry
    #[arg(long, global = true, value_enum, default_value_t, value_name = "FORM")]
    pub log_format: LogFormat,
    /// Whether to use colors
    #[arg(long, global = true, value_enum, default_value_t, value_name = "WHEN")]
    pub color: Color,
}

/// Form of the log.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum LogFormat {
    #[default]
    Text,
    Json,
}

/// When to use colors.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum Color {
    /// On a terminal, unless NO_COLOR is set
    #[default]
    Auto,
    Always,
    Never,
}

/// Which model, and who serves it.
#[derive(Clone, Debug, Default, Args)]
#[command(next_help_heading = "Model")]
pub struct ModelArgs {
    /// A catalog name, a path, or a repository: org/repo, org/repo/file, org/repo@revision, org/repo:QUANT.
    /// A small default model if absent
    #[arg(long, value_name = "MODEL", conflicts_with_all = ["mlx_file", "gguf_file"])]
    pub model: Option<String>,
    #[command(flatten)]
    pub weights: WeightsArgs,
}

/// The same for a server, which may have several.
#[derive(Clone, Debug, Default, Args)]
#[command(next_help_heading = "Model")]
pub struct ServedArgs {
    /// A catalog name, a path, or a repository: org/repo, org/repo/file, org/repo@revision, org/repo:QUANT.
    /// A small default model if absent. May be repeated: the first is loaded at once, others when they are asked for
    #[arg(long = "model", value_name = "MODEL", conflicts_with_all = ["mlx_file", "gguf_file"])]
    pub model: Vec<String>,
    #[command(flatten)]
    pub weights: WeightsArgs,
}

/// Files instead of a model, and what goes for all models of a command line.
#[derive(Clone, Debug, Default, Args)]
#[command(next_help_heading = "Model")]
pub struct WeightsArgs {
    /// A safetensors file on disk, served by the mlx backend
    #[arg(long, value_name = "PATH", conflicts_with_all = ["gguf_file", "gguf", "backend"])]
    pub mlx_file: Option<PathBuf>,
    /// A GGUF file on disk
    #[arg(long, value_name = "PATH", conflicts_with = "mlx")]
    pub gguf_file: Option<PathBuf>,
    #[command(flatten)]
    pub choice: ChoiceArgs,
    /// Context length in tokens: prompt and answer together
    #[arg(long, value_name = "TOKENS", value_parser = clap::value_parser!(u32).range(1..))]
    pub ctx: Option<u32>,
}

/// Which weights of a model, and who serves them.
#[derive(Clone, Debug, Default, Args)]
#[command(next_help_heading = "Model")]
pub struct ChoiceArgs {
    /// The model's safetensors weights, served by the mlx backend
    #[arg(long, conflicts_with_all = ["gguf", "backend"])]
    pub mlx: bool,
    /// The model's GGUF weights
    #[arg(long)]
    pub gguf: bool,
    /// The backend that has to serve it, or `auto` for the best one, experimental ones included
    #[arg(long, value_name = "NAME")]
    pub backend: Option<String>,
}

/// Where things are.
#[derive(Clone, Debug, Default, Args)]
#[command(next_help_heading = "Environment")]
pub struct EnvironmentArgs {
    /// Configuration file; config.toml in mesh-llm's configuration directory if absent
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// The llama-server binary to use
    #[arg(long, value_name = "PATH")]
    pub llama_server: Option<PathBuf>,
    /// Never install what a backend lacks
    #[arg(long)]
    pub no_install: bool,
    /// Use models that are on disk, and download nothing
    #[arg(long)]
    pub offline: bool,
}

/// How many requests at once.
#[derive(Clone, Copy, Debug, Default, Args)]
pub struct LimitArgs {
    /// Requests computed at the same time for a model [default: as many as memory allows]
    #[arg(long, value_name = "NUMBER", help_heading = "Server", value_parser = clap::value_parser!(u32).range(1..=256))]
    pub max_parallel: Option<u32>,
    /// Requests that may wait for those; one more is answered with 503 [default: 32]
    #[arg(long, value_name = "NUMBER", help_heading = "Server", value_parser = clap::value_parser!(u32).range(..=4096))]
    pub max_queue: Option<u32>,
}

/// `mesh-llm serve`.
#[derive(Clone, Debug, Default, Args)]
pub struct ServeArgs {
    #[command(flatten)]
    pub model: ServedArgs,
    #[command(flatten)]
    pub environment: EnvironmentArgs,
    #[command(flatten)]
    pub limits: LimitArgs,
    /// Address to listen on [default: 127.0.0.1]
    #[arg(long, value_name = "ADDRESS", help_heading = "Server")]
    pub host: Option<IpAddr>,
    /// Port to listen on; 0 takes any free one [default: 9337]
    #[arg(long, value_name = "PORT", help_heading = "Server")]
    pub port: Option<u16>,
    /// Memory that models may hold together, such as 8GiB; the least recently used one is unloaded to make room.
    /// What the device has, less a tenth, if absent
    #[arg(long, value_name = "BYTES", help_heading = "Server", value_parser = memory)]
    pub memory: Option<ByteSize>,
    /// Unload models that nobody has used for so long
    #[arg(long, value_name = "SECONDS", help_heading = "Server", value_parser = clap::value_parser!(u64).range(1..))]
    pub idle_ttl: Option<u64>,
    #[command(flatten)]
    pub access: AccessArgs,
    #[command(flatten)]
    pub mesh: MeshArgs,
}

/// `mesh-llm client`.
#[derive(Clone, Debug, Default, Args)]
pub struct ClientArgs {
    #[command(flatten)]
    pub environment: EnvironmentArgs,
    /// Address to listen on [default: 127.0.0.1]
    #[arg(long, value_name = "ADDRESS", help_heading = "Server")]
    pub host: Option<IpAddr>,
    /// Port to listen on; 0 takes any free one [default: 9337]
    #[arg(long, value_name = "PORT", help_heading = "Server")]
    pub port: Option<u16>,
    #[command(flatten)]
    pub access: AccessArgs,
    #[command(flatten)]
    pub mesh: MeshArgs,
}

/// What is said of an amount of memory that is none.
pub const MEMORY: &str = "it has to be a number of bytes, such as 8GiB or 512MiB";

fn memory(text: &str) -> Result<ByteSize, String> {
    match text.parse::<ByteSize>() {
        Ok(bytes) if bytes.as_u64() > 0 => Ok(bytes),
        _ => Err(MEMORY.into()),
    }
}

/// `mesh-llm chat`.
#[derive(Clone, Debug, Default, Args)]
pub struct ChatArgs {
    #[command(flatten)]
    pub model: ModelArgs,
    #[command(flatten)]
    pub environment: EnvironmentArgs,
    /// Talk with a model of a running server instead, such as http://127.0.0.1:9337
    #[arg(long, value_name = "URL", help_heading = "Chat", conflicts_with_all = ["mlx_file", "gguf_file", "mlx", "gguf", "backend", "ctx"])]
    pub url: Option<String>,
    /// Instructions for the model
    #[arg(long, value_name = "TEXT", help_heading = "Chat")]
    pub system: Option<String>,
    /// Most tokens of an answer
    #[arg(long, value_name = "TOKENS", help_heading = "Chat", value_parser = clap::value_parser!(u32).range(1..))]
    pub max_tokens: Option<u32>,
    /// Randomness, 0 to 2; 0 always takes the likeliest token
    #[arg(long, value_name = "NUMBER", help_heading = "Chat", value_parser = temperature)]
    pub temperature: Option<f32>,
}

fn temperature(text: &str) -> Result<f32, String> {
    match text.parse::<f32>() {
        Ok(value) if (0.0..=2.0).contains(&value) => Ok(value),
        _ => Err("it has to be a number between 0 and 2".into()),
    }
}

/// `mesh-llm explain`.
#[derive(Clone, Debug, Args)]
pub struct ExplainArgs {
    /// A catalog name, a path, or a repository
    #[arg(value_name = "MODEL")]
    pub model: String,
    /// Answer in JSON
    #[arg(long)]
    pub json: bool,
    /// The server of this machine that is asked where requests go, if it takes part in a mesh [default: where `mesh-llm
    /// serve` listens]
    #[arg(long, value_name = "URL")]
    pub url: Option<String>,
    #[command(flatten)]
    pub choice: ChoiceArgs,
    #[command(flatten)]
    pub environment: EnvironmentArgs,
}

/// `mesh-llm backends`.
#[derive(Clone, Debug, Args)]
pub struct BackendsArgs {
    #[command(subcommand)]
    pub command: Option<BackendsCommand>,
    #[command(flatten)]
    pub environment: EnvironmentArgs,
}

#[derive(Clone, Debug, Subcommand)]
pub enum BackendsCommand {
    /// List backends and what they find on this machine
    List,
    /// Install what a backend needs
    Install {
        /// The backend
        name: String,
    },
}

/// `mesh-llm models`.
#[derive(Clone, Debug, Args)]
// `--offline` is about the command that follows, and is looked for behind it.
#[command(mut_args(|arg| arg.global(true)))]
pub struct ModelsArgs {
    #[command(subcommand)]
    pub command: Option<ModelsCommand>,
    #[command(flatten)]
    pub environment: EnvironmentArgs,
}

#[derive(Clone, Debug, Subcommand)]
pub enum ModelsCommand {
    /// List catalog names and models on disk
    List {
        /// Answer in JSON
        #[arg(long)]
        json: bool,
    },
    /// Look for models by words, in the catalog and on the hub
    Search {
        /// Words that a model's name has to hold
        #[arg(required = true)]
        words: Vec<String>,
        /// Answer in JSON
        #[arg(long)]
        json: bool,
    },
    /// Say what a model is, what it can do, what memory it takes and who would serve it
    Show(ShowArgs),
    /// Make an MLX directory of a GGUF, and say what became of its weights
    Import(ImportArgs),
    /// Quantize a model's safetensors into a new directory, and say what that changed
    Convert(ConvertArgs),
    /// Download a model
    Download {
        /// A catalog name or a repository
        model: String,
        /// Its safetensors weights, where it has several kinds
        #[arg(long, conflicts_with = "gguf")]
        mlx: bool,
        /// Its GGUF weights, where it has several kinds
        #[arg(long)]
        gguf: bool,
    },
    /// Remove a model from the cache: all of it, a revision, a quantization or a file
    Remove {
        /// A catalog name, a repository, or a directory of the cache
        model: String,
        /// Answer in JSON
        #[arg(long)]
        json: bool,
    },
    /// Remove from the cache what nothing refers to, and what interrupted downloads left
    Prune {
        /// Answer in JSON
        #[arg(long)]
        json: bool,
    },
    /// Hash what is in the cache again, and compare it with what was published
    Verify {
        /// A catalog name or a repository; everything if absent
        model: Option<String>,
        /// Answer in JSON
        #[arg(long)]
        json: bool,
    },
}

/// `mesh-llm verify`.
#[derive(Clone, Debug, Args)]
pub struct VerifyArgs {
    /// A directory, whose logits are compared with its own reference.safetensors; or a GGUF file, or a catalog name or
    /// repository of one, whose tokens on the mlx backend are compared with llama-server's
    #[arg(value_name = "MODEL")]
    pub model: String,
    /// For a directory the largest absolute difference of logits allowed; its own `tolerance`, or 2e-4, if absent. For a
    /// GGUF the largest difference of log-probabilities between two choices that may fall either way; 0.05 if absent
    #[arg(long, value_name = "NUMBER", value_parser = positive)]
    pub tolerance: Option<f32>,
    /// Where to compute
    #[arg(long, value_enum, default_value_t, value_name = "DEVICE")]
    pub device: BenchDevice,
    /// Compute in bf16, and compare the median over positions of each one's largest difference
    #[arg(long, requires = "tolerance")]
    pub bf16: bool,
    /// Use MLX's plain operations alone, no kernels of our own
    #[arg(long)]
    pub no_kernels: bool,
    /// Answer in JSON
    #[arg(long)]
    pub json: bool,
    #[command(flatten)]
    pub environment: EnvironmentArgs,
}

fn positive(text: &str) -> Result<f32, String> {
    match text.parse::<f32>() {
        Ok(value) if value > 0.0 => Ok(value),
        _ => Err("it has to be a number above 0".into()),
    }
}

/// `mesh-llm bench`.
#[derive(Clone, Debug, Args)]
pub struct BenchArgs {
    #[command(flatten)]
    pub model: ModelArgs,
    #[command(flatten)]
    pub environment: EnvironmentArgs,
    /// Measure the mlx backend on random weights of this shape instead, such as qwen3-8b
    #[arg(long, value_name = "NAME", help_heading = "Bench", conflicts_with_all = ["model", "mlx_file", "gguf_file", "mlx", "gguf", "backend", "ctx"])]
    pub shape: Option<String>,
    /// Bits a weight of a shape: 2 to 8 quantized, 16 or 32 plain
    #[arg(long, value_name = "BITS", help_heading = "Bench", default_value_t = 4, requires = "shape")]
    pub bits: u32,
    /// Where to compute a shape
    #[arg(long, value_enum, default_value_t, value_name = "DEVICE", help_heading = "Bench", requires = "shape")]
    pub device: BenchDevice,
    /// Seed of random weights
    #[arg(long, value_name = "NUMBER", help_heading = "Bench", default_value_t = 0, requires = "shape")]
    pub seed: u64,
    /// Answers have to match this regular expression, in the tokens of --tokenizer: what constraints cost
    #[arg(long, value_name = "REGEX", help_heading = "Bench", requires = "tokenizer", requires = "shape")]
    pub constrain: Option<String>,
    /// The same by a JSON schema
    #[arg(
        long,
        value_name = "JSON",
        help_heading = "Bench",
        requires = "tokenizer",
        requires = "shape",
        conflicts_with = "constrain"
    )]
    pub constrain_schema: Option<String>,
    /// The tokenizer.json whose vocabulary constraints are about; no larger than the shape's
    #[arg(long, value_name = "PATH", help_heading = "Bench")]
    pub tokenizer: Option<PathBuf>,
    /// Measure a shape with MLX's plain operations alone, no kernels of our own
    #[arg(long, help_heading = "Bench", requires = "shape")]
    pub no_kernels: bool,
    /// Tokens to read
    #[arg(long, value_name = "TOKENS", help_heading = "Bench", default_value_t = 512, value_parser = clap::value_parser!(u32).range(1..))]
    pub prompt_tokens: u32,
    /// Tokens to write
    #[arg(long, value_name = "TOKENS", help_heading = "Bench", default_value_t = 128, value_parser = clap::value_parser!(u32).range(2..))]
    pub generate_tokens: u32,
    /// Requests at once; several numbers are measured one after the other
    #[arg(long, value_name = "NUMBER", help_heading = "Bench", value_delimiter = ',', value_parser = clap::value_parser!(u32).range(1..=256))]
    pub streams: Vec<u32>,
    /// Measure the time to the first token of a prompt that is sent right behind one of so many tokens
    #[arg(long, value_name = "TOKENS", help_heading = "Bench", conflicts_with = "streams", value_parser = clap::value_parser!(u32).range(1..))]
    pub behind: Option<u32>,
    /// Have a conversation of so many turns, of --prompt-tokens in all, and measure what is not computed again
    #[arg(long, value_name = "TURNS", help_heading = "Bench", conflicts_with_all = ["streams", "behind"], value_parser = clap::value_parser!(u32).range(2..))]
    pub conversation: Option<u32>,
    /// A setting of the mlx backend for a shape, such as prefill_chunk_tokens=512
    #[arg(long = "set", value_name = "KEY=VALUE", help_heading = "Bench", requires = "shape")]
    pub settings: Vec<String>,
    /// Runs that count, after one that warms up
    #[arg(long, value_name = "NUMBER", help_heading = "Bench", default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..))]
    pub runs: u32,
    /// Answer in JSON
    #[arg(long, help_heading = "Bench")]
    pub json: bool,
}

/// Where MLX computes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum BenchDevice {
    /// A GPU if there is one
    #[default]
    Auto,
    Cpu,
    Gpu,
}
