//! Many nodes, simulated: iroh-gossip's own state machine and this crate's decisions over a network that is made up, in time
//! that is made up too. `cargo run --release -p mesh-peers --example simulate` prints more of it.

mod measure;
mod peer;
mod traffic;
mod world;

use std::time::Duration;

use measure::{convergence, steady};
use world::Setup;

const S: Duration = Duration::from_secs(1);

#[test]
fn one_seed_is_one_course_of_events() {
    let [one, other] = [0, 1].map(|_| steady(Setup::usual(30, 1), S, 20 * S));
    assert_eq!(one, other);
    assert_ne!(one, steady(Setup::usual(30, 2), S, 20 * S));
}

#[test]
fn a_thousand_nodes_come_and_go_and_requests_go_to_living_ones() {
    // Many requests in little time, so that they are enough to count.
    let setup = Setup { requests_per_s: 1000.0, answer: S / 2, ..Setup::usual(1000, 1) };
    let steady = steady(setup, 2 * S, 15 * S);
    let outcome = &steady.outcome;
    assert!(outcome.requests() > 9_000, "{outcome:?}");
    assert!(outcome.first_try_part() >= 0.999, "{} {outcome:?}", outcome.first_try_part());
    // Conversations stay where their prefixes are.
    assert!(outcome.turns[1] as f64 >= 0.95 * outcome.turns[0] as f64, "{outcome:?}");
    // 20 heartbeats a second reach everybody, and changes do.
    let (messages, bytes) = steady.rate(steady.all());
    assert!(messages < 300.0 && bytes < 150e3, "{messages} messages, {bytes} bytes a node and second");
}

#[test]
fn everybody_soon_knows() {
    for nodes in [10, 100] {
        let found = convergence(nodes, 1);
        assert!(found.join[1] < 2 * S && found.joiner < S, "{found:?}");
        assert!(found.crash[1] < 3 * S && found.leave[1] < 2 * S, "{found:?}");
        assert!(found.partition[0] < 20 * S && found.partition[1] < 10 * S, "{found:?}");
    }
}
