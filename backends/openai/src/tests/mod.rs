//! Against stand-ins of several kinds, and against hostile ones.

mod answers;
mod hostile;
mod kinds;
mod lists;
mod live;
mod replies;
mod stand_in;

use std::{sync::Arc, time::Duration};

use futures::StreamExt;
use mesh_core::{
    EngineError, EngineHandle,
    answer::{Delta, Finished, Part},
    ask::{Ask, Chat, Subject},
    chat::Message,
    node::Elsewhere,
};
use tokio::time::timeout;

use crate::{ShareOptions, Shared};
use stand_in::StandIn;

/// Longest wait for what has to come.
const SOON: Duration = Duration::from_secs(30);

/// Looks often and waits for nothing long.
fn options(server: &StandIn) -> ShareOptions {
    ShareOptions {
        interval: Duration::from_millis(20),
        backoff_max: Duration::from_millis(20),
        look_max: Duration::from_secs(5),
        ..ShareOptions::new(server.url(), "box")
    }
}

async fn share(server: &StandIn) -> Arc<Shared> {
    Shared::start(options(server)).await.unwrap()
}

/// Waits until something holds of it.
async fn until(shared: &Shared, what: &str, mut holds: impl FnMut(&Shared) -> bool) {
    let wait = async {
        while !holds(shared) {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    timeout(SOON, wait).await.unwrap_or_else(|_| panic!("never {what}: {}", shared.status()));
}

fn names(shared: &Shared) -> Vec<String> {
    shared.models().into_iter().map(|model| model.name).collect()
}

async fn engine(shared: &Shared, name: &str) -> EngineHandle {
    until(shared, "offered", |shared| shared.engine(name).is_some()).await;
    shared.engine(name).unwrap().0
}

fn message(role: &str, content: &str) -> Message {
    Message { role: role.into(), content: Some(content.into()), ..Message::default() }
}

fn chat(content: &str) -> Chat {
    Chat { messages: vec![message("user", content)], ..Chat::default() }
}

fn ask(content: &str) -> Ask {
    Ask::new("job", Subject::Chat(chat(content)))
}

/// All parts of an answer, and how it ended.
async fn parts(engine: &EngineHandle, ask: Ask) -> (Vec<Part>, Option<EngineError>) {
    let mut stream = engine.answer(ask).await.unwrap();
    let (mut parts, mut error) = (Vec::new(), None);
    while let Some(part) = timeout(SOON, stream.next()).await.expect("a part or the end") {
        match part {
            Ok(part) => parts.push(part),
            Err(last) => error = Some(last),
        }
    }
    (parts, error)
}

/// An answer that ended well.
async fn whole(engine: &EngineHandle, ask: Ask) -> (Vec<Delta>, Finished) {
    let (mut parts, error) = parts(engine, ask).await;
    assert_eq!(error, None);
    let Some(Part::Finished(finished)) = parts.pop() else { panic!("no end: {parts:?}") };
    let deltas = parts.into_iter().filter_map(|part| match part {
        Part::Delta(delta) => Some(delta),
        _ => None,
    });
    (deltas.collect(), finished)
}

fn content(text: &str) -> Delta {
    Delta::Content(text.into())
}
