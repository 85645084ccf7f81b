//! mesh-llm
