//! `mesh-llm chat`: a conversation in the terminal.

use std::{
    fs,
    io::Write,
    path::PathBuf,
    sync::{Arc, Once},
    time::Duration,
};

use console::style;
use futures::StreamExt;
use mesh_core::chat::Message;
use mesh_llm::slots::{Keeping, Slots, StartStep};
use rustyline::{DefaultEditor, error::ReadlineError};

use super::{
    conversation::{Manner, Partner, Piece},
    serve,
};
use crate::cli::{
    args::ChatArgs,
    failure::{Exit, Failure},
    output::{Output, report},
    plan::Setting,
};

/// How long an engine may take to stop.
const GRACE: Duration = Duration::from_secs(5);

const HELP: &str = "\
/help          this list
/reset         forget the conversation
/system TEXT   give the model new instructions and forget the conversation; without TEXT, show them
/exit          leave (so does Ctrl-D)
Ctrl-C stops the current answer. Anything else is said to the model.";

pub async fn run(args: ChatArgs, output: &Output) -> Result<(), Failure> {
    let manner = Manner { tokens_max: args.max_tokens, temperature: args.temperature };
    let mut system = args.system.clone();
    let partner = match &args.url {
        Some(url) => Partner::there(url, args.model.model.clone()).await?,
        None => here(&args, output).await?,
    };
    output.line(style(format!("talking with {}; /help lists commands", partner.name())).dim());
    let outcome = talk(&partner, &mut system, manner, output).await;
    if let Partner::Here { slots } = &partner {
        slots.drain(GRACE).await;
    }
    outcome
}

async fn here(args: &ChatArgs, output: &Output) -> Result<Partner, Failure> {
    let setting = Setting::new(&args.environment)?;
    let plan = setting.plan(&args.model)?;
    let failed: Arc<std::sync::Mutex<Option<Failure>>> = Arc::default();
    let (said, noted) = (serve::observer(output.clone(), Arc::new(Once::new())), failed.clone());
    let observer = Arc::new(move |step: &StartStep| {
        said(step);
        if let (StartStep::Failed(error), Ok(mut noted)) = (step, noted.lock()) {
            *noted = Some(Failure::from(&**error));
        }
    });
    let slots = Slots::spawn(vec![setting.starter(&plan, output.progress(), observer).into()], Keeping::default());
    let loaded = tokio::select! {
        loaded = async { slots.get(&plan.reference)?.model(None).await } => loaded,
        () = serve::interrupted() => {
            slots.drain(Duration::ZERO).await;
            return Err(Failure::new(Exit::Failure, "interrupted while loading"));
        }
    };
    match loaded {
        Ok(_) => Ok(Partner::Here { slots }),
        Err(error) => {
            let noted = failed.lock().ok().and_then(|mut noted| noted.take());
            Err(noted.unwrap_or_else(|| Failure::new(Exit::Failure, error)))
        }
    }
}

