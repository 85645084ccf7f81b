//! Who may be computed and who waits. Waiting happens here and not in the child, so that its silence means trouble and
//! everybody knows the position.

use std::{
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use mesh_core::queue::{Line, Pace, Ticket};
use tokio::sync::watch;

/// Places for jobs: so many are computed, so many more wait in line. Cheap to clone; clones share the places.
#[derive(Clone, Debug)]
pub(crate) struct Gate(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    state: Mutex<State>,
    /// Places taken, those in line included.
    occupied: watch::Sender<u32>,
}

#[derive(Debug)]
struct State {
    running: u32,
    running_max: u32,
    line: Line<watch::Sender<Turn>>,
    pace: Pace,
}

/// Where a job is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Turn {
    /// It waits behind so many.
    Waits(u32),
    /// It may be computed, since then.
    Runs(Instant),
}

/// Every place is taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Full {
    /// Jobs computed or waiting.
    pub occupied: u32,
    /// When a place may be free.
    pub retry_after: Duration,
}

/// One job's place. Dropping it lets the others move up.
#[derive(Debug)]
pub(crate) struct Place {
    gate: Gate,
    /// None for a job that never had to wait.
    ticket: Option<Ticket>,
    turn: watch::Receiver<Turn>,
}

impl Gate {
    /// A gate with nobody behind it.
    pub fn new(running_max: u32, waiting_max: u32) -> Self {
        let state = State { running: 0, running_max, line: Line::new(waiting_max), pace: Pace::default() };
        Self(Arc::new(Shared { state: Mutex::new(state), occupied: watch::channel(0).0 }))
    }

    /// Takes a place among those who run, or else at the end of the line.
    pub fn enter(&self) -> Result<Place, Full> {
        let mut state = self.lock();
        let free = state.running < state.running_max && state.line.is_empty();
        let first = if free { Turn::Runs(Instant::now()) } else { Turn::Waits(state.line.len()) };
        let (sender, turn) = watch::channel(first);
        let ticket = if free {
            state.running += 1;
            None
        } else {
            let joined = state.line.join(sender).ok();
            let full = || Full {
                occupied: state.running + state.line.len(),
                retry_after: state.pace.retry_after(state.line.len(), state.running),
            };
            Some(joined.ok_or_else(full)?)
        };
        self.settle(&mut state);
        Ok(Place { gate: self.clone(), ticket, turn })
    }

    /// Waits until nobody runs and nobody waits.
    pub async fn emptied(&self) {
        // The sender lives as long as this gate.
        let _ = self.0.occupied.subscribe().wait_for(|occupied| *occupied == 0).await;
    }

    /// Lets those run who can, and tells everybody whose position changed.
    fn settle(&self, state: &mut State) {
        while state.running < state.running_max
            && let Some(next) = state.line.serve()
        {
            state.running += 1;
            next.send_replace(Turn::Runs(Instant::now()));
        }
        for (waiting, ahead) in state.line.moved() {
            waiting.send_replace(Turn::Waits(ahead));
        }
        self.0.occupied.send_replace(state.running + state.line.len());
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // Nothing that holds the lock panics half-way.
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Place {
    /// Waits until the job may run. `waits` is told how many are ahead, at first and whenever that changes.
    pub async fn turn(&mut self, mut waits: impl FnMut(u32)) {
        loop {
            match *self.turn.borrow_and_update() {
                Turn::Runs(_) => return,
                Turn::Waits(ahead) => waits(ahead),
            }
            if self.turn.changed().await.is_err() {
                return;
            }
        }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut state = self.gate.lock();
        let turn = *self.turn.borrow();
        match (turn, self.ticket) {
            (Turn::Runs(since), _) => {
                state.running -= 1;
                state.pace.record(since.elapsed());
            }
            (Turn::Waits(_), Some(ticket)) => drop(state.line.leave(ticket)),
            (Turn::Waits(_), None) => {}
        }
        self.gate.settle(&mut state);
    }
}

#[cfg(test)]
mod tests {
    use futures::FutureExt;

    use super::*;

    /// What a place is told without waiting, and whether it may run.
    fn told(place: &mut Place) -> (Vec<u32>, bool) {
        let mut told = Vec::new();
        let runs = place.turn(|ahead| told.push(ahead)).now_or_never().is_some();
        (told, runs)
    }

    #[tokio::test]
    async fn those_who_wait_move_up_as_others_leave() {
        let gate = Gate::new(1, 3);
        let mut places: Vec<_> = (0..4).map(|_| gate.enter().unwrap()).collect();
        assert_eq!(gate.enter().unwrap_err().occupied, 4);
        let expected = [(vec![], true), (vec![0], false), (vec![1], false), (vec![2], false)];
        assert_eq!(places.iter_mut().map(told).collect::<Vec<_>>(), expected);
        drop(places.remove(2)); // gives up waiting
        assert_eq!(
            places.iter_mut().map(told).collect::<Vec<_>>(),
            [(vec![], true), (vec![0], false), (vec![1], false)]
        );
        let mut last = gate.enter().unwrap();
        assert_eq!(told(&mut last), (vec![2], false));
        drop(places.remove(0)); // is done
        assert_eq!(places.iter_mut().map(told).collect::<Vec<_>>(), [(vec![], true), (vec![0], false)]);
        assert!(gate.emptied().now_or_never().is_none());
        drop((places, last));
        gate.emptied().await;
        assert_eq!(told(&mut gate.enter().unwrap()), (vec![], true), "no place is lost");
    }

    #[test]
    fn nobody_overtakes_the_line() {
        let gate = Gate::new(2, 2);
        let [one, _two, mut three] = [(); 3].map(|()| gate.enter().unwrap());
        drop(one);
        assert!(told(&mut three).1);
        assert!(!told(&mut gate.enter().unwrap()).1);
    }

    #[test]
    fn a_gate_without_a_line_refuses_at_once() {
        let gate = Gate::new(1, 0);
        let only = gate.enter().unwrap();
        let full = gate.enter().unwrap_err();
        assert_eq!((full.occupied, full.retry_after), (1, mesh_core::queue::RETRY_AFTER_UNMEASURED));
        drop(only);
        let _only = gate.enter().unwrap();
        assert_eq!(gate.enter().unwrap_err().retry_after, mesh_core::queue::RETRY_AFTER_MIN, "jobs here are short");
    }
}
