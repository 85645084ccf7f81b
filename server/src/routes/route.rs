//! A route as data: where it is, and what answers.

use std::{pin::Pin, sync::Arc};

use bytes::Bytes;
use futures::{Stream, StreamExt};
use percent_encoding::percent_decode_str;
use schemars::{JsonSchema, Schema, SchemaGenerator};
use warp::{
    Buf, Reply,
    http::{HeaderMap, Method, header},
    reply::Response,
};

use crate::{
    anthropic, body,
    error::ApiError,
    listen,
    openai::{BadRequest, responses::Store},
    running::Running,
    slots::{Slot, Slots},
};

/// What all handlers share.
pub(crate) struct Door {
    /// The models.
    pub slots: Slots,
    /// What can be cancelled.
    pub running: Running,
    /// What can be continued.
    pub store: Store,
}

impl Door {
    /// The model that was asked for, or the only one.
    pub fn model_or_only(&self, asked: Option<String>) -> Result<String, ApiError> {
        let own = self.slots.iter().map(Slot::name);
        let others = || self.slots.remote().names().into_iter();
        let mut served = own.chain(others());
        let first = served.next();
        match (asked.filter(|name| !name.is_empty()), first) {
            (Some(name), _) => Ok(name),
            (None, Some(only)) if served.all(|other| other == only) => Ok(only),
            _ => Err(BadRequest::missing("model").into()),
        }
    }
}

type Answer = Pin<Box<dyn Future<Output = Result<Response, ApiError>> + Send>>;
type Handler = Arc<dyn Fn(Arc<Door>, Call) -> Answer + Send + Sync>;

type SchemaOf = fn(&mut SchemaGenerator) -> Schema;

/// Whose form errors have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ErrorForm {
    OpenAi,
    Anthropic,
}

impl ErrorForm {
    pub fn reply(self, error: ApiError, request_id: Option<&str>) -> Response {
        match self {
            Self::OpenAi => error.into_response(),
            Self::Anthropic => {
                let body = anthropic::error::ErrorBody::new(&error, request_id);
                error.with_body(&body)
            }
        }
    }
}

/// One method of one path.
pub(crate) struct Route {
    pub method: Method,
    /// A segment in braces takes any text; `{name*}` at the end takes all that is left, slashes included.
    pub path: &'static str,
    /// In a sentence.
    pub summary: &'static str,
    pub form: ErrorForm,
    pub request: Option<SchemaOf>,
    pub response: Option<SchemaOf>,
    /// What each event of a stream holds.
    pub event: Option<SchemaOf>,
    /// What the last event holds that is not JSON.
    pub last: Option<&'static str>,
    /// What may follow the question mark: names, and schemas as JSON.
    pub queries: &'static [(&'static str, &'static str)],
    pub handler: Handler,
}

impl Route {
    pub fn says(self, summary: &'static str) -> Self {
        Self { summary, ..self }
    }

    /// The body it reads.
    pub fn takes<T: JsonSchema>(self) -> Self {
        Self { request: Some(|generator| generator.subschema_for::<T>()), ..self }
    }

    /// The body it answers with.
    pub fn gives<T: JsonSchema>(self) -> Self {
        Self { response: Some(|generator| generator.subschema_for::<T>()), ..self }
    }

    /// The events it answers with where `stream` is true.
    pub fn streams<T: JsonSchema>(self) -> Self {
        Self { event: Some(|generator| generator.subschema_for::<T>()), ..self }
    }

    /// The last event holds this, which is not JSON.
    pub fn ends(self, last: &'static str) -> Self {
        Self { last: Some(last), ..self }
    }

    /// What may follow the question mark.
    pub fn queried(self, queries: &'static [(&'static str, &'static str)]) -> Self {
        Self { queries, ..self }
    }

    /// Errors are in Anthropic's form.
    pub fn anthropic(self) -> Self {
        Self { form: ErrorForm::Anthropic, ..self }
    }

    fn new<F>(
        method: Method,
        path: &'static str,
        handler: impl Fn(Arc<Door>, Call) -> F + Send + Sync + 'static,
    ) -> Self
    where
        F: Future<Output = Result<Response, ApiError>> + Send + 'static,
    {
        Self {
            method,
            path,
            summary: "",
            form: ErrorForm::OpenAi,
            request: None,
            response: None,
            event: None,
            last: None,
            queries: &[],
            handler: Arc::new(move |door, call| Box::pin(handler(door, call))),
        }
    }

