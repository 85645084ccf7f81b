//! A model in use: while somebody holds a [`Lease`], its engine is not stopped to make room.

use std::{fmt, ops::Deref, sync::Arc, time::Duration};

use tokio::{sync::watch, time::Instant};

use crate::served::ServedModel;

/// Who uses a model, and since when nobody does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Use {
    /// Leases that are out: requests in flight, from before they are submitted until their answer is dropped.
    pub requests: usize,
    /// When the last one came or went.
    pub last: Instant,
    /// Whether there will be more.
    open: bool,
}

/// Counts the leases on one model.
#[derive(Clone, Debug)]
pub(crate) struct Usage(Arc<watch::Sender<Use>>);

impl Usage {
    pub(crate) fn new() -> Self {
        Self(Arc::new(watch::Sender::new(Use { requests: 0, last: Instant::now(), open: true })))
    }

    pub(crate) fn now(&self) -> Use {
        *self.0.borrow()
    }

    /// A place among the users, unless no more are admitted.
    fn enter(&self) -> Option<Place> {
        let entered = self.0.send_if_modified(|usage| {
            if usage.open {
                usage.requests += 1;
                usage.last = Instant::now();
            }
            usage.open
        });
        entered.then(|| Place(self.clone()))
    }

    /// Admits nobody any more; who is there stays.
    pub(crate) fn close(&self) {
        self.0.send_modify(|usage| usage.open = false);
    }

    /// The same, if the model was unused for as long as `ttl`. Tells whether it was.
    pub(crate) fn close_unused(&self, ttl: Duration) -> bool {
        self.0.send_if_modified(|usage| {
            let unused = usage.requests == 0 && usage.last.elapsed() >= ttl;
            usage.open &= !unused;
            unused
        })
    }

    /// Admits users again.
    pub(crate) fn open(&self) {
        self.0.send_modify(|usage| usage.open = true);
    }

    /// Waits until nobody uses the model.
    pub(crate) async fn over(&self) {
        // The sender lives in `self`, so this cannot fail.
        self.0.subscribe().wait_for(|usage| usage.requests == 0).await.ok();
    }

    /// Waits until the model was unused for as long as `ttl`.
    pub(crate) async fn unused_for(&self, ttl: Duration) {
        let mut changes = self.0.subscribe();
        loop {
            let usage = *changes.borrow_and_update();
            if usage.requests == 0 {
                tokio::select! {
                    () = tokio::time::sleep_until(usage.last + ttl) => return,
                    _ = changes.changed() => {}
                }
            } else {
                changes.changed().await.ok();
            }
        }
    }
}

#[derive(Debug)]
struct Place(Usage);

impl Drop for Place {
    fn drop(&mut self) {
        self.0.0.send_modify(|usage| {
            usage.requests -= 1;
            usage.last = Instant::now();
        });
    }
}

/// A model that stays as it is for as long as this is held.
pub struct Lease {
    // In this order: when the place is given up, nothing of the model is held here any more.
    model: Arc<ServedModel>,
    _place: Place,
}

impl Lease {
    /// A lease, unless the model is about to be unloaded.
    pub fn of(model: &Arc<ServedModel>) -> Option<Self> {
        model.usage.enter().map(|place| Self { model: model.clone(), _place: place })
    }
}

impl Deref for Lease {
    type Target = Arc<ServedModel>;

    fn deref(&self) -> &Self::Target {
        &self.model
    }
}

impl fmt::Debug for Lease {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Lease").field(&self.model).finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TTL: Duration = Duration::from_secs(10);

    #[tokio::test(start_paused = true)]
    async fn a_closed_model_admits_nobody_and_is_over_when_the_last_one_leaves() {
        let usage = Usage::new();
        let (one, two) = (usage.enter().unwrap(), usage.enter().unwrap());
        usage.close();
        assert!(usage.enter().is_none());
        drop(one);
        let over = usage.over();
        tokio::pin!(over);
        assert!(futures::poll!(&mut over).is_pending(), "one is left");
        drop(two);
        over.await;
        usage.open();
        assert!(usage.enter().is_some());
    }

    #[tokio::test(start_paused = true)]
    async fn use_puts_the_end_off() {
        let usage = Usage::new();
        let place = usage.enter().unwrap();
        tokio::time::advance(TTL * 2).await;
        assert!(!usage.close_unused(TTL), "it is in use");
        drop(place);
        let before = Instant::now();
        usage.unused_for(TTL).await;
        assert_eq!(before.elapsed(), TTL);
        drop(usage.enter().unwrap());
        assert!(!usage.close_unused(TTL), "somebody was there in the meantime");
        tokio::time::advance(TTL).await;
        assert!(usage.close_unused(TTL));
        assert!(usage.enter().is_none());
    }
}