/// What a line asks for.
#[derive(Debug, PartialEq, Eq)]
enum Line<'a> {
    Nothing,
    Help,
    Reset,
    Exit,
    System(&'a str),
    Unknown(&'a str),
    Say(&'a str),
}

fn understand(line: &str) -> Line<'_> {
    let line = line.trim();
    let (word, rest) = line.split_once(char::is_whitespace).unwrap_or((line, ""));
    match word {
        "" => Line::Nothing,
        "/help" | "/?" => Line::Help,
        "/reset" => Line::Reset,
        "/exit" | "/quit" => Line::Exit,
        "/system" => Line::System(rest.trim()),
        // A path or a regular expression begins with a slash too, but not with a word alone.
        word if word.starts_with('/') && word[1..].chars().all(char::is_alphabetic) => Line::Unknown(word),
        _ => Line::Say(line),
    }
}

async fn talk(partner: &Partner, system: &mut Option<String>, manner: Manner, output: &Output) -> Result<(), Failure> {
    let mut reader = Reader::new()?;
    let mut messages = beginning(system.as_deref());
    while let Some(line) = reader.line().await? {
        match understand(&line) {
            Line::Nothing => {}
            Line::Exit => break,
            Line::Help => output.line(HELP),
            Line::Unknown(word) => output.line(format_args!("there is no {word}; /help lists commands")),
            Line::Reset => {
                messages = beginning(system.as_deref());
                output.line("the conversation is forgotten");
            }
            Line::System("") => output.line(system.as_deref().unwrap_or("no instructions are set")),
            Line::System(text) => {
                *system = Some(text.to_owned());
                messages = beginning(system.as_deref());
                output.line("the instructions are set, and the conversation is forgotten");
            }
            Line::Say(text) => {
                messages.push(message("user", text));
                match answer(partner, &messages, manner).await {
                    Ok(text) => messages.push(message("assistant", &text)),
                    Err(failure) => {
                        // What was not answered was not said: the next try begins where this one did.
                        messages.pop();
                        report(&failure);
                    }
                }
            }
        }
    }
    reader.close();
    Ok(())
}

fn beginning(system: Option<&str>) -> Vec<Message> {
    system.map(|text| message("system", text)).into_iter().collect()
}

fn message(role: &str, text: &str) -> Message {
    Message { role: role.into(), content: Some(text.into()), ..Message::default() }
}

/// Prints an answer as it comes and returns its text: all of it, or what there was when Ctrl-C stopped it.
async fn answer(partner: &Partner, messages: &[Message], manner: Manner) -> Result<String, Failure> {
    let mut whole = String::new();
    let mut reasoning = false;
    let work = async {
        let mut pieces = partner.answer(messages, manner).await?;
        while let Some(piece) = pieces.next().await {
            let (text, thought) = match piece? {
                Piece::Reasoning(text) => (text, true),
                Piece::Content(text) => {
                    whole.push_str(&text);
                    (text, false)
                }
            };
            if reasoning && !thought {
                print("\n");
            }
            reasoning = thought;
            if thought { print(&style(text).dim().to_string()) } else { print(&text) }
        }
        Ok(())
    };
    let outcome = tokio::select! {
        outcome = work => outcome,
        _ = tokio::signal::ctrl_c() => {
            print(&style(" [stopped]").dim().to_string());
            Ok(())
        }
    };
    print("\n");
    outcome.map(|()| whole)
}

fn print(text: &str) {
    let mut stdout = std::io::stdout().lock();
    stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush()).ok();
}

/// Reads lines on a thread of its own, since the editor blocks.
struct Reader {
    editor: Option<DefaultEditor>,
    history: Option<PathBuf>,
}

impl Reader {
    fn new() -> Result<Self, Failure> {
        let mut editor = DefaultEditor::new().map_err(|error| Failure::new(Exit::Failure, error))?;
        let history = dirs::data_local_dir().map(|dir| dir.join("mesh-llm").join("chat_history"));
        if let Some(path) = &history {
            editor.load_history(path).ok(); // there is none the first time
        }
        Ok(Self { editor: Some(editor), history })
    }

    /// The next line; none at the end of the input.
    async fn line(&mut self) -> Result<Option<String>, Failure> {
        loop {
            let Some(mut editor) = self.editor.take() else { return Ok(None) };
            let read = tokio::task::spawn_blocking(move || {
                let line = editor.readline("> ");
                if let Ok(line) = &line {
                    editor.add_history_entry(line.as_str()).ok();
                }
                (editor, line)
            });
            let (editor, line) = read.await.map_err(|error| Failure::new(Exit::Failure, error))?;
            self.editor = Some(editor);
            match line {
                Ok(line) => return Ok(Some(line)),
                Err(ReadlineError::Interrupted) => print(&format!("{}\n", style("/exit or Ctrl-D leaves").dim())),
                Err(ReadlineError::Eof) => return Ok(None),
                Err(error) => return Err(Failure::new(Exit::Failure, error)),
            }
        }
    }

    fn close(&mut self) {
        let (Some(editor), Some(path)) = (&mut self.editor, &self.history) else { return };
        if let Some(dir) = path.parent()
            && let Err(error) = fs::create_dir_all(dir)
        {
            tracing::warn!(%error, "the history could not be kept");
            return;
        }
        if let Err(error) = editor.save_history(path) {
            tracing::warn!(%error, "the history could not be kept");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_commands_or_said() {
        assert_eq!(understand("  "), Line::Nothing);
        assert_eq!(understand("/help"), Line::Help);
        assert_eq!(understand("/system  be brief "), Line::System("be brief"));
        assert_eq!(understand("/system"), Line::System(""));
        assert_eq!(understand("/rest"), Line::Unknown("/rest"));
        assert_eq!(understand("/usr/bin is what?"), Line::Say("/usr/bin is what?"));
        assert_eq!(understand(" hello /exit "), Line::Say("hello /exit"));
    }
}
