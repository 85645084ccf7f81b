//! What users can set about this backend.

use std::{path::PathBuf, time::Duration};

use serde::Deserialize;
use serde_json::Value;

use crate::argv;

/// The backend's own section of the settings. Every key may be left out.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Settings {
    /// The binary to use; nothing else is looked for then.
    pub path: Option<PathBuf>,
    /// Whether llama-server may be installed when it is missing.
    pub install: bool,
    /// Further arguments, appended. Those that mesh-llm sets itself are refused by name.
    pub args: Vec<String>,
    /// Longest wait for the model to be loaded, in seconds.
    pub start_timeout_s: u64,
    /// Where llama-server is installed; absent means `mesh-llm/llama-server` in the user's data directory.
    pub install_dir: Option<PathBuf>,
    /// Requests computed at the same time, each with a whole context of its own; absent means as many as memory allows.
    #[serde(alias = "parallel")]
    pub parallel_requests_max: Option<u32>,
    /// Requests that may wait for those; one more is refused.
    pub queue_requests_max: u32,
    /// Memory for prompts that no slot holds any more, in MiB, 0 for none; absent means what memory allows.
    pub prompt_cache_mib: Option<u32>,
}

/// Longest `start_timeout_s`: a day.
const START_TIMEOUT_S_MAX: u64 = 24 * 60 * 60;
/// Largest `parallel_requests_max`: llama.cpp's own bound.
const PARALLEL_MAX: u32 = 256;
/// Largest `queue_requests_max`.
const QUEUE_MAX: u32 = 4096;
/// Largest `prompt_cache_mib`: 1 TiB.
const PROMPT_CACHE_MIB_MAX: u32 = 1 << 20;
/// `queue_requests_max` unless set.
pub(crate) const QUEUE_DEFAULT: u32 = 32;
/// Most extra arguments.
const ARGS_MAX: usize = 256;

impl Default for Settings {
    fn default() -> Self {
        Self {
            path: None,
            install: true,
            args: Vec::new(),
            start_timeout_s: 600,
            install_dir: None,
            parallel_requests_max: None,
            queue_requests_max: QUEUE_DEFAULT,
            prompt_cache_mib: None,
        }
    }
}

/// A settings section that cannot be used; names the key.
#[derive(Debug, thiserror::Error)]
pub enum SettingsError {
    /// Not a table of known keys and types.
    #[error("{0}")]
    Shape(#[from] serde_json::Error),
    /// A value out of bounds.
    #[error("`{key}` is {value}; it has to be between {min} and {max}")]
    OutOfBounds {
        /// The key.
        key: &'static str,
        /// What it was set to.
        value: u64,
        /// The least that is accepted.
        min: u64,
        /// The most that is accepted.
        max: u64,
    },
    /// An argument that mesh-llm sets itself.
    #[error("`args` holds {arg}, which mesh-llm sets itself{}", .instead.map(|what| format!("; {what}")).unwrap_or_default())]
    OwnedArgument {
        /// The argument.
        arg: String,
        /// What to do instead.
        instead: Option<&'static str>,
    },
}

impl Settings {
    /// Reads a settings section; `Null` is an empty one.
    pub fn parse(section: &Value) -> Result<Self, SettingsError> {
        let settings = if section.is_null() { Self::default() } else { Self::deserialize(section)? };
        within("start_timeout_s", settings.start_timeout_s, 1, START_TIMEOUT_S_MAX)?;
        let parallel = settings.parallel_requests_max.unwrap_or(1);
        within("parallel_requests_max", parallel.into(), 1, PARALLEL_MAX.into())?;
        within("queue_requests_max", settings.queue_requests_max.into(), 0, QUEUE_MAX.into())?;
        let cache_mib = settings.prompt_cache_mib.unwrap_or(0);
        within("prompt_cache_mib", cache_mib.into(), 0, PROMPT_CACHE_MIB_MAX.into())?;
        within("args", settings.args.len() as u64, 0, ARGS_MAX as u64)?;
        argv::refuse_owned(&settings.args)?;
        Ok(settings)
    }

    /// [`Settings::start_timeout_s`] as a duration.
    pub fn start_timeout(&self) -> Duration {
        Duration::from_secs(self.start_timeout_s)
    }
}

fn within(key: &'static str, value: u64, min: u64, max: u64) -> Result<(), SettingsError> {
    if (min..=max).contains(&value) { Ok(()) } else { Err(SettingsError::OutOfBounds { key, value, min, max }) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn nothing_set_is_fine() {
        assert_eq!(Settings::parse(&Value::Null).unwrap(), Settings::default());
        assert_eq!(Settings::parse(&json!({})).unwrap(), Settings::default());
        assert!(Settings::default().install);
    }

    #[test]
    fn errors_name_the_key() {
        for (section, word) in [
            (json!({"paht": "/x"}), "paht"),
            (json!({"start_timeout_s": 0}), "start_timeout_s"),
            (json!({"parallel_requests_max": 257}), "parallel_requests_max"),
            (json!({"parallel_requests_max": 0}), "parallel_requests_max"),
            (json!({"queue_requests_max": 4097}), "queue_requests_max"),
            (json!({"prompt_cache_mib": 1 << 21}), "prompt_cache_mib"),
            (json!({"args": ["--port", "1"]}), "--port"),
            (json!({"args": ["--port=1"]}), "--port"),
            (json!({"args": ["-m", "x.gguf"]}), "-m"),
            (json!({"args": ["--parallel", "4"]}), "--max-parallel"),
            (json!({"args": ["--cache-ram", "9"]}), "`prompt_cache_mib`"),
            (json!({"args": ["--api-key", "x"]}), "--api-key"),
        ] {
            let error = Settings::parse(&section).unwrap_err().to_string();
            assert!(error.contains(word), "{section}: {error}");
        }
    }

    #[test]
    fn other_arguments_pass() {
        let settings = Settings::parse(&json!({"args": ["--threads", "2", "-ngl", "0"], "parallel": 4})).unwrap();
        assert_eq!(settings.args, ["--threads", "2", "-ngl", "0"]);
        assert_eq!(settings.parallel_requests_max, Some(4), "its short name");
    }
}
