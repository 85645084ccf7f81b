//! The `[backends.mlx]` section of the settings.

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
    /// Requests that may wait; one more is refused.
    pub queue_requests_max: u32,
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

impl Default for Settings {
    fn default() -> Self {
        Self { device: DeviceChoice::Auto, prefill_chunk_tokens: 2048, queue_requests_max: 32 }
    }
}

impl Settings {
    /// Reads the section; an unknown key is an error that names it.
    pub fn read(section: &Value) -> Result<Self, String> {
        if section.is_null() {
            return Ok(Self::default());
        }
        let settings = Self::deserialize(section).map_err(|error| error.to_string())?;
        if settings.prefill_chunk_tokens == 0 {
            return Err("`prefill_chunk_tokens` must be at least 1".into());
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
    }

    #[test]
    fn a_gpu_that_is_not_there_is_an_error() {
        assert!(DeviceChoice::Gpu.settle(DeviceKind::Cpu).is_err());
        assert_eq!(DeviceChoice::Auto.settle(DeviceKind::Cuda), Ok(DeviceKind::Cuda));
        assert_eq!(DeviceChoice::Cpu.settle(DeviceKind::Cuda), Ok(DeviceKind::Cpu));
    }
}
