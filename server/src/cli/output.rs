//! What people see: lines on standard output, errors and logs on standard error, bars on a terminal.

use std::{
    collections::HashMap,
    fmt::Display,
    io::{IsTerminal, Write},
    sync::{Arc, Mutex},
};

use console::style;
use indicatif::{MultiProgress, ProgressBar, ProgressDrawTarget, ProgressStyle};
use mesh_core::{Progress, ProgressSink, Stage};
use mesh_llm::otel;
use tracing_subscriber::{EnvFilter, fmt::MakeWriter};

use super::{
    args::{Color, LogFormat, OutputArgs},
    failure::Failure,
};

/// The environment variable that sets the log's levels.
const LOG_VARIABLE: &str = "MESH_LLM_LOG";
/// The log of a server: what it does, and what others warn of.
pub const LOG_SERVING: &str = "warn,mesh_llm=info,mesh_models=info,mesh_text=info,mesh_backend_mlx=info,\
                               mesh_backend_llama_server=info";
/// The log of commands about models: what was chosen and why is never silent.
pub const LOG_MODELS: &str = "warn,mesh_models=info";
/// The log of everything else.
pub const LOG_QUIET: &str = "warn";

/// Where everything is printed.
#[derive(Clone)]
pub struct Output {
    bars: MultiProgress,
    drawn: bool,
}

impl Output {
    /// Sets colors and the log up. `levels` unless the environment says otherwise.
    pub fn set_up(args: OutputArgs, levels: &str) -> Self {
        match args.color {
            Color::Auto => {}
            Color::Always | Color::Never => {
                console::set_colors_enabled(args.color == Color::Always);
                console::set_colors_enabled_stderr(args.color == Color::Always);
            }
        }
        let bars = MultiProgress::with_draw_target(ProgressDrawTarget::stderr());
        let drawn = std::io::stderr().is_terminal();
        let levels = EnvFilter::try_from_env(LOG_VARIABLE).unwrap_or_else(|_| EnvFilter::new(levels));
        let writer = BesideBars(bars.clone());
        let log = tracing_subscriber::fmt().with_env_filter(levels).with_writer(writer);
        // A second set-up in one process (tests) keeps the first.
        match args.log_format {
            LogFormat::Text => log.with_ansi(console::colors_enabled_stderr()).with_target(false).try_init().ok(),
            LogFormat::Json => log.fmt_fields(otel::Json::fields()).event_format(otel::Json).try_init().ok(),
        };
        Self { bars, drawn }
    }

    /// A line on standard output.
    pub fn line(&self, text: impl Display) {
        // A closed pipe is the reader's choice, and no reason to stop serving.
        self.bars.suspend(|| writeln!(std::io::stdout(), "{text}").ok());
    }

    /// A line on what is being done.
    pub fn step(&self, what: &str, text: impl Display) {
        self.line(format_args!("{} {text}", style(format!("{what:>9}")).green().bold()));
    }

    /// A line that should not be missed.
    pub fn notice(&self, text: impl Display) {
        self.line(format_args!("{} {text}", style(format!("{:>9}", "notice")).yellow().bold()));
    }

    /// Draws progress on a terminal; elsewhere a line says what begins.
    pub fn progress(&self) -> ProgressSink {
        let shown: Arc<Mutex<HashMap<String, ProgressBar>>> = Arc::default();
        let output = self.clone();
        ProgressSink::new(move |progress| {
            let Ok(mut shown) = shown.lock() else { return };
            output.show(&mut shown, progress);
        })
    }

    /// The same for a command that may answer in JSON: what is read by a program holds nothing else.
    pub fn progress_beside(&self, json: bool) -> ProgressSink {
        if json && !self.drawn { ProgressSink::silent() } else { self.progress() }
    }

    fn show(&self, shown: &mut HashMap<String, ProgressBar>, progress: Progress) {
        let (verb, what, bytes) = match &progress.stage {
            Stage::Download { file } => ("download", file, true),
            Stage::Install { what } => ("install", what, true),
            Stage::Import { what } => ("import", what, false),
            Stage::Convert { what } => ("convert", what, false),
            Stage::Check { what } => ("check", what, true),
            Stage::Load { what } => ("load", what, true),
        };
        let over = progress.total == Some(progress.done);
        let key = format!("{verb} {what}");
        if !self.drawn {
            if over {
                shown.remove(&key);
            } else {
                shown.entry(key).or_insert_with(|| {
                    self.step(verb, what);
                    ProgressBar::hidden()
                });
            }
            return;
        }
        if over {
            if let Some(bar) = shown.remove(&key) {
                bar.finish_and_clear();
                self.bars.remove(&bar);
            }
            return;
        }
        let bar = shown.entry(key).or_insert_with(|| {
            // Complete before it is added, which draws it.
            let bar = ProgressBar::no_length()
                .with_style(bar_style(progress.total.is_some(), bytes))
                .with_prefix(format!("{verb:>9}"))
                .with_message(what.clone());
            let bar = self.bars.add(bar);
            bar.enable_steady_tick(std::time::Duration::from_millis(120));
            bar
        });
        if let Some(total) = progress.total
            && bar.length() != Some(total)
        {
            bar.set_style(bar_style(true, bytes));
            bar.set_length(total);
        }
        bar.set_position(progress.done);
    }
}

fn bar_style(length: bool, bytes: bool) -> ProgressStyle {
    let template = match (length, bytes) {
        (true, true) => "{prefix:.green.bold} {msg} [{bar:30}] {bytes}/{total_bytes} {eta}",
        (true, false) => "{prefix:.green.bold} {msg} [{bar:30}] {pos}/{len}",
        (false, _) => "{prefix:.green.bold} {msg} {spinner} {elapsed}",
    };
    ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar()).progress_chars("=> ")
}

/// Says on standard error why a command failed.
pub fn report(failure: &Failure) {
    let mut stderr = std::io::stderr().lock();
    writeln!(stderr, "{} {}", style("error:").for_stderr().red().bold(), failure.message).ok();
    if let Some(hint) = &failure.hint {
        writeln!(stderr, "{} {hint}", style("hint:").for_stderr().cyan().bold()).ok();
    }
}

/// Writes log lines above the bars rather than through them.
struct BesideBars(MultiProgress);

struct LogLine<'a> {
    bars: &'a MultiProgress,
    line: Vec<u8>,
}

impl<'a> MakeWriter<'a> for BesideBars {
    type Writer = LogLine<'a>;

    fn make_writer(&'a self) -> LogLine<'a> {
        LogLine { bars: &self.0, line: Vec::new() }
    }
}

impl Write for LogLine<'_> {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.line.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

impl Drop for LogLine<'_> {
    fn drop(&mut self) {
        self.bars.suspend(|| std::io::stderr().write_all(&self.line).ok());
    }
}

/// A count of bytes, for people.
pub fn bytes(count: u64) -> String {
    indicatif::HumanBytes(count).to_string()
}
