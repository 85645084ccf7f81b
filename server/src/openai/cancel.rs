//! `/v1/requests/{id}/cancel`.

use schemars::JsonSchema;
use serde::Serialize;

/// A request that was cancelled.
#[derive(Clone, Debug, Serialize, JsonSchema)]
#[allow(missing_docs)]
pub struct Cancelled {
    pub id: String,
    /// `request`.
    pub object: &'static str,
    pub cancelled: bool,
}
