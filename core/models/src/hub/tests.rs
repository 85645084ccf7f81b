//! Against a small server that answers as the hub does.

use std::{
    collections::BTreeMap,
    fs,
    io::{BufRead, BufReader, Write},
    net::{TcpListener, TcpStream},
    sync::atomic::{AtomicUsize, Ordering},
};

use super::*;

const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

/// The repository `o/r` over HTTP.
pub(crate) struct Server {
    pub endpoint: String,
    requests: Arc<AtomicUsize>,
}

pub(crate) fn serve(files: &[(&str, &[u8])]) -> Server {
    serve_with(files, |_| None)
}

/// `spoil` gives another body for a file's GET.
fn serve_with(files: &[(&str, &[u8])], spoil: fn(&str) -> Option<&'static [u8]>) -> Server {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let endpoint = format!("http://{}", listener.local_addr().unwrap());
    let files: Arc<BTreeMap<String, Vec<u8>>> =
        Arc::new(files.iter().map(|(name, content)| ((*name).to_owned(), content.to_vec())).collect());
    let requests = Arc::new(AtomicUsize::new(0));
    let counter = requests.clone();
    std::thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            let (files, counter) = (files.clone(), counter.clone());
            std::thread::spawn(move || {
                let _ = answer(stream, &files, &counter, spoil);
            });
        }
    });
    Server { endpoint, requests }
}

fn answer(
    stream: TcpStream,
    files: &BTreeMap<String, Vec<u8>>,
    counter: &AtomicUsize,
    spoil: fn(&str) -> Option<&'static [u8]>,
) -> std::io::Result<()> {
    let mut reader = BufReader::new(stream.try_clone()?);
    let mut line = String::new();
    reader.read_line(&mut line)?;
    loop {
        let mut header = String::new();
        if reader.read_line(&mut header)? <= 2 {
            break;
        }
    }
    counter.fetch_add(1, Ordering::SeqCst);
    let mut words = line.split_whitespace();
    let (method, target) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
    let path = target.split('?').next().unwrap_or_default();
    let (status, body, name) = if path.starts_with("/api/models/o/r/tree/") {
        let list: Vec<_> = files
            .iter()
            .map(|(path, content)| serde_json::json!({"type": "file", "oid": "0", "size": content.len(), "path": path}))
            .collect();
        ("200 OK", serde_json::to_vec(&list).unwrap(), None)
    } else if path.starts_with("/api/models/o/closed/") {
        ("401 Unauthorized", b"{}".to_vec(), None)
    } else if let Some(name) = path.strip_prefix("/o/r/resolve/main/").filter(|name| files.contains_key(*name)) {
        let body = spoil(name).filter(|_| method == "GET").map_or_else(|| files[name].clone(), <[u8]>::to_vec);
        ("200 OK", body, Some(name))
    } else {
        ("404 Not Found", b"{}".to_vec(), None)
    };
    let mut stream = stream;
    write!(stream, "HTTP/1.1 {status}\r\nContent-Length: {}\r\nConnection: close\r\n", body.len())?;
    if let Some(name) = name {
        let etag: String = name.bytes().map(|byte| format!("{byte:02x}")).collect();
        write!(stream, "ETag: \"{etag}\"\r\nX-Repo-Commit: {COMMIT}\r\n")?;
    }
    stream.write_all(b"\r\n")?;
    if method == "GET" {
        stream.write_all(&body)?;
    }
    stream.flush()
}

fn hub_ref(file: Option<&str>, quant: Option<&str>) -> HubRef {
    HubRef { repo: "o/r".into(), file: file.map(Into::into), revision: None, quant: quant.map(Into::into) }
}

async fn locate(hub: &Hub, reference: &HubRef, want: Want, offline: bool) -> Result<Artifact, FetchError> {
    hub.locate(reference, "o/r", "o/r", want, offline, &ProgressSink::silent()).await
}

const SHARDED: &[(&str, &[u8])] = &[
    ("README.md", b"not needed"),
    ("config.json", b"{}"),
    ("tokenizer.json", b"{}"),
    ("chat_template.jinja", b"T"),
    (
        "model.safetensors.index.json",
        br#"{"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}"#,
    ),
    ("model-00001-of-00002.safetensors", b"one"),
    ("model-00002-of-00002.safetensors", b"two!"),
    ("other.safetensors", b"not needed"),
];

