//! Which models stay in memory. Pure.

use std::{cmp::Reverse, time::Duration};

use mesh_core::{ModelProfile, Offer};

/// What a model wants to hold, in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Need {
    /// Its weights, without which there is no model.
    pub weights_bytes: u64,
    /// What it works with: the cache of one full context above all. With less of it, a model serves shorter contexts.
    pub cache_bytes: u64,
}

impl Need {
    /// What an offer comes to, or `share_bytes` where the user says what the model shall have.
    pub fn of(profile: &ModelProfile, offer: &Offer, share_bytes: Option<u64>) -> Self {
        let stored = profile.weight_bytes.value;
        // Where nobody can tell what a cache takes, there is to be as much again.
        let whole = share_bytes.or(offer.memory_bytes).unwrap_or(stored.saturating_mul(2));
        // Whatever share a model was given, it does not do with less than its weights.
        let weights_bytes = if share_bytes.is_some() { stored } else { stored.min(whole) };
        Self { weights_bytes, cache_bytes: whole.saturating_sub(weights_bytes) }
    }

    /// Both together.
    pub fn bytes(self) -> u64 {
        self.weights_bytes.saturating_add(self.cache_bytes)
    }
}

/// What a model that holds memory is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Activity {
    /// It is being loaded, and has requests to serve once it is.
    Loading,
    /// It serves.
    Ready {
        /// Requests in flight.
        requests: usize,
        /// How long ago the last one came or went.
        unused: Duration,
    },
    /// It takes no more requests, and will give back what it holds.
    Leaving,
}

/// A model that holds memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Resident<K> {
    /// Which one.
    pub key: K,
    /// What it holds.
    pub bytes: u64,
    /// Whether it stays whatever comes.
    pub pinned: bool,
    /// What it is doing.
    pub activity: Activity,
}

/// What to do about a model that is to be loaded.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Decision<K> {
    /// It may hold this many bytes, now.
    Load {
        /// All it needs, or what there is for a shorter cache.
        bytes: u64,
    },
    /// These have to go first. Idle ones go at once, busy ones once they have answered.
    Evict {
        /// Least recently used first, idle ones before busy ones.
        victims: Vec<K>,
    },
    /// Room is on its way: a model leaves, or is about to be loaded and can leave after that.
    Wait,
    /// Not even its weights fit beside what is pinned.
    Never {
        /// What pinned models hold.
        pinned_bytes: u64,
    },
}

/// Decides whether a model that needs `need` may be loaded beside `residents`, when all may hold `budget_bytes`.
pub fn decide<K: Copy>(need: Need, budget_bytes: u64, residents: &[Resident<K>]) -> Decision<K> {
    let sum = |which: &dyn Fn(&Resident<K>) -> bool| {
        residents.iter().filter(|resident| which(resident)).fold(0u64, |sum, one| sum.saturating_add(one.bytes))
    };
    let leaving = |resident: &Resident<K>| resident.activity == Activity::Leaving;
    let pinned_bytes = sum(&|resident| resident.pinned && !leaving(resident));
    let most = budget_bytes.saturating_sub(pinned_bytes);
    if need.weights_bytes > most {
        return Decision::Never { pinned_bytes };
    }
    let bytes = need.bytes().min(most);
    let lacking = sum(&|_| true).saturating_add(bytes).saturating_sub(budget_bytes);
    if lacking == 0 {
        return Decision::Load { bytes };
    }
    let lacking = lacking.saturating_sub(sum(&leaving));
    if lacking == 0 {
        return Decision::Wait;
    }
    let mut able: Vec<_> = residents
        .iter()
        .filter(|resident| !resident.pinned)
        .filter_map(|resident| match resident.activity {
            Activity::Ready { requests, unused } => Some((requests > 0, Reverse(unused), resident)),
            Activity::Loading | Activity::Leaving => None,
        })
        .collect();
    able.sort_by_key(|(busy, unused, _)| (*busy, *unused));
    match enough(able.into_iter().map(|(.., resident)| resident).collect(), lacking) {
        Some(victims) => Decision::Evict { victims },
        // The rest is held by models that are being loaded. Nobody goes before it is known whom that helps.
        None => Decision::Wait,
    }
}

/// The first of `able` that hold `lacking` bytes together, without those that the later ones make needless.
fn enough<K: Copy>(able: Vec<&Resident<K>>, lacking: u64) -> Option<Vec<K>> {
    let mut chosen = Vec::new();
    let mut freed = 0u64;
    for resident in able {
        if freed >= lacking {
            break;
        }
        freed = freed.saturating_add(resident.bytes);
        chosen.push(resident);
    }
    if freed < lacking {
        return None;
    }
    // From the end: who was used last, or is busy, is spared first.
    for at in (0..chosen.len()).rev() {
        if freed - chosen[at].bytes >= lacking {
            freed -= chosen.remove(at).bytes;
        }
    }
    Some(chosen.into_iter().map(|resident| resident.key).collect())
}

