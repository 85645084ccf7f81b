//! The engine over a stand-in for llama-server: whatever that sends or fails to send, a stream ends, and says why.

use std::time::Duration;

use futures::StreamExt;
use mesh_core::{
    Engine, EngineError, EngineState, Event, EventStream, FinishReason, Job, Knob, Prompt, Sampling, SubmitError,
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    sync::mpsc,
    time::timeout,
};

use crate::{
    child::{Process, Program},
    client::Client,
    engine::LlamaEngine,
    judge::capabilities,
};

/// Nothing here should take this long.
const SOON: Duration = Duration::from_secs(20);
const CONTEXT: u32 = 16;
const VOCAB: u32 = 100;
const QUEUED: u32 = 3;

/// What the stand-in answers `/completion` with.
#[derive(Clone, Copy)]
enum Answer {
    /// These events, and then the end of the answer.
    Events(&'static str),
    /// These events, and then the connection breaks in the middle of the answer.
    Broken(&'static str),
    /// These events, and then silence.
    Silent(&'static str),
    /// This status and body.
    Status(&'static str, &'static str),
}

/// Serves on a port of its own; reports every connection that the other side closed while the stand-in was silent.
async fn stand_in(answer: Answer) -> (u16, mpsc::UnboundedReceiver<()>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let (closed, closings) = mpsc::unbounded_channel();
    tokio::spawn(async move {
        while let Ok((connection, _)) = listener.accept().await {
            tokio::spawn(serve(connection, answer, closed.clone()));
        }
    });
    (port, closings)
}

async fn serve(mut connection: TcpStream, answer: Answer, closed: mpsc::UnboundedSender<()>) {
    while let Some(head) = request(&mut connection).await {
        assert!(head.to_ascii_lowercase().contains("authorization: bearer key"), "{head}");
        if head.starts_with("POST /tokenize") {
            respond(&mut connection, "200 OK", r#"{"tokens":[1,2,3]}"#).await;
            continue;
        }
        assert!(head.starts_with("POST /completion"), "{head}");
        let (events, ending) = match answer {
            Answer::Status(status, body) => {
                respond(&mut connection, status, body).await;
                continue;
            }
            Answer::Events(events) => (events, "0\r\n\r\n"),
            Answer::Broken(events) | Answer::Silent(events) => (events, ""),
        };
        let head = "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n";
        let chunk = if events.is_empty() { String::new() } else { format!("{:x}\r\n{events}\r\n", events.len()) };
        connection.write_all(format!("{head}{chunk}{ending}").as_bytes()).await.unwrap();
        match answer {
            Answer::Broken(_) => return,
            Answer::Silent(_) => {
                let _ = connection.read(&mut [0]).await;
                let _ = closed.send(());
                return;
            }
            _ => {}
        }
    }
}

async fn request(connection: &mut TcpStream) -> Option<String> {
    let mut bytes = Vec::new();
    let end = loop {
        if let Some(end) = bytes.windows(4).position(|window| window == b"\r\n\r\n") {
            break end + 4;
        }
        if connection.read_buf(&mut bytes).await.ok()? == 0 {
            return None;
        }
    };
    let head = String::from_utf8_lossy(&bytes[..end]).into_owned();
    let length = head.lines().find_map(|line| {
        let (name, value) = line.split_once(':')?;
        name.eq_ignore_ascii_case("content-length").then(|| value.trim().parse::<usize>().unwrap())
    });
    while bytes.len() < end + length.unwrap_or(0) {
        connection.read_buf(&mut bytes).await.ok()?;
    }
    Some(head)
}

async fn respond(connection: &mut TcpStream, status: &str, body: &str) {
    let text = format!("HTTP/1.1 {status}\r\nContent-Length: {}\r\n\r\n{body}", body.len());
    connection.write_all(text.as_bytes()).await.unwrap();
}

/// An engine that talks to `port`, over a child that only waits.
async fn engine_at(port: u16, silence_max: Duration) -> LlamaEngine {
    let arguments = vec!["-c".into(), "echo loaded; exec sleep 1000".into()];
    let process = Process::start(Program { binary: "/bin/sh".into(), arguments, environment: vec![] }).await.unwrap();
    let client = Client::new(port, "key", silence_max).unwrap();
    LlamaEngine::new(process, client, capabilities(CONTEXT, 1, QUEUED), Some(VOCAB))
}

async fn engine(answer: Answer) -> (LlamaEngine, mpsc::UnboundedReceiver<()>) {
    let (port, closings) = stand_in(answer).await;
    (engine_at(port, SOON).await, closings)
}

fn job(prompt: Prompt) -> Job {
    Job { sampling: Sampling::greedy(), ..Job::new("test", prompt) }
}

fn text() -> Job {
    job(Prompt::Text { text: "hello".into(), add_special: true })
}

async fn events(stream: EventStream) -> Vec<Result<Event, EngineError>> {
    timeout(SOON, stream.collect()).await.expect("the stream did not end")
}

async fn failure(engine: &LlamaEngine) -> String {
    let events = events(engine.submit(text()).await.unwrap()).await;
    let (last, before) = events.split_last().unwrap();
    assert!(before.iter().all(Result::is_ok), "{events:?}");
    last.clone().expect_err("the answer was taken for complete").to_string()
}

fn refused(result: Result<EventStream, SubmitError>) -> SubmitError {
    result.err().expect("the job was admitted")
}

const PIECE: &str = "data: {\"content\":\"a\",\"stop\":false,\"tokens_predicted\":1}\n\n";

#[tokio::test]
async fn a_whole_answer() {
    let (engine, _) = engine(Answer::Events(concat!(
        ": ping\n\n",
        "data: {\"content\":\"\",\"stop\":false,\"prompt_progress\":{\"total\":3,\"cache\":1,\"processed\":3}}\n\n",
        "data: {\"content\":\"a\",\"stop\":false,\"tokens_predicted\":1}\n\n",
        "data: {\"content\":\"\",\"stop\":false,\"tokens_predicted\":2}\n\n",
        "data: {\"content\":\"é\",\"stop\":false,\"tokens_predicted\":3}\n\n",
        "data: {\"content\":\"\",\"stop\":true,\"stop_type\":\"eos\",\"tokens_predicted\":4,\"timings\":{\"cache_n\":1}}\n\n",
    )))
    .await;
    let events: Vec<_> =
        events(engine.submit(text()).await.unwrap()).await.into_iter().collect::<Result<_, _>>().unwrap();
    assert_eq!(events[0], Event::Prefill { done: 3, total: 3, cached: 1 });
    assert_eq!(events[1], Event::Text { text: "a".into(), tokens: 1, logprobs: Vec::new() });
    assert_eq!(events[2], Event::Text { text: "é".into(), tokens: 2, logprobs: Vec::new() });
    let Event::Finished { reason, usage, .. } = &events[3] else { panic!("{events:?}") };
    assert_eq!(*reason, FinishReason::Stop);
    assert_eq!((usage.prompt_tokens, usage.cached_tokens, usage.completion_tokens), (3, 1, 4));
    assert_eq!(events.len(), 4);
}

#[tokio::test]
async fn malformed_answers_end_in_an_error_that_says_what() {
    for (answer, words) in [
        (Answer::Events("data: {nonsense\n\n"), "malformed"),
        (Answer::Events("data: {}\n\n"), "without `stop`"),
        (Answer::Events("data: {\"stop\":\"perhaps\"}\n\n"), "malformed"),
        (Answer::Events("data: \u{FFFD}\n\n"), "malformed"),
        (Answer::Events(PIECE), "before the answer was complete"),
        (Answer::Events(""), "before the answer was complete"),
        (Answer::Broken(PIECE), "connection to llama-server broke"),
        (Answer::Broken(""), "connection to llama-server broke"),
        (Answer::Events("data: {\"error\":{\"code\":500,\"message\":\"no KV\"}}\n\n"), "no KV"),
        (Answer::Status("400 Bad Request", r#"{"error":{"message":"invalid tokens"}}"#), "invalid tokens"),
        (Answer::Status("500 Oops", "<html>"), "<html>"),
        (Answer::Status("204 No Content", ""), "204"),
    ] {
        let (engine, _) = engine(answer).await;
        let error = failure(&engine).await;
        assert!(error.contains(words), "expected {words:?}: {error}");
    }
}

#[tokio::test]
async fn an_endless_event_is_cut() {
    let endless: &'static str = Box::leak(format!("data: {}", "x".repeat(3 << 20)).into_boxed_str());
    let (engine, _) = engine(Answer::Silent(endless)).await;
    let error = failure(&engine).await;
    assert!(error.contains("more than 1048576 bytes"), "{error}");
}

#[tokio::test]
async fn silence_is_bounded() {
    let (port, _closings) = stand_in(Answer::Silent(PIECE)).await;
    let engine = engine_at(port, Duration::from_millis(200)).await;
    let error = failure(&engine).await;
    assert!(error.contains("silent"), "{error}");
}

#[tokio::test]
async fn nobody_at_the_port_is_gone() {
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let engine = engine_at(port, SOON).await;
    assert!(matches!(refused(engine.submit(text()).await), SubmitError::Gone { .. }));
}

#[tokio::test]
async fn dropping_the_stream_closes_the_connection() {
    let (engine, mut closings) = engine(Answer::Silent(PIECE)).await;
    let mut stream = engine.submit(text()).await.unwrap();
    assert_eq!(stream.next().await, Some(Ok(Event::Text { text: "a".into(), tokens: 1, logprobs: Vec::new() })));
    assert!(closings.try_recv().is_err());
    drop(stream);
    timeout(Duration::from_secs(2), closings.recv()).await.expect("the connection stayed open").unwrap();
}

#[tokio::test]
async fn more_jobs_than_seats_are_refused_and_a_seat_comes_back() {
    let (engine, _closings) = engine(Answer::Silent(PIECE)).await;
    let mut streams = Vec::new();
    for _ in 0..1 + QUEUED {
        streams.push(engine.submit(text()).await.unwrap());
    }
    match refused(engine.submit(text()).await) {
        SubmitError::Busy { running, retry_after } => {
            assert_eq!(running, 1 + QUEUED);
            assert!(!retry_after.is_zero());
        }
        other => panic!("{other}"),
    }
    streams.pop();
    let again = async {
        while engine.submit(text()).await.is_err() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    timeout(SOON, again).await.expect("the seat did not come back");
}

#[tokio::test]
async fn whoever_waits_is_told_the_position_and_whenever_it_changes() {
    let (engine, _closings) = engine(Answer::Silent(PIECE)).await;
    let mut streams = Vec::new();
    for _ in 0..4 {
        streams.push(engine.submit(text()).await.unwrap());
    }
    let next = async |stream: &mut EventStream| timeout(SOON, stream.next()).await.unwrap().unwrap().unwrap();
    let runs = Event::Text { text: "a".into(), tokens: 1, logprobs: Vec::new() };
    assert_eq!(next(&mut streams[0]).await, runs);
    for ahead in 0..3 {
        assert_eq!(next(&mut streams[1 + ahead as usize]).await, Event::Queued { ahead });
    }
    drop(streams.remove(2)); // gives up waiting
    assert_eq!(next(&mut streams[2]).await, Event::Queued { ahead: 1 });
    drop(streams.remove(0)); // gives up running
    assert_eq!(next(&mut streams[0]).await, runs);
    assert_eq!(next(&mut streams[1]).await, Event::Queued { ahead: 0 });
}

#[tokio::test]
async fn who_waited_when_the_child_died_was_never_begun() {
    let (engine, _closings) = engine(Answer::Silent(PIECE)).await;
    let mut streams = Vec::new();
    for _ in 0..1 + QUEUED {
        streams.push(engine.submit(text()).await.unwrap());
    }
    assert!(matches!(streams[0].next().await, Some(Ok(Event::Text { .. }))));
    engine.end_child().await;
    for waiting in streams.drain(1..) {
        let events = events(waiting).await;
        assert!(matches!(events.last(), Some(Err(EngineError::NotBegun { .. }))), "{events:?}");
    }
}

#[tokio::test]
async fn the_seat_is_free_once_the_end_is_read() {
    let (engine, _) = engine(Answer::Events("data: {\"content\":\"\",\"stop\":true,\"stop_type\":\"eos\"}\n\n")).await;
    for _ in 0..20 {
        let streams: Vec<_> = futures::future::join_all((0..1 + QUEUED).map(|_| engine.submit(text()))).await;
        for stream in streams {
            let events = events(stream.unwrap()).await;
            let (last, before) = events.split_last().unwrap();
            assert!(matches!(last, Ok(Event::Finished { .. })), "{events:?}");
            assert!(before.iter().all(|event| matches!(event, Ok(Event::Queued { .. }))), "{events:?}");
        }
    }
}

#[tokio::test]
async fn unfit_jobs_are_refused_by_name() {
    let (engine, _) = engine(Answer::Silent("")).await;
    let tokens = |tokens: Vec<u32>| job(Prompt::Tokens(tokens));
    assert_eq!(refused(engine.submit(tokens(vec![])).await), SubmitError::Empty);
    assert_eq!(
        refused(engine.submit(tokens(vec![1; CONTEXT as usize])).await),
        SubmitError::TooLong { prompt: CONTEXT, max: CONTEXT }
    );
    assert!(engine.submit(tokens(vec![1; CONTEXT as usize - 1])).await.is_ok());
    let unknown = SubmitError::UnknownToken { id: VOCAB, vocab_size: VOCAB };
    assert_eq!(refused(engine.submit(tokens(vec![1, VOCAB])).await), unknown);
    let sampling = Sampling { logit_bias: [(VOCAB, 1.0)].into(), ..Sampling::greedy() };
    assert_eq!(refused(engine.submit(Job { sampling, ..tokens(vec![1]) }).await), unknown);
    assert_eq!(
        refused(engine.submit(Job { tokens_min: Some(1), ..tokens(vec![1]) }).await),
        SubmitError::Unsupported { knob: Knob::MinTokens }
    );
}

#[tokio::test]
async fn draining_waits_for_the_grace_and_then_stops_everything() {
    let (engine, _closings) = engine(Answer::Silent(PIECE)).await;
    let stream = engine.submit(text()).await.unwrap();
    let start = std::time::Instant::now();
    let grace = Duration::from_millis(300);
    let refusal = async {
        tokio::time::sleep(Duration::from_millis(100)).await;
        assert_eq!(*engine.state().borrow(), EngineState::Draining);
        refused(engine.submit(text()).await)
    };
    let ((), refusal) = tokio::join!(engine.drain(grace), refusal);
    assert!(matches!(refusal, SubmitError::Gone { .. }), "{refusal}");
    assert!(start.elapsed() >= grace && start.elapsed() < Duration::from_secs(4), "{:?}", start.elapsed());
    assert_eq!(*engine.state().borrow(), EngineState::Stopped);
    assert_eq!(events(stream).await.pop(), Some(Err(EngineError::Stopped)));
    // And again, which changes nothing.
    timeout(SOON, engine.drain(grace)).await.unwrap();
}

#[tokio::test]
async fn an_abandoned_drain_can_be_finished_by_another() {
    let (engine, _closings) = engine(Answer::Silent(PIECE)).await;
    let _stream = engine.submit(text()).await.unwrap();
    assert!(timeout(Duration::from_millis(50), engine.drain(SOON)).await.is_err());
    timeout(Duration::from_secs(5), engine.drain(Duration::ZERO)).await.expect("the second drain hangs");
    assert_eq!(*engine.state().borrow(), EngineState::Stopped);
}

/// The child is gone, and the connection to it does not tell.
#[tokio::test]
async fn an_answer_ends_with_its_child_whatever_becomes_of_the_connection() {
    let (port, _closings) = stand_in(Answer::Silent(PIECE)).await;
    let engine = engine_at(port, 1000 * SOON).await;
    let mut stream = engine.submit(text()).await.unwrap();
    assert!(matches!(stream.next().await, Some(Ok(Event::Text { .. }))));
    engine.end_child().await;
    match events(stream).await.as_slice() {
        [Err(EngineError::Failed { what })] => assert!(what.contains("exited with signal"), "{what}"),
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn an_idle_engine_drains_at_once() {
    let (engine, _) = engine(Answer::Silent("")).await;
    timeout(Duration::from_secs(4), engine.drain(Duration::from_secs(60))).await.expect("it waited for nobody");
    assert_eq!(*engine.state().borrow(), EngineState::Stopped);
}

#[tokio::test]
async fn dropping_the_engine_ends_open_streams() {
    let (engine, _closings) = engine(Answer::Silent(PIECE)).await;
    let stream = engine.submit(text()).await.unwrap();
    let mut state = engine.state();
    drop(engine);
    assert_eq!(events(stream).await.pop(), Some(Err(EngineError::Stopped)));
    timeout(SOON, state.wait_for(|state| *state == EngineState::Stopped)).await.unwrap().unwrap();
}
