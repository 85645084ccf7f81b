//! Connections between members: how they begin, and which of two is kept.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use iroh::{
    EndpointAddr, EndpointId,
    endpoint::{Connection, ConnectionError, VarInt},
};
use mesh_peers::cadence::PULSES_MISSED_MAX;
use tokio::time::{sleep, timeout};

use crate::{
    node::Node,
    trust::TrustError,
    wire::{self, Card, Proof, STRANGER_BYTES_MAX, Side, WireError},
};

/// How long a connection may take until both sides know each other.
pub const MEETING_MAX: Duration = Duration::from_secs(5);

/// A connection over which nothing came for so long is closed, and what was under way over it has failed. Whoever is not heard
/// counts as lost well before that.
pub const SILENCE_MAX: Duration = Duration::from_secs(2);

/// Why a connection was closed, in a word for programs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Parting {
    /// The other side did not prove that it is a member.
    Stranger = 1,
    /// There is another connection between the two.
    Duplicate = 2,
    /// This node goes.
    Leaving = 3,
    /// The other side was revoked.
    Revoked = 4,
    /// The other side asks for more than it may.
    Greedy = 5,
    /// This node opened the connection, and does not need it any more.
    Unneeded = 6,
    /// Nothing is heard of the other side.
    Silent = 7,
}

impl Parting {
    /// Closes a connection for this reason. Strangers are told nothing else.
    pub fn close(self, connection: &Connection) {
        connection.close(VarInt::from_u32(self as u32), b"");
    }

    /// Whether the other side closed it for this reason.
    pub fn ended(self, connection: &Connection) -> bool {
        let code = VarInt::from_u32(self as u32);
        matches!(connection.close_reason(), Some(ConnectionError::ApplicationClosed(close)) if close.error_code == code)
    }
}

