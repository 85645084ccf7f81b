//! Who waits for a place, in order, and how long that takes. Values only: no clock, no lock, no task.

use std::{collections::VecDeque, time::Duration};

/// Shortest wait that a client is told.
pub const RETRY_AFTER_MIN: Duration = Duration::from_secs(1);
/// Longest wait that a client is told.
pub const RETRY_AFTER_MAX: Duration = Duration::from_secs(60);
/// What a client is told before anything was measured.
pub const RETRY_AFTER_UNMEASURED: Duration = Duration::from_secs(5);

/// Names one's place in a [`Line`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Ticket(u64);

/// A line of bounded length: first come, first served, and whoever leaves lets the others move up.
#[derive(Debug)]
pub struct Line<T> {
    waiting: VecDeque<Waiting<T>>,
    waiting_max: u32,
    next: u64,
}

#[derive(Debug)]
struct Waiting<T> {
    ticket: Ticket,
    who: T,
    /// The position that was told last.
    told: Option<u32>,
}

impl<T> Line<T> {
    /// An empty line in which `waiting_max` may wait.
    pub fn new(waiting_max: u32) -> Self {
        Self { waiting: VecDeque::new(), waiting_max, next: 0 }
    }

    /// Takes the last place in the line.
    ///
    /// # Errors
    ///
    /// The line is full; `who` is handed back.
    pub fn join(&mut self, who: T) -> Result<Ticket, T> {
        if self.len() >= self.waiting_max {
            return Err(who);
        }
        let ticket = Ticket(self.next);
        self.next += 1;
        self.waiting.push_back(Waiting { ticket, who, told: None });
        Ok(ticket)
    }

    /// Whoever is served next.
    pub fn first(&self) -> Option<&T> {
        self.waiting.front().map(|first| &first.who)
    }

    /// Takes the first out of the line, to be served.
    pub fn serve(&mut self) -> Option<T> {
        self.waiting.pop_front().map(|first| first.who)
    }

    /// Takes somebody out of the line, wherever that is; none where the ticket was served or left before.
    pub fn leave(&mut self, ticket: Ticket) -> Option<T> {
        // Tickets ascend along the line.
        let at = self.waiting.binary_search_by_key(&ticket, |waiting| waiting.ticket).ok()?;
        self.waiting.remove(at).map(|left| left.who)
    }

    /// Takes everybody out of the line of whom `stays` is false.
    pub fn retain(&mut self, mut stays: impl FnMut(&T) -> bool) {
        self.waiting.retain(|waiting| stays(&waiting.who));
    }

    /// Takes everybody out of the line, in order.
    pub fn drain(&mut self) -> impl Iterator<Item = T> {
        self.waiting.drain(..).map(|waiting| waiting.who)
    }

    /// Those whose position changed since it was told last, with how many are before each; newcomers among them.
    pub fn moved(&mut self) -> impl Iterator<Item = (&mut T, u32)> {
        self.waiting.iter_mut().zip(0..).filter_map(|(waiting, ahead)| {
            (waiting.told.replace(ahead) != Some(ahead)).then_some((&mut waiting.who, ahead))
        })
    }

    /// How many wait.
    pub fn len(&self) -> u32 {
        u32::try_from(self.waiting.len()).unwrap_or(u32::MAX)
    }

    /// Whether nobody waits.
    pub fn is_empty(&self) -> bool {
        self.waiting.is_empty()
    }
}

/// How long jobs hold their places, recent ones counting most.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Pace {
    mean_s: Option<f64>,
}

/// What a job counts for in a [`Pace`] against all those before it.
const PACE_WEIGHT: f64 = 0.125;

impl Pace {
    /// A job that held its place for so long has given it back, finished or not.
    pub fn record(&mut self, held: Duration) {
        let held_s = held.as_secs_f64();
        self.mean_s = Some(self.mean_s.map_or(held_s, |mean_s| mean_s + (held_s - mean_s) * PACE_WEIGHT));
    }

