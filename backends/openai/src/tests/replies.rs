//! Questions that are answered without generating.

use mesh_core::{
    Embedded, Pooling,
    ask::{Chat, Effort, Subject},
    node::{Question, RejectionKind, Reply},
};
use serde_json::json;

use super::{
    chat, engine, share,
    stand_in::{Answer, Request, StandIn, bare, hello, list, llama_server, mesh_llm, not_found, vllm},
};

/// As llama-server and mesh-llm have the routes.
fn routes(request: &Request) -> Answer {
    match request.path() {
        "/apply-template" => Answer::Json(200, json!({ "prompt": "<user>hi<assistant>" })),
        "/tokenize" if request.body["with_pieces"] == true => {
            Answer::Json(200, json!({ "tokens": [{ "id": 5, "piece": "a" }, { "id": 6, "piece": [195] }] }))
        }
        "/tokenize" => Answer::Json(200, json!({ "tokens": [5, 6, 7] })),
        "/detokenize" => Answer::Json(200, json!({ "content": "a" })),
        _ => not_found(),
    }
}

fn tokenize(pieces: bool) -> Question {
    Question::Tokenize { text: "aü".into(), add_special: true, pieces }
}

fn render() -> Question {
    Question::Render { chat: chat("hi"), add_generation_prompt: true }
}

fn count(subject: Subject) -> Question {
    Question::Count { subject }
}

#[tokio::test]
async fn llama_server_and_mesh_llm_tell_all() {
    for (server, model) in
        [(StandIn::new(llama_server(routes)).await, "model.gguf"), (StandIn::new(mesh_llm(routes)).await, "smol")]
    {
        let shared = share(&server).await;
        let engine = engine(&shared, model).await;
        let reply = async |question| engine.reply(question).await.unwrap();
        assert_eq!(reply(tokenize(false)).await, Reply::Tokens { ids: vec![5, 6, 7], pieces: vec![] });
        assert_eq!(server.last("/tokenize").body["content"], "aü");
        assert_eq!(server.last("/tokenize").body["add_special"], true);
        assert_eq!(
            reply(tokenize(true)).await,
            Reply::Tokens { ids: vec![5, 6], pieces: vec![b"a".to_vec(), vec![195]] }
        );
        assert_eq!(reply(Question::Detokenize { ids: vec![5] }).await, Reply::Text("a".into()));
        assert_eq!(server.last("/detokenize").body["tokens"], json!([5]));
        assert_eq!(reply(render()).await, Reply::Text("<user>hi<assistant>".into()));
        assert_eq!(reply(count(Subject::Chat(chat("hi")))).await, Reply::Count(3));
        assert_eq!(server.last("/tokenize").body["content"], "<user>hi<assistant>");
        assert_eq!(reply(count(Subject::Text("a".into()))).await, Reply::Count(3));
        assert_eq!(reply(count(Subject::Tokens(vec![1; 9]))).await, Reply::Count(9));
    }
}

#[tokio::test]
async fn variables_of_the_template_go_with_it() {
    let server = StandIn::new(llama_server(routes)).await;
    let shared = share(&server).await;
    let engine = engine(&shared, "model.gguf").await;
    let thinking = Chat { effort: Some(Effort::Switch(false)), ..chat("hi") };
    engine.reply(Question::Render { chat: thinking, add_generation_prompt: false }).await.unwrap();
    let body = server.last("/apply-template").body;
    assert_eq!(
        (&body["chat_template_kwargs"]["enable_thinking"], &body["add_generation_prompt"]),
        (&json!(false), &json!(false))
    );
}

#[tokio::test]
async fn vllm_tells_tokens_and_no_bytes() {
    let server = StandIn::new(vllm(|request| match request.path() {
        "/tokenize" => Answer::Json(200, json!({ "count": 2, "max_model_len": 5, "tokens": [1, 2] })),
        "/detokenize" => Answer::Json(200, json!({ "prompt": "a" })),
        _ => hello(),
    }))
    .await;
    let shared = share(&server).await;
    let engine = engine(&shared, "org/model").await;
    assert_eq!(engine.reply(tokenize(false)).await.unwrap(), Reply::Tokens { ids: vec![1, 2], pieces: vec![] });
    let body = server.last("/tokenize").body;
    assert_eq!(
        (&body["prompt"], &body["add_special_tokens"], &body["model"]),
        (&json!("aü"), &json!(true), &json!("org/model"))
    );
    assert_eq!(engine.reply(Question::Detokenize { ids: vec![1] }).await.unwrap(), Reply::Text("a".into()));
    assert_eq!(engine.reply(count(Subject::Chat(chat("hi")))).await.unwrap(), Reply::Count(2));
    assert_eq!(server.last("/tokenize").body["messages"][0]["content"], "hi");
    for question in [tokenize(true), render()] {
        let rejection = engine.reply(question).await.unwrap_err();
        assert_eq!((rejection.kind, rejection.code.as_str()), (RejectionKind::Invalid, "unsupported"));
    }
}

