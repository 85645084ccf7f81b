//! How positions are encoded, as configs say it: the kinds they name, and the places they name them in.

use serde_json::Value;

use crate::model::GraphError;

/// How positions are encoded.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct RopeSpec {
    /// Dimensions rotated, from the first of a head.
    pub dims: i32,
    /// Base of the frequencies.
    pub theta: f32,
    /// Whether neighbours are paired, rather than halves.
    pub traditional: bool,
    /// How frequencies or positions are scaled.
    pub scaling: Scaling,
}

/// How frequencies or positions are scaled for long contexts.
#[derive(Clone, Debug, Default, PartialEq)]
pub enum Scaling {
    /// Not at all.
    #[default]
    None,
    /// Positions divided by `factor`.
    Linear {
        /// The divisor.
        factor: f32,
    },
    /// Llama 3's: long wavelengths divided by `factor`, short ones kept, those between blended.
    Llama3 {
        /// The divisor of long wavelengths.
        factor: f32,
        /// Wavelengths over `original / low_freq_factor` are long.
        low_freq_factor: f32,
        /// Wavelengths under `original / high_freq_factor` are short.
        high_freq_factor: f32,
        /// The context length before scaling, in tokens.
        original_max_position_embeddings: f32,
    },
    /// YaRN: as `Llama3`, with a ramp over dimensions and a factor on what is rotated.
    Yarn(Yarn),
    /// The base grows with the sequence once it is longer than `max_position_embeddings`.
    Dynamic {
        /// How much the context is stretched.
        factor: f32,
        /// The context length before scaling, in tokens.
        max_position_embeddings: f32,
    },
    /// A divisor for each frequency, one list for sequences up to the original length and another beyond. Also called
    /// `su`.
    Longrope {
        /// Divisors up to the original length.
        short_factor: Vec<f32>,
        /// Divisors beyond.
        long_factor: Vec<f32>,
        /// The context length before scaling, in tokens.
        original_max_position_embeddings: i32,
        /// Multiplies what is rotated.
        attention_factor: f32,
    },
    /// Frequencies as if all of the head were rotated, but only the first `rotated` dimensions are.
    Proportional {
        /// Dimensions that rotate.
        rotated: i32,
        /// The divisor of frequencies.
        factor: f32,
    },
}

/// YaRN's settings.
#[derive(Clone, Debug, PartialEq)]
pub struct Yarn {
    /// The divisor of long wavelengths.
    pub factor: f32,
    /// The context length before scaling, in tokens.
    pub original_max_position_embeddings: f32,
    /// Rotations within the original context above which a frequency is kept.
    pub beta_fast: f32,
    /// Rotations within the original context under which a frequency is divided.
    pub beta_slow: f32,
    /// Whether the ramp's ends are rounded to whole dimensions.
    pub truncate: bool,
    /// Multiplies what is rotated.
    pub attention_factor: f32,
    /// What the attention scale is multiplied by, from `mscale_all_dim`; the families that do so say it.
    pub scale_factor: f32,
}

impl RopeSpec {
    /// Reads `rope_parameters` (where that tells layer types apart: those of full attention), or `rope_theta` with
    /// `rope_scaling`, of a text config. The first `partial_rotary_factor` of `head_dim` dimensions are rotated. A kind
    /// that is not computed here is an error that names it.
    pub fn read(config: &Value, head_dim: i32) -> Result<Self, GraphError> {
        for key in ["rope_parameters", "rope_scaling"] {
            if let Some(other) = config.get(key).filter(|value| !value.is_object() && !value.is_null()) {
                return Err(GraphError::Config(format!("`{key}` is {other}, not an object")));
            }
        }
        let object = |key: &str| config.get(key).filter(|value| value.is_object());
        let parameters = object("rope_parameters");
        let full = parameters.and_then(|all| all.get("full_attention")).filter(|value| value.is_object());
        Self::parse(config, full.or(parameters).or_else(|| object("rope_scaling")), head_dim)
    }

    /// Reads `rope_parameters.{layer_type}`, or failing that what [`read`](Self::read) reads.
    pub fn read_layer_type(config: &Value, head_dim: i32, layer_type: &str) -> Result<Self, GraphError> {
        match config.get("rope_parameters").and_then(|all| all.get(layer_type)).filter(|value| value.is_object()) {
            Some(own) => Self::parse(config, Some(own), head_dim),
            None => Self::read(config, head_dim),
        }
    }

