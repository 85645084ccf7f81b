use ciborium::{Value, cbor};
use mesh_core::{Knob, WeightFormat};
use proptest::{collection::vec, option, prelude::*};

use super::*;
use crate::samples;

fn any_load() -> impl Strategy<Value = Load> {
    let speed = || option::of(0.1..1e6_f32);
    (any::<u32>(), any::<u32>(), speed(), speed()).prop_map(|(running, waiting, prefill_per_s, decode_per_s)| Load {
        running,
        waiting,
        prefill_per_s,
        decode_per_s,
    })
}

fn any_advert() -> impl Strategy<Value = Advert> {
    let offer = (option::of("[a-z/]{1,40}"), any::<bool>(), any_load(), option::of(any::<u64>()));
    let head = ("[a-zé -]{1,20}", any::<[u8; 32]>(), any::<u64>(), any::<u64>(), 1..300_000_u32, any::<bool>());
    (head, vec(offer, 0..20)).prop_map(|((name, node, incarnation, sequence, lease_ms, leaving), offers)| Advert {
        version: VERSION,
        node: NodeId(node),
        name,
        incarnation,
        sequence,
        lease_ms,
        leaving,
        offers: offers
            .into_iter()
            .enumerate()
            .map(|(index, (reference, tools, load, parameters))| {
                let mut offer = samples::offer(&format!("model-{index}"));
                let changed = Arc::make_mut(&mut offer);
                changed.capabilities.knobs.extend([Knob::TopK, Knob::Dry]);
                (changed.reference, changed.tools, changed.load, changed.parameters) =
                    (reference, tools, load, parameters);
                changed.format = tools.then_some(WeightFormat::Gguf);
                offer
            })
            .collect(),
    })
}

fn sample() -> Advert {
    Advert {
        version: VERSION,
        node: NodeId([7; 32]),
        name: "desk".to_owned(),
        incarnation: 1_700_000_000_000,
        sequence: 3,
        lease_ms: 5000,
        leaving: false,
        offers: vec![samples::offer("a"), samples::offer("b")],
    }
}

/// The sample as a tree, changed, as bytes.
fn changed(change: impl FnOnce(&mut Vec<(Value, Value)>)) -> Vec<u8> {
    let mut tree: Value = ciborium::from_reader(&sample().encode()[..]).unwrap();
    change(tree.as_map_mut().unwrap());
    encode(&tree)
}

fn set(map: &mut [(Value, Value)], key: &str, value: impl Into<Value>) {
    map.iter_mut().find(|(known, _)| known.as_text() == Some(key)).unwrap().1 = value.into();
}

fn offers(map: &mut [(Value, Value)]) -> &mut Vec<Value> {
    map.iter_mut().find(|(key, _)| key.as_text() == Some("offers")).unwrap().1.as_array_mut().unwrap()
}

proptest! {
    #[test]
    fn what_is_written_is_read(advert in any_advert(), loads in vec((any::<u16>(), any_load()), 0..OFFERS_MAX)) {
        prop_assert_eq!(&Advert::decode(&advert.encode()).unwrap(), &advert);
        let news = News::Advert(advert.clone());
        prop_assert_eq!(News::decode(&news.encode()).unwrap(), news);
        let loss = News::Loss(Loss { node: advert.node, incarnation: advert.incarnation, sequence: advert.sequence });
        prop_assert_eq!(News::decode(&loss.encode()).unwrap(), loss);
        let pulse = Pulse { incarnation: advert.incarnation, sequence: advert.sequence, next_ms: 250, loads };
        prop_assert_eq!(Pulse::decode(&pulse.encode()).unwrap(), pulse);
        let snapshot = Snapshot { held: vec![Held { age_ms: 12, advert: Arc::new(advert) }] };
        prop_assert_eq!(Snapshot::decode(&snapshot.encode()).unwrap(), snapshot);
    }

    #[test]
    fn any_bytes_are_refused_or_within_bounds(bytes in vec(any::<u8>(), 0..300)) {
        survives(&bytes);
    }

    #[test]
    fn no_cut_is_taken_for_the_whole(advert in any_advert(), cut in any::<prop::sample::Index>()) {
        let bytes = advert.encode();
        prop_assert!(Advert::decode(&bytes[..cut.index(bytes.len())]).is_err());
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(5000))]

    #[test]
    fn mutated_messages_are_refused_or_within_bounds(
        advert in any_advert(),
        changes in vec((any::<prop::sample::Index>(), any::<u8>()), 1..8),
        cut in any::<prop::sample::Index>(),
        place in any::<prop::sample::Index>(),
    ) {
        let mut bytes = advert.encode();
        for (index, byte) in changes {
            let index = index.index(bytes.len());
            bytes[index] = byte;
        }
        survives(&bytes);
        // A part of it once more, in the middle.
        let part = bytes[cut.index(bytes.len())..].to_vec();
        let place = place.index(bytes.len());
        bytes.splice(place..place, part);
        survives(&bytes);
    }
}

fn survives(bytes: &[u8]) {
    if let Ok(advert) = Advert::decode(bytes) {
        assert!(advert.check().is_ok() && advert.offers.len() <= OFFERS_MAX);
        assert_eq!(Advert::decode(&advert.encode()), Ok(advert));
    }
    if let Ok(pulse) = Pulse::decode(bytes) {
        assert_eq!(Pulse::decode(&pulse.encode()), Ok(pulse));
    }
    if let Err(AdvertError::Malformed(complaint)) = News::decode(bytes) {
        assert!(complaint.len() <= 1000);
    }
    _ = Snapshot::decode(bytes);
}

