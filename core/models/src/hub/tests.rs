//! Against a stand-in for the hub.

mod kept;

use std::{
    fs,
    net::TcpListener,
    sync::{Arc, Mutex},
    time::Instant,
};

use conformance::hub::{Hub as StandIn, Trouble, git_hash, sha256};
use mesh_core::{Hint, WeightFormat};

use super::*;
use crate::{choice::Room, reference::HubRef, store::Want, testing::GgufWriter};

struct House {
    server: StandIn,
    cache: tempfile::TempDir,
    hub: Hub,
}

fn house(files: &[(&str, &[u8])]) -> House {
    let (server, cache) = (StandIn::with("o/r", files), tempfile::tempdir().unwrap());
    let hub = Hub::at(&server.endpoint, cache.path()).unwrap();
    House { server, cache, hub }
}

fn of(file: Option<&str>, quant: Option<&str>) -> HubRef {
    HubRef { repo: "o/r".into(), file: file.map(Into::into), revision: None, quant: quant.map(Into::into) }
}

async fn locate(hub: &Hub, what: &HubRef, want: Want, offline: bool) -> Result<Artifact, FetchError> {
    let asked = Asked { hub: what, name: "o/r", reference: "o/r", want, room: None };
    hub.locate(asked, offline, &ProgressSink::silent()).await
}

impl House {
    async fn any(&self) -> Result<Artifact, FetchError> {
        locate(&self.hub, &of(None, None), Want::Any, false).await
    }

    async fn offline(&self) -> Result<Artifact, FetchError> {
        locate(&self.hub, &of(None, None), Want::Any, true).await
    }

    fn blob(&self, name: &str) -> PathBuf {
        self.cache.path().join("models--o--r/blobs").join(name)
    }

    /// Files that are not whole.
    fn partial(&self) -> Vec<String> {
        let files = local::files_below(self.cache.path());
        files.into_iter().filter(|file| file.ends_with(cache::PARTIAL)).collect()
    }
}

const INDEX_TEXT: &[u8] =
    br#"{"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}"#;
const SHARDED: &[(&str, &[u8])] = &[
    ("README.md", b"not needed"),
    ("additional_chat_templates/tool_use.jinja", b"tools"),
    ("additional_chat_templates/notes.txt", b"not needed"),
    ("chat_template.jinja", b"T"),
    ("config.json", b"{}"),
    ("model-00001-of-00002.safetensors", b"one"),
    ("model-00002-of-00002.safetensors", b"two!"),
    ("model.safetensors.index.json", INDEX_TEXT),
    ("other.safetensors", b"not needed"),
    ("tokenizer.json", b"{\"a\": 1}"),
    ("tokenizer.model", b"not needed beside tokenizer.json"),
];
/// Large enough to be cut in the middle.
const WEIGHTS: &[u8] = &[7; 300_000];
const SINGLE: &[(&str, &[u8])] =
    &[("config.json", b"{}"), ("model.safetensors", WEIGHTS), ("tokenizer.json", b"{\"a\": 1}")];

