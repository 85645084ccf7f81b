//! Model families, one file each: who it is, how it talks, how it computes. What two share lives in `mesh-graph`.

mod llama;
mod qwen2;
mod qwen3;
