//! A real llama-server, where there is one: the one that is found, or one that was installed into the workspace's target folder.

use std::{net::TcpListener, path::PathBuf, process::Stdio, time::Duration};

use mesh_backend_llama_server::{
    InstallOptions,
    find::{self, Places},
    install,
};
use mesh_core::{
    FinishReason, ProgressSink, Sampling,
    answer::{Finish, Part},
    ask::{Ask, Subject},
    node::{Elsewhere, Question, Reply},
};

use super::{ask, chat, names, parts, until};
use crate::{ShareOptions, Shared};

fn workspace() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).ancestors().nth(2).unwrap().to_owned()
}

/// The binary and a model, or why there is none.
async fn ready() -> Result<(PathBuf, PathBuf), String> {
    let model = workspace().parent().unwrap().join("shared/golden/qwen3/model.gguf");
    if !model.is_file() {
        return Err("../shared/golden is not there".into());
    }
    let dir = workspace().join("target").join("llama-server");
    let places = Places::here(None, mesh_backend_llama_server::install::candidates(&dir));
    if let Some(found) = find::find(&places, &find::is_executable).map_err(|error| error.to_string())? {
        return Ok((found.path, model));
    }
    let installed = install(&InstallOptions::new(dir), &ProgressSink::silent()).await;
    installed.map(|installed| (installed.binary, model)).map_err(|error| error.to_string())
}

#[tokio::test]
async fn a_real_llama_server_is_shared() {
    let (binary, model) = match ready().await {
        Ok(ready) => ready,
        Err(why) => {
            assert!(std::env::var_os("CI").is_none(), "a_real_llama_server_is_shared cannot run: {why}");
            println!("skipped: a_real_llama_server_is_shared: {why}");
            return;
        }
    };
    let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let mut child = tokio::process::Command::new(binary)
        .args(["--host", "127.0.0.1", "--port", &port.to_string(), "-c", "256", "--parallel", "2", "--threads", "1"])
        .arg("-m")
        .arg(model)
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .kill_on_drop(true)
        .spawn()
        .unwrap();
    let often = Duration::from_millis(50);
    let options = ShareOptions::new(format!("http://127.0.0.1:{port}/v1"), "box");
    let shared = Shared::start(ShareOptions { interval: often, backoff_max: often, ..options }).await.unwrap();
    until(&shared, "loaded", |shared| names(shared) == ["model"]).await;
    let (engine, offer) = shared.engine("model").unwrap();
    let can = &offer.offer.capabilities;
    assert_eq!((can.context_tokens_max, can.requests_parallel_max, can.embeddings), (256, 2, false));
    assert_eq!(shared.status()["kind"], "llama-server");

    let greedy = |subject| Ask {
        sampling: Sampling::greedy(),
        tokens_max: Some(5),
        logprobs: Some(2),
        ..Ask::new("job", subject)
    };
    let mut counted = Vec::new();
    for subject in [Subject::Chat(chat("hi")), Subject::Text("hi".into()), Subject::Tokens(vec![1, 2, 3])] {
        let (parts, error) = parts(&engine, greedy(subject)).await;
        assert_eq!(error, None);
        let Some(Part::Finished(finished)) = parts.last() else { panic!("{parts:?}") };
        assert_eq!(finished.finish, Finish::Engine(FinishReason::Length));
        assert_eq!(finished.usage.completion_tokens, 5);
        assert!(finished.timings.is_some() && finished.logprob_mean.is_some());
        let tokens = parts.iter().map(|part| if let Part::Tokens(tokens) = part { tokens.len() } else { 0 });
        assert_eq!(tokens.sum::<usize>(), 5);
        counted.push(u64::from(finished.usage.prompt_tokens));
    }
    // What it counts is what it read.
    let count = async |subject| engine.reply(Question::Count { subject }).await.unwrap();
    assert_eq!(count(Subject::Chat(chat("hi"))).await, Reply::Count(counted[0]));
    assert_eq!(count(Subject::Text("hi".into())).await, Reply::Count(counted[1]));

    let text = "Zwölf <|im_start|> 🦀";
    let tokenize = Question::Tokenize { text: text.into(), add_special: false, pieces: true };
    let Reply::Tokens { ids, pieces } = engine.reply(tokenize).await.unwrap() else { panic!("no tokens") };
    assert_eq!(String::from_utf8(pieces.concat()).unwrap(), text);
    assert_eq!(engine.reply(Question::Detokenize { ids }).await.unwrap(), Reply::Text(text.into()));
    let render = |speak| Question::Render { chat: chat("hi"), add_generation_prompt: speak };
    let (Reply::Text(open), Reply::Text(closed)) =
        (engine.reply(render(true)).await.unwrap(), engine.reply(render(false)).await.unwrap())
    else {
        panic!("no texts")
    };
    assert!(open.starts_with(&closed) && open.len() > closed.len(), "{open:?} {closed:?}");

    let long = engine.answer(ask(&"hi ".repeat(1000))).await.err().unwrap();
    assert_eq!(long.code, "context_length_exceeded", "{long:?}");
    child.kill().await.unwrap();
    until(&shared, "gone", |shared| shared.models().is_empty()).await;
    assert!(engine.answer(ask("hi")).await.is_err());
}