#[tokio::test]
async fn a_sharded_repository_comes_with_its_sidecars_and_stays() {
    let (server, cache) = (serve(SHARDED), tempfile::tempdir().unwrap());
    let hub = Hub::at(&server.endpoint, cache.path()).unwrap();
    let reports = Arc::new(Mutex::new(Vec::new()));
    let seen = reports.clone();
    let sink = ProgressSink::new(move |progress| seen.lock().unwrap().push(progress));
    let artifact = hub.locate(&hub_ref(None, None), "o/r", "o/r", Want::Any, false, &sink).await.unwrap();
    assert_eq!((artifact.name.as_str(), artifact.format), ("o/r", WeightFormat::Safetensors));
    let contents: Vec<_> = artifact.weights.iter().map(|path| fs::read(path).unwrap()).collect();
    assert_eq!(contents, [&b"one"[..], b"two!"]);
    assert_eq!(fs::read(artifact.root.join("chat_template.jinja")).unwrap(), b"T");
    assert!(!artifact.root.join("README.md").exists() && !artifact.root.join("other.safetensors").exists());
    let last = reports.lock().unwrap().pop().unwrap();
    assert_eq!((last.done, last.total), (4, Some(4)));

    // Once there, nothing is asked, online or offline.
    let asked = server.requests.load(Ordering::SeqCst);
    for offline in [false, true] {
        assert_eq!(locate(&hub, &hub_ref(None, None), Want::Safetensors, offline).await.unwrap(), artifact);
    }
    let named = hub_ref(Some("model.safetensors.index.json"), None);
    assert_eq!(locate(&hub, &named, Want::Safetensors, true).await.unwrap(), artifact);
    assert_eq!(server.requests.load(Ordering::SeqCst), asked);
    let listed = hub.repositories();
    assert_eq!(listed, [("o/r".to_owned(), artifact.root.clone(), WeightFormat::Safetensors, 7)]);

    // Without the tokenizer it is fetched again if it can be, and used as it is if not.
    discard(&artifact.root.join("tokenizer.json"));
    assert_eq!(locate(&hub, &hub_ref(None, None), Want::Any, true).await.unwrap(), artifact);
    let gone = Hub::at("http://127.0.0.1:9", cache.path()).unwrap();
    assert_eq!(locate(&gone, &hub_ref(None, None), Want::Any, false).await.unwrap(), artifact);
    assert_eq!(locate(&hub, &hub_ref(None, None), Want::Any, false).await.unwrap(), artifact);
    assert!(artifact.root.join("tokenizer.json").is_file());

    // A shard that went missing is fetched again.
    discard(&artifact.weights[1]);
    assert!(matches!(locate(&hub, &hub_ref(None, None), Want::Any, true).await, Err(FetchError::Offline { .. })));
    assert_eq!(locate(&hub, &hub_ref(None, None), Want::Any, false).await.unwrap(), artifact);
    assert_eq!(fs::read(&artifact.weights[1]).unwrap(), b"two!");
}

#[tokio::test]
async fn quantizations_and_files_are_picked() {
    let files: &[(&str, &[u8])] =
        &[("m-Q4_K_M.gguf", b"GGUF4"), ("sub/m-Q8_0.gguf", b"GGUF8"), ("mmproj-m.gguf", b"GGUF")];
    let (server, cache) = (serve(files), tempfile::tempdir().unwrap());
    let hub = Hub::at(&server.endpoint, cache.path()).unwrap();
    let several = locate(&hub, &hub_ref(None, None), Want::Any, false).await.unwrap_err();
    assert!(matches!(several, FetchError::Probe(ProbeError::Ambiguous { .. })), "{several}");
    let picked = locate(&hub, &hub_ref(None, Some("Q8_0")), Want::Any, false).await.unwrap();
    assert_eq!(fs::read(&picked.weights[0]).unwrap(), b"GGUF8");
    let named = locate(&hub, &hub_ref(Some("sub/m-Q8_0.gguf"), None), Want::Gguf, true).await.unwrap();
    assert!(named.root.ends_with("sub"));
    let wrong = locate(&hub, &hub_ref(None, None), Want::Safetensors, false).await.unwrap_err();
    assert!(matches!(wrong, FetchError::WrongFormat { .. }), "{wrong}");
    let missing = locate(&hub, &hub_ref(Some("x.gguf"), None), Want::Any, false).await.unwrap_err();
    assert!(matches!(missing, FetchError::NotFound { .. }), "{missing}");
}

#[tokio::test]
async fn refusals_and_absence_are_told_apart() {
    let (server, cache) = (serve(SHARDED), tempfile::tempdir().unwrap());
    let hub = Hub::at(&server.endpoint, cache.path()).unwrap();
    let of = |repo: &str| HubRef { repo: repo.into(), ..hub_ref(None, None) };
    assert!(matches!(locate(&hub, &of("o/closed"), Want::Any, false).await, Err(FetchError::Denied { .. })));
    assert!(matches!(locate(&hub, &of("o/none"), Want::Any, false).await, Err(FetchError::NotFound { .. })));
}

#[tokio::test]
async fn a_body_of_another_size_is_not_kept() {
    let spoiled = |name: &str| (name == "model.safetensors").then_some(&b"<html>try again later</html>"[..]);
    let files: &[(&str, &[u8])] =
        &[("config.json", b"{}"), ("tokenizer.json", b"{}"), ("model.safetensors", b"weights")];
    let (server, cache) = (serve_with(files, spoiled), tempfile::tempdir().unwrap());
    let hub = Hub::at(&server.endpoint, cache.path()).unwrap();
    let error = locate(&hub, &hub_ref(None, None), Want::Any, false).await.unwrap_err();
    assert!(error.to_string().contains("28 bytes arrived, the hub lists 7"), "{error}");
    let kept = local::files_below(cache.path());
    assert!(!kept.iter().any(|file| file.contains("model.safetensors")), "{kept:?}");
    assert!(matches!(locate(&hub, &hub_ref(None, None), Want::Any, true).await, Err(FetchError::Offline { .. })));
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
        let error = locate(&hub, &hub_ref(None, None), Want::Any, false).await.unwrap_err();
        assert!(matches!(error, FetchError::Unreachable { .. }), "{error}");
        assert!(begun.elapsed() < ANSWER_TIMEOUT + Duration::from_secs(5));
    }
}
