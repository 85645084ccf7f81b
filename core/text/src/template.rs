//! Chat templates: Jinja as transformers renders it, in bounded time and space.
//!
//! The template text is a stranger's program. Work is limited by minijinja's fuel, which our own functions pay too. What
//! fuel does not see is recursion over values that a template nests very deeply, and values that hold themselves many
//! times over: so a rendering has a thread of its own, with a stack that fits its fuel, and a time limit. One hole is
//! left: a thread cannot be killed, and one that prints such a value with `~` takes memory until there is none.

mod generation;
mod json;
mod methods;
mod no_content;
mod number;
mod python;

use std::{
    error::Error as _,
    fmt, io,
    sync::{
        Arc, OnceLock,
        atomic::{AtomicBool, AtomicUsize, Ordering},
        mpsc::{self, RecvTimeoutError},
    },
    thread,
    time::Duration,
};

use chrono::NaiveDateTime;
use mesh_core::error::TemplateError;
use minijinja::{Environment, Error, ErrorKind, State, Value, syntax::SyntaxConfig};
use serde_json::Map;

/// Most work one rendering may do, in minijinja's fuel: an instruction costs 1, data 1 for 64 bytes, JSON 1 for 4
/// bytes. That is under a second. Real templates take 0.3 for a byte of prompt.
pub const FUEL_MAX: u64 = 4_000_000;
/// Fuel for the template itself, whatever the conversation.
const FUEL_BASE: u64 = 100_000;
/// Further fuel for each byte of the conversation.
const FUEL_PER_BYTE: u64 = 4;
/// Stack for each unit of fuel, in bytes. One unit nests less than one list in another, and printing lists takes
/// 840 bytes for it at worst.
const STACK_BYTES_PER_FUEL: usize = 1 << 10;
/// Stack besides, in bytes.
const STACK_BYTES_BASE: usize = 8 << 20;
/// Longest rendering.
pub const TIME_MAX: Duration = Duration::from_secs(5);
/// Longest rendered prompt, in bytes.
pub const OUTPUT_BYTES_MAX: usize = 64 << 20;
/// Longest template, in bytes. Published ones stay below 100 KB.
pub const SOURCE_BYTES_MAX: usize = 1 << 20;

/// Longest format of a date, in bytes.
const FORMAT_BYTES_MAX: usize = 1 << 10;
const NAME: &str = "chat_template";

/// A compiled chat template.
pub struct Template {
    environment: Environment<'static>,
    /// Renderings that exceeded their time and still run.
    overdue: Arc<AtomicUsize>,
    /// What [`Template::takes_no_content`] found.
    takes_no_content: OnceLock<bool>,
}

impl fmt::Debug for Template {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Template")
    }
}

/// What a template sees.
#[derive(Clone, Copy, Debug)]
pub struct TemplateInput<'a> {
    /// The conversation: an array of objects with `role`, `content`, `tool_calls` …
    pub messages: &'a serde_json::Value,
    /// The tools offered: an array of `{"type": "function", "function": {…}}`. Absent is `none` to the template.
    pub tools: Option<&'a serde_json::Value>,
    /// Whether the prompt ends where the assistant begins to speak.
    pub add_generation_prompt: bool,
    /// Text of the begin-of-text token; undefined to the template where absent.
    pub bos_token: Option<&'a str>,
    /// Text of the end-of-text token; undefined to the template where absent.
    pub eos_token: Option<&'a str>,
    /// Further variables, such as `enable_thinking`. They take precedence over the ones above.
    pub kwargs: &'a Map<String, serde_json::Value>,
    /// What `strftime_now` sees.
    pub now: NaiveDateTime,
}

impl Template {
    /// Compiles a template. [`TemplateError::Syntax`] says where it is broken.
    pub fn compile(source: &str) -> Result<Self, TemplateError> {
        if source.len() > SOURCE_BYTES_MAX {
            let what = format!("it has {} bytes, {SOURCE_BYTES_MAX} are the most", source.len());
            return Err(TemplateError::Syntax { what });
        }
        let mut environment = Environment::new();
        let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
        environment.set_syntax(syntax.map_err(|error| TemplateError::Syntax { what: error.to_string() })?);
        // Errors then name the expression that is undefined.
        environment.set_debug(true);
        environment.set_unknown_method_callback(methods::call);
        python::install(&mut environment);
        environment.add_filter("tojson", json::tojson);
        environment.add_function("raise_exception", raise_exception);
        environment
            .add_template_owned(NAME, generation::plain_blocks(source))
            .map_err(|error| TemplateError::Syntax { what: describe(&error) })?;
        Ok(Self { environment, overdue: Arc::default(), takes_no_content: OnceLock::new() })
    }