#[tokio::test]
async fn a_sharded_repository_comes_with_its_sidecars_and_stays() {
    let house = house(SHARDED);
    house.server.page(3);
    let reports = Arc::new(Mutex::new(Vec::new()));
    let seen = reports.clone();
    let sink = ProgressSink::new(move |progress| seen.lock().unwrap().push(progress));
    let what = of(None, None);
    let asked = Asked { hub: &what, name: "o/r", reference: "o/r", want: Want::Any, room: None };
    let artifact = house.hub.locate(asked, false, &sink).await.unwrap();
    assert_eq!((artifact.name.as_str(), artifact.format), ("o/r", WeightFormat::Safetensors));
    let contents: Vec<_> = artifact.weights.iter().map(|path| fs::read(path).unwrap()).collect();
    assert_eq!(contents, [&b"one"[..], b"two!"]);
    let there = local::files_below(&artifact.root);
    let wanted = |(name, content): &&(&str, &[u8])| !content.starts_with(b"not needed") && !name.is_empty();
    let wanted: Vec<&str> = SHARDED.iter().filter(wanted).map(|(name, _)| *name).collect();
    assert_eq!(there, wanted);
    // A bar for each file, and one for all of them; both are over at the end.
    let over: Vec<_> = reports.lock().unwrap().iter().filter(|at| Some(at.done) == at.total).cloned().collect();
    let names: Vec<String> = over.iter().map(|progress| format!("{:?}", progress.stage)).collect();
    for file in ["config.json", "model-00002-of-00002.safetensors", "o/r, 6 files"] {
        assert!(names.iter().any(|name| name.contains(file)), "{file}: {names:?}");
    }
    // No token is asked for and none is sent; large files are fetched where the hub says.
    assert!(house.server.requests().iter().all(|request| !request.token));

    // Once there, nothing is asked, online or offline.
    let requests = house.server.requests().len();
    for offline in [false, true] {
        assert_eq!(locate(&house.hub, &what, Want::Safetensors, offline).await.unwrap(), artifact);
    }
    assert_eq!(locate(&house.hub, &of(Some(INDEX), None), Want::Safetensors, true).await.unwrap(), artifact);
    assert_eq!(house.server.requests().len(), requests);
    let listed = house.hub.repositories();
    assert_eq!(listed, [("o/r".to_owned(), artifact.root.clone(), WeightFormat::Safetensors, 7)]);

    // Without a file of the list it is fetched again if it can be, and used as it is if not.
    for file in ["tokenizer.json", "additional_chat_templates/tool_use.jinja"] {
        discard(&artifact.root.join(file));
        assert_eq!(house.offline().await.unwrap(), artifact);
        let gone = Hub::at("http://127.0.0.1:9", house.cache.path()).unwrap();
        assert_eq!(locate(&gone, &what, Want::Any, false).await.unwrap(), artifact);
        assert_eq!(house.any().await.unwrap(), artifact);
        assert!(artifact.root.join(file).is_file(), "{file}");
    }
    // A shard that went missing is fetched again.
    discard(&artifact.weights[1]);
    assert!(matches!(house.offline().await, Err(FetchError::Offline { .. })));
    assert_eq!(house.any().await.unwrap(), artifact);
    assert_eq!(fs::read(&artifact.weights[1]).unwrap(), b"two!");
}

#[tokio::test]
async fn blobs_are_called_as_other_tools_call_them() {
    let house = house(SINGLE);
    let artifact = house.any().await.unwrap();
    assert_eq!(fs::read(house.blob(&sha256(WEIGHTS))).unwrap(), WEIGHTS);
    assert_eq!(fs::read(house.blob(&git_hash(b"{}"))).unwrap(), b"{}");
    let link = fs::read_link(artifact.root.join("model.safetensors")).unwrap();
    assert_eq!(link, Path::new("../../blobs").join(sha256(WEIGHTS)));
    let main = fs::read_to_string(house.cache.path().join("models--o--r/refs/main")).unwrap();
    assert!(artifact.root.ends_with(&main));
}

#[tokio::test]
async fn what_was_cut_goes_on_where_it_was() {
    let house = house(SINGLE);
    house.server.trouble("o/r/model.safetensors", Trouble::Cut(100_000));
    house.server.trouble("o/r/model.safetensors", Trouble::Cut(50_000));
    house.server.trouble("o/r/config.json", Trouble::Cut(1));
    let artifact = house.any().await.unwrap();
    assert_eq!(fs::read(&artifact.weights[0]).unwrap(), WEIGHTS);
    assert_eq!(house.server.fetched("model.safetensors"), [0, 100_000, 150_000]);
    assert_eq!(house.server.fetched("config.json"), [0, 1]);
    assert!(house.partial().is_empty());
}