    pub fn get<F>(path: &'static str, handler: impl Fn(Arc<Door>, Call) -> F + Send + Sync + 'static) -> Self
    where
        F: Future<Output = Result<Response, ApiError>> + Send + 'static,
    {
        Self::new(Method::GET, path, handler)
    }

    pub fn delete<F>(path: &'static str, handler: impl Fn(Arc<Door>, Call) -> F + Send + Sync + 'static) -> Self
    where
        F: Future<Output = Result<Response, ApiError>> + Send + 'static,
    {
        Self::new(Method::DELETE, path, handler)
    }

    pub fn post<F>(path: &'static str, handler: impl Fn(Arc<Door>, Call) -> F + Send + Sync + 'static) -> Self
    where
        F: Future<Output = Result<Response, ApiError>> + Send + 'static,
    {
        Self::new(Method::POST, path, handler)
    }
}

/// One request to a route.
pub(crate) struct Call {
    /// What the braces of the path took, decoded.
    pub params: Vec<String>,
    /// What follows the question mark.
    pub query: Option<String>,
    pub headers: HeaderMap,
    body: Pin<Box<dyn Stream<Item = Result<Bytes, warp::Error>> + Send>>,
}

impl Call {
    pub fn new<B: Buf>(
        params: Vec<String>,
        query: Option<String>,
        headers: HeaderMap,
        body: impl Stream<Item = Result<B, warp::Error>> + Send + 'static,
    ) -> Self {
        let body = body.map(|chunk| chunk.map(|mut chunk| chunk.copy_to_bytes(chunk.remaining())));
        Self { params, query, headers, body: Box::pin(body) }
    }

    /// The whole body.
    pub async fn read(&mut self) -> Result<Vec<u8>, ApiError> {
        let number = |name| self.headers.get(name)?.to_str().ok()?.parse().ok();
        body::read(number(header::CONTENT_LENGTH), self.headers.contains_key(header::EXPECT), &mut self.body).await
    }

    /// What the request is called, by the client or by the listener.
    pub fn request_id(&self) -> Option<&str> {
        self.headers.get(listen::REQUEST_ID)?.to_str().ok()
    }

    /// What the first braces of the path took.
    pub fn param(&self) -> &str {
        self.params.first().map_or("", String::as_str)
    }
}

/// What the braces of `template` take of `path`, if it is such a path.
pub(super) fn matched(template: &str, path: &str) -> Option<Vec<String>> {
    let decoded = |text: &str| percent_decode_str(text).decode_utf8_lossy().into_owned();
    let mut params = Vec::new();
    let mut rest = Some(path.strip_prefix('/')?);
    for segment in template.trim_start_matches('/').split('/') {
        let left = rest.take()?;
        if segment.ends_with("*}") {
            params.push(decoded(left));
            return (!left.is_empty()).then_some(params);
        }
        let (head, tail) = left.split_once('/').map_or((left, None), |(head, tail)| (head, Some(tail)));
        if segment.starts_with('{') {
            (!head.is_empty()).then(|| params.push(decoded(head)))?;
        } else if segment != head {
            return None;
        }
        rest = tail;
    }
    // A slash at the end is forgiven.
    rest.is_none_or(str::is_empty).then_some(params)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_are_matched_whole() {
        let found = |template, path| matched(template, path).map(|params| params.join("|"));
        assert_eq!(found("/v1/models", "/v1/models").as_deref(), Some(""));
        assert_eq!(found("/v1/models", "/v1/models/").as_deref(), Some(""));
        for path in ["/v1", "/v1/models/x", "/v1/model", "v1/models", "/", "", "//v1/models", "/v1//models"] {
            assert_eq!(found("/v1/models", path), None, "{path}");
        }
        assert_eq!(found("/v1/models/{model*}", "/v1/models/a/b%2Fc").as_deref(), Some("a/b/c"));
        assert_eq!(found("/v1/models/{model*}", "/v1/models/"), None);
        assert_eq!(found("/v1/r/{id}/cancel", "/v1/r/a%20b/cancel").as_deref(), Some("a b"));
        assert_eq!(found("/v1/r/{id}/cancel", "/v1/r//cancel"), None);
        assert_eq!(found("/v1/r/{id}", "/v1/r/a/cancel"), None);
        assert_eq!(found("/v1/r/{id}", "/v1/r/%ff").as_deref(), Some("\u{fffd}"));
    }
}