#[cfg(test)]
mod tests {
    use mesh_core::{Capabilities, Device, DeviceKind, Fact, OutputForm, PromptForm, Source, WeightFormat};
    use proptest::prelude::*;

    use super::*;

    fn need(weights_bytes: u64) -> Need {
        Need { weights_bytes, cache_bytes: 0 }
    }

    fn idle(key: char, bytes: u64, seconds: u64) -> Resident<char> {
        busy(key, bytes, seconds, 0)
    }

    fn busy(key: char, bytes: u64, seconds: u64, requests: usize) -> Resident<char> {
        let activity = Activity::Ready { requests, unused: Duration::from_secs(seconds) };
        Resident { key, bytes, pinned: false, activity }
    }

    fn pinned(resident: Resident<char>) -> Resident<char> {
        Resident { pinned: true, ..resident }
    }

    fn being(key: char, bytes: u64, activity: Activity) -> Resident<char> {
        Resident { key, bytes, pinned: false, activity }
    }

    fn evict(victims: &[char]) -> Decision<char> {
        Decision::Evict { victims: victims.to_vec() }
    }

    #[test]
    fn the_least_recently_used_goes_first() {
        let residents = [idle('a', 4, 10), idle('b', 4, 300), idle('c', 2, 20)];
        assert_eq!(decide(need(0), 10, &residents), Decision::Load { bytes: 0 });
        assert_eq!(decide(need(4), 10, &residents), evict(&['b']));
        assert_eq!(decide(need(6), 10, &residents), evict(&['b', 'c']));
        assert_eq!(decide(need(10), 10, &residents), evict(&['b', 'c', 'a']));
    }

    #[test]
    fn idle_ones_go_before_busy_ones_and_nobody_goes_for_nothing() {
        let residents = [busy('a', 5, 900, 1), idle('b', 5, 1)];
        assert_eq!(decide(need(5), 10, &residents), evict(&['b']));
        assert_eq!(decide(need(6), 10, &residents), evict(&['b', 'a']));
        // b alone, which is larger, makes room enough.
        assert_eq!(decide(need(5), 6, &[idle('a', 1, 900), idle('b', 5, 1)]), evict(&['b']));
    }

    #[test]
    fn room_that_is_on_its_way_is_waited_for() {
        let leaving = being('a', 6, Activity::Leaving);
        assert_eq!(decide(need(6), 10, &[leaving, idle('b', 4, 1)]), Decision::Wait);
        assert_eq!(decide(need(7), 10, &[leaving, idle('b', 4, 1)]), evict(&['b']));
        let loading = being('a', 6, Activity::Loading);
        assert_eq!(decide(need(4), 10, &[loading, idle('b', 4, 1)]), evict(&['b']));
        assert_eq!(decide(need(6), 10, &[loading, idle('b', 4, 1)]), Decision::Wait);
    }

    #[test]
    fn what_is_pinned_stays_and_is_named_where_it_is_in_the_way() {
        let residents = [pinned(idle('a', 6, 900)), idle('b', 4, 1)];
        assert_eq!(decide(need(4), 10, &residents), evict(&['b']));
        assert_eq!(decide(need(5), 10, &residents), Decision::Never { pinned_bytes: 6 });
        assert_eq!(decide(need(11), 10, &[] as &[Resident<char>]), Decision::Never { pinned_bytes: 0 });
    }

    #[test]
    fn a_cache_takes_what_there_is() {
        let need = Need { weights_bytes: 4, cache_bytes: 100 };
        assert_eq!(decide(need, 10, &[] as &[Resident<char>]), Decision::Load { bytes: 10 });
        assert_eq!(decide(need, 10, &[pinned(idle('a', 3, 1))]), Decision::Load { bytes: 7 });
        assert_eq!(decide(need, 10, &[idle('a', 3, 1)]), evict(&['a']));
    }

