//! What nodes tell one another: adverts of what they serve, pulses of how busy they are, and who was lost. CBOR by field
//! names, so that a field which one side does not know is passed over by it. Whatever comes in is bounded before it is read.

mod codec;
#[cfg(test)]
mod tests;

use std::{collections::BTreeSet, sync::Arc};

use mesh_core::node::{Load, ModelOffer};
use serde::{Deserialize, Serialize};

use crate::{
    NodeId,
    cadence::{LEASE_MAX, PULSE_IDLE, PULSE_MAX},
};
use codec::{bounded, decode, encode};

/// What [`Advert::version`] is. A field that others may do without, or a new model parameter, does not change it.
pub const VERSION: u32 = 1;

/// The longest message but a [`Snapshot`], in bytes.
pub const MESSAGE_BYTES_MAX: usize = 32 << 10;

/// The longest snapshot, in bytes.
pub const SNAPSHOT_BYTES_MAX: usize = 256 << 10;

/// Offers an advert may have.
pub const OFFERS_MAX: usize = 64;

/// The longest name of a node, in bytes.
pub const NODE_NAME_BYTES_MAX: usize = 64;

/// The longest text of an offer, in bytes.
pub const TEXT_BYTES_MAX: usize = 256;

/// Adverts a snapshot may have.
const HELD_MAX: usize = 4096;

/// Why a message is refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum AdvertError {
    /// More than may be sent at once.
    #[error("{bytes} bytes, over {max}")]
    Long {
        /// What came.
        bytes: usize,
        /// What may.
        max: usize,
    },
    /// Not what it should be.
    #[error("malformed: {0}")]
    Malformed(String),
    /// Of another time.
    #[error("version {found}, and this program knows {VERSION}: the older one of the two has to be updated")]
    Version {
        /// What it says.
        found: u32,
    },
    /// More of something than there may be.
    #[error("{what}: {found}, over {max}")]
    Bound {
        /// Of what.
        what: &'static str,
        /// What it says.
        found: u64,
        /// What it may.
        max: u64,
    },
    /// A value that has no meaning.
    #[error("{what} is {wrong}")]
    Value {
        /// Which.
        what: &'static str,
        /// What is wrong with it.
        wrong: &'static str,
    },
}

/// What a node serves, as it tells everybody. A later one takes the place of all earlier ones.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Advert {
    /// [`VERSION`].
    pub version: u32,
    /// Who speaks.
    pub node: NodeId,
    /// What it is called. Several may be called the same.
    pub name: String,
    /// When it was started, in milliseconds since 1970.
    pub incarnation: u64,
    /// Counts its adverts since then.
    pub sequence: u64,
    /// For how long it holds, in milliseconds.
    pub lease_ms: u32,
    /// Its last one: it goes.
    #[serde(default)]
    pub leaving: bool,
    /// What is ready there.
    #[serde(default, deserialize_with = "bounded::<_, _, OFFERS_MAX>")]
    pub offers: Vec<Arc<ModelOffer>>,
}

impl Advert {
    /// As bytes. Whether others would take them is what [`check`](Self::check) says.
    pub fn encode(&self) -> Vec<u8> {
        encode(self)
    }

    /// From bytes, within every bound.
    pub fn decode(bytes: &[u8]) -> Result<Self, AdvertError> {
        let advert: Self = decode(bytes, MESSAGE_BYTES_MAX)?;
        advert.check()?;
        Ok(advert)
    }

    /// Whether it is within every bound but that of its bytes.
    pub fn check(&self) -> Result<(), AdvertError> {
        if self.version != VERSION {
            return Err(AdvertError::Version { found: self.version });
        }
        text("the node's name", &self.name, NODE_NAME_BYTES_MAX)?;
        at_most("the lease in milliseconds", self.lease_ms.into(), LEASE_MAX.as_millis() as u64)?;
        if self.lease_ms == 0 {
            return Err(AdvertError::Value { what: "the lease", wrong: "none" });
        }
        at_most("offers", self.offers.len() as u64, OFFERS_MAX as u64)?;
        self.offers.iter().try_for_each(|offer| check_offer(offer))?;
        let names: BTreeSet<&str> = self.offers.iter().map(|offer| offer.name.as_str()).collect();
        if names.len() < self.offers.len() {
            return Err(AdvertError::Value { what: "a model's name", wrong: "there twice" });
        }
        Ok(())
    }

    /// Whether it was said after another one of the same node.
    pub fn is_later_than(&self, incarnation: u64, sequence: u64) -> bool {
        (self.incarnation, self.sequence) > (incarnation, sequence)
    }

    /// About the memory that keeping it takes.
    pub fn weight_bytes(&self) -> usize {
        let offers = self.offers.iter().map(|offer| {
            let texts = [&offer.reference, &offer.revision, &offer.hash, &offer.quantization, &offer.family];
            let texts = texts.into_iter().chain([&offer.dialect]).flatten().map(String::len).sum::<usize>();
            size_of::<ModelOffer>() + offer.name.len() + offer.backend.len() + texts + offer.capabilities.knobs.len()
        });
        size_of::<Self>() + self.name.len() + offers.sum::<usize>()
    }
}

fn check_offer(offer: &ModelOffer) -> Result<(), AdvertError> {
    text("a model's name", &offer.name, TEXT_BYTES_MAX)?;
    text("a backend's name", &offer.backend, TEXT_BYTES_MAX)?;
    let optional = [
        ("a model's reference", &offer.reference),
        ("a model's revision", &offer.revision),
        ("a model's hash", &offer.hash),
        ("a model's quantization", &offer.quantization),
        ("a model's family", &offer.family),
        ("a model's dialect", &offer.dialect),
    ];
    for (what, value) in optional {
        value.as_deref().map_or(Ok(()), |value| text(what, value, TEXT_BYTES_MAX))?;
    }
    check_load(&offer.load)
}

