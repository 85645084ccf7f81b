//! mesh-graph
