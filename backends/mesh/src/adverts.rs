//! Adverts as they pass between nodes: signed by who they are about, with what proves that it is a member.

use bytes::Bytes;
use iroh::{EndpointAddr, EndpointId};
use mesh_peers::advert::{Advert, AdvertError, Loss, MESSAGE_BYTES_MAX};
use serde::{Deserialize, Serialize};

use crate::{
    codec::{self, CodecError},
    trust::{Certificate, Judge, Revocations, Signable, Signed, TrustError},
};

/// Addresses that a node may say it has.
pub const ADDRESSES_MAX: usize = 32;
/// Largest message of gossip, in bytes: an advert, what proves it, and what gossip adds.
pub const GOSSIP_BYTES_MAX: usize = MESSAGE_BYTES_MAX + (8 << 10);

/// What a node says of itself.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Spoken {
    /// What it serves.
    pub advert: Advert,
    /// Where it can be reached.
    pub at: EndpointAddr,
}

impl Signable for Spoken {
    const KIND: &'static str = "advert";
}

/// An advert that anybody may pass on and nobody can change.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Shown {
    /// Who speaks.
    pub node: EndpointId,
    /// That it is a member.
    pub certificate: Signed<Certificate>,
    /// What it says.
    pub spoken: Signed<Spoken>,
    /// How long ago it was heard, in milliseconds, where it is passed on.
    #[serde(default)]
    pub age_ms: u32,
}

/// What is told to everybody.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Gossiped {
    /// What a node serves.
    Advert(Box<Shown>),
    /// Who does not answer any more. Not signed: all who notice say the same bytes, which are passed on once, and who lives
    /// says so.
    Loss(Loss),
    /// Who is no member any more.
    Revocations(Signed<Revocations>),
}

/// Why something that others say does not count.
#[derive(Debug, thiserror::Error)]
pub enum Unheard {
    /// It cannot be read.
    #[error(transparent)]
    Codec(#[from] CodecError),
    /// It is not from whom it says, or from nobody who counts.
    #[error(transparent)]
    Trust(#[from] TrustError),
    /// It says what may not be said.
    #[error(transparent)]
    Advert(#[from] AdvertError),
    /// It is about somebody else than who signed it.
    #[error("an advert of another node than it is about")]
    Another,
    /// It names too many addresses.
    #[error("{0} addresses, and {ADDRESSES_MAX} are the most")]
    Addresses(usize),
}

impl Shown {
    /// What it says, if a member says so.
    pub fn open(&self, judge: &Judge) -> Result<Spoken, Unheard> {
        judge.admit(self.node, &self.certificate)?;
        let spoken = self.spoken.open(&self.node)?;
        if spoken.advert.node.0 != *self.node.as_bytes() || spoken.at.id != self.node {
            return Err(Unheard::Another);
        }
        if spoken.at.addrs.len() > ADDRESSES_MAX {
            return Err(Unheard::Addresses(spoken.at.addrs.len()));
        }
        spoken.advert.check()?;
        Ok(spoken)
    }
}

impl Gossiped {
    /// As bytes.
    pub fn encode(&self) -> Bytes {
        codec::encode(self).into()
    }

    /// From bytes, within every bound.
    pub fn decode(bytes: &[u8]) -> Result<Self, CodecError> {
        codec::decode(bytes, GOSSIP_BYTES_MAX)
    }
}
