//! The child's command line: decided here, run elsewhere.

use std::{ffi::OsString, path::Path};

use crate::settings::SettingsError;

/// Arguments that are ours to set, in every spelling, and what to do instead.
const OWNED: &[(&[&str], Option<&str>)] = &[
    (&["--host"], None),
    (&["--port"], None),
    (&["--reuse-port"], None),
    (&["--api-key", "--api-key-file"], None),
    (&["--api-prefix"], None),
    (&["--ssl-key-file", "--ssl-cert-file"], None),
    (
        &[
            "-m",
            "--model",
            "-mu",
            "--model-url",
            "-hf",
            "-hfr",
            "--hf-repo",
            "-hff",
            "--hf-file",
            "-dr",
            "--docker-repo",
            "--models-dir",
            "--models-preset",
        ],
        Some("name the model with --model"),
    ),
    (&["-c", "--ctx-size"], Some("use --ctx")),
    (&["-np", "--parallel"], Some("use --max-parallel")),
    (&["-cram", "--cache-ram"], Some("set `prompt_cache_mib`")),
    (&["--cache-prompt", "--no-cache-prompt"], None),
    (&["-n", "--predict", "--n-predict"], None),
    (&["-sp", "--special"], None),
    (&["--context-shift"], None),
    (&["--embedding", "--embeddings", "--rerank", "--reranking"], None),
    (&["-kvu", "--kv-unified"], None),
    (&["--webui", "--no-webui", "--ui", "--no-ui"], None),
    (&["--log-disable", "--log-file"], None),
    (&["--tools", "--agent", "-ag"], None),
    (&["-h", "--help", "--usage", "--version"], None),
];

/// Refuses extra arguments that would work against the ones mesh-llm sets.
pub(crate) fn refuse_owned(args: &[String]) -> Result<(), SettingsError> {
    for arg in args {
        let name = arg.split('=').next().unwrap_or(arg);
        if let Some((_, instead)) = OWNED.iter().find(|(names, _)| names.contains(&name)) {
            return Err(SettingsError::OwnedArgument { arg: name.to_owned(), instead: *instead });
        }
    }
    Ok(())
}

/// How much of a prompt a slot has to hold to be taken for it rather than the slot that was idle for longest; those who read
/// further arguments may set another. llama.cpp's own tenth has a conversation take the slot of any other that merely begins
/// with the same instructions, and then find its own prompt neither there nor among the remembered ones.
const SLOT_SIMILARITY: &str = "0.5";

/// What a command line is made from.
pub(crate) struct Invocation<'a> {
    /// First shard of the model.
    pub model: &'a Path,
    /// Loopback port.
    pub port: u16,
    /// Context of one request, in tokens.
    pub context_tokens: u32,
    /// Requests computed at the same time.
    pub parallel: u32,
    /// Extra arguments.
    pub extra: &'a [String],
}

/// The arguments, program name excluded. The API key and what older builds would stumble over are not among them: see
/// [`environment`].
pub(crate) fn arguments(invocation: &Invocation) -> Vec<OsString> {
    // llama-server splits the context it is given evenly over its slots.
    let context = u64::from(invocation.context_tokens) * u64::from(invocation.parallel);
    let mut arguments: Vec<OsString> = vec!["--model".into(), invocation.model.into()];
    for (name, value) in [
        ("--host", "127.0.0.1".to_owned()),
        ("--port", invocation.port.to_string()),
        ("--ctx-size", context.to_string()),
        ("--parallel", invocation.parallel.to_string()),
    ] {
        arguments.extend([name.into(), value.into()]);
    }
    arguments.push("--no-webui".into());
    arguments.extend(["-sps".into(), SLOT_SIMILARITY.into()]);
    arguments.extend(invocation.extra.iter().map(OsString::from));
    arguments
}

/// What travels by environment: the API key, because `ps` shows arguments, and the size of the prompt cache, because builds
/// that have none ignore the variable and would refuse the argument.
pub(crate) fn environment(key: &str, cache_mib: u32) -> Vec<(&'static str, String)> {
    vec![("LLAMA_API_KEY", key.to_owned()), ("LLAMA_ARG_CACHE_RAM", cache_mib.to_string())]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_argument_we_set_is_owned() {
        let extra = [];
        let invocation =
            Invocation { model: Path::new("/m.gguf"), port: 1, context_tokens: 512, parallel: 2, extra: &extra };
        for argument in arguments(&invocation) {
            let argument = argument.to_str().unwrap().to_owned();
            if argument.starts_with("--") {
                assert!(refuse_owned(std::slice::from_ref(&argument)).is_err(), "{argument} can be overridden");
            }
        }
    }

    #[test]
    fn the_line() {
        let extra = ["--threads".to_owned(), "2".to_owned()];
        let invocation =
            Invocation { model: Path::new("/a b.gguf"), port: 4711, context_tokens: 512, parallel: 2, extra: &extra };
        let line: Vec<_> = arguments(&invocation).into_iter().map(|argument| argument.into_string().unwrap()).collect();
        assert_eq!(
            line.join("|"),
            "--model|/a b.gguf|--host|127.0.0.1|--port|4711|--ctx-size|1024|--parallel|2|--no-webui|-sps|0.5|--threads|2"
        );
    }
}
