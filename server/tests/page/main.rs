//! The page at `/`, as somebody uses it: a headless Chromium in front of a server with a scripted engine.

mod browser;
#[allow(dead_code, reason = "the server's own tests use the rest")]
#[path = "../server/fake.rs"]
mod fake;
#[allow(dead_code, reason = "the same")]
#[path = "../server/fake_mesh.rs"]
mod fake_mesh;

use std::sync::{Arc, atomic::Ordering};

use fake::{Fake, Form, Server, Step, eventually};
use fake_mesh::{FakeMesh, Peer};
use mesh_core::{FinishReason, Prompt, Sampling, node::Elsewhere};
use mesh_dialects as _;
use mesh_llm::{
    defaults::Manner,
    slots::{Keeping, RemoteModels, SlotPlan, Slots},
};

use browser::{Tab, chromium};

const STOP: Step = Step::Finish(FinishReason::Stop);

/// An answer with something of everything.
const ANSWER: &str = "**Paris** is the capital. It is on the `Seine`, see [here](https://example.org/).\n\n\
    1. one\n2. two\n   - inner\n\n\
    | District | People |\n|---|--:|\n| Paris | 2,102,650 |\n\n\
    ```rust\nfn main() {\n    println!(\"{}\", 1 < 2);\n}\n```\n\n\
    > It is said to be worth a mass.\n";

/// An answer that tries to be more than text.
const HOSTILE: &str = "<img src=x onerror=\"document.title='taken'\"><script>document.title='taken'</script>\n\n\
    before <b onclick=\"x()\">bold</b> [go](javascript:alert(1)) ![seen](https://example.org/seen.png)\n\n\
    <style>body { display: none }</style>\n\n[data](data:text/html,x) &lt;i&gt; done";

async fn opened(script: Vec<Step>) -> Option<(Server, Tab)> {
    let chromium = chromium()?;
    let server = Server::start(Form::Text, script).await;
    let tab = Tab::open(&chromium, &server.url).await;
    Some((server, tab))
}

fn prompt(server: &Server) -> String {
    match server.last_prompt() {
        Prompt::Text { text, .. } => text,
        other => panic!("{other:?}"),
    }
}

fn script(server: &Server, steps: &[Step]) {
    *server.fake.script.lock().unwrap() = steps.to_vec();
}

