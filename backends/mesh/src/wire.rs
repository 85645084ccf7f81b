//! What nodes say to one another over a connection: frames of CBOR, each with its length before it.
//!
//! A frame's length is read before the frame, and memory is taken as bytes come, never as they are announced. What requests
//! of others take together is bounded by a [`Budget`].

use std::sync::Arc;

use iroh::endpoint::{Connection, RecvStream, SendStream};
use mesh_core::{
    EngineError,
    answer::Part,
    ask::Ask,
    node::{Question, Rejection, Reply},
};
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::{
    codec::{self, CodecError},
    home::{Denied, Membership, Secret},
    trust::{Certificate, Revocations, Signed},
};

/// Members to members.
pub const ALPN: &[u8] = b"mesh-llm/1";
/// Nodes that want to become members.
pub const JOIN_ALPN: &[u8] = b"mesh-llm/join/1";
/// iroh-gossip between members.
pub const GOSSIP_ALPN: &[u8] = b"mesh-llm/gossip/1";

/// Largest frame of a stranger, in bytes.
pub const STRANGER_BYTES_MAX: usize = 4 << 10;
/// Largest frame of a member that introduces itself, in bytes: revocations are the most of it.
pub const CARD_BYTES_MAX: usize = 2 << 20;
/// Largest request, in bytes: what the server takes over HTTP, and some.
pub const CALL_BYTES_MAX: usize = 48 << 20;
/// Largest frame of an answer, in bytes.
pub const SAID_BYTES_MAX: usize = 32 << 20;
/// Everything that requests of others hold in memory while they are read, in bytes.
pub const BUDGET_BYTES: usize = 256 << 20;
const STEP_BYTES: usize = 64 << 10;

/// What ends a conversation between nodes.
#[derive(Debug, thiserror::Error)]
pub enum WireError {
    /// The other side ended it, or is gone.
    #[error("the connection ended: {0}")]
    Ended(String),
    /// A frame is longer than it may be.
    #[error("a frame of {bytes} bytes, and {max} are the most")]
    TooLarge {
        /// How long it says it is.
        bytes: usize,
        /// How long it may be.
        max: usize,
    },
    /// Too much is being read at the moment.
    #[error("as much is being read as may be, {BUDGET_BYTES} bytes")]
    NoRoom,
    /// A frame that does not read as what is expected.
    #[error(transparent)]
    Codec(#[from] CodecError),
}

/// What frames may hold in memory together.
#[derive(Clone, Debug)]
pub struct Budget(Arc<Semaphore>);

impl Default for Budget {
    fn default() -> Self {
        Self(Arc::new(Semaphore::new(BUDGET_BYTES / STEP_BYTES)))
    }
}

impl Budget {
    fn step(&self) -> Result<OwnedSemaphorePermit, WireError> {
        self.0.clone().try_acquire_owned().map_err(|_| WireError::NoRoom)
    }
}

/// Writes a frame.
pub async fn write(stream: &mut SendStream, value: &impl Serialize) -> Result<(), WireError> {
    write_encoded(stream, &codec::encode(value)).await
}

/// The same for what was encoded already.
pub async fn write_encoded(stream: &mut SendStream, body: &[u8]) -> Result<(), WireError> {
    let length =
        u32::try_from(body.len()).map_err(|_| WireError::TooLarge { bytes: body.len(), max: u32::MAX as usize })?;
    // One write: a frame that fits leaves in one packet.
    let frame = [&length.to_be_bytes()[..], body].concat();
    stream.write_all(&frame).await.map_err(|error| WireError::Ended(error.to_string()))
}

/// Reads a frame; `None` where the other side has nothing more to say.
pub async fn read<T: DeserializeOwned>(
    stream: &mut RecvStream,
    bytes_max: usize,
    budget: Option<&Budget>,
) -> Result<Option<T>, WireError> {
    let mut length = [0; 4];
    match stream.read_exact(&mut length).await {
        Ok(()) => {}
        Err(iroh::endpoint::ReadExactError::FinishedEarly(0)) => return Ok(None),
        Err(error) => return Err(WireError::Ended(error.to_string())),
    }
    let length = u32::from_be_bytes(length) as usize;
    if length > bytes_max {
        return Err(WireError::TooLarge { bytes: length, max: bytes_max });
    }
    let (mut body, mut held) = (Vec::new(), Vec::new());
    while body.len() < length {
        held.extend(budget.map(Budget::step).transpose()?);
        let from = body.len();
        body.resize((from + STEP_BYTES).min(length), 0);
        stream.read_exact(&mut body[from..]).await.map_err(|error| WireError::Ended(error.to_string()))?;
    }
    Ok(Some(codec::decode(&body, bytes_max)?))
}

/// The same where something has to come.
pub async fn expect<T: DeserializeOwned>(stream: &mut RecvStream, bytes_max: usize) -> Result<T, WireError> {
    let frame = read(stream, bytes_max, None).await?;
    frame.ok_or_else(|| WireError::Ended("it ended before it should".into()))
}

/// What both sides of a connection begin with: that they know the mesh's secret. It holds for this connection alone.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Proof {
    bytes: [u8; 32],
}