    /// When to come back, where `running` jobs hold places and `waiting` wait for one: about when the last of those who
    /// wait now has one. `running` places come free once in a mean job.
    pub fn retry_after(&self, waiting: u32, running: u32) -> Duration {
        let Some(mean_s) = self.mean_s else { return RETRY_AFTER_UNMEASURED };
        // Where nobody waits because nobody may, one place has to come free.
        let seconds = f64::from(waiting.max(1)) * mean_s / f64::from(running.max(1));
        Duration::try_from_secs_f64(seconds).unwrap_or(RETRY_AFTER_MAX).clamp(RETRY_AFTER_MIN, RETRY_AFTER_MAX)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_line_moves_up_and_says_so_once() {
        let mut line = Line::new(3);
        let [a, b, _] = ["a", "b", "c"].map(|who| line.join(who).unwrap());
        assert_eq!(line.join("d"), Err("d"));
        let moved = |line: &mut Line<&'static str>| line.moved().map(|(who, ahead)| (*who, ahead)).collect::<Vec<_>>();
        assert_eq!(moved(&mut line), [("a", 0), ("b", 1), ("c", 2)]);
        assert_eq!(moved(&mut line), []);
        assert_eq!(line.leave(b), Some("b"));
        assert_eq!(line.leave(b), None, "nobody leaves twice");
        line.join("d").unwrap();
        assert_eq!(moved(&mut line), [("c", 1), ("d", 2)]);
        assert_eq!(line.first(), Some(&"a"));
        assert_eq!((line.serve(), line.leave(a)), (Some("a"), None));
        line.retain(|who| *who != "c");
        assert_eq!(moved(&mut line), [("d", 0)]);
        assert_eq!(line.drain().collect::<Vec<_>>(), ["d"]);
        assert!(line.is_empty());
    }

    /// What happens to a line; numbers pick one of those who wait.
    #[derive(Clone, Debug)]
    enum Step {
        Join,
        Serve,
        Leave(usize),
        Told,
    }

    proptest! {
        #[test]
        fn whoever_stays_is_served_in_order_and_knows_the_position(
            max in 0u32..6,
            steps in prop::collection::vec(
                prop_oneof![
                    3 => Just(Step::Join), 1 => Just(Step::Serve), 1 => (0usize..6).prop_map(Step::Leave), 1 => Just(Step::Told),
                ],
                0..60,
            ),
        ) {
            let mut line = Line::new(max);
            let mut model: Vec<(u32, Ticket)> = Vec::new();
            let mut known = std::collections::BTreeMap::new();
            for (who, step) in (0..).zip(steps) {
                match step {
                    Step::Join => match line.join(who) {
                        Ok(ticket) => model.push((who, ticket)),
                        Err(back) => {
                            prop_assert_eq!(back, who);
                            prop_assert_eq!(model.len() as u32, max);
                        }
                    },
                    Step::Serve => {
                        let first = (!model.is_empty()).then(|| model.remove(0).0);
                        prop_assert_eq!(line.serve(), first);
                    }
                    Step::Leave(at) if at < model.len() => {
                        let (who, ticket) = model.remove(at);
                        prop_assert_eq!(line.leave(ticket), Some(who));
                    }
                    Step::Leave(_) => {}
                    Step::Told => {
                        for (who, ahead) in line.moved() {
                            prop_assert_ne!(known.insert(*who, ahead), Some(ahead), "told twice");
                        }
                        for (ahead, (who, _)) in (0u32..).zip(&model) {
                            prop_assert_eq!(known.get(who), Some(&ahead));
                        }
                    }
                }
                prop_assert_eq!(line.len() as usize, model.len());
            }
        }

        #[test]
        fn waits_stay_within_bounds_and_grow_with_the_line(
            held_ms in prop::collection::vec(0u64..10_000_000, 0..20), waiting in 0u32..100_000, running in 0u32..300,
        ) {
            let mut pace = Pace::default();
            held_ms.iter().for_each(|ms| pace.record(Duration::from_millis(*ms)));
            let wait = pace.retry_after(waiting, running);
            prop_assert!((RETRY_AFTER_MIN..=RETRY_AFTER_MAX).contains(&wait));
            prop_assert!(wait <= pace.retry_after(waiting + 1, running));
            prop_assert!(wait >= pace.retry_after(waiting, running + 1));
        }
    }

    #[test]
    fn a_wait_is_the_line_over_the_rate() {
        let mut pace = Pace::default();
        assert_eq!(pace.retry_after(8, 4), RETRY_AFTER_UNMEASURED);
        pace.record(Duration::from_secs(10));
        assert_eq!(pace.retry_after(8, 4), Duration::from_secs(20));
        assert_eq!(pace.retry_after(0, 1), Duration::from_secs(10));
        for _ in 0..100 {
            pace.record(Duration::from_secs(2));
        }
        assert_eq!(pace.retry_after(8, 4).as_secs_f64().round(), 4.0, "recent jobs count most");
    }
}