    /// Renders a conversation. Takes microseconds, and blocks for [`TIME_MAX`] at worst.
    ///
    /// # Errors
    /// [`TemplateError::Refused`] with the template's own words where it calls `raise_exception`, and
    /// [`TemplateError::Failed`] where it fails or exceeds a bound: [`FUEL_MAX`], [`OUTPUT_BYTES_MAX`], [`TIME_MAX`].
    pub fn render(&self, input: &TemplateInput<'_>) -> Result<String, TemplateError> {
        let failed = |what: String| TemplateError::Failed { what };
        if self.overdue.load(Ordering::Acquire) > 0 {
            return Err(failed("it has not ended for an earlier conversation".into()));
        }
        let bytes = json::size(input.messages) + input.tools.map_or(0, json::size);
        let bytes = bytes + input.kwargs.values().map(json::size).sum::<usize>();
        let fuel = FUEL_MAX.min(FUEL_BASE + FUEL_PER_BYTE.saturating_mul(bytes as u64));
        let mut environment = self.environment.clone();
        environment.set_fuel(Some(fuel));
        let context = context(input);
        // Whoever comes second, the rendering or the deadline, finds the flag set.
        let flag = Arc::new(AtomicBool::new(false));
        let (overdue, late) = (self.overdue.clone(), flag.clone());
        let (done, outcome) = mpsc::sync_channel(1);
        let work = move || {
            let rendered = render(&environment, context);
            if late.swap(true, Ordering::AcqRel) {
                overdue.fetch_sub(1, Ordering::AcqRel);
            }
            // Nobody listens past the deadline.
            let _ = done.send(rendered);
        };
        let stack = STACK_BYTES_BASE + fuel as usize * STACK_BYTES_PER_FUEL;
        let thread = thread::Builder::new().name("chat-template".into()).stack_size(stack);
        thread.spawn(work).map_err(|error| failed(format!("no thread for it: {error}")))?;
        match outcome.recv_timeout(TIME_MAX) {
            Ok(rendered) => rendered,
            Err(RecvTimeoutError::Disconnected) => Err(failed("it broke the template engine".into())),
            Err(RecvTimeoutError::Timeout) => {
                self.overdue.fetch_add(1, Ordering::AcqRel);
                if flag.swap(true, Ordering::AcqRel) {
                    self.overdue.fetch_sub(1, Ordering::AcqRel);
                }
                Err(failed(format!("it did not end within {} s", TIME_MAX.as_secs())))
            }
        }
    }
}

fn render(environment: &Environment<'_>, context: Value) -> Result<String, TemplateError> {
    let template = environment.get_template(NAME).map_err(|error| failure(&error))?;
    let mut output = Capped(Vec::new());
    template.render_captured_to(context, &mut output).map_err(|error| failure(&error))?;
    String::from_utf8(output.0).map_err(|error| TemplateError::Failed { what: error.to_string() })
}

fn context(input: &TemplateInput<'_>) -> Value {
    let now = input.now;
    let tokens = [("bos_token", input.bos_token), ("eos_token", input.eos_token)];
    let variables = [
        ("messages", json::from_json(input.messages)),
        ("tools", input.tools.map_or(Value::from(()), json::from_json)),
        ("documents", Value::from(())),
        ("add_generation_prompt", Value::from(input.add_generation_prompt)),
        ("strftime_now", Value::from_function(move |format: &str| strftime(now, format))),
    ];
    let tokens = tokens.into_iter().filter_map(|(name, token)| Some((name, Value::from(token?))));
    let kwargs = input.kwargs.iter().map(|(name, value)| (name.as_str(), json::from_json(value)));
    Value::from_pairs(variables.into_iter().chain(tokens).chain(kwargs))
}

fn strftime(now: NaiveDateTime, format: &str) -> Result<String, Error> {
    use fmt::Write;
    if format.len() > FORMAT_BYTES_MAX {
        let what = format!("strftime_now: the format has more than {FORMAT_BYTES_MAX} bytes");
        return Err(Error::new(ErrorKind::InvalidOperation, what));
    }
    let mut text = String::new();
    // chrono reports a directive it does not know as a formatting error.
    write!(text, "{}", now.format(format)).map_err(|_| {
        Error::new(ErrorKind::InvalidOperation, format!("strftime_now does not know the format {format:?}"))
    })?;
    Ok(text)
}

/// What a template said when it refused, carried through minijinja's errors.
#[derive(Debug)]
struct Refusal(String);

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Refusal {}

fn raise_exception(state: &State, message: Value) -> Result<Value, Error> {
    let message = python::to_str(state, &message)?;
    Err(Error::new(ErrorKind::InvalidOperation, message.clone()).with_source(Refusal(message)))
}

fn failure(error: &Error) -> TemplateError {
    let mut cause: Option<&(dyn std::error::Error + 'static)> = Some(error);
    while let Some(this) = cause {
        if let Some(Refusal(what)) = this.downcast_ref() {
            return TemplateError::Refused { what: what.clone() };
        }
        cause = this.source();
    }
    let what = match error.kind() {
        ErrorKind::OutOfFuel => "it does more work than a prompt can need, and was stopped".to_owned(),
        _ => describe(error),
    };
    TemplateError::Failed { what }
}

fn describe(error: &Error) -> String {
    let mut what = error.to_string();
    let mut cause = error.source();
    while let Some(this) = cause {
        what = format!("{what}: {this}");
        cause = this.source();
    }
    what
}

/// Refuses to grow past [`OUTPUT_BYTES_MAX`].
struct Capped(Vec<u8>);

impl io::Write for Capped {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.0.len() + bytes.len() > OUTPUT_BYTES_MAX {
            return Err(io::Error::other(format!("the prompt would exceed {OUTPUT_BYTES_MAX} bytes")));
        }
        self.0.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
