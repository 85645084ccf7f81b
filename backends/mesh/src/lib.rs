//! Nodes that serve for one another: transport and identity by iroh, membership and adverts by iroh-gossip.
//!
//! - [`home`], [`trust`], [`ticket`]: who belongs to a mesh, and how that is kept and proved.
//! - [`wire`], [`codec`], [`adverts`]: what nodes say to one another.
//! - [`mesh`]: a node's life; [`engine`]: how a request finds its way to another.
//!
//! What others offer and who is asked is decided by `mesh-peers`, purely.

pub mod adverts;
mod attend;
pub mod backend;
pub mod codec;
pub mod counts;
pub mod engine;
pub mod home;
mod link;
mod links;
pub mod mesh;
mod node;
mod own;
mod serving;
mod tasks;
pub mod ticket;
pub mod trust;
pub mod wire;

pub use home::{Home, HomeError, Membership};
pub use iroh::{EndpointAddr, EndpointId, RelayUrl, SecretKey};
pub use mesh::{Mesh, MeshError, Options, PORT};
pub use mesh_peers::Policy;
pub use ticket::{Ticket, TicketError};
