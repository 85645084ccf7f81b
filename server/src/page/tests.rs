use std::{collections::BTreeSet, path::Path};

use super::*;

async fn get(path: &str) -> warp::http::Response<warp::hyper::body::Bytes> {
    warp::test::request().path(path).reply(&routes()).await
}

fn text(asset: &Asset) -> &'static str {
    std::str::from_utf8(asset.bytes).unwrap()
}

/// What stands between `before` and the next `after`, wherever it does.
fn between<'a>(text: &'a str, before: &str, after: char) -> Vec<&'a str> {
    text.split(before).skip(1).filter_map(|rest| rest.split(after).next()).collect()
}

fn ours() -> impl Iterator<Item = &'static Asset> {
    ASSETS.iter().filter(|asset| !asset.path.contains("/vendor/"))
}

#[tokio::test]
async fn every_file_is_served_as_what_it_is_and_may_do_no_more_than_it_needs() {
    for asset in ASSETS.iter() {
        let reply = get(asset.path).await;
        let header = |name: &str| reply.headers().get(name).unwrap_or_else(|| panic!("{name} of {}", asset.path));
        assert_eq!(reply.status(), 200);
        assert_eq!(reply.body(), asset.bytes);
        let kind = match asset.path.rsplit('.').next().unwrap() {
            "js" | "mjs" => "text/javascript; charset=utf-8",
            "css" => "text/css; charset=utf-8",
            "svg" | "ico" => "image/svg+xml",
            _ => "text/html; charset=utf-8",
        };
        assert_eq!(header("content-type"), kind, "{}", asset.path);
        assert_eq!(header("cache-control"), "no-cache");
        assert_eq!(header("x-content-type-options"), "nosniff");
        assert_eq!(header("referrer-policy"), "no-referrer");
        let policy = header("content-security-policy").to_str().unwrap();
        for rule in [
            "default-src 'none'",
            "script-src 'self'",
            "style-src 'self'",
            "connect-src 'self'",
            "img-src 'self' data:",
            "base-uri 'none'",
            "form-action 'none'",
            "frame-ancestors 'none'",
            "require-trusted-types-for 'script'",
            "trusted-types dompurify",
        ] {
            assert!(policy.split("; ").any(|part| part == rule), "{rule} is not in {policy}");
        }
        assert!(!policy.contains("unsafe"), "{policy}");
    }
}

#[tokio::test]
async fn a_browser_that_has_a_file_is_told_so() {
    let tag = get("/").await.headers()["etag"].to_str().unwrap().to_owned();
    for (sent, status) in [
        (tag.clone(), 304),
        (format!("W/{tag}"), 304),
        (format!("\"else\", {tag}"), 304),
        ("*".into(), 304),
        ("\"else\"".into(), 200),
    ] {
        let reply = warp::test::request().path("/").header("if-none-match", &sent).reply(&routes()).await;
        assert_eq!(reply.status(), status, "{sent}");
        assert_eq!(reply.body().is_empty(), status == 304, "{sent}");
        assert_eq!(reply.headers()["etag"], tag);
    }
    assert_ne!(get("/ui/app.js").await.headers()["etag"], tag);
}

#[tokio::test]
async fn other_paths_and_methods_are_not_the_pages() {
    for path in ["/ui", "/ui/", "/ui/app.jsx", "/ui/../Cargo.toml", "/index.html", "//"] {
        assert_eq!(get(path).await.status(), 404, "{path}");
    }
    assert_eq!(warp::test::request().method("POST").path("/").reply(&routes()).await.status(), 405);
    assert_eq!(warp::test::request().method("HEAD").path("/").reply(&routes()).await.status(), 200);
}

#[test]
fn what_the_page_refers_to_is_there() {
    let served: BTreeSet<&str> = ASSETS.iter().map(|asset| asset.path).collect();
    assert_eq!(served.len(), ASSETS.len(), "a path is there twice");
    let mut used: BTreeSet<String> = ["/".into(), "/favicon.ico".into()].into();
    for asset in ASSETS.iter() {
        let text = text(asset);
        match asset.kind {
            HTML => {
                let links = [between(text, "src=\"", '"'), between(text, "href=\"", '"')].concat();
                used.extend(links.iter().map(|link| format!("/{link}")));
            }
            JS => {
                // Modules name each other relative to themselves.
                let folder = asset.path.rsplit_once('/').unwrap().0;
                used.extend(between(text, "from './", '\'').iter().map(|link| format!("{folder}/{link}")));
            }
            _ => {}
        }
    }
    assert_eq!(used.iter().map(String::as_str).collect::<BTreeSet<_>>(), served);
}

#[test]
fn nothing_is_fetched_from_elsewhere_and_no_text_is_made_html() {
    for asset in ours() {
        let text = text(asset).replace("http://www.w3.org/2000/svg", "");
        for word in ["http://", "https://", "@import", "url(", "innerHTML", "outerHTML", "insertAdjacentHTML", "eval("]
        {
            assert!(!text.contains(word), "{} has {word}", asset.path);
        }
        for word in [" style=", " onclick=", "<style", "<script>"] {
            assert!(!text.contains(word), "the policy forbids {word} in {}", asset.path);
        }
    }
}

#[test]
fn elements_that_scripts_look_for_are_in_the_page() {
    let page = text(&ASSETS[0]);
    for script in ours().filter(|asset| asset.kind == JS) {
        let script = text(script);
        for call in ["getElementById('", "element('", "field('", "copy('"] {
            for id in between(script, call, '\'') {
                assert!(page.contains(&format!("id=\"{id}\"")), "{id}");
            }
        }
    }
}

#[test]
fn code_of_others_is_as_it_was_published() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/page/vendor");
    let list = include_str!("vendor/VENDORED.md");
    let mut listed = BTreeSet::new();
    for row in list.lines().filter(|line| line.starts_with("| `")) {
        let cells: Vec<_> = row.split('|').map(|cell| cell.trim().trim_matches('`')).collect();
        let (file, package, hash) = (cells[1], cells[2], cells[6]);
        let bytes = std::fs::read(root.join(file)).unwrap();
        let found: String = Sha256::digest(&bytes).iter().map(|byte| format!("{byte:02x}")).collect();
        assert_eq!(found, hash, "{file}");
        assert!(root.join(package).join("LICENSE").is_file(), "the licence of {package}");
        listed.insert(format!("/ui/vendor/{file}"));
    }
    let served: BTreeSet<_> =
        ASSETS.iter().map(|asset| asset.path.to_owned()).filter(|path| path.contains("/vendor/")).collect();
    assert_eq!(listed, served);
}
