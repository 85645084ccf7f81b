//! The binary against a stand-in for the hub: what people type, what they read, and what is on disk afterwards.
#![cfg(unix)]

mod commands;
mod home;
mod interrupted;
mod mission;
mod refusals;
