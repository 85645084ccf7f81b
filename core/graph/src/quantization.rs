//! Which tensors are quantized, and how: `quantization` (or `quantization_config`) of config.json, with its entries for
//! single tensors.

use std::collections::HashMap;

use serde_json::Value;

use crate::{ffi::Mode, model::GraphError};

/// How one tensor is quantized.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Scheme {
    /// Values that share a scale.
    pub group_size: i32,
    /// Bits a code.
    pub bits: i32,
    /// What a code means.
    pub mode: Mode,
}

/// How matrices in 8-bit floats (E4M3) are scaled.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fp8 {
    /// By one number.
    Whole,
    /// By one number for each block of so many rows and columns.
    Blocks([i32; 2]),
}

/// The scheme of every quantized tensor.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct QuantizationTable {
    default: Option<Scheme>,
    fp8: Option<Fp8>,
    tensors: HashMap<String, Option<Scheme>>,
}

impl QuantizationTable {
    /// Reads `quantization`, or failing that `quantization_config`. A method or mode that is not computed here is an
    /// error that names it.
    pub fn read(config: &Value) -> Result<Self, GraphError> {
        let keys = ["quantization", "quantization_config"];
        let inner = crate::config::text_config(config);
        let section =
            keys.iter().find_map(|key| config.get(key)).or_else(|| keys.iter().find_map(|key| inner.get(key)));
        let Some(section) = section.and_then(Value::as_object) else { return Ok(Self::default()) };
        match section.get("quant_method").and_then(Value::as_str) {
            None => {}
            Some("fp8") => return Ok(Self { fp8: Some(fp8(section)?), ..Self::default() }),
            // What is packed, and how, shows in the tensors.
            Some("mxfp4") => return Ok(Self::default()),
            Some(method) => return Err(GraphError::Config(format!("`quant_method` `{method}` is not supported"))),
        }
        let default = scheme(section.get("group_size"), section.get("bits"), section.get("mode"), None)?;
        let mut tensors = HashMap::new();
        for (name, entry) in section {
            match entry {
                Value::Object(entry) => {
                    let own = scheme(entry.get("group_size"), entry.get("bits"), entry.get("mode"), default)?;
                    tensors.insert(name.clone(), own);
                }
                Value::Bool(false) => {
                    tensors.insert(name.clone(), None);
                }
                _ => {}
            }
        }
        Ok(Self { default, tensors, fp8: None })
    }

    /// A table that quantizes everything alike.
    pub fn uniform(scheme: Scheme) -> Self {
        Self { default: Some(scheme), ..Self::default() }
    }

    /// Sets what holds for tensors that have no entry of their own.
    pub(crate) fn set_default(&mut self, scheme: Scheme) {
        self.default.get_or_insert(scheme);
    }

    /// How matrices in 8-bit floats are scaled, where there are any.
    pub fn fp8(&self) -> Option<Fp8> {
        self.fp8
    }

    /// The scheme of the tensor at `name` (without `.weight`), for one that has `.scales` beside it.
    pub fn scheme(&self, name: &str) -> Option<Scheme> {
        self.tensors.get(name).copied().unwrap_or(self.default)
    }
}

fn fp8(section: &serde_json::Map<String, Value>) -> Result<Fp8, GraphError> {
    let Some(sizes) = section.get("weight_block_size").filter(|sizes| !sizes.is_null()) else { return Ok(Fp8::Whole) };
    let sizes: Vec<i32> = sizes
        .as_array()
        .into_iter()
        .flatten()
        .filter_map(|size| size.as_i64().and_then(|size| i32::try_from(size).ok()).filter(|size| *size > 0))
        .collect();
    match sizes.try_into() {
        Ok(block) => Ok(Fp8::Blocks(block)),
        Err(_) => Err(GraphError::Config("`weight_block_size` is not two numbers above zero".into())),
    }
}

fn scheme(
    group_size: Option<&Value>,
    bits: Option<&Value>,
    mode: Option<&Value>,
    default: Option<Scheme>,
) -> Result<Option<Scheme>, GraphError> {
    let mode = match mode.and_then(Value::as_str) {
        Some(name) => Mode::parse(name)
            .ok_or_else(|| GraphError::Config(format!("quantization `mode` `{name}` is not supported")))?,
        // Also in the entry of a single tensor, whatever the others are.
        None => Mode::Affine,
    };
    let number = |value: Option<&Value>, default: Option<i32>| {
        value.and_then(Value::as_i64).and_then(|value| i32::try_from(value).ok()).or(default)
    };
    let group_size = number(group_size, default.map(|default| default.group_size));
    let bits = number(bits, default.map(|default| default.bits));
    match (group_size, bits) {
        (Some(group_size), Some(bits)) if matches!(bits, 2 | 3 | 4 | 5 | 6 | 8) && group_size > 0 => {
            Ok(Some(Scheme { group_size, bits, mode }))
        }
        (Some(group_size), Some(bits)) => {
            Err(GraphError::Config(format!("quantization to {bits} bits in groups of {group_size} is not supported")))
        }
        _ => Ok(None),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn single_tensors_override() {
        let table = QuantizationTable::read(&json!({"quantization": {
            "group_size": 64, "bits": 4,
            "model.embed_tokens": {"group_size": 32, "bits": 8},
            "lm_head": false,
        }}))
        .unwrap();
        assert_eq!(table.scheme("a"), Some(Scheme { group_size: 64, bits: 4, mode: Mode::Affine }));
        assert_eq!(table.scheme("model.embed_tokens"), Some(Scheme { group_size: 32, bits: 8, mode: Mode::Affine }));
        assert_eq!(table.scheme("lm_head"), None);
    }

    #[test]
    fn an_entry_without_a_mode_is_affine() {
        let table = QuantizationTable::read(&json!({"quantization": {
            "group_size": 32, "bits": 4, "mode": "mxfp4", "model.layers.0.mlp.gate": {"group_size": 64, "bits": 8},
        }}))
        .unwrap();
        assert_eq!(table.scheme("a"), Some(Scheme { group_size: 32, bits: 4, mode: Mode::Mxfp4 }));
        let gate = table.scheme("model.layers.0.mlp.gate");
        assert_eq!(gate, Some(Scheme { group_size: 64, bits: 8, mode: Mode::Affine }));
    }

    #[test]
    fn foreign_methods_are_named() {
        let error = QuantizationTable::read(&json!({"quantization_config": {"quant_method": "gptq"}})).unwrap_err();
        assert!(error.to_string().contains("gptq"), "{error}");
    }
}
