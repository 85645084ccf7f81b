//! What is measured of a world.

use std::time::Duration;

use crate::{
    traffic::Outcome,
    world::{Sent, Setup, Traffic, World},
};

/// How often it is looked whether everybody knows.
const LOOK: Duration = Duration::from_millis(50);

/// What happened in a while of ordinary life.
#[derive(Clone, Debug, PartialEq)]
pub struct Steady {
    pub outcome: Outcome,
    pub traffic: Traffic,
    pub node_seconds: f64,
}

impl Steady {
    /// Messages and bytes that a node sends in a second.
    pub fn rate(&self, sent: Sent) -> (f64, f64) {
        (sent.messages as f64 / self.node_seconds, sent.bytes as f64 / self.node_seconds)
    }

    pub fn all(&self) -> Sent {
        let Traffic { adverts, control, pulses, snapshots } = &self.traffic;
        let all = [adverts, control, pulses, snapshots];
        Sent { messages: all.iter().map(|sent| sent.messages).sum(), bytes: all.iter().map(|sent| sent.bytes).sum() }
    }
}

/// Lives for a while with everything that a setup has, and then counts for another.
pub fn steady(setup: Setup, before: Duration, counted: Duration) -> Steady {
    let mut world = World::new(setup);
    world.live();
    world.run(before);
    world.reset();
    world.run(counted);
    Steady { outcome: world.outcome, traffic: world.traffic, node_seconds: world.node_seconds }
}

/// Time until something holds; as much as `most` if it does not.
fn until(world: &mut World, most: Duration, holds: impl Fn(&World) -> bool) -> Duration {
    let start = world.now;
    while !holds(world) && world.now - start < most {
        world.run(LOOK);
    }
    world.now - start
}

/// How long it takes until something is known.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Convergence {
    /// Until half of all nodes route to one that joined, and until all do.
    pub join: [Duration; 2],
    /// Until one that joined can route to all others.
    pub joiner: Duration,
    /// Until half of all nodes do not route to one that crashed any more, and until none does.
    pub crash: [Duration; 2],
    /// The same of one that left.
    pub leave: [Duration; 2],
    /// Until nobody routes to the other half of a divided mesh, and until all route to all when it is whole again.
    pub partition: [Duration; 2],
}

/// Does one thing after the other to a mesh in which nothing else happens.
pub fn convergence(nodes: usize, seed: u64) -> Convergence {
    let setup =
        Setup { churn_per_minute: 0.0, requests_per_s: 0.0, swaps_per_minute: 0.0, ..Setup::usual(nodes, seed) };
    let mut world = World::new(setup);
    let most = Duration::from_secs(400);
    world.run(Duration::from_secs(5));

    let new = world.join();
    let half = until(&mut world, most, |world| world.knowing(new).0 * 2 >= world.knowing(new).1);
    let all = half + until(&mut world, most, |world| world.knowing(new).0 == world.knowing(new).1);
    let joiner = all + until(&mut world, most, |world| world.known(new).0 == world.known(new).1);

    world.run(Duration::from_secs(5));
    let gone = |world: &mut World, node: usize| {
        let half = until(world, most, |world| world.knowing(node).0 * 2 <= world.knowing(node).1);
        [half, half + until(world, most, |world| world.knowing(node).0 == 0)]
    };
    let one = world.any_living().expect("there are some");
    world.die(one);
    let crash = gone(&mut world, one);
    let one = world.any_living().expect("there are some");
    world.leave(one);
    let leave = gone(&mut world, one);

    world.run(Duration::from_secs(5));
    world.divide(true);
    let across = |world: &World, wanted: bool| {
        let living = world.living();
        living.iter().all(|from| {
            let others = living.iter().filter(|to| world.peers[**to].side != world.peers[*from].side);
            others.into_iter().all(|to| world.routes(*from, *to) == wanted)
        })
    };
    let apart = until(&mut world, most, |world| across(world, false));
    world.run(Duration::from_secs(30));
    world.divide(false);
    let together = until(&mut world, most, |world| across(world, true));
    Convergence { join: [half, all], joiner, crash, leave, partition: [apart, together] }
}