/// Why two nodes did not come together.
#[derive(Debug, thiserror::Error)]
pub enum MeetError {
    /// It did not answer.
    #[error("it does not answer: {0}")]
    Unreached(String),
    /// It took too long.
    #[error("it did not introduce itself within {} s", MEETING_MAX.as_secs())]
    Slow,
    /// The connection broke.
    #[error(transparent)]
    Wire(#[from] WireError),
    /// It does not know the mesh's secret.
    #[error("it does not know the mesh's secret")]
    Stranger,
    /// It was revoked, or this node goes.
    #[error("the connection is not kept")]
    Gone,
    /// It is no member.
    #[error(transparent)]
    Trust(#[from] TrustError),
}

/// A connection to a member.
#[derive(Clone, Debug)]
pub struct Link {
    /// The connection.
    pub connection: Connection,
    /// Who opened it.
    pub dialler: EndpointId,
    /// When the other side was started, in milliseconds since 1970.
    pub incarnation: u64,
    opened: Instant,
    usage: Arc<Usage>,
}

/// What passes over a connection.
#[derive(Debug, Default)]
struct Usage {
    /// Requests, either way.
    now: AtomicUsize,
    /// When the last one ended, in milliseconds since the connection was opened.
    last_ms: AtomicU64,
    /// When the last pulse came, likewise.
    pulse_ms: AtomicU64,
    /// When the one after that should come, likewise.
    next_ms: AtomicU64,
}

/// A request that passes over a connection.
#[derive(Debug)]
pub struct Use {
    opened: Instant,
    usage: Arc<Usage>,
}

impl Drop for Use {
    fn drop(&mut self) {
        self.usage.last_ms.store(self.opened.elapsed().as_millis() as u64, Ordering::Relaxed);
        self.usage.now.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Link {
    /// Over a connection.
    pub fn new(connection: Connection, dialler: EndpointId, incarnation: u64) -> Self {
        Self { connection, dialler, incarnation, opened: Instant::now(), usage: Arc::default() }
    }

    /// Notes that a request passes over it, until that is dropped.
    pub fn used(&self) -> Use {
        self.usage.now.fetch_add(1, Ordering::Relaxed);
        Use { opened: self.opened, usage: self.usage.clone() }
    }

    /// Notes that a pulse came, and when the next one should.
    pub fn heard(&self, next: Duration) {
        let now = self.opened.elapsed();
        self.usage.pulse_ms.store(now.as_millis() as u64, Ordering::Relaxed);
        self.usage.next_ms.store((now + next).as_millis() as u64, Ordering::Relaxed);
    }

    /// Whether nothing was heard over it for as long as a connection lasts, and for as long as several pulses take.
    pub fn is_silent(&self) -> bool {
        let [last, next] = [&self.usage.pulse_ms, &self.usage.next_ms].map(|time| time.load(Ordering::Relaxed));
        let most = SILENCE_MAX.max(Duration::from_millis(next - last.min(next)) * PULSES_MISSED_MAX);
        self.opened.elapsed().saturating_sub(Duration::from_millis(last)) > most
    }

    /// Time since it was used, or opened. Zero while it is used.
    pub fn unused(&self) -> Duration {
        if self.usage.now.load(Ordering::Relaxed) > 0 {
            return Duration::ZERO;
        }
        let last = Duration::from_millis(self.usage.last_ms.load(Ordering::Relaxed));
        self.opened.elapsed().saturating_sub(last)
    }

    /// Closes it once nothing passes over it any more. The other side may not know yet that there is another one.
    pub async fn retire(self) {
        const GRACE: Duration = Duration::from_secs(2);
        loop {
            tokio::select! {
                _ = self.connection.closed() => return,
                () = sleep(GRACE) => {}
            }
            if self.usage.now.load(Ordering::Relaxed) == 0 {
                return Parting::Duplicate.close(&self.connection);
            }
        }
    }

    /// Whether it takes the place of another one to the same node. Both sides come to the same answer.
    pub fn replaces(&self, other: &Self) -> bool {
        if other.connection.close_reason().is_some() || self.incarnation > other.incarnation {
            return true;
        }
        self.incarnation == other.incarnation && self.dialler <= other.dialler
    }
}

/// Opens a connection to a node and makes acquaintance, unless there is one: whoever else tries the same is waited for. Two
/// connections that the same side opened at the same time might be kept by one side each.
pub async fn dial(node: &Arc<Node>, to: EndpointAddr) -> Result<Link, MeetError> {
    let unreached = |error: String| MeetError::Unreached(error);
    let turn = node.turn(to.id);
    let meeting = async {
        let _turn = turn.lock().await;
        let there = node.state().links.get(&to.id).filter(|link| link.connection.close_reason().is_none()).cloned();
        if let Some(link) = there {
            return Ok(link);
        }
        let connection =
            node.endpoint.connect(to, wire::ALPN).await.map_err(|error| unreached(format!("{error:#}")))?;
        match introduce(node, &connection).await {
            Ok(card) => node.meet(connection, node.id, card).ok_or(MeetError::Gone),
            Err(error) => {
                Parting::Stranger.close(&connection);
                Err(error)
            }
        }
    };
    timeout(MEETING_MAX, meeting).await.map_err(|_| MeetError::Slow)?
}

async fn introduce(node: &Arc<Node>, connection: &Connection) -> Result<Card, MeetError> {
    let ended = |error: iroh::endpoint::ConnectionError| WireError::Ended(error.to_string());
    let (mut send, mut recv) = connection.open_bi().await.map_err(ended)?;
    wire::write(&mut send, &Proof::of(&node.membership.secret, connection, Side::Dialler)?).await?;
    let theirs: Proof = wire::expect(&mut recv, STRANGER_BYTES_MAX).await?;
    if !theirs.is(&Proof::of(&node.membership.secret, connection, Side::Listener)?) {
        return Err(MeetError::Stranger);
    }
    wire::write(&mut send, &node.card(connection.remote_id(), None)).await?;
    let card: Card = wire::expect(&mut recv, wire::CARD_BYTES_MAX).await?;
    node.admit(connection.remote_id(), &card)?;
    send.finish().ok();
    Ok(card)
}

/// Takes a connection, and makes acquaintance before anything else is said.
pub async fn welcome(node: &Arc<Node>, connection: &Connection) -> Result<Link, MeetError> {
    let ended = |error: iroh::endpoint::ConnectionError| WireError::Ended(error.to_string());
    let meeting = async {
        let (mut send, mut recv) = connection.accept_bi().await.map_err(ended)?;
        let theirs: Proof = wire::expect(&mut recv, STRANGER_BYTES_MAX).await?;
        if !theirs.is(&Proof::of(&node.membership.secret, connection, Side::Dialler)?) {
            return Err(MeetError::Stranger);
        }
        wire::write(&mut send, &Proof::of(&node.membership.secret, connection, Side::Listener)?).await?;
        let card: Card = wire::expect(&mut recv, wire::CARD_BYTES_MAX).await?;
        node.admit(connection.remote_id(), &card)?;
        wire::write(&mut send, &node.card(connection.remote_id(), Some(&card))).await?;
        send.finish().ok();
        let dialler = connection.remote_id();
        node.meet(connection.clone(), dialler, card).ok_or(MeetError::Gone)
    };
    timeout(MEETING_MAX, meeting).await.map_err(|_| MeetError::Slow)?
}