fn check_load(load: &Load) -> Result<(), AdvertError> {
    let speeds = [load.prefill_per_s, load.decode_per_s];
    match speeds.into_iter().flatten().all(|speed| speed.is_finite() && speed > 0.0) {
        true => Ok(()),
        false => Err(AdvertError::Value { what: "a speed", wrong: "no number above zero" }),
    }
}

/// Names are shown in tables and logs: nothing in them may move a terminal's cursor.
fn text(what: &'static str, value: &str, max: usize) -> Result<(), AdvertError> {
    at_most(what, value.len() as u64, max as u64)?;
    if value.is_empty() {
        return Err(AdvertError::Value { what, wrong: "empty" });
    }
    if value.chars().any(char::is_control) {
        return Err(AdvertError::Value { what, wrong: "not all printable" });
    }
    Ok(())
}

fn at_most(what: &'static str, found: u64, max: u64) -> Result<(), AdvertError> {
    if found > max { Err(AdvertError::Bound { what, found, max }) } else { Ok(()) }
}

/// What a node tells those who have a connection to it: that it is there, and how busy.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Pulse {
    /// As in its latest advert.
    pub incarnation: u64,
    /// As in its latest advert.
    pub sequence: u64,
    /// The time after which its next one is sent, in milliseconds.
    #[serde(default = "next_ms_default")]
    pub next_ms: u32,
    /// How busy which of that advert's offers are; absent ones are as before.
    #[serde(default, deserialize_with = "bounded::<_, _, OFFERS_MAX>")]
    pub loads: Vec<(u16, Load)>,
}

fn next_ms_default() -> u32 {
    PULSE_IDLE.as_millis() as u32
}

impl Pulse {
    /// As bytes.
    pub fn encode(&self) -> Vec<u8> {
        encode(self)
    }

    /// As so many bytes at most: with as many loads as fit, from a certain one on. That it comes matters more than what it
    /// says.
    pub fn encode_within(&self, bytes_max: usize, from: usize) -> Vec<u8> {
        let whole = self.encode();
        if whole.len() <= bytes_max || self.loads.is_empty() {
            return whole;
        }
        let mut loads = self.loads.clone();
        loads.rotate_left(from % self.loads.len());
        let longest = loads.iter().map(|load| encode(load).len()).max().unwrap_or(1);
        let others = whole.len() - loads.iter().map(|load| encode(load).len()).sum::<usize>();
        loads.truncate(bytes_max.saturating_sub(others) / longest);
        Self { loads, ..self.clone() }.encode()
    }

    /// From bytes, within every bound.
    pub fn decode(bytes: &[u8]) -> Result<Self, AdvertError> {
        let pulse: Self = decode(bytes, MESSAGE_BYTES_MAX)?;
        at_most("the time to the next pulse in milliseconds", pulse.next_ms.into(), PULSE_MAX.as_millis() as u64)?;
        pulse.loads.iter().try_for_each(|(_, load)| check_load(load))?;
        Ok(pulse)
    }
}

/// That the connection to a node was lost when this was the latest heard of it. Whoever loses one tells everybody: an
/// advert's lease is long in a large mesh. All who notice the same say the same bytes, which gossip passes on once. The
/// node itself, if it lives, answers with a later advert.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Loss {
    /// Who was lost.
    pub node: NodeId,
    /// As in the latest advert heard of it.
    pub incarnation: u64,
    /// As in the latest advert heard of it.
    pub sequence: u64,
}

/// What is told to everybody.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum News {
    /// What somebody serves.
    Advert(Advert),
    /// Who was lost.
    Loss(Loss),
}

impl News {
    /// As bytes.
    pub fn encode(&self) -> Vec<u8> {
        encode(self)
    }

    /// From bytes, within every bound.
    pub fn decode(bytes: &[u8]) -> Result<Self, AdvertError> {
        let news: Self = decode(bytes, MESSAGE_BYTES_MAX)?;
        if let Self::Advert(advert) = &news {
            advert.check()?;
        }
        Ok(news)
    }
}

/// What one node knows of others, for one that has just come, or that was away: it need not wait until all have spoken.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Snapshot {
    /// The latest adverts.
    #[serde(deserialize_with = "bounded::<_, _, HELD_MAX>")]
    pub held: Vec<Held>,
}

/// An advert that was heard a while ago.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Held {
    /// How long ago, in milliseconds: so much of its lease is over.
    pub age_ms: u32,
    /// What was heard.
    pub advert: Arc<Advert>,
}

impl Snapshot {
    /// As bytes.
    pub fn encode(&self) -> Vec<u8> {
        encode(self)
    }

    /// From bytes, within every bound.
    pub fn decode(bytes: &[u8]) -> Result<Self, AdvertError> {
        let snapshot: Self = decode(bytes, SNAPSHOT_BYTES_MAX)?;
        snapshot.held.iter().try_for_each(|held| held.advert.check())?;
        Ok(snapshot)
    }

    /// As many as may be sent at once, one after the other.
    pub(crate) fn several(held: impl IntoIterator<Item = Held>) -> Vec<Self> {
        let mut all: Vec<Self> = Vec::new();
        let mut bytes = SNAPSHOT_BYTES_MAX;
        for held in held {
            let needs = encode(&held).len();
            if bytes + needs > SNAPSHOT_BYTES_MAX - 64 || all.last().is_some_and(|last| last.held.len() >= HELD_MAX) {
                all.push(Self::default());
                bytes = 0;
            }
            bytes += needs;
            all.last_mut().expect("one was pushed").held.push(held);
        }
        all
    }
}
