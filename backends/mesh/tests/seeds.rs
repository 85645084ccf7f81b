//! What fuzzing begins with: real messages, one of each kind. `WRITE_SEEDS=1` writes them anew where messages have got more
//! fields.

use std::{collections::BTreeMap, fs, path::Path, sync::Arc, time::Duration};

use mesh_backend_mesh::{
    EndpointAddr, SecretKey, Ticket,
    adverts::{Gossiped, Shown, Spoken},
    codec,
    home::{Denied, Membership},
    trust::{Certificate, Revocations, Signed},
    wire::{Call, Card, Join, Joined, Said},
};
use mesh_core::{
    Capabilities, Embedded, EngineError, FinishReason, Grammar, Knob, OutputForm, Pooling, PromptForm, Sampling,
    Timings, Usage,
    answer::{Delta, Finish, Finished, Likely, Part, TokenText},
    ask::{Ask, Chat, Effort, Subject, ToolChoice},
    chat::{FunctionCall, Message, ToolCall},
    node::{Load, ModelOffer, Question, Reasoning, Rejection, RejectionKind, Reply},
};
use mesh_peers::{
    NodeId,
    advert::{Advert, Loss, VERSION},
};
use serde_json::json;

type Seeds = Vec<(&'static str, Vec<u8>)>;

fn offer() -> ModelOffer {
    let capabilities = Capabilities {
        knobs: [Knob::Temperature, Knob::Seed].into(),
        requests_parallel_max: 4,
        prefix_reuse: true,
        ..Capabilities::new(PromptForm::Tokens, OutputForm::Tokens, 32_768)
    };
    ModelOffer {
        reference: Some("org/model".into()),
        revision: Some("0123456789abcdef".into()),
        chat: true,
        reasoning: Reasoning::Effort,
        load: Load { running: 1, waiting: 2, prefill_per_s: Some(900.5), decode_per_s: Some(40.0) },
        ..ModelOffer::new("model", "mlx", capabilities)
    }
}

/// The same bytes each time: these keys are known to everybody, and a signature follows from key and text.
fn membership() -> Seeds {
    let (key, mesh) = (SecretKey::from_bytes(&[1; 32]), SecretKey::from_bytes(&[2; 32]));
    let id = NodeId(*key.public().as_bytes());
    let at = EndpointAddr::new(key.public())
        .with_ip_addr("192.0.2.1:4000".parse().unwrap())
        .with_ip_addr("[2001:db8::1]:4000".parse().unwrap());
    let certificate = Certificate { mesh: mesh.public(), node: key.public(), issued_s: 1 };
    let revocations = Revocations { mesh: mesh.public(), serial: 1, nodes: [mesh.public()].into() };
    let advert = Advert {
        version: VERSION,
        node: id,
        name: "node".into(),
        incarnation: 1,
        sequence: 2,
        lease_ms: 5000,
        leaving: false,
        offers: vec![Arc::new(offer())],
    };
    let spoken = Spoken { advert, at: at.clone() };
    let shown = Shown {
        node: key.public(),
        certificate: Signed::new(&mesh, &certificate),
        spoken: Signed::new(&key, &spoken),
        age_ms: 7,
    };
    let list = Signed::new(&mesh, &revocations);
    let card = Card {
        incarnation: 1,
        certificate: shown.certificate.clone(),
        revocations: Some(list.clone()),
        adverts: vec![shown.clone()],
    };
    let member = Membership {
        mesh: mesh.public(),
        mesh_name: "lab".into(),
        secret: codec::decode(&codec::encode(&[4u8; 32]), 64).unwrap(),
        certificate: shown.certificate.clone(),
    };
    let ticket = Ticket::new(mesh.public(), at, "mesh-llm-0123456789".into(), [3; 16], 1_800_000_000);
    vec![
        ("gossiped_advert", Gossiped::Advert(Box::new(shown)).encode().to_vec()),
        ("gossiped_loss", Gossiped::Loss(Loss { node: id, incarnation: 1, sequence: 2 }).encode().to_vec()),
        ("gossiped_revocations", Gossiped::Revocations(list).encode().to_vec()),
        ("card", codec::encode(&card)),
        ("proof", codec::encode(&BTreeMap::from([("bytes", [5u8; 32])]))),
        ("join", codec::encode(&Join { secret: [3; 16] })),
        ("member", codec::encode(&Joined::Member(Box::new(member)))),
        ("denied", codec::encode(&Joined::Denied(Denied::Used))),
        ("certificate", codec::encode(&certificate)),
        ("revocations", codec::encode(&revocations)),
        ("spoken", codec::encode(&spoken)),
        ("ticket", codec::encode(&ticket)),
        ("ticket_text", ticket.to_string().into_bytes()),
    ]
}

fn ask() -> Ask {
    let call =
        FunctionCall { name: "weather".into(), arguments: json!({ "city": "Paris", "days": [1, -2, 0.5, null] }) };
    let messages = vec![
        Message { role: "user".into(), content: Some("Hello".into()), name: Some("Ann".into()), ..Message::default() },
        Message {
            role: "assistant".into(),
            reasoning_content: Some("They greet.".into()),
            tool_calls: vec![ToolCall { id: "call_1".into(), kind: "function".into(), function: call }],
            ..Message::default()
        },
        Message {
            role: "tool".into(),
            content: Some("sunny".into()),
            tool_call_id: Some("call_1".into()),
            ..Message::default()
        },
    ];
    let kwargs = json!({ "enable_thinking": true, "nested": { "a": [{}] } });
    let chat = Chat {
        messages,
        tools: vec![json!({ "type": "function", "function": { "name": "weather", "parameters": {} } })],
        tool_choice: ToolChoice::Named("weather".into()),
        single_call: true,
        kwargs: kwargs.as_object().unwrap().clone(),
        effort: Some(Effort::Level("low".into())),
        thinking_tokens_max: Some(64),
    };
    Ask {
        sampling: Sampling {
            temperature: Some(0.7),
            seed: Some(1),
            logit_bias: [(5, -1.5)].into(),
            ..Sampling::default()
        },
        tokens_max: Some(16),
        logprobs: Some(2),
        stop: vec!["\n".into()],
        grammar: Some(Grammar::JsonSchema(Arc::new(json!({ "type": "object" })))),
        choices: 2,
        ..Ask::new("req_1", Subject::Chat(chat))
    }
}

fn calls() -> Seeds {
    let model = || "model".to_owned();
    let question = |question| codec::encode(&Call::Question { model: model(), question });
    let text = || Subject::Text("once".into());
    let token = TokenText {
        chosen: Likely { bytes: vec![104, 105], logprob: -0.25 },
        top: vec![Likely { bytes: vec![255], logprob: f32::NEG_INFINITY }],
        offset_chars: 3,
    };
    let finished = Finished {
        finish: Finish::Engine(FinishReason::Length),
        usage: Usage { prompt_tokens: 7, cached_tokens: 3, completion_tokens: 2 },
        timings: Some(Timings { prefill: Duration::from_millis(3), decode: Duration::from_millis(40) }),
        stopped_by: Some("\n".into()),
        reasoning_tokens: 1,
        malformed_calls: 0,
        tokens: vec![token.clone()],
        logprob_mean: Some(-0.5),
    };
    let call = Delta::ToolCall { index: 0, name: "weather".into(), arguments: "{}".into() };
    let said = |part| codec::encode(&Said::Part(part));
    let rejected = Rejection {
        param: Some("logprobs".into()),
        retry_after: Some(Duration::from_secs(2)),
        ..Rejection::new(RejectionKind::Unavailable, "busy", "Try again.")
    };
    let embedded = Embedded { vectors: vec![vec![0.5, -0.1]], prompt_tokens: 2 };
    let chat = Subject::Chat(Chat::default());
    vec![
        ("ask_chat", codec::encode(&Call::Ask { model: model(), ask: Box::new(ask()) })),
        (
            "ask_tokens",
            codec::encode(&Call::Ask { model: model(), ask: Box::new(Ask::new("a", Subject::Tokens(vec![1, 900]))) }),
        ),
        ("render", question(Question::Render { chat: Chat::default(), add_generation_prompt: true })),
        ("tokenize", question(Question::Tokenize { text: "hi".into(), add_special: true, pieces: true })),
        ("detokenize", question(Question::Detokenize { ids: vec![1, 70_000] })),
        ("count", question(Question::Count { subject: chat })),
        ("embed", question(Question::Embed { id: "e".into(), inputs: vec![text()], pooling: Pooling::Last })),
        ("admitted", codec::encode(&Said::Admitted)),
        ("queued", said(Part::Queued { ahead: 1 })),
        ("prefill", said(Part::Prefill { done: 1, total: 2 })),
        ("tokens", said(Part::Tokens(vec![token]))),
        ("delta", said(Part::Delta(Delta::Content("Hello".into())))),
        ("delta_call", said(Part::Delta(call))),
        ("finished", said(Part::Finished(finished))),
        ("broke", codec::encode(&Said::Broke(EngineError::Failed { what: "it broke".into() }))),
        ("rejected", codec::encode(&Said::Rejected(rejected))),
        ("reply_tokens", codec::encode(&Said::Reply(Reply::Tokens { ids: vec![1], pieces: vec![vec![104]] }))),
        ("reply_vectors", codec::encode(&Said::Reply(Reply::Vectors(embedded)))),
    ]
}

#[test]
fn fuzzing_begins_with_real_messages() {
    for (target, seeds) in [("membership", membership()), ("calls", calls())] {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fuzz/seeds").join(target);
        for (name, bytes) in seeds {
            let file = root.join(name);
            if std::env::var_os("WRITE_SEEDS").is_some() {
                fs::create_dir_all(&root).unwrap();
                fs::write(&file, &bytes).unwrap();
            }
            let found = fs::read(&file).unwrap_or_default();
            assert_eq!(found, bytes, "{} is not today's message: run with WRITE_SEEDS=1", file.display());
        }
    }
}
