//! mesh-text