    fn parse(config: &Value, settings: Option<&Value>, head_dim: i32) -> Result<Self, GraphError> {
        let find = |key: &str| settings.and_then(|settings| settings.get(key)).filter(|value| !value.is_null());
        let wrong = |key: &str, value: &Value| GraphError::Config(format!("`{key}` is {value}"));
        let kind = match find("rope_type").or_else(|| find("type")) {
            None => "default",
            Some(Value::String(kind)) => kind,
            Some(other) => return Err(wrong("rope_type", other)),
        };
        // Each of these is a length, a ratio or a base: none may be zero, negative, or no number.
        let positive = |key: &str, value: Option<&Value>| match value {
            None => Ok(None),
            Some(value) => match value.as_f64().filter(|number| number.is_finite() && *number > 0.0) {
                Some(number) => Ok(Some(number as f32)),
                None => Err(wrong(key, value)),
            },
        };
        let optional = |key: &str| positive(key, find(key));
        let in_config = |key: &str| config.get(key).filter(|value| !value.is_null());
        let either = |key: &str| positive(key, find(key).or_else(|| in_config(key)));
        let number = |key: &str| {
            optional(key)?.ok_or_else(|| GraphError::Config(format!("rope scaling of kind `{kind}` has no `{key}`")))
        };
        // DeepSeek's may be zero, which stands for none.
        let mscale =
            |key: &str| find(key).and_then(Value::as_f64).filter(|value| *value > 0.0).map(|value| value as f32);
        let theta = either("rope_theta")?.unwrap_or(10_000.0);
        let original = || either("original_max_position_embeddings");
        let longest = || positive("max_position_embeddings", in_config("max_position_embeddings"));
        let missing = |key: &str| GraphError::Config(format!("rope scaling of kind `{kind}` has no `{key}`"));
        let share = either("partial_rotary_factor")?.unwrap_or(1.0);
        let partial = (head_dim as f32 * share) as i32;
        let mut dims = partial;
        let scaling = match kind {
            // With text alone the three positions of `mrope` are the same number.
            "default" | "mrope" => Scaling::None,
            "linear" => Scaling::Linear { factor: number("factor")? },
            "llama3" => Scaling::Llama3 {
                factor: number("factor")?,
                low_freq_factor: number("low_freq_factor")?,
                high_freq_factor: number("high_freq_factor")?,
                original_max_position_embeddings: number("original_max_position_embeddings")?,
            },
            "yarn" => {
                let factor = number("factor")?;
                let (mscale, all_dim) = (mscale("mscale"), mscale("mscale_all_dim"));
                let attention_factor = match (optional("attention_factor")?, mscale, all_dim) {
                    (Some(given), ..) => given,
                    (None, Some(mscale), Some(all_dim)) => yarn_mscale(factor, mscale) / yarn_mscale(factor, all_dim),
                    _ => yarn_mscale(factor, 1.0),
                };
                Scaling::Yarn(Yarn {
                    factor,
                    original_max_position_embeddings: match original()? {
                        Some(original) => original,
                        None => longest()?.ok_or_else(|| missing("original_max_position_embeddings"))?,
                    },
                    beta_fast: optional("beta_fast")?.unwrap_or(32.0),
                    beta_slow: optional("beta_slow")?.unwrap_or(1.0),
                    truncate: find("truncate").and_then(Value::as_bool).unwrap_or(true),
                    attention_factor,
                    scale_factor: all_dim.map_or(1.0, |all_dim| yarn_mscale(factor, all_dim).powi(2)),
                })
            }
            "dynamic" => Scaling::Dynamic {
                factor: number("factor")?,
                max_position_embeddings: longest()?.ok_or_else(|| missing("max_position_embeddings"))?,
            },
            "longrope" | "su" => {
                let list = |key: &str| -> Result<Vec<f32>, GraphError> {
                    let values = find(key).and_then(Value::as_array).ok_or_else(|| missing(key))?;
                    let values: Vec<f32> = values.iter().filter_map(Value::as_f64).map(|value| value as f32).collect();
                    if values.len() != partial as usize / 2 {
                        let (has, wants) = (values.len(), partial / 2);
                        return Err(GraphError::Config(format!("`{key}` has {has} numbers, not {wants}")));
                    }
                    Ok(values)
                };
                let original = original()?.ok_or_else(|| missing("original_max_position_embeddings"))?;
                if original <= 1.0 {
                    let what = format!("`original_max_position_embeddings` is {original}");
                    return Err(GraphError::Config(what));
                }
                let stretch = match optional("factor")? {
                    Some(factor) => factor,
                    None => longest()?.map_or(1.0, |longest| longest / original),
                };
                let computed = if stretch <= 1.0 { 1.0 } else { (1.0 + stretch.ln() / original.ln()).sqrt() };
                Scaling::Longrope {
                    short_factor: list("short_factor")?,
                    long_factor: list("long_factor")?,
                    original_max_position_embeddings: original as i32,
                    attention_factor: optional("attention_factor")?.unwrap_or(computed),
                }
            }
            "proportional" => {
                dims = head_dim;
                Scaling::Proportional { rotated: partial, factor: optional("factor")?.unwrap_or(1.0) }
            }
            other => return Err(GraphError::Config(format!("`rope_type` `{other}` is not supported"))),
        };
        if dims <= 0 || dims > head_dim || dims % 2 != 0 {
            return Err(GraphError::Config(format!("{dims} of a head's {head_dim} dimensions cannot be rotated")));
        }
        Ok(Self { dims, theta, traditional: false, scaling })
    }