    #[test]
    fn a_need_is_what_was_offered_or_what_the_user_says() {
        let format = Fact::new(WeightFormat::Gguf, Source::file("m.gguf"));
        let profile = ModelProfile::of_files("m".into(), "".into(), vec![], format, 10);
        let need = |offered, share| {
            let capabilities = Capabilities {
                prompt: PromptForm::Text,
                output: OutputForm::Text,
                knobs: Default::default(),
                context_tokens_max: 1,
                requests_parallel_max: 1,
                requests_queued_max: 1,
                prefix_reuse: false,
                embeddings: false,
                vision: false,
            };
            let device = Device { kind: DeviceKind::Cpu, name: "".into(), memory_bytes: None };
            let offer = Offer { capabilities, device, memory_bytes: offered, score: 1, reasons: vec![] };
            let need = Need::of(&profile, &offer, share);
            (need.weights_bytes, need.cache_bytes)
        };
        assert_eq!(need(Some(25), None), (10, 15));
        assert_eq!(need(None, None), (10, 10), "where nobody can tell, there is as much again");
        assert_eq!(need(Some(25), Some(18)), (10, 8));
        assert_eq!(need(Some(25), Some(8)), (10, 0), "a share that is too small does not make weights smaller");
        assert_eq!(need(Some(8), None), (8, 0), "weights may be smaller in memory than on disk");
    }

    fn resident() -> impl Strategy<Value = Resident<usize>> {
        let activity = prop_oneof![
            Just(Activity::Loading),
            Just(Activity::Leaving),
            (0usize..3, 0u64..100)
                .prop_map(|(requests, unused)| Activity::Ready { requests, unused: Duration::from_secs(unused) }),
        ];
        (0u64..50, any::<bool>(), activity).prop_map(|(bytes, pinned, activity)| Resident {
            key: 0,
            bytes,
            pinned,
            activity,
        })
    }

    fn residents() -> impl Strategy<Value = Vec<Resident<usize>>> {
        proptest::collection::vec(resident(), 0..8).prop_map(|mut residents| {
            residents.iter_mut().enumerate().for_each(|(key, resident)| resident.key = key);
            residents
        })
    }

    fn held<'a>(residents: impl IntoIterator<Item = &'a Resident<usize>>) -> u64 {
        residents.into_iter().map(|resident| resident.bytes).sum()
    }

    proptest! {
        #[test]
        fn a_decision_keeps_its_promises(
            residents in residents(), weights_bytes in 0u64..120, cache_bytes in 0u64..120, budget in 0u64..200,
        ) {
            let need = Need { weights_bytes, cache_bytes };
            let stays = |resident: &&Resident<usize>| resident.pinned && resident.activity != Activity::Leaving;
            let pinned = held(residents.iter().filter(stays));
            match decide(need, budget, &residents) {
                Decision::Load { bytes } => {
                    prop_assert!(held(&residents) + bytes <= budget, "overcommitted");
                    prop_assert!(bytes >= weights_bytes && bytes <= need.bytes());
                }
                Decision::Never { pinned_bytes } => {
                    prop_assert_eq!(pinned_bytes, pinned);
                    prop_assert!(weights_bytes + pinned > budget);
                }
                // Whoever waits, waits for somebody.
                Decision::Wait => prop_assert!(residents.iter().any(
                    |resident| matches!(resident.activity, Activity::Loading | Activity::Leaving)
                )),
                Decision::Evict { victims } => {
                    prop_assert!(!victims.is_empty());
                    let bytes = need.bytes().min(budget - pinned);
                    let leaves = |resident: &Resident<usize>| resident.activity == Activity::Leaving;
                    let rest_without = |spared: Option<usize>| held(residents.iter().filter(|resident| {
                        !leaves(resident) && (!victims.contains(&resident.key) || spared == Some(resident.key))
                    }));
                    prop_assert!(rest_without(None) + bytes <= budget, "it does not fit after all");
                    for &key in &victims {
                        let Activity::Ready { requests, unused } = residents[key].activity else {
                            return Err(TestCaseError::fail("only who is ready can be asked to go"));
                        };
                        prop_assert!(!residents[key].pinned);
                        prop_assert!(rest_without(Some(key)) + bytes > budget, "{} went for nothing", key);
                        // A busy one goes only if all idle ones together are too small.
                        if requests > 0 {
                            let idle = |resident: &&Resident<usize>| !resident.pinned
                                && matches!(resident.activity, Activity::Ready { requests: 0, .. });
                            let rest = held(&residents) - held(residents.iter().filter(|one| leaves(one)))
                                - held(residents.iter().filter(idle));
                            prop_assert!(rest + bytes > budget, "{} was busy", key);
                        }
                        // Nobody who is kept could have gone in the place of a more recently used one of the same size.
                        for other in residents.iter().filter(|other| !other.pinned && !victims.contains(&other.key)) {
                            if let Activity::Ready { requests: r, unused: u } = other.activity
                                && (r > 0) == (requests > 0) && other.bytes == residents[key].bytes
                            {
                                prop_assert!(u <= unused, "{} was used longer ago than {}", other.key, key);
                            }
                        }
                    }
                }
            }
        }
    }
}
