//! Requests that are running, so that they can be cancelled by name.

use std::{
    collections::HashMap,
    pin::Pin,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    task::{Context, Poll},
};

use futures::{Stream, StreamExt};
use mesh_core::EngineError;
use tokio_util::sync::{CancellationToken, WaitForCancellationFutureOwned};

use crate::error::ApiError;

/// Most requests that run at a time, waiting ones included.
pub const RUNNING_MAX: usize = 8192;

/// The requests that are running.
#[derive(Clone, Debug, Default)]
pub struct Running(Arc<Mutex<Entries>>);

#[derive(Debug, Default)]
struct Entries {
    next: u64,
    entries: HashMap<u64, Entry>,
}

#[derive(Debug)]
struct Entry {
    /// What it is called. Clients may call several requests the same.
    names: Vec<String>,
    cancel: CancellationToken,
}

impl Running {
    fn lock(&self) -> MutexGuard<'_, Entries> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes note of a request that can be cancelled by any of `names` until the ticket is dropped.
    pub fn enter<'a>(&self, names: impl IntoIterator<Item = &'a str>) -> Result<Arc<Ticket>, ApiError> {
        let mut inner = self.lock();
        if inner.entries.len() >= RUNNING_MAX {
            return Err(ApiError::crowded(RUNNING_MAX));
        }
        let (key, cancel) = (inner.next, CancellationToken::new());
        inner.next += 1;
        let names = names.into_iter().map(str::to_owned).collect();
        inner.entries.insert(key, Entry { names, cancel: cancel.clone() });
        Ok(Arc::new(Ticket { running: self.clone(), key, cancel }))
    }

    /// Cancels what is called that; tells whether there was anything.
    pub fn cancel(&self, name: &str) -> bool {
        let inner = self.lock();
        let called = inner.entries.values().filter(|entry| entry.names.iter().any(|known| known == name));
        called.map(|entry| entry.cancel.cancel()).count() > 0
    }

    /// Requests that are running.
    pub fn count(&self) -> usize {
        self.lock().entries.len()
    }
}

/// A running request's place among the others.
#[derive(Debug)]
pub struct Ticket {
    running: Running,
    key: u64,
    cancel: CancellationToken,
}

impl Drop for Ticket {
    fn drop(&mut self) {
        self.running.lock().entries.remove(&self.key);
    }
}

impl Ticket {
    /// Does the work, unless the request is cancelled before it is done. What is given up is dropped.
    pub async fn unless_cancelled<T>(&self, work: impl Future<Output = Result<T, ApiError>>) -> Result<T, ApiError> {
        tokio::select! {
            biased;
            () = self.cancel.cancelled() => Err(ApiError::cancelled()),
            done = work => done,
        }
    }

    /// An answer that ends when the request is cancelled. The request is running until its answers are over or
    /// dropped, and the ticket is.
    pub fn watch<S>(self: &Arc<Self>, parts: S) -> Watched<S> {
        let cancelled = Box::pin(self.cancel.clone().cancelled_owned());
        Watched { parts: Some(parts), cancelled, ticket: Some(self.clone()) }
    }
}

/// Why an answer broke off.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Broken {
    /// The engine could not finish it.
    #[error(transparent)]
    Engine(#[from] EngineError),
    /// It was cancelled.
    #[error("the request was cancelled")]
    Cancelled,
}

impl From<Broken> for ApiError {
    fn from(broken: Broken) -> Self {
        match broken {
            Broken::Engine(error) => error.into(),
            Broken::Cancelled => Self::cancelled(),
        }
    }
}

/// An answer that can be cancelled. Made by [`Ticket::watch`].
pub struct Watched<S> {
    /// None once it is over. Dropping it is what stops the engine.
    parts: Option<S>,
    cancelled: Pin<Box<WaitForCancellationFutureOwned>>,
    ticket: Option<Arc<Ticket>>,
}

impl<S, T> Stream for Watched<S>
where
    S: Stream<Item = Result<T, EngineError>> + Unpin,
{
    type Item = Result<T, Broken>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let this = &mut *self;
        let Some(parts) = &mut this.parts else { return Poll::Ready(None) };
        if this.ticket.is_some() && this.cancelled.as_mut().poll(cx).is_ready() {
            (this.parts, this.ticket) = (None, None);
            return Poll::Ready(Some(Err(Broken::Cancelled)));
        }
        let next = parts.poll_next_unpin(cx).map(|next| next.map(|part| part.map_err(Broken::Engine)));
        if let Poll::Ready(None | Some(Err(_))) = next {
            (this.parts, this.ticket) = (None, None);
        }
        next
    }
}

#[cfg(test)]
mod tests {
    use futures::stream;

    use super::*;

    type Part = Result<u32, EngineError>;

    #[tokio::test]
    async fn an_answer_ends_when_any_of_its_names_is_cancelled() {
        let running = Running::default();
        let ticket = running.enter(["chatcmpl-1", "mine"]).unwrap();
        let mut parts = ticket.watch(stream::iter([Part::Ok(1)]).chain(stream::pending()));
        drop(ticket);
        assert_eq!(parts.next().await, Some(Ok(1)));
        assert!(futures::poll!(parts.next()).is_pending());
        assert!(!running.cancel("other") && running.cancel("mine"));
        assert_eq!(parts.next().await, Some(Err(Broken::Cancelled)));
        assert_eq!((parts.next().await, running.count(), running.cancel("mine")), (None, 0, false));
    }

    #[tokio::test]
    async fn what_is_over_is_not_running() {
        let running = Running::default();
        let mut parts = running.enter(["a"]).unwrap().watch(stream::iter([Part::Err(EngineError::Stopped)]));
        assert_eq!(running.count(), 1);
        assert_eq!(parts.next().await, Some(Err(Broken::Engine(EngineError::Stopped))));
        assert_eq!(running.count(), 0);
        drop(running.enter(["b"]).unwrap().watch(stream::pending::<Part>()));
        assert_eq!(running.count(), 0);
    }

    #[tokio::test]
    async fn work_is_given_up_and_there_is_a_bound() {
        let running = Running::default();
        let ticket = running.enter(["a"]).unwrap();
        assert!(running.cancel("a"));
        let refused = ticket.unless_cancelled(std::future::pending::<Result<(), _>>()).await.unwrap_err();
        assert_eq!(refused.status(), 409);
        let tickets: Vec<_> = (1..RUNNING_MAX).map(|_| running.enter(["b"]).unwrap()).collect();
        assert_eq!(running.enter(["c"]).unwrap_err().status(), 503);
        drop(tickets);
        assert!(running.enter(["c"]).is_ok());
    }
}
