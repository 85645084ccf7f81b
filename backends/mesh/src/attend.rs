//! Everything that happens over a connection to a member: pulses and news both ways, and its requests.

use std::{sync::Arc, time::Duration};

use iroh::endpoint::RecvStream;
use tokio::time::{Instant, sleep_until, timeout};

use crate::{
    adverts::{GOSSIP_BYTES_MAX, Gossiped},
    link::{Link, Parting},
    node::Node,
    serving, tasks, wire,
};

/// How long a message may take to be read.
const MESSAGE_MAX: Duration = Duration::from_secs(5);

/// Attends to a connection until it ends.
pub fn attend(node: &Arc<Node>, link: Link) {
    let (node, tasks) = (node.clone(), node.tasks.clone());
    tasks.spawn(async move {
        let connection = &link.connection;
        let mut next = Instant::now();
        loop {
            tokio::select! {
                () = node.over.cancelled() => {
                    Parting::Leaving.close(connection);
                    break;
                }
                () = sleep_until(next) => next = Instant::now() + pulse(&node, &link),
                datagram = connection.read_datagram() => match datagram {
                    Ok(bytes) => node.hear_pulse(&link, &bytes),
                    Err(_) => break,
                },
                stream = connection.accept_uni() => match stream {
                    Ok(recv) => {
                        node.tasks.spawn(hear(node.clone(), recv));
                    }
                    Err(_) => break,
                },
                stream = connection.accept_bi() => match stream {
                    Ok((send, recv)) => {
                        node.tasks.spawn(serving::serve(node.clone(), link.clone(), send, recv));
                    }
                    Err(_) => break,
                },
            }
        }
        node.part(&link);
    });
}

/// Sends a pulse, and says when the next one is due.
fn pulse(node: &Node, link: &Link) -> Duration {
    let bytes_max = link.connection.max_datagram_size().unwrap_or_default();
    let (pulse, next) = node.pulse(link, bytes_max);
    if let Err(error) = link.connection.send_datagram(pulse) {
        tracing::debug!(node = %link.connection.remote_id().fmt_short(), %error, "a pulse is not sent");
    }
    next
}

/// Hears what is told over the connection, which is what gossip brings later.
async fn hear(node: Arc<Node>, mut recv: RecvStream) {
    let said = timeout(MESSAGE_MAX, wire::read::<Gossiped>(&mut recv, GOSSIP_BYTES_MAX, Some(&node.budget)));
    match said.await {
        Ok(Ok(Some(said))) => tasks::hear(&node, said),
        Ok(Ok(None)) => {}
        Ok(Err(error)) => tracing::debug!(%error, "a message that cannot be read"),
        Err(_) => tracing::debug!("a message that takes too long"),
    }
}
