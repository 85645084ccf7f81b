//! The `[backends.mlx]` section of the settings.

use std::path::PathBuf;

use mesh_core::DeviceKind;
use serde::Deserialize;
use serde_json::Value;

/// What a user can set.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Settings {
    /// Where to compute; `auto` takes a GPU if there is one.
    pub device: DeviceChoice,
    /// Prompt tokens computed between two looks at the queue and at who left.
    pub prefill_chunk_tokens: u32,
    /// Requests computed at the same time; absent means as many as the device bears.
    pub parallel_requests_max: Option<u32>,
    /// Requests that may wait; one more is refused.
    pub queue_requests_max: u32,
    /// Bytes of the device's memory to use for a model and its requests; absent means what is free.
    pub memory_bytes: Option<u64>,
    /// Bytes of that for what requests keep, running and earlier ones together; absent means what the weights leave.
    pub sequences_bytes_max: Option<u64>,
    /// Bytes of that for prefixes of earlier requests; absent means half of what is left beside the weights.
    pub prefix_bytes_max: Option<u64>,
    /// Bytes of files that keep prefixes beyond the program's end; 0 keeps none.
    pub prefix_files_bytes_max: u64,
    /// Where those files are; absent means `mesh-llm/prefixes` in the user's cache directory.
    pub prefix_files_dir: Option<PathBuf>,
    /// Longest step of the device, in seconds, before the engine is given up.
    pub step_s_max: u64,
    /// Whether a GPU's kernels are compiled before the first request is admitted, rather than when it comes.
    pub warm_up: bool,
}

/// Where to compute.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DeviceChoice {
    /// A GPU if there is one.
    #[default]
    Auto,
    /// The CPU.
    Cpu,
    /// A GPU, or nothing.
    Gpu,
}

/// Largest `parallel_requests_max`.
const PARALLEL_REQUESTS_MAX: u32 = 256;

impl Settings {
    /// Requests computed at the same time: a GPU is hardly slower for many than for one, a CPU soon is.
    pub fn parallel(&self, device: DeviceKind) -> u32 {
        let default = if device == DeviceKind::Cpu { 8 } else { 32 };
        self.parallel_requests_max.unwrap_or(default)
    }
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            device: DeviceChoice::Auto,
            prefill_chunk_tokens: 2048,
            parallel_requests_max: None,
            queue_requests_max: 32,
            memory_bytes: None,
            sequences_bytes_max: None,
            prefix_bytes_max: None,
            prefix_files_bytes_max: 0,
            prefix_files_dir: None,
            step_s_max: 300,
            warm_up: true,
        }
    }
}

impl Settings {
    /// Reads the section; an unknown key is an error that names it.
    pub fn read(section: &Value) -> Result<Self, String> {
        if section.is_null() {
            return Ok(Self::default());
        }
        let settings = Self::deserialize(section).map_err(|error| error.to_string())?;
        let least = [
            ("prefill_chunk_tokens", u64::from(settings.prefill_chunk_tokens)),
            ("parallel_requests_max", settings.parallel_requests_max.map_or(1, u64::from)),
            ("step_s_max", settings.step_s_max),
        ];
        if let Some((key, _)) = least.iter().find(|(_, value)| *value == 0) {
            return Err(format!("`{key}` must be at least 1"));
        }
        if settings.parallel_requests_max.is_some_and(|max| max > PARALLEL_REQUESTS_MAX) {
            return Err(format!("`parallel_requests_max` must be at most {PARALLEL_REQUESTS_MAX}"));
        }
        Ok(settings)
    }
}

impl DeviceChoice {
    /// The device to use, given what MLX found.
    pub fn settle(self, found: DeviceKind) -> Result<DeviceKind, String> {
        match (self, found) {
            (Self::Cpu, _) => Ok(DeviceKind::Cpu),
            (Self::Gpu, DeviceKind::Cpu) => Err("`device` is `gpu`, and this build of MLX finds no GPU".into()),
            (_, found) => Ok(found),
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn unknown_keys_are_named() {
        let error = Settings::read(&json!({"devise": "cpu"})).unwrap_err();
        assert!(error.contains("devise"), "{error}");
        assert_eq!(Settings::read(&Value::Null).unwrap(), Settings::default());
        for key in ["prefill_chunk_tokens", "parallel_requests_max", "step_s_max"] {
            assert!(Settings::read(&json!({ key: 0 })).unwrap_err().contains(key));
        }
    }

    #[test]
    fn a_gpu_that_is_not_there_is_an_error() {
        assert!(DeviceChoice::Gpu.settle(DeviceKind::Cpu).is_err());
        assert_eq!(DeviceChoice::Auto.settle(DeviceKind::Cuda), Ok(DeviceKind::Cuda));
        assert_eq!(DeviceChoice::Cpu.settle(DeviceKind::Cuda), Ok(DeviceKind::Cpu));
    }
}
