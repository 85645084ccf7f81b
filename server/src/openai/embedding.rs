//! `/v1/embeddings`.

use base64::{Engine, prelude::BASE64_STANDARD};
use mesh_core::Pooling;
use schemars::{JsonSchema, json_schema};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::{
    BadRequest,
    bad_request::{element, kind},
    schema::schema,
};
use crate::pipeline::Subject;

/// Most inputs of a request.
pub const INPUTS_MAX: usize = 2048;

/// The body of a request for embeddings.
#[derive(Clone, Debug, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, expecting = "an object")]
#[allow(missing_docs)]
pub struct EmbeddingRequest {
    #[schemars(required, length(min = 1))]
    pub model: Option<String>,
    #[schemars(required)]
    pub input: Option<Input>,
    /// `float` or `base64`.
    #[schemars(extend("enum" = ["float", "base64", null]))]
    pub encoding_format: Option<String>,
    /// Refused: vectors are as long as the model makes them.
    #[schemars(skip)]
    pub dimensions: Option<u32>,
    /// How an input's tokens become one vector: `mean`, unless given, or `last`.
    #[schemars(extend("enum" = ["mean", "last", null]))]
    pub pooling: Option<String>,
    /// Says who asks. Accepted and put to no use: it is neither logged nor kept.
    pub user: Option<String>,
}

/// A text, a list of texts, the tokens of one text, or a list of those.
#[derive(Clone, Debug, Deserialize)]
#[serde(transparent)]
pub struct Input(Value);

schema!(Input, "EmbeddingInput", |_generator| {
    let tokens = json_schema!({ "type": "array", "items": { "type": "integer", "minimum": 0 }, "minItems": 1 });
    json_schema!({ "anyOf": [
        { "type": "string" },
        { "type": "array", "items": { "anyOf": [{ "type": "string" }, tokens] }, "minItems": 1 },
        tokens,
    ] })
});

/// How vectors are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Encoding {
    /// As numbers.
    Float,
    /// As base64 of little-endian 32-bit floats.
    Base64,
}

/// A request for embeddings, checked.
#[derive(Clone, Debug)]
pub struct Embeddings {
    /// Who shall give them.
    pub model: String,
    /// Of what.
    pub inputs: Vec<Subject>,
    /// How an input's tokens become one vector.
    pub pooling: Pooling,
    /// How vectors are written.
    pub encoding: Encoding,
}

impl EmbeddingRequest {
    /// Checks it.
    pub fn check(self) -> Result<Embeddings, BadRequest> {
        let model = self.model.filter(|model| !model.is_empty()).ok_or_else(|| BadRequest::missing("model"))?;
        if self.dimensions.is_some() {
            return Err(BadRequest::unsupported("dimensions", "vectors are as long as the model makes them"));
        }
        let encoding = match self.encoding_format.as_deref() {
            None | Some("float") => Encoding::Float,
            Some("base64") => Encoding::Base64,
            Some(_) => return Err(BadRequest::value("encoding_format", "has to be float or base64")),
        };
        let pooling = match self.pooling.as_deref() {
            None | Some("mean") => Pooling::Mean,
            Some("last") => Pooling::Last,
            Some(_) => return Err(BadRequest::value("pooling", "has to be mean or last")),
        };
        let inputs = inputs(self.input.ok_or_else(|| BadRequest::missing("input"))?.0)?;
        Ok(Embeddings { model, inputs, pooling, encoding })
    }
}

fn inputs(input: Value) -> Result<Vec<Subject>, BadRequest> {
    let list = match input {
        Value::String(text) => vec![Value::String(text)],
        Value::Array(list) if list.first().is_some_and(Value::is_number) => vec![Value::Array(list)],
        Value::Array(list) => list,
        other => {
            let what = format!("found {}, expected a string, a list of strings or token ids", kind(&other));
            return Err(BadRequest::Type { param: "input".into(), what });
        }
    };
    if list.is_empty() || list.len() > INPUTS_MAX {
        let what = format!("has {} entries; between 1 and {INPUTS_MAX} are possible", list.len());
        return Err(BadRequest::value("input", what));
    }
    list.into_iter()
        .enumerate()
        .map(|(index, entry)| match entry {
            Value::String(text) if text.is_empty() => {
                Err(BadRequest::value(format!("input[{index}]"), "is empty; send a text that is not"))
            }
            Value::String(text) => Ok(Subject::Text(text)),
            Value::Array(ids) if ids.is_empty() => {
                Err(BadRequest::value(format!("input[{index}]"), "has no tokens; send a text that is not empty"))
            }
            entry => element::<Vec<u32>>(&format!("input[{index}]"), entry).map(Subject::Tokens),
        })
        .collect()
}

/// What `/v1/embeddings` answers.
#[derive(Clone, Debug, Serialize, JsonSchema)]
#[allow(missing_docs)]
pub struct EmbeddingList {
    /// `list`.
    pub object: &'static str,
    pub data: Vec<Embedding>,
    pub model: String,
    pub usage: EmbeddingUsage,
}

/// The vector of one input.
#[derive(Clone, Debug, Serialize, JsonSchema)]
#[allow(missing_docs)]
pub struct Embedding {
    /// `embedding`.
    pub object: &'static str,
    pub index: usize,
    pub embedding: Vector,
}

/// A vector.
#[derive(Clone, Debug, Serialize, JsonSchema)]
#[serde(untagged)]
pub enum Vector {
    /// As numbers.
    Float(Vec<f32>),
    /// As base64 of little-endian 32-bit floats.
    Base64(String),
}

impl Vector {
    /// A vector, written in this way.
    pub fn new(vector: Vec<f32>, encoding: Encoding) -> Self {
        match encoding {
            Encoding::Float => Self::Float(vector),
            Encoding::Base64 => {
                let bytes: Vec<u8> = vector.into_iter().flat_map(f32::to_le_bytes).collect();
                Self::Base64(BASE64_STANDARD.encode(bytes))
            }
        }
    }
}

/// Tokens read.
#[derive(Clone, Copy, Debug, Serialize, JsonSchema)]
#[allow(missing_docs)]
pub struct EmbeddingUsage {
    pub prompt_tokens: u32,
    pub total_tokens: u32,
}
