use std::time::Instant;

use iroh::EndpointId;
use mesh_peers::advert::Loss;

use super::*;
use crate::{
    adverts::Gossiped,
    link::Parting,
    node::node_id,
    trust::{Revocations, Signed},
};

const SOON: Duration = Duration::from_secs(10);

fn options(root: &tempfile::TempDir, name: &str) -> Options {
    Options {
        home: Home::at(root.path().join(name)),
        name: name.into(),
        listen: SocketAddr::from(([127, 0, 0, 1], 0)),
        mdns: false,
        relays: Vec::new(),
        policy: Policy::default(),
    }
}

/// Two nodes that have a connection and know one another.
async fn two(root: &tempfile::TempDir) -> [Arc<Mesh>; 2] {
    options(root, "one").home.create("home").unwrap();
    let one = Mesh::start(options(root, "one"), None).await.unwrap();
    let ticket = options(root, "one").home.invite(one.address(), Duration::from_secs(600), true).unwrap();
    let two = Mesh::start(options(root, "two"), Some(&ticket)).await.unwrap();
    let both = [one, two];
    let [a, b] = [0, 1].map(|at| both[at].node.id);
    eventually("they know one another", || routes(&both[0], b) && routes(&both[1], a)).await;
    both
}

fn routes(mesh: &Mesh, to: EndpointId) -> bool {
    mesh.node.state().links.contains_key(&to) && mesh.node.state().directory.is_routable(&node_id(to), mesh.node.now())
}

async fn eventually(what: &str, mut done: impl FnMut() -> bool) {
    let deadline = Instant::now() + SOON;
    while !done() {
        assert!(Instant::now() < deadline, "not within {SOON:?}: {what}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn news_goes_over_connections_without_gossip() {
    let root = tempfile::tempdir().unwrap();
    let [one, two] = two(&root).await;
    let key = options(&root, "one").home.mesh_key().unwrap().unwrap();
    let list = Revocations { mesh: key.public(), serial: 7, nodes: [SecretKey::generate().public()].into() };
    // The first has not taken it in itself, so that it comes by no other way.
    one.node.tell(&Gossiped::Revocations(Signed::new(&key, &list)));
    eventually("told", || two.node.state().judge.revoked().is_some_and(|list| list.serial == 7)).await;
    assert!(one.node.state().judge.revoked().is_none());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_connection_that_is_given_up_is_no_loss_and_one_that_ends_is() {
    for (why, lost) in [(Parting::Unneeded, false), (Parting::Greedy, true)] {
        let root = tempfile::tempdir().unwrap();
        let [one, two] = two(&root).await;
        let (node, id) = (&one.node, two.node.id);
        // Nobody shall connect anew while it is looked.
        two.node.state().reach.forget(node_id(node.id));
        let link = {
            let mut state = node.state();
            state.reach.forget(node_id(id));
            state.directory.closed(node_id(id));
            state.links.remove(&id).unwrap()
        };
        why.close(&link.connection);
        eventually("it ends there, too", || !two.node.state().links.contains_key(&node.id)).await;
        let (state, now) = (two.node.state(), two.node.now());
        assert_eq!(state.directory.is_routable(&node_id(node.id), now), !lost, "{why:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn who_is_said_to_be_lost_says_that_it_is_not() {
    let root = tempfile::tempdir().unwrap();
    let [one, two] = two(&root).await;
    let said = || one.node.state().own.as_ref().map_or(0, |own| own.sequence);
    let (node, incarnation) = (node_id(one.node.id), one.node.incarnation);
    let began = Instant::now();
    for _ in 0..5 {
        let sequence = said();
        two.node.tell(&Gossiped::Loss(Loss { node, incarnation, sequence }));
        eventually("it speaks", || said() > sequence).await;
    }
    assert!(began.elapsed() < mesh_peers::heartbeat(2) * 4, "it speaks no sooner than it would have anyhow");
}