/// Who shows a [`Proof`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// Who opened the connection.
    Dialler,
    /// Who took it.
    Listener,
}

impl Proof {
    /// Of one side of a connection.
    pub fn of(secret: &Secret, connection: &Connection, side: Side) -> Result<Self, WireError> {
        let mut bound = [0; 32];
        connection
            .export_keying_material(&mut bound, b"mesh-llm 1 proof", &[])
            .map_err(|error| WireError::Ended(format!("no keys: {error:?}")))?;
        let purpose = match side {
            Side::Dialler => "mesh-llm 1 proof of the dialling side",
            Side::Listener => "mesh-llm 1 proof of the listening side",
        };
        Ok(Self { bytes: secret.derive(purpose, &bound) })
    }

    /// In a time that tells nothing.
    pub fn is(&self, other: &Self) -> bool {
        blake3::Hash::from_bytes(self.bytes) == blake3::Hash::from_bytes(other.bytes)
    }
}

/// What a member shows another, once both have proved that they know the secret.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Card {
    /// When it was started, in milliseconds since 1970.
    pub incarnation: u64,
    /// That it is a member.
    pub certificate: Signed<Certificate>,
    /// Who is none any more.
    #[serde(default)]
    pub revocations: Option<Signed<Revocations>>,
    /// What it knows of others, itself included, newest first.
    #[serde(default)]
    pub adverts: Vec<crate::adverts::Shown>,
}

/// A request between nodes.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Call {
    /// To be answered by a model.
    Ask {
        /// The model, as it is called there.
        model: String,
        /// The request.
        ask: Box<Ask>,
    },
    /// To be answered without generating.
    Question {
        /// The model, as it is called there.
        model: String,
        /// The question.
        question: Question,
    },
}

/// What comes back. A request is answered with [`Said::Admitted`] and parts, or turned down.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Said {
    /// The request was admitted; parts follow.
    Admitted,
    /// The next part of the answer.
    Part(Part),
    /// The end of an answer that could not be finished.
    Broke(EngineError),
    /// The request was turned down.
    Rejected(Rejection),
    /// The answer to a question.
    Reply(Reply),
}

/// What a node says that wants to join.
#[derive(Debug, Serialize, Deserialize)]
pub struct Join {
    /// Of its ticket.
    pub secret: [u8; 16],
}

/// What it hears.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Joined {
    /// It is a member now.
    Member(Box<Membership>),
    /// It is not.
    Denied(Denied),
}

#[cfg(test)]
mod tests {
    use iroh::SecretKey;
    use mesh_core::{
        ask::{Chat, Subject},
        chat::Message,
    };
    use mesh_peers::advert::{Advert, Loss, VERSION};
    use proptest::prelude::*;

    use super::*;
    use crate::{
        adverts::{Gossiped, Shown, Spoken},
        node::node_id,
        trust::Judge,
    };

    fn shown(key: &SecretKey, mesh: &SecretKey) -> Shown {
        let advert = Advert {
            version: VERSION,
            node: node_id(key.public()),
            name: "node".into(),
            incarnation: 1,
            sequence: 2,
            lease_ms: 5000,
            leaving: false,
            offers: Vec::new(),
        };
        let certificate = Certificate { mesh: mesh.public(), node: key.public(), issued_s: 1 };
        let spoken = Spoken { advert, at: iroh::EndpointAddr::new(key.public()) };
        Shown {
            node: key.public(),
            certificate: Signed::new(mesh, &certificate),
            spoken: Signed::new(key, &spoken),
            age_ms: 0,
        }
    }

