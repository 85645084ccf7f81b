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
    /// Requests computed at the same time, each with a whole context of its own.
    pub parallel: u32,
}

/// Longest `start_timeout_s`: a day.
const START_TIMEOUT_S_MAX: u64 = 24 * 60 * 60;
/// Largest `parallel`.
const PARALLEL_MAX: u32 = 64;
/// Most extra arguments.
const ARGS_MAX: usize = 256;

impl Default for Settings {
    fn default() -> Self {
        Self { path: None, install: true, args: Vec::new(), start_timeout_s: 600, install_dir: None, parallel: 1 }
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
        within("parallel", settings.parallel.into(), 1, PARALLEL_MAX.into())?;
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
            (json!({"parallel": 65}), "parallel"),
            (json!({"args": ["--port", "1"]}), "--port"),
            (json!({"args": ["--port=1"]}), "--port"),
            (json!({"args": ["-m", "x.gguf"]}), "-m"),
            (json!({"args": ["--parallel", "4"]}), "`parallel`"),
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
    }
}
