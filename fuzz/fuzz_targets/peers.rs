#![no_main]
//! What nodes of a mesh tell one another.

use std::time::Duration;

use libfuzzer_sys::fuzz_target;
use mesh_peers::{
    Bounds, Directory, NodeId,
    advert::{Advert, News, OFFERS_MAX, Pulse, Snapshot},
};

fuzz_target!(|content: &[u8]| {
    let now = Duration::from_secs(1);
    let mut directory = Directory::new(NodeId([0; 32]), Bounds::default());
    if let Ok(advert) = Advert::decode(content) {
        assert!(advert.offers.len() <= OFFERS_MAX);
        assert_eq!(Advert::decode(&advert.encode()), Ok(advert.clone()));
        let node = advert.node;
        directory.hear(advert, now);
        for model in directory.models(now) {
            assert!(directory.offers(&model.name, now).iter().all(|candidate| candidate.node == node));
        }
    }
    if let Ok(pulse) = Pulse::decode(content) {
        assert_eq!(Pulse::decode(&pulse.encode()), Ok(pulse.clone()));
        directory.pulse(NodeId([7; 32]), &pulse, None, now);
    }
    if let Ok(News::Loss(loss)) = News::decode(content) {
        directory.report(&loss, now);
    }
    if let Ok(snapshot) = Snapshot::decode(content) {
        for held in snapshot.held {
            directory.hear_aged(held.advert, Duration::from_millis(held.age_ms.into()), now);
        }
    }
});