    /// One of each kind of message, as bytes.
    fn messages() -> Vec<Vec<u8>> {
        let (key, mesh) = (SecretKey::from_bytes(&[1; 32]), SecretKey::from_bytes(&[2; 32]));
        let revocations =
            Signed::new(&mesh, &Revocations { mesh: mesh.public(), serial: 1, nodes: [key.public()].into() });
        let message = Message { role: "user".into(), content: Some("Hello".into()), ..Message::default() };
        let subject = Subject::Chat(Chat { messages: vec![message], ..Chat::default() });
        let card = Card {
            incarnation: 1,
            certificate: shown(&key, &mesh).certificate,
            revocations: Some(revocations.clone()),
            adverts: vec![shown(&key, &mesh)],
        };
        let loss = Loss { node: node_id(key.public()), incarnation: 1, sequence: 1 };
        vec![
            Gossiped::Advert(Box::new(shown(&key, &mesh))).encode().to_vec(),
            Gossiped::Loss(loss).encode().to_vec(),
            Gossiped::Revocations(revocations).encode().to_vec(),
            codec::encode(&card),
            codec::encode(&Call::Ask { model: "m".into(), ask: Box::new(Ask::new("a", subject)) }),
            codec::encode(&Call::Question { model: "m".into(), question: Question::Detokenize { ids: vec![1] } }),
            codec::encode(&Said::Part(Part::Queued { ahead: 1 })),
            codec::encode(&Said::Rejected(Rejection::failed("x"))),
            codec::encode(&Join { secret: [1; 16] }),
        ]
    }

    /// Reads bytes as everything that they might be meant to be.
    fn read_as_all(bytes: &[u8]) {
        if let Ok(Gossiped::Advert(shown)) = Gossiped::decode(bytes) {
            shown.open(&Judge::new(SecretKey::from_bytes(&[2; 32]).public())).ok();
        }
        codec::decode::<Card>(bytes, CARD_BYTES_MAX).ok();
        codec::decode::<Call>(bytes, CALL_BYTES_MAX).ok();
        codec::decode::<Said>(bytes, SAID_BYTES_MAX).ok();
        codec::decode::<Join>(bytes, STRANGER_BYTES_MAX).ok();
        codec::decode::<Proof>(bytes, STRANGER_BYTES_MAX).ok();
    }

    #[test]
    fn an_advert_counts_if_its_node_signed_it_and_is_a_member() {
        let (key, mesh, other) =
            (SecretKey::from_bytes(&[1; 32]), SecretKey::from_bytes(&[2; 32]), SecretKey::from_bytes(&[3; 32]));
        let judge = Judge::new(mesh.public());
        let good = shown(&key, &mesh);
        assert_eq!(good.open(&judge).unwrap().advert.name, "node");
        let foreign = Shown { node: other.public(), ..good.clone() };
        assert!(foreign.open(&judge).is_err(), "passed off as another's");
        let forged = Shown { spoken: shown(&other, &mesh).spoken, ..good.clone() };
        assert!(forged.open(&judge).is_err(), "signed by another member");
        assert!(good.open(&Judge::new(other.public())).is_err(), "another mesh");
    }

    #[test]
    fn reading_for_others_is_bounded_together() {
        let budget = Budget::default();
        let all: Vec<_> = std::iter::from_fn(|| budget.step().ok()).collect();
        assert_eq!(all.len() * STEP_BYTES, BUDGET_BYTES);
        assert!(matches!(budget.step(), Err(WireError::NoRoom)));
        drop(all);
        assert!(budget.step().is_ok());
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(3000))]
        #[test]
        fn bent_messages_are_read_or_refused(
            which in 0usize..9,
            bends in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6),
            cut in any::<prop::sample::Index>(),
        ) {
            let mut bytes = messages().swap_remove(which);
            for (at, byte) in bends {
                let at = at.index(bytes.len());
                bytes[at] = byte;
            }
            read_as_all(&bytes);
            read_as_all(&bytes[..cut.index(bytes.len() + 1)]);
        }
    }
}
