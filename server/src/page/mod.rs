//! The page at `/`: a chat in the browser. It is in the binary whole, and fetches nothing from anywhere else.

use std::sync::LazyLock;

use sha2::{Digest, Sha256};
use warp::{
    Filter, Rejection, Reply,
    http::{HeaderMap, HeaderValue, StatusCode, header},
    path::FullPath,
    reply::Response,
};

#[cfg(test)]
mod tests;

/// What the page may do: run and fetch what this server serves, and nothing else. Text from a model becomes part of the
/// page by way of DOMPurify only, which the browser enforces (`trusted-types`).
const POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; \
                      base-uri 'none'; form-action 'none'; frame-ancestors 'none'; \
                      require-trusted-types-for 'script'; trusted-types dompurify";

const HTML: &str = "text/html; charset=utf-8";
const CSS: &str = "text/css; charset=utf-8";
const JS: &str = "text/javascript; charset=utf-8";
const SVG: &str = "image/svg+xml";

/// A file of the page.
struct Asset {
    path: &'static str,
    kind: &'static str,
    bytes: &'static [u8],
    etag: HeaderValue,
}

macro_rules! assets {
    ($($path:literal: $kind:ident = $file:literal,)*) => {
        vec![$(Asset::new($path, $kind, include_bytes!($file))),*]
    };
}

static ASSETS: LazyLock<Vec<Asset>> = LazyLock::new(|| {
    assets! {
        "/": HTML = "index.html",
        "/favicon.ico": SVG = "icon.svg",
        "/ui/icon.svg": SVG = "icon.svg",
        "/ui/style.css": CSS = "style.css",
        "/ui/app.js": JS = "app.js",
        "/ui/client.js": JS = "client.js",
        "/ui/conversation.js": JS = "conversation.js",
        "/ui/markdown.js": JS = "markdown.js",
        "/ui/mesh.js": JS = "mesh.js",
        "/ui/models.js": JS = "models.js",
        "/ui/settings.js": JS = "settings.js",
        "/ui/transcript.js": JS = "transcript.js",
        "/ui/vendor/dompurify/purify.es.mjs": JS = "vendor/dompurify/purify.es.mjs",
        "/ui/vendor/eventsource-parser/errors.js": JS = "vendor/eventsource-parser/errors.js",
        "/ui/vendor/eventsource-parser/parse.js": JS = "vendor/eventsource-parser/parse.js",
        "/ui/vendor/marked/marked.esm.js": JS = "vendor/marked/marked.esm.js",
    }
});

impl Asset {
    fn new(path: &'static str, kind: &'static str, bytes: &'static [u8]) -> Self {
        let hash: String = Sha256::digest(bytes).iter().take(16).map(|byte| format!("{byte:02x}")).collect();
        // Hexadecimal digits in quotes are a header value.
        let etag = HeaderValue::try_from(format!("\"{hash}\"")).unwrap_or(HeaderValue::from_static("\"\""));
        Self { path, kind, bytes, etag }
    }

    /// The file, or that the client has it.
    fn reply(&self, headers: &HeaderMap) -> Response {
        let mut response = if self.known(headers) {
            StatusCode::NOT_MODIFIED.into_response()
        } else {
            let mut response = Response::new(self.bytes.into());
            response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static(self.kind));
            response
        };
        let headers = response.headers_mut();
        headers.insert(header::ETAG, self.etag.clone());
        headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-cache"));
        headers.insert(header::CONTENT_SECURITY_POLICY, HeaderValue::from_static(POLICY));
        headers.insert(header::X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
        headers.insert(header::REFERRER_POLICY, HeaderValue::from_static("no-referrer"));
        response
    }

    fn known(&self, headers: &HeaderMap) -> bool {
        let lists = headers.get_all(header::IF_NONE_MATCH).iter().filter_map(|value| value.to_str().ok());
        let mut tags = lists.flat_map(|list| list.split(',')).map(|tag| tag.trim().trim_start_matches("W/"));
        tags.any(|tag| tag == "*" || tag == self.etag)
    }
}

/// The page and its files. Other paths are rejected as not found.
pub fn routes() -> impl Filter<Extract = (Response,), Error = Rejection> + Clone {
    let read = warp::get().or(warp::head()).unify();
    warp::path::full()
        .and_then(|path: FullPath| async move {
            ASSETS.iter().find(|asset| asset.path == path.as_str()).ok_or_else(warp::reject::not_found)
        })
        .and(read)
        .and(warp::header::headers_cloned())
        .map(|asset: &'static Asset, headers: HeaderMap| asset.reply(&headers))
}