#[tokio::test(flavor = "multi_thread")]
async fn an_answer_is_streamed_and_its_reasoning_folded() {
    let steps = [
        Step::Reading(4096, 16_000),
        Step::Wait,
        Step::Text("<think>They want"),
        Step::Text(" a capital."),
        Step::Wait,
        Step::Text("</think>"),
        Step::Text(ANSWER),
        Step::Wait,
        Step::Text("\nDone."),
        STOP,
    ];
    let Some((server, tab)) = opened(steps.to_vec()).await else { return };
    tab.shows("#model-state", "not loaded").await;
    assert_eq!(
        tab.js::<Vec<String>>("[...document.querySelector('#model').options].map((o) => o.value)").await,
        [server.slots.iter().next().unwrap().name()]
    );
    tab.picture("welcome").await;

    tab.say("What is the capital\nof France?").await;
    tab.shows(".progress", "Reading the prompt, 4,096 of 16,000 tokens").await;
    assert_eq!(tab.js::<f64>("document.querySelector('progress').position").await, 4096.0 / 16_000.0);
    assert!(prompt(&server).contains("<user>What is the capital\nof France?<assistant>"), "{}", prompt(&server));
    let job = server.fake.jobs.lock().unwrap().last().unwrap().clone();
    assert_eq!((job.sampling, job.tokens_max), (Sampling::default(), None), "nothing is filled in");

    server.fake.steps.add_permits(1);
    tab.shows(".thoughts", "They want a capital.").await;
    assert!(tab.js::<bool>("document.querySelector('.reasoning').open").await);
    assert!(tab.js::<bool>("document.querySelector('#send').hidden && !document.querySelector('#stop').hidden").await);
    tab.picture("reasoning").await;

    server.fake.steps.add_permits(1);
    tab.until("the reasoning folds", "!document.querySelector('.reasoning').open").await;
    tab.shows(".answer", "Paris is the capital.").await;
    tab.shows(".stats", "to first token").await;

    server.fake.steps.add_permits(1);
    tab.answer_is("done").await;
    tab.shows(".answer", "Done.").await;
    tab.shows("#model-state", "ready, 4,096 tokens").await;
    for selector in [
        "strong",
        "ol > li > ul > li",
        "td[align=right]",
        "pre > code.language-rust",
        "blockquote",
        "a[rel='noopener noreferrer']",
    ] {
        assert!(tab.js::<bool>(&format!("!!document.querySelector('.answer').querySelector({selector:?})")).await);
    }
    let stats = tab.text(".stats").await;
    assert!(stats.contains("6 tokens") && stats.contains("prompt 7 (3 cached)"), "{stats}");
    assert!(stats.contains("tok/s") && !stats.contains('≈'), "{stats}");
    assert_eq!(tab.text(".reasoning summary").await.split(" for ").next(), Some("Reasoned"));
    tab.click(".reasoning summary").await;
    assert!(tab.js::<bool>("document.querySelector('.reasoning').open").await);
    tab.click(".reasoning summary").await;

    tab.picture("light").await;
    tab.scheme("dark").await;
    tab.picture("dark").await;
    tab.scheme("light").await;
    tab.size(390, 844, 2.0).await;
    tab.until("it fits a telephone", "document.documentElement.scrollWidth <= innerWidth").await;
    tab.picture("mobile").await;
    tab.close(&server.url).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_stopped_is_computed_no_further() {
    let Some((server, tab)) = opened(vec![Step::Queued(2), Step::Hang]).await else { return };
    let stopped = || server.fake.dropped.load(Ordering::SeqCst);
    tab.say("Hello").await;
    tab.shows(".progress", "Waiting in line, 2 ahead").await;
    tab.press("#prompt", "Escape").await;
    tab.answer_is("stopped").await;
    eventually("the stream is dropped", || stopped() == 1).await;

    script(&server, &[Step::Text("Hello "), Step::Text("there"), Step::Hang]);
    tab.click("[data-action=regenerate]").await;
    tab.shows(".answer", "Hello there").await;
    tab.click("#stop").await;
    tab.answer_is("stopped").await;
    tab.shows(".note", "Stopped").await;
    eventually("the stream is dropped", || stopped() == 2).await;
    assert_eq!(tab.js::<u32>("document.querySelectorAll('.turn').length").await, 2);
    assert_eq!(tab.text(".answer").await, "Hello there");

    // A new chat stops what is being written, too.
    tab.click("[data-action=regenerate]").await;
    tab.shows(".answer", "Hello there").await;
    tab.click("#new-chat").await;
    eventually("the stream is dropped", || stopped() == 3).await;
    tab.until("the send button is back", "!document.querySelector('#send').hidden").await;
    assert_eq!(tab.js::<u32>("document.querySelectorAll('.turn').length").await, 0);
    tab.close(&server.url).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_tool_call_is_a_card_that_takes_its_result() {
    let steps = [
        Step::Text("I look."),
        Step::Text(
            "<tool_call>{\"name\": \"weather\", \"arguments\": {\"city\": \"Paris\", \"days\": [1, 2]}}</tool_call>",
        ),
        STOP,
    ];
    let Some((server, tab)) = opened(steps.to_vec()).await else { return };
    tab.click("#settings-toggle").await;
    tab.write("#tools", "[{\"type\": \"function\", \"function\": {\"name\": \"weather\"}}]").await;
    tab.say("What is the weather?").await;
    tab.answer_is("done").await;
    assert!(prompt(&server).contains("[1 tools]"), "{}", prompt(&server));
    assert_eq!(tab.text(".call-name").await, "weather");
    assert_eq!(tab.text(".call-arguments").await, "{\n  \"city\": \"Paris\",\n  \"days\": [\n    1,\n    2\n  ]\n}");
    tab.picture("tool-call").await;

    script(&server, &[Step::Text("It is warm."), STOP]);
    tab.write(".call textarea", "31 degrees").await;
    tab.click(".send-results").await;
    tab.shows(".answer", "It is warm.").await;
    tab.answer_is("done").await;
    assert!(prompt(&server).contains("I look.<tool>31 degrees"), "{}", prompt(&server));
    assert_eq!(tab.text(".call-result pre").await, "31 degrees");
    tab.close(&server.url).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn errors_are_told_in_the_servers_words() {
    let Some((server, tab)) = opened(vec![Step::Text("half of"), Step::Fail]).await else { return };
    tab.say("Hello").await;
    tab.answer_is("failed").await;
    tab.shows(".error", "signal 9; last lines: ouch").await;
    assert_eq!(tab.text(".answer").await, "half of");
    assert_eq!(tab.complaints(), Vec::<String>::new());

    script(&server, &[Step::Text("whole"), STOP]);
    tab.click("#settings-toggle").await;
    for (typed, said) in [("9", "`temperature` is 9; it has to be between 0 and 2"), ("warm", "`temperature`")] {
        tab.write("#temperature", typed).await;
        tab.click(".error button").await;
        tab.shows(".error", said).await;
        // The browser itself tells of every refusal.
        let complaints = tab.complaints();
        assert!(complaints.len() == 1 && complaints[0].contains("400"), "{complaints:?}");
    }
    tab.picture("error").await;
    tab.write("#tools", "[").await;
    tab.click(".error button").await;
    tab.shows("#notice", "Tools is not JSON").await;
    tab.write("#tools", "").await;
    tab.write("#temperature", "0.5").await;
    tab.click(".error button").await;
    tab.shows(".answer", "whole").await;
    assert!(tab.js::<bool>("document.querySelector('#notice').hidden").await);
    tab.close(&server.url).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_set_is_sent() {
    let Some((server, tab)) = opened(vec![Step::Text("Yes."), STOP]).await else { return };
    tab.click("#settings-toggle").await;
    tab.write("#system", "Be brief.").await;
    for (field, value) in [("#temperature", "0.25"), ("#top_p", "0.5"), ("#max_tokens", "77"), ("#seed", "9")] {
        tab.write(field, value).await;
    }
    tab.write("#key", "secret").await;
    tab.run("document.querySelector('#thinking').value = 'false'").await;
    tab.say("First").await;
    tab.answer_is("done").await;
    assert_eq!(prompt(&server), "<system>Be brief.<user>First[thinking=False]<assistant>");
    let job = server.fake.jobs.lock().unwrap().last().unwrap().clone();
    let sampling = Sampling { temperature: Some(0.25), top_p: Some(0.5), seed: Some(9), ..Sampling::default() };
    assert_eq!((job.sampling, job.tokens_max), (sampling, Some(77)));
    let requests = tab.requests();
    let (_, key) = requests.iter().find(|(url, _)| url.ends_with("/v1/chat/completions")).unwrap();
    assert_eq!(key.as_deref(), Some("Bearer secret"));
    let kept = "[localStorage.length, sessionStorage.length, sessionStorage.getItem('mesh-llm.api-key')]";
    assert_eq!(tab.js::<(u32, u32, String)>(kept).await, (0, 1, "secret".into()));
    tab.click("#settings-close").await;

    tab.say("Second").await;
    tab.until("there are two answers", "document.querySelectorAll('.assistant[data-state=done]').length === 2").await;
    assert_eq!(prompt(&server), "<system>Be brief.<user>First<assistant>Yes.<user>Second[thinking=False]<assistant>");

    // What is edited takes the place of what followed.
    tab.run("document.querySelector('[data-action=edit]').click()").await;
    tab.write(".edit textarea", "Third").await;
    tab.press(".edit textarea", "Enter").await;
    tab.until("one is left", "document.querySelectorAll('.assistant[data-state=done]').length === 1").await;
    assert_eq!(prompt(&server), "<system>Be brief.<user>Third[thinking=False]<assistant>");
    assert_eq!(tab.text(".bubble").await, "Third");
    tab.close(&server.url).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_model_that_is_picked_is_asked_and_stays_picked_when_it_gets_its_name() {
    let Some(chromium) = chromium() else { return };
    let fakes = ["a", "b"].map(|name| Fake::new(Form::Text, vec![Step::Text(name), STOP]));
    let starters = ["a", "b"].iter().zip(&fakes).map(|(name, fake)| fake.starter(name, Form::Text).into()).collect();
    let server = Server::serve(fakes[0].clone(), Slots::spawn(starters, Keeping::default())).await;
    let tab = Tab::open(&chromium, &server.url).await;
    let labels = "[...document.querySelector('#model').options].map((option) => option.text)";
    assert_eq!(tab.js::<Vec<String>>(labels).await, ["a", "b (not loaded)"]);
    tab.press("#model", "ArrowDown").await;
    tab.until("b is picked", "document.querySelector('#model').value === 'b'").await;
    tab.say("Hello").await;
    tab.answer_is("done").await;
    assert_eq!(tab.text(".answer").await, "b");
    tab.shows("#model-state", "ready, 4,096 tokens").await;
    assert_eq!(tab.js::<Vec<String>>(labels).await, ["a (not loaded)", "org/b-model"]);
    assert_eq!(tab.js::<String>("document.querySelector('#model').value").await, "org/b-model");
    tab.close(&server.url).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_hostile_answer_is_text() {
    let steps = HOSTILE.split_inclusive(' ').map(Step::Text).chain([STOP]).collect();
    let Some((server, tab)) = opened(steps).await else { return };
    tab.say("Hello").await;
    tab.answer_is("done").await;
    assert_eq!(tab.js::<String>("document.title").await, "mesh-llm");
    let found = "[...document.querySelectorAll('.answer *')].map((e) => e.localName)\
                 .filter((name) => !['p', 'a'].includes(name))";
    assert_eq!(tab.js::<Vec<String>>(found).await, Vec::<String>::new());
    let links = "[...document.querySelectorAll('.answer a[href]')].map((a) => a.href)";
    assert_eq!(tab.js::<Vec<String>>(links).await, ["https://example.org/seen.png"]);
    let text = tab.text(".answer").await;
    for shown in ["<img src=x", "<script>document", "<b onclick=\"x()\">bold</b>", "<style>body", "<i> done"] {
        assert!(text.contains(shown), "{shown} in {text}");
    }
    tab.close(&server.url).await;
}

/// A name that tries to be more than one.
const HOSTILE_NAME: &str = "<img src=x onerror=\"document.title='taken'\"><b>two</b>";

/// A machine with a model of that name.
async fn peer(model: &str) -> Peer {
    let fake = Fake::new(Form::Text, vec![Step::Text("from there"), STOP]);
    let plan = SlotPlan { name: Some(model.to_owned()), ..fake.starter("peer", Form::Text).into() };
    Peer::with(fake, vec![plan], Vec::new()).await
}

#[tokio::test(flavor = "multi_thread")]
async fn machines_are_shown_with_their_models_as_they_come_and_go() {
    let Some(chromium) = chromium() else { return };
    let (one, two) = (peer("big").await, peer("<i>small</i>").await);
    let mesh = FakeMesh::new(&[("one", &one), (HOSTILE_NAME, &two)]);
    let fake = Fake::new(Form::Text, vec![Step::Text("from here"), STOP]);
    let remote = RemoteModels::new(vec![mesh.clone() as Arc<dyn Elsewhere>], Manner::default());
    let slots = Slots::spawn_beside(vec![fake.starter("own", Form::Text).into()], Keeping::default(), remote);
    let server = Server::serve(fake, slots).await;
    let tab = Tab::open(&chromium, &server.url).await;
    let looked = || tab.requests().iter().any(|(url, _)| url.ends_with("/v1/mesh"));
    assert!(!looked(), "nobody looks as long as the panel is not seen");
    tab.click("#settings-toggle").await;
    tab.shows("#machines-note", "Mesh lab; this one is here.").await;
    let rows = "[...document.querySelectorAll('#machines-list li')].map((row) => [...row.children].map((line) => line.innerText))";
    let hostile = vec![HOSTILE_NAME.to_owned(), "<i>small</i>".into(), "1.5 ms away · 0 sent there".into()];
    let row = |way: &str| vec!["one".to_owned(), "big".into(), way.into()];
    assert_eq!(tab.js::<Vec<Vec<String>>>(rows).await, [hostile.clone(), row("1.5 ms away · 0 sent there")]);
    tab.shows("#machines-route", "The next request for own is answered here").await;
    tab.run("document.querySelector('#machines').scrollIntoView()").await;
    tab.picture("machines").await;

    // What is asked of another machine is seen there.
    let pick = async |model: &str| {
        tab.run(&format!("document.querySelector('#model').value = {model:?}")).await;
        tab.run("document.querySelector('#model').dispatchEvent(new Event('change'))").await;
    };
    pick("big").await;
    tab.shows("#machines-route", "The next request for big is answered on another machine: ready there.\none").await;
    tab.say("Hello").await;
    tab.answer_is("done").await;
    assert_eq!(tab.text(".answer").await, "from there");
    mesh.count("one", |count| (count.failed, count.served) = (2, 3));
    tab.shows("#machines-list li", "1 sent there · 2 failed · 3 answered for it").await;

    // What is asked for has to be there: the browser itself tells of every refusal.
    pick("own").await;

    tab.shows("#machines-route", "The next request for own is answered here").await;
    mesh.lose("one");
    tab.shows("#machines-list li", "lost · 1 sent there").await;
    mesh.forget("one");
    tab.until("it is gone", "document.querySelectorAll('#machines-list li').length === 1").await;
    assert_eq!(tab.js::<Vec<Vec<String>>>(rows).await, [hostile]);
    mesh.forget(HOSTILE_NAME);
    tab.shows("#machines-list", "No other machine is there.").await;

    // Names are text wherever they are shown, and no address is shown at all.
    assert_eq!(tab.js::<String>("document.title").await, "mesh-llm");
    let made = "document.querySelectorAll('#machines img, #machines b, #machines i, #model img').length";
    assert_eq!(tab.js::<u32>(made).await, 0);
    let shown: String = tab.js("document.querySelector('#machines').innerText").await;
    assert!(!shown.contains("127.0.0.1") && !shown.contains("://"), "{shown}");

    tab.close(&server.url).await;
}