#[tokio::test]
async fn what_another_process_left_is_taken_up_if_it_is_right() {
    let weights = sha256(WEIGHTS);
    for (left, requests) in [
        (WEIGHTS[..1000].to_vec(), vec![1000]),
        // Wrong bytes show at the end, and then it is fetched whole.
        (vec![8; 1000], vec![1000, 0]),
        // Longer than it can be.
        (vec![7; WEIGHTS.len() + 1], vec![0]),
        // Whole, but never put in place.
        (WEIGHTS.to_vec(), vec![]),
    ] {
        let house = house(SINGLE);
        fs::create_dir_all(house.blob("")).unwrap();
        fs::write(house.blob(&format!("{weights}{}", cache::PARTIAL)), left).unwrap();
        let artifact = house.any().await.unwrap();
        assert_eq!(fs::read(&artifact.weights[0]).unwrap(), WEIGHTS);
        assert_eq!(house.server.fetched("model.safetensors"), requests);
    }
}

#[tokio::test]
async fn a_server_without_ranges_is_asked_for_all() {
    let house = house(SINGLE);
    house.server.trouble("o/r/model.safetensors", Trouble::Cut(1000));
    house.server.trouble("o/r/model.safetensors", Trouble::NoRanges);
    let artifact = house.any().await.unwrap();
    assert_eq!(fs::read(&artifact.weights[0]).unwrap(), WEIGHTS);
    assert_eq!(house.server.fetched("model.safetensors"), [0, 1000]);
}

#[tokio::test]
async fn corruption_is_found_and_not_kept() {
    let house = house(SINGLE);
    house.server.trouble("o/r/model.safetensors", Trouble::Corrupt);
    let error = house.any().await.unwrap_err();
    assert!(matches!(error, FetchError::Checksum { .. }), "{error}");
    assert!(!house.blob(&sha256(WEIGHTS)).exists() && house.partial().is_empty());
    assert!(matches!(house.offline().await, Err(FetchError::Offline { .. })));
    // A small file is no exception, and the next try is a new one.
    let house = self::house(SINGLE);
    house.server.trouble("o/r/config.json", Trouble::Corrupt);
    assert!(matches!(house.any().await, Err(FetchError::Checksum { .. })));
    house.any().await.unwrap();

    let house = self::house(SINGLE);
    house.server.trouble("o/r/config.json", Trouble::Longer);
    house.server.trouble("o/r/model.safetensors", Trouble::Longer);
    house.any().await.unwrap();
    for _ in 0..10 {
        house.server.put("o/r", &[("config.json", b"{\"b\": 2}"), SINGLE[1], SINGLE[2]]);
        house.server.trouble("o/r/config.json", Trouble::Longer);
    }
    fs::remove_dir_all(house.cache.path().join("models--o--r")).unwrap();
    let error = house.any().await.unwrap_err().to_string();
    assert!(error.contains("more arrives than the 8 bytes that the hub lists"), "{error}");
}