    /// What the attention scale is multiplied by where YaRN's `mscale_all_dim` is meant for it.
    pub fn scale_factor(&self) -> f32 {
        match &self.scaling {
            Scaling::Yarn(yarn) => yarn.scale_factor,
            _ => 1.0,
        }
    }
}

fn yarn_mscale(factor: f32, mscale: f32) -> f32 {
    if factor <= 1.0 { 1.0 } else { 0.1 * mscale * factor.ln() + 1.0 }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn reads_every_place() {
        let flat = RopeSpec::read(&json!({"rope_theta": 5e5}), 64).unwrap();
        let nested =
            RopeSpec::read(&json!({"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}}), 64).unwrap();
        assert_eq!(flat, nested);
        let linear = RopeSpec::read(&json!({"rope_scaling": {"type": "linear", "factor": 8.0}}), 64).unwrap();
        assert_eq!(linear.scaling, Scaling::Linear { factor: 8.0 });
        let by_layer = json!({"rope_parameters": {
            "full_attention": {"rope_theta": 1e6, "rope_type": "proportional", "partial_rotary_factor": 0.25},
            "sliding_attention": {"rope_theta": 1e4, "rope_type": "default"},
        }});
        let full = RopeSpec::read_layer_type(&by_layer, 64, "full_attention").unwrap();
        assert_eq!((full.theta, full.dims), (1e6, 64));
        assert_eq!(full.scaling, Scaling::Proportional { rotated: 16, factor: 1.0 });
        assert_eq!(RopeSpec::read_layer_type(&by_layer, 64, "sliding_attention").unwrap().theta, 1e4);
        assert_eq!(RopeSpec::read(&json!({"partial_rotary_factor": 0.5}), 64).unwrap().dims, 32);
    }

    #[test]
    fn names_what_it_cannot_do() {
        let error = RopeSpec::read(&json!({"rope_scaling": {"rope_type": "foo"}}), 64).unwrap_err();
        assert!(error.to_string().contains("`rope_type` `foo`"), "{error}");
        let error = RopeSpec::read(&json!({"rope_scaling": {"rope_type": "linear"}}), 64).unwrap_err();
        assert!(error.to_string().contains("`factor`"), "{error}");
        let error = RopeSpec::read(&json!({"rope_scaling": {"type": "longrope", "factor": 2.0}}), 64).unwrap_err();
        assert!(error.to_string().contains("`original_max_position_embeddings`"), "{error}");
        let error = RopeSpec::read(&json!({"partial_rotary_factor": 0.3}), 10).unwrap_err();
        assert!(error.to_string().contains("3 of a head's 10"), "{error}");
        for (config, word) in [
            (json!({"rope_theta": "5e5"}), "`rope_theta` is \"5e5\""),
            (json!({"rope_theta": -1.0}), "`rope_theta` is -1.0"),
            (json!({"rope_scaling": "yarn"}), "`rope_scaling` is \"yarn\""),
            (json!({"rope_scaling": {"rope_type": 7}}), "`rope_type` is 7"),
            (json!({"rope_scaling": {"rope_type": "linear", "factor": 0.0}}), "`factor` is 0.0"),
        ] {
            let error = RopeSpec::read(&config, 64).unwrap_err();
            assert!(error.to_string().contains(word), "{error}");
        }
    }

    #[test]
    fn yarn_factors() {
        let spec = |more: Value| {
            let mut scaling = json!({"type": "yarn", "factor": 40.0, "original_max_position_embeddings": 4096});
            scaling.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
            match RopeSpec::read(&json!({"rope_scaling": scaling}), 64).unwrap().scaling {
                Scaling::Yarn(yarn) => (yarn.attention_factor, yarn.scale_factor),
                other => panic!("{other:?}"),
            }
        };
        let mscale = 0.1 * 40.0_f32.ln() + 1.0;
        assert_eq!(spec(json!({})), (mscale, 1.0));
        assert_eq!(spec(json!({"mscale": 1.0, "mscale_all_dim": 1.0})), (1.0, mscale * mscale));
        assert_eq!(spec(json!({"attention_factor": 1.5})), (1.5, 1.0));
    }
}