#[test]
fn what_is_not_known_is_passed_over() {
    let bytes = changed(|map| {
        map.insert(0, (Value::from("colour"), cbor!({ "of" => ["the", { "sky" => 1.5 }] }).unwrap()));
        let offer = offers(map)[1].as_map_mut().unwrap();
        offer.push((Value::from("adapters"), cbor!(["lora"]).unwrap()));
        let capabilities = offer.iter_mut().find(|(key, _)| key.as_text() == Some("capabilities")).unwrap();
        set(capabilities.1.as_map_mut().unwrap(), "knobs", cbor!(["top_k", "tomorrows", "seed"]).unwrap());
    });
    let advert = Advert::decode(&bytes).unwrap();
    let mut expected = sample();
    Arc::make_mut(&mut expected.offers[1]).capabilities.knobs.extend([Knob::TopK, Knob::Seed]);
    assert_eq!(advert, expected);
    let pulse =
        Pulse::decode(&encode(&cbor!({ "incarnation" => 1, "sequence" => 2, "mood" => null }).unwrap())).unwrap();
    assert_eq!(pulse, Pulse { incarnation: 1, sequence: 2, next_ms: 1000, loads: Vec::new() });
}

#[test]
fn what_is_over_a_bound_is_refused_by_name() {
    let refused = |what: &str, bytes: Vec<u8>| {
        let error = Advert::decode(&bytes).unwrap_err().to_string();
        assert!(error.contains(what), "{what}: {error}");
    };
    refused("version 2", changed(|map| set(map, "version", 2)));
    refused("lease in milliseconds: 300001, over 300000", changed(|map| set(map, "lease_ms", 300_001)));
    refused("the lease is none", changed(|map| set(map, "lease_ms", 0)));
    refused("the node's name: 65, over 64", changed(|map| set(map, "name", "n".repeat(65))));
    refused("the node's name is empty", changed(|map| set(map, "name", "")));
    refused("not all printable", changed(|map| set(map, "name", "\u{1b}[2J")));
    refused("at most 64", changed(|map| *offers(map) = vec![offers(map)[0].clone(); 65]));
    refused("there twice", changed(|map| *offers(map) = vec![offers(map)[0].clone(); 2]));
    refused(
        "a model's name: 257, over 256",
        changed(|map| {
            set(offers(map)[0].as_map_mut().unwrap(), "name", "n".repeat(257));
        }),
    );
    refused(
        "a speed is no number above zero",
        changed(|map| {
            set(offers(map)[0].as_map_mut().unwrap(), "load", cbor!({ "decode_per_s" => -1.0 }).unwrap());
        }),
    );
    refused("bytes, over 32768", changed(|map| map.push((Value::from("pad"), Value::Bytes(vec![0; 32 << 10])))));
    let deep = |depth| {
        changed(|map| {
            map.push((Value::from("deep"), (0..depth).fold(Value::Null, |inner, _| Value::Array(vec![inner]))))
        })
    };
    assert_eq!(Advert::decode(&deep(10)), Ok(sample()));
    refused("nested deeper", deep(17));
    refused("1 bytes after its end", [sample().encode(), vec![0]].concat());
    let pulse = Pulse { incarnation: 1, sequence: 1, next_ms: 10_001, loads: Vec::new() };
    assert!(Pulse::decode(&pulse.encode()).unwrap_err().to_string().contains("10001, over 10000"));
}

#[test]
fn snapshots_are_cut_where_they_would_be_too_long() {
    let all: Vec<Held> = (0..2000_u32)
        .map(|index| {
            let mut advert = sample();
            advert.node.0[..4].copy_from_slice(&index.to_le_bytes());
            Held { age_ms: 0, advert: Arc::new(advert) }
        })
        .collect();
    let snapshots = Snapshot::several(all.clone());
    assert!(snapshots.len() > 2);
    let read = snapshots.iter().flat_map(|snapshot| Snapshot::decode(&snapshot.encode()).unwrap().held);
    assert!(read.eq(all));
}

#[test]
fn a_pulse_of_many_models_fits_all_the_same() {
    let busy = Load { running: 3, waiting: 70_000, prefill_per_s: Some(0.1), decode_per_s: Some(20.5) };
    let loads: Vec<_> = (0..OFFERS_MAX as u16).map(|place| (place, busy)).collect();
    let pulse = Pulse { incarnation: u64::MAX, sequence: 1 << 40, next_ms: 250, loads };
    assert_eq!(pulse.encode_within(MESSAGE_BYTES_MAX, 3), pulse.encode());
    let mut seen = BTreeSet::new();
    for from in 0..OFFERS_MAX {
        let bytes = pulse.encode_within(1100, from);
        assert!(bytes.len() <= 1100);
        let some = Pulse::decode(&bytes).unwrap();
        assert!(some.loads.len() > 5 && some.loads.len() < OFFERS_MAX, "{}", some.loads.len());
        seen.extend(some.loads.iter().map(|(place, _)| *place));
    }
    assert_eq!(seen.len(), OFFERS_MAX, "each has its turn");
    assert_eq!(Pulse::decode(&pulse.encode_within(10, 0)).unwrap().loads, []);
}