#[tokio::test]
async fn what_a_server_does_not_tell_is_said() {
    let server = StandIn::new(bare(|_| hello())).await;
    let shared = share(&server).await;
    let engine = engine(&shared, "m").await;
    let embed = Question::Embed { id: "e".into(), inputs: vec![Subject::Text("a".into())], pooling: Pooling::Mean };
    for question in [
        tokenize(false),
        render(),
        count(Subject::Chat(chat("hi"))),
        count(Subject::Text("a".into())),
        Question::Detokenize { ids: vec![1] },
        embed,
    ] {
        let rejection = engine.reply(question).await.unwrap_err();
        assert_eq!((rejection.kind, rejection.code.as_str()), (RejectionKind::Invalid, "unsupported"));
        assert!(rejection.message.contains("does not tell"), "{rejection}");
    }
}

#[tokio::test]
async fn texts_become_vectors() {
    let server = StandIn::new(|request| match request.path() {
        "/v1/models" => list(&[json!({ "id": "e" })]),
        "/v1/embeddings" => Answer::Json(
            200,
            json!({
                "data": [{ "index": 1, "embedding": [0.0, -2.0] }, { "index": 0, "embedding": [3.0, 4.0] }],
                "usage": { "prompt_tokens": 7 },
            }),
        ),
        _ => not_found(),
    })
    .await;
    let shared = share(&server).await;
    let engine = engine(&shared, "e").await;
    let embed = |inputs: Vec<Subject>, pooling| engine.reply(Question::Embed { id: "e".into(), inputs, pooling });
    let text = |text: &str| Subject::Text(text.into());
    let vectors = embed(vec![text("a"), text("b")], Pooling::Mean).await.unwrap();
    let expected = Embedded { vectors: vec![vec![0.6, 0.8], vec![0.0, -1.0]], prompt_tokens: 7 };
    assert_eq!(vectors, Reply::Vectors(expected));
    let body = server.last("/v1/embeddings").body;
    assert_eq!(body, json!({ "model": "e", "input": ["a", "b"], "encoding_format": "float" }));
    // As many as were asked for.
    assert_eq!(embed(vec![text("a")], Pooling::Mean).await.unwrap_err().kind, RejectionKind::Failed);
    for (inputs, pooling, param) in [
        (vec![text("a"), text("b")], Pooling::Last, "pooling"),
        (vec![Subject::Tokens(vec![1]), text("b")], Pooling::Mean, "input"),
        (vec![Subject::Chat(chat("hi"))], Pooling::Mean, "input"),
    ] {
        let rejection = embed(inputs, pooling).await.unwrap_err();
        assert_eq!((rejection.kind, rejection.param.as_deref()), (RejectionKind::Invalid, Some(param)));
    }
    for data in [
        json!([{ "embedding": [0.0] }, { "embedding": [1.0] }]),
        json!([{ "index": 0, "embedding": [1.0] }, { "index": 0, "embedding": [1.0] }]),
        json!([{ "index": 0, "embedding": [1.0] }, { "index": 9, "embedding": [1.0] }]),
        json!([{ "embedding": "AAAA" }, { "embedding": [1.0] }]),
        json!([{ "embedding": [] }, { "embedding": [1.0] }]),
    ] {
        let shown = data.to_string();
        server.set(move |request| match request.path() {
            "/v1/models" => list(&[json!({ "id": "e" })]),
            _ => Answer::Json(200, json!({ "data": data })),
        });
        let rejection = embed(vec![text("a"), text("b")], Pooling::Mean).await.unwrap_err();
        assert_eq!(rejection.kind, RejectionKind::Failed, "{shown}");
    }
}
