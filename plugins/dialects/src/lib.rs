//! mesh-dialects
