//! Simulates meshes of several sizes and prints what they cost and how soon they know. `simulate [NODES]...`

#[path = "../tests/simulation/measure.rs"]
mod measure;
#[path = "../tests/simulation/peer.rs"]
mod peer;
#[path = "../tests/simulation/traffic.rs"]
mod traffic;
#[path = "../tests/simulation/world.rs"]
mod world;

use std::time::Duration;

use measure::{convergence, steady};
use world::Setup;

fn main() {
    let sizes: Vec<usize> = std::env::args().skip(1).filter_map(|size| size.parse().ok()).collect();
    let sizes = if sizes.is_empty() { vec![10, 100, 1000] } else { sizes };
    for nodes in sizes {
        let setup = Setup::usual(nodes, 1);
        // The fewer nodes there are, the longer it takes until something has happened often enough.
        let counted = Duration::from_secs((60_000 / nodes as u64).clamp(100, 6000));
        let began = std::time::Instant::now();
        let steady = steady(setup, Duration::from_secs(20), counted);
        let outcome = &steady.outcome;
        println!(
            "{nodes} nodes, {} s, 10 % churn a minute ({:.0} s of work)",
            counted.as_secs(),
            began.elapsed().as_secs_f64()
        );
        println!("  {:.3} % of {} at the first try; {outcome:?}", 100.0 * outcome.first_try_part(), outcome.requests());
        let traffic = &steady.traffic;
        for (what, sent) in [
            ("adverts", traffic.adverts),
            ("control", traffic.control),
            ("pulses", traffic.pulses),
            ("snapshots", traffic.snapshots),
            ("all", steady.all()),
        ] {
            let (messages, bytes) = steady.rate(sent);
            println!("  {what:9} {messages:8.1} messages, {:8.1} kB a node and second", bytes / 1e3);
        }
        println!("  {:?}", convergence(nodes, 1));
    }
}
