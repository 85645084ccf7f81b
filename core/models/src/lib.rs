//! mesh-models
