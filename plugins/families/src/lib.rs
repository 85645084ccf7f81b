//! mesh-families
