//! What a node knows of others, and how it decides: values in, values out. No network, no clock; time is what has passed
//! since some start, and is handed in.
//!
//! - [`advert`]: what nodes tell one another, and its bounded codec.
//! - [`directory`]: who is there, and what may be routed to whom.
//! - [`policy`]: who is asked, and whether anybody is.
//! - [`affinity`]: who has seen the beginning of a conversation.
//! - [`cadence`]: how often nodes speak.
//! - [`reach`]: who is connected to, and which connections are given up.

pub mod advert;
pub mod affinity;
pub mod cadence;
pub mod directory;
mod id;
pub mod policy;
pub mod reach;
#[cfg(test)]
mod samples;

pub use advert::{Advert, AdvertError, Loss, Pulse};
pub use affinity::Affinity;
pub use cadence::{heartbeat, lease};
pub use directory::{Bounds, Directory, Heard};
pub use id::{NodeId, NodeIdError};
pub use policy::{Asked, Candidate, Choice, Expected, Place, Policy, choose, expect, place};
pub use reach::{Reach, Standing};
