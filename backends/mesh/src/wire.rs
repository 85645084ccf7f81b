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
    let body = codec::encode(value);
    let length =
        u32::try_from(body.len()).map_err(|_| WireError::TooLarge { bytes: body.len(), max: u32::MAX as usize })?;
    // One write: a frame that fits leaves in one packet.
    let frame = [&length.to_be_bytes()[..], &body].concat();
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
