//! One file a command.

pub mod backends;
pub mod bench;
pub mod chat;
mod conversation;
pub mod explain;
pub mod mesh;
pub mod models;
pub mod serve;
pub mod verify;
