//! Looking after the cache.

use super::*;

#[tokio::test]
async fn what_is_kept_is_hashed_again_removed_and_swept() {
    let house = house(SHARDED);
    house.server.put("o/g", &[("m-Q4_0.gguf", b"GGUF4"), ("m-Q8_0.gguf", b"GGUF88")]);
    let artifact = house.any().await.unwrap();
    let silent = ProgressSink::silent();
    let reference = |text: &str| match crate::reference::Reference::parse(text, |_| false) {
        Ok(crate::reference::Reference::Hub(hub)) => hub,
        other => panic!("{other:?}"),
    };
    for text in ["o/g:Q4_0", "o/g:Q8_0"] {
        let hub = reference(text);
        let asked = Asked { hub: &hub, name: text, reference: text, want: Want::Any, room: None };
        house.hub.locate(asked, false, &silent).await.unwrap();
    }
    let verdicts = async |repo| {
        let checked = house.hub.verify(repo, true, &silent).await.unwrap();
        let bad = checked.iter().filter(|one| one.verdict != Verdict::Sound);
        (checked.len(), bad.map(|one| (one.file.clone(), one.verdict.clone())).collect::<Vec<_>>())
    };
    assert_eq!(verdicts(None).await, (9, vec![]));
    fs::write(fs::canonicalize(&artifact.weights[1]).unwrap(), b"two?").unwrap();
    fs::remove_file(fs::canonicalize(artifact.root.join("chat_template.jinja")).unwrap()).unwrap();
    let (count, bad) = verdicts(Some("o/r")).await;
    assert_eq!((count, bad.len()), (7, 2));
    assert_eq!(bad[0], ("chat_template.jinja".into(), Verdict::Missing));
    assert!(matches!(&bad[1].1, Verdict::Damaged { expected, .. } if expected.ends_with(&sha256(b"two!"))));
    // Without the list, blobs' names tell.
    fs::remove_dir_all(house.cache.path().join("models--o--r/.listings")).unwrap();
    assert_eq!(verdicts(Some("o/r")).await.1.len(), 2);
    assert!(matches!(house.hub.verify(Some("o/none"), true, &silent).await, Err(FetchError::NotCached { .. })));

    let remove = |text: &str| {
        let hub = reference(text);
        house.hub.remove(Asked { hub: &hub, name: text, reference: text, want: Want::Any, room: None })
    };
    let freed = remove("o/g:Q8_0").unwrap();
    assert_eq!(freed.bytes, 6, "{freed:?}");
    let left = local::files_below(&house.cache.path().join("models--o--g/blobs"));
    assert_eq!(left, [sha256(b"GGUF4")]);
    assert!(matches!(remove("o/none"), Err(FetchError::NotCached { .. })));

    // A second commit that no branch names, and what was left of a download; what is being fetched stays.
    let other = house.server.put("o/g", &[("m-Q4_0.gguf", b"GGUF4"), ("m-Q5_0.gguf", b"GGUF555")]);
    let text = format!("o/g/m-Q5_0.gguf@{other}");
    let hub = reference(&text);
    let asked = Asked { hub: &hub, name: "x", reference: &text, want: Want::Any, room: None };
    house.hub.locate(asked, false, &silent).await.unwrap();
    let blobs = house.cache.path().join("models--o--g/blobs");
    let (stale, busy) = ("1".repeat(64), "2".repeat(64));
    for name in [&stale, &busy] {
        fs::write(blobs.join(format!("{name}{}", cache::PARTIAL)), b"abc").unwrap();
    }
    let lock = house.hub.cache.folder("o/g").lock(&hash::Hash::named(&busy).unwrap());
    let lock = fs::File::create(lock).unwrap();
    lock.lock().unwrap();
    let freed = house.hub.prune().unwrap();
    assert_eq!(freed.bytes, 7 + 3, "{freed:?}");
    assert_eq!(local::files_below(&blobs).len(), 2, "the first commit's blob, and the busy one");
    assert_eq!(house.hub.prune().unwrap().bytes, 0);
    let freed = remove("o/r").unwrap();
    assert!(freed.bytes > 7 && !house.cache.path().join("models--o--r").exists());
}

#[tokio::test]
async fn searches_go_to_the_hub() {
    let house = house(SINGLE);
    house.server.put("org/Qwen3-4B-MLX", SINGLE);
    let found = house.hub.search("qwen3 4b", 5).await.unwrap();
    assert_eq!(found.iter().map(|found| found.repo.as_str()).collect::<Vec<_>>(), ["org/Qwen3-4B-MLX"]);
    assert!(house.hub.search("nothing like it", 5).await.unwrap().is_empty());
}
