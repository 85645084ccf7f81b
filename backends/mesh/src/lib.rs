//! Nodes that serve for one another: transport and identity by iroh, membership and adverts by iroh-gossip.

pub mod codec;
pub mod home;
pub mod ticket;
pub mod trust;
