//! Errors in Anthropic's form.

use schemars::JsonSchema;
use serde::Serialize;

use crate::error::ApiError;

/// `{"type": "error", …}`.
#[derive(Clone, Debug, Serialize, JsonSchema)]
#[schemars(rename = "AnthropicErrorBody")]
pub struct ErrorBody {
    /// `error`.
    #[serde(rename = "type")]
    pub kind: &'static str,
    /// The error.
    pub error: ErrorObject,
    /// What the request is called.
    pub request_id: Option<String>,
}

/// What was wrong.
#[derive(Clone, Debug, Serialize, JsonSchema)]
#[schemars(rename = "AnthropicErrorObject")]
pub struct ErrorObject {
    /// `invalid_request_error`, `overloaded_error` …
    #[serde(rename = "type")]
    pub kind: &'static str,
    /// What was wrong, and what to do next.
    pub message: String,
}

impl ErrorBody {
    /// An error, in this form.
    pub fn new(error: &ApiError, request_id: Option<&str>) -> Self {
        let kind = match error.status().as_u16() {
            401 => "authentication_error",
            403 => "permission_error",
            404 => "not_found_error",
            413 => "request_too_large",
            429 => "rate_limit_error",
            503 | 529 => "overloaded_error",
            500.. => "api_error",
            _ => "invalid_request_error",
        };
        let error = ErrorObject { kind, message: error.body().error.message };
        Self { kind: "error", error, request_id: request_id.map(str::to_owned) }
    }
}