#[tokio::test]
async fn busy_hubs_are_asked_again_when_they_say() {
    let house = house(SINGLE);
    house.server.trouble("o/r", Trouble::Status(429, Some(1)));
    house.server.trouble("o/r", Trouble::Status(503, None));
    house.server.trouble("o/r/model.safetensors", Trouble::Status(500, None));
    house.server.trouble("o/r/model.safetensors", Trouble::Status(429, Some(1)));
    house.server.trouble("o/r/config.json", Trouble::Status(504, Some(0)));
    let begun = Instant::now();
    house.any().await.unwrap();
    // One second for the list, one for the file.
    assert!(begun.elapsed() >= Duration::from_secs(2));

    // There is an end to it.
    let house = self::house(SINGLE);
    for _ in 0..20 {
        house.server.trouble("o/r/model.safetensors", Trouble::Status(503, None));
    }
    let error = house.any().await.unwrap_err().to_string();
    assert!(error.contains("o/r/model.safetensors failed: the hub answers 503"), "{error}");
    let tries = house.server.requests().iter().filter(|one| one.target.contains("model.safetensors")).count();
    assert_eq!(tries, 6);
    let house = self::house(SINGLE);
    house.server.trouble("o/r", Trouble::Status(429, Some(3600)));
    let error = house.any().await.unwrap_err().to_string();
    assert!(error.contains("it asks to come back in 3600 s"), "{error}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn who_wants_the_same_file_shares_its_download() {
    let house = Arc::new(house(SINGLE));
    house.server.trouble("o/r/model.safetensors", Trouble::Pause(1000));
    // Two processes would have a hub each.
    let other = Arc::new(Hub::at(&house.server.endpoint, house.cache.path()).unwrap());
    let mut tasks = tokio::task::JoinSet::new();
    for task in 0..6 {
        let (house, other) = (house.clone(), other.clone());
        tasks.spawn(async move {
            let hub = if task % 2 == 0 { &house.hub } else { &*other };
            locate(hub, &of(None, None), Want::Any, false).await.unwrap()
        });
    }
    let waiting = house.clone();
    tokio::task::spawn_blocking(move || waiting.server.wait_for_pauses(1)).await.unwrap();
    house.server.release();
    let artifacts = tasks.join_all().await;
    assert!(artifacts.iter().all(|artifact| *artifact == artifacts[0]));
    assert_eq!(house.server.fetched("model.safetensors"), [0], "fetched once");
    assert_eq!(fs::read(&artifacts[0].weights[0]).unwrap(), WEIGHTS);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_given_up_never_looks_whole_and_is_taken_up_again() {
    let house = Arc::new(house(SHARDED));
    house.server.trouble("o/r/model-00002-of-00002.safetensors", Trouble::Pause(2));
    let begun = house.clone();
    let task = tokio::spawn(async move { begun.any().await });
    let waiting = house.clone();
    tokio::task::spawn_blocking(move || waiting.server.wait_for_pauses(1)).await.unwrap();
    let partial = house.blob(&format!("{}{}", sha256(b"two!"), cache::PARTIAL));
    while fs::metadata(&partial).map_or(0, |metadata| metadata.len()) < 2 {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    task.abort();
    assert!(task.await.unwrap_err().is_cancelled());
    assert!(matches!(house.offline().await, Err(FetchError::Offline { .. })));
    assert!(house.hub.repositories().is_empty());
    let artifact = house.any().await.unwrap();
    assert_eq!(fs::read(&artifact.weights[1]).unwrap(), b"two!");
    assert_eq!(house.server.fetched("model-00002-of-00002.safetensors"), [0, 2]);
    house.server.release();
}

#[tokio::test]
async fn a_new_commit_does_not_take_the_old_one_away_before_it_is_there() {
    let house = house(SINGLE);
    let old = house.any().await.unwrap();
    let fresh = house.server.put("o/r", &[SINGLE[0], ("model.safetensors", b"newer"), SINGLE[2]]);
    // What is there is used until somebody asks for more.
    assert_eq!(house.any().await.unwrap(), old);
    let pinned = HubRef { revision: Some(fresh.clone()), ..of(None, None) };
    house.server.trouble("o/r/model.safetensors", Trouble::Corrupt);
    assert!(locate(&house.hub, &pinned, Want::Any, false).await.is_err());
    assert_eq!(house.offline().await.unwrap(), old);
    let new = locate(&house.hub, &pinned, Want::Any, false).await.unwrap();
    assert!(new.root.ends_with(&fresh));
    assert_eq!(house.offline().await.unwrap(), old, "main is what it was");
    let unknown = HubRef { revision: Some("v9".into()), ..of(None, None) };
    let error = locate(&house.hub, &unknown, Want::Any, false).await.unwrap_err();
    assert_eq!(error.to_string(), "the hub has no o/r@v9");
}

#[tokio::test]
async fn quantizations_and_files_are_picked() {
    let files: &[(&str, &[u8])] =
        &[("m-Q4_K_M.gguf", b"GGUF4"), ("sub/m-Q8_0.gguf", b"GGUF88"), ("mmproj-m.gguf", b"GGUF")];
    let house = house(files);
    let several = house.any().await.unwrap_err();
    assert!(matches!(several, FetchError::Probe(ProbeError::Ambiguous { .. })), "{several}");
    let picked = locate(&house.hub, &of(None, Some("Q8_0")), Want::Any, false).await.unwrap();
    assert_eq!(fs::read(&picked.weights[0]).unwrap(), b"GGUF88");
    let named = locate(&house.hub, &of(Some("sub/m-Q8_0.gguf"), None), Want::Gguf, true).await.unwrap();
    assert!(named.root.ends_with("sub"));
    // What happens to be on disk does not settle it, unless there is no other way.
    let several = house.any().await.unwrap_err();
    assert!(matches!(several, FetchError::Probe(ProbeError::Ambiguous { .. })), "{several}");
    assert_eq!(house.offline().await.unwrap().weights, picked.weights);
    let wrong = locate(&house.hub, &of(None, None), Want::Safetensors, false).await.unwrap_err();
    assert!(matches!(wrong, FetchError::WrongFormat { .. }), "{wrong}");
    let missing = locate(&house.hub, &of(Some("m-Q4_K.gguf"), None), Want::Any, false).await.unwrap_err();
    assert!(missing.to_string().contains("did you mean o/r/m-Q4_K_M.gguf"), "{missing}");
    // With a memory of so much the largest that fits is taken.
    let what = of(None, None);
    let room = |memory_bytes| Some(Room { memory_bytes, context_bytes: 0, context_tokens: 0 });
    for (memory, content) in [(6, &b"GGUF88"[..]), (5, b"GGUF4")] {
        let asked = Asked { hub: &what, name: "o/r", reference: "o/r", want: Want::Any, room: room(memory) };
        let artifact = house.hub.locate(asked, false, &ProgressSink::silent()).await.unwrap();
        assert_eq!(fs::read(&artifact.weights[0]).unwrap(), content);
    }
}

#[tokio::test]
async fn what_a_context_takes_is_read_before_the_weights_are_fetched() {
    // A key and a value of 32 heads for each token and 1024 layers: 128 KiB a token.
    let header = |kind: u8| {
        let writer = GgufWriter::new("x").number("x.block_count", 1024).number("x.attention.head_count_kv", 32);
        let writer = writer.number("x.attention.key_length", 1).number("x.attention.value_length", 1);
        [writer.finish(), vec![kind; 200_000]].concat()
    };
    let (small, mut large) = (header(4), header(8));
    large.extend([8; 100_000]);
    let house = house(&[("m-Q4_0.gguf", &small), ("m-Q8_0.gguf", &large)]);
    let (what, context_tokens) = (of(None, None), 16);
    let context = 16 * 128 * 1024;
    let fitting = async |memory_bytes: usize, offline| {
        let room = Some(Room { memory_bytes: memory_bytes as u64, context_bytes: 0, context_tokens });
        let asked = Asked { hub: &what, name: "o/r", reference: "o/r", want: Want::Any, room };
        let artifact = house.hub.locate(asked, offline, &ProgressSink::silent()).await?;
        Ok::<_, FetchError>(fs::metadata(&artifact.weights[0]).unwrap().len() as usize)
    };
    let none = fitting(context + small.len() - 1, false).await.unwrap_err();
    assert!(matches!(none, FetchError::Probe(ProbeError::Ambiguous { .. })), "{none}");
    assert_eq!(fitting(context + large.len() - 1, false).await.unwrap(), small.len());
    // Once known it is not asked for again.
    let requests = house.server.requests().len();
    assert_eq!(fitting(context + large.len() - 1, false).await.unwrap(), small.len());
    assert_eq!(house.server.requests().len(), requests);
    assert_eq!(fitting(context + large.len(), false).await.unwrap(), large.len());
}

#[tokio::test]
async fn refusals_are_told_apart_and_name_the_next_command() {
    let house = house(SHARDED);
    let server = &house.server;
    server.put("o/gated", SINGLE);
    server.gate("o/gated");
    server.put("o/pickled", &[("config.json", b"{}"), ("pytorch_model.bin", b"x"), ("tokenizer.json", b"{}")]);
    server.put("o/adapter", &[("adapter_config.json", b"{}"), ("adapter_model.safetensors", b"x")]);
    server.put("o/bare", &[("model.safetensors", b"x"), ("tokenizer.json", b"{}")]);
    server.put("o/mute", &[("model.safetensors", b"x"), ("config.json", b"{}")]);
    server.put(
        "o/torn",
        &[("config.json", b"{}"), ("model.safetensors.index.json", INDEX_TEXT), ("tokenizer.json", b"{}")],
    );
    server.put("o/both", &[SINGLE[0], SINGLE[1], SINGLE[2], ("m-Q4_0.gguf", b"GGUF"), ("m-Q8_0.gguf", b"GGUF1")]);
    server.put("o/hostile", &[("config.json", b"{}"), ("../../../x.safetensors", b"x"), ("tokenizer.json", b"{}")]);
    server.put(
        "o/climbing",
        &[
            ("config.json", b"{}"),
            ("model.safetensors.index.json", br#"{"weight_map": {"a": "../../../../x.safetensors"}}"#),
            ("tokenizer.json", b"{}"),
        ],
    );
    let mut said = Vec::new();
    for (reference, want) in [
        ("o/gated", Want::Any),
        ("o/none", Want::Any),
        ("o/r@v2", Want::Any),
        ("o/r/model-00003-of-00002.safetensors", Want::Any),
        ("o/r", Want::Gguf),
        ("o/both", Want::Any),
        ("o/both:Q4_1", Want::Any),
        ("o/pickled", Want::Any),
        ("o/adapter", Want::Any),
        ("o/bare", Want::Any),
        ("o/mute", Want::Any),
        ("o/torn", Want::Any),
        ("o/hostile", Want::Any),
        ("o/climbing", Want::Any),
    ] {
        let Ok(crate::reference::Reference::Hub(what)) = crate::reference::Reference::parse(reference, |_| false)
        else {
            panic!("{reference}")
        };
        let asked = Asked { hub: &what, name: reference, reference, want, room: None };
        let error = house.hub.locate(asked, false, &ProgressSink::silent()).await.unwrap_err();
        let (error, hint) = (error.to_string(), error.hint().unwrap());
        let error = error.replace(&*house.cache.path().to_string_lossy(), "CACHE");
        let mut lines = vec![format!("{reference}: {error}\nhint: {hint}\n")];
        said.append(&mut lines);
    }
    let said = said.join("\n");
    let commit = said.find("snapshots/").map(|at| said[at + 10..at + 50].to_owned()).unwrap_or_default();
    insta::assert_snapshot!(said.replace(&commit, "COMMIT"));
    let outside = local::files_below(house.cache.path().parent().unwrap());
    assert!(!outside.iter().any(|file| file.ends_with("/x.safetensors")), "{outside:?}");
}

#[cfg(unix)]
#[tokio::test]
async fn links_that_leave_the_cache_are_refused() {
    let house = house(SINGLE);
    let artifact = house.any().await.unwrap();
    let outside = tempfile::NamedTempFile::new().unwrap();
    fs::write(outside.path(), WEIGHTS).unwrap();
    fs::remove_file(&artifact.weights[0]).unwrap();
    std::os::unix::fs::symlink(outside.path(), &artifact.weights[0]).unwrap();
    for outcome in [house.any().await, house.offline().await] {
        let error = outcome.unwrap_err();
        assert!(matches!(error, FetchError::Outside { .. } | FetchError::Offline { .. }), "{error}");
    }
}

#[tokio::test]
async fn nobody_there_is_said_within_seconds() {
    let closed = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    // Accepts connections and says nothing.
    let silent = TcpListener::bind("127.0.0.1:0").unwrap();
    let cache = tempfile::tempdir().unwrap();
    for address in [closed, silent.local_addr().unwrap()] {
        let hub = Hub::at(&format!("http://{address}"), cache.path()).unwrap();
        let begun = Instant::now();
        let error = locate(&hub, &of(None, None), Want::Any, false).await.unwrap_err();
        assert!(matches!(error, FetchError::Unreachable { .. }), "{error}");
        assert!(begun.elapsed() < ANSWER_TIMEOUT + Duration::from_secs(5));
    }
}
