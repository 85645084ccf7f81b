//! Errors as HTTP answers. The only place with status codes.

use std::time::Duration;

use mesh_core::{
    EngineError, Hint, SubmitError, TemplateError,
    node::{Rejection, RejectionKind},
};
use mesh_text::ConstraintError;
use warp::{
    Reply,
    http::{
        HeaderValue, StatusCode,
        header::{ALLOW, RETRY_AFTER, WWW_AUTHENTICATE},
    },
    reply::Response,
};

use crate::{
    openai::{
        BadRequest,
        response::{ErrorBody, ErrorObject},
    },
    pipeline::PipelineError,
    slots::SlotError,
};

/// An error on its way to a client.
#[derive(Clone, Debug)]
pub struct ApiError {
    status: StatusCode,
    object: ErrorObject,
    retry_after: Option<Duration>,
}

const INVALID: &str = "invalid_request_error";
const SERVER: &str = "server_error";
const UNAUTHENTICATED: &str = "authentication_error";

/// Why a request was refused, for the log: beside the answer, since the message may quote what was sent.
#[derive(Clone, Debug)]
pub(crate) struct Refused {
    pub code: Option<String>,
    pub param: Option<String>,
}

impl ApiError {
    fn new(status: StatusCode, kind: &str, code: &str, message: impl Into<String>) -> Self {
        let object = ErrorObject { message: message.into(), kind: kind.into(), code: Some(code.into()), param: None };
        Self { status, object, retry_after: None }
    }

    fn invalid(code: &str, message: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, INVALID, code, message)
    }

    fn unavailable(code: &str, message: impl Into<String>, retry_after: Option<Duration>) -> Self {
        Self { retry_after, ..Self::new(StatusCode::SERVICE_UNAVAILABLE, SERVER, code, message) }
    }

    fn param(mut self, param: impl Into<String>) -> Self {
        self.object.param = Some(param.into());
        self
    }

    /// Says which field it is about.
    pub(crate) fn about(self, param: &str) -> Self {
        self.param(param)
    }

    /// Names the field that holds the prompt, for errors about prompts, which do not know what request they came in.
    pub(crate) fn prompt_in(mut self, field: &str) -> Self {
        if matches!(self.object.param.as_deref(), Some("messages" | "prompt")) {
            self.object.param = Some(field.into());
        }
        self
    }

    /// Names fields as the request's surface does, where the pipeline knows them by other names.
    pub(crate) fn renamed(mut self, names: &[(&str, &str)]) -> Self {
        for (name, here) in names {
            if self.object.param.as_deref() == Some(*name) {
                self.object.param = Some((*here).to_owned());
            }
            self.object.message = self.object.message.replace(&format!("`{name}`"), &format!("`{here}`"));
        }
        self
    }

    /// Whoever asked for it does not want it any more.
    pub fn cancelled() -> Self {
        Self::new(StatusCode::CONFLICT, INVALID, "cancelled", "the request was cancelled")
    }

    /// No request of that id is running.
    pub fn not_running(id: &str) -> Self {
        let id: String = id.chars().take(200).collect();
        let message = format!("no request `{id}` is running; it may have ended");
        Self::new(StatusCode::NOT_FOUND, INVALID, "request_not_found", message)
    }

    /// As many requests are running as may.
    pub fn crowded(max: usize) -> Self {
        let message = format!("{max} requests are running, which is the most; try again shortly");
        Self::unavailable("busy", message, Some(Duration::from_secs(1)))
    }

    /// No stored response has that id.
    pub fn no_such_response(id: &str) -> Self {
        let id: String = id.chars().take(200).collect();
        let message = format!(
            "no response `{id}` is stored; only the most recent ones are kept, in memory, and none that said `store`: false"
        );
        Self::new(StatusCode::NOT_FOUND, INVALID, "response_not_found", message)
    }

    /// A response that is over cannot be cancelled.
    pub fn response_is_over(status: &str) -> Self {
        Self::invalid("invalid_value", format!("the response is {status} and cannot be cancelled any more"))
    }

    /// No route has that path.
    pub fn no_such_path(path: &str) -> Self {
        let path: String = path.chars().take(200).collect();
        let message =
            format!("there is nothing at {path}; try /v1/models or /v1/chat/completions, or see /openapi.json");
        Self::new(StatusCode::NOT_FOUND, INVALID, "not_found", message)
    }

    /// The path has other methods, which `allow` lists.
    pub fn method_not_allowed(allow: &str) -> Response {
        let message = "this path does not take that method; GET /openapi.json lists what each takes";
        let error = Self::new(StatusCode::METHOD_NOT_ALLOWED, INVALID, "method_not_allowed", message);
        let mut response = error.into_response();
        response.headers_mut().extend(HeaderValue::from_str(allow).ok().map(|allow| (ALLOW, allow)));
        response
    }

    /// The body is longer than `max` bytes.
    pub fn body_too_large(max: u64) -> Self {
        let message = format!("the body is larger than {max} bytes, the most that is read");
        Self::new(StatusCode::PAYLOAD_TOO_LARGE, INVALID, "body_too_large", message)
    }

    /// The body stopped arriving.
    pub fn body_too_slow() -> Self {
        Self::new(StatusCode::REQUEST_TIMEOUT, INVALID, "request_timeout", "the body did not arrive in time")
    }

    /// The body broke off.
    pub fn body_broken() -> Self {
        Self::invalid("body_incomplete", "the body could not be read to its end")
    }

    /// The request says in no way, or in several, what it calls this server.
    pub fn bad_host(what: &str) -> Self {
        Self::invalid("bad_host", format!("the request has {what}; it has to have one, such as `host: localhost`"))
    }

    /// The request calls this server by a name that is not known to be its own.
    pub fn foreign_host(host: &str) -> Self {
        let host: String = host.chars().take(200).collect();
        let message = format!(
            "this server does not go by the name `{host}`; if it should, start it with --allow-host {host} (or `allow_hosts` in \
             config.toml)"
        );
        Self::new(StatusCode::FORBIDDEN, INVALID, "host_not_allowed", message)
    }

    /// A page of another server asks.
    pub fn foreign_page(origin: &str) -> Self {
        let message = format!(
            "pages from `{origin}` may not use this server; if they should, start it with --cors-origin {origin} (or \
             `cors_origins` in config.toml)"
        );
        Self::new(StatusCode::FORBIDDEN, INVALID, "origin_not_allowed", message)
    }

    /// There is no key.
    pub fn no_key() -> Self {
        let message = "this server asks for an API key: send it as `authorization: Bearer KEY` or as `x-api-key: KEY`";
        Self::new(StatusCode::UNAUTHORIZED, UNAUTHENTICATED, "missing_api_key", message)
    }

    /// The key is nobody's.
    pub fn unknown_key() -> Self {
        let message = "the API key is not one of this server's; ask whoever runs it for one";
        Self::new(StatusCode::UNAUTHORIZED, UNAUTHENTICATED, "invalid_api_key", message)
    }

    /// Anything that nobody foresaw.
    pub fn internal() -> Self {
        let message = "the server failed; its log says more";
        Self::new(StatusCode::INTERNAL_SERVER_ERROR, SERVER, "internal_error", message)
    }

    /// The body to send.
    pub fn body(&self) -> ErrorBody {
        ErrorBody { error: self.object.clone() }
    }

    /// The status to send.
    pub fn status(&self) -> StatusCode {
        self.status
    }
}

impl Reply for ApiError {
    fn into_response(self) -> Response {
        let body = self.body();
        self.with_body(&body)
    }
}

impl ApiError {
    /// The answer, with its body in another form.
    pub(crate) fn with_body(self, body: &impl serde::Serialize) -> Response {
        let mut response = warp::reply::json(body).into_response();
        *response.status_mut() = self.status;
        if self.status == StatusCode::UNAUTHORIZED {
            response.headers_mut().insert(WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        if let Some(after) = self.retry_after {
            // Rounded up, and never 0: clients take that as an invitation to try without end.
            let seconds = after.as_secs() + u64::from(after.subsec_nanos() > 0);
            response.headers_mut().insert(RETRY_AFTER, HeaderValue::from(seconds.max(1)));
        }
        response.extensions_mut().insert(Refused { code: self.object.code, param: self.object.param });
        response
    }
}

/// What was wrong, and what to do next, in one message.
fn said(error: &(impl std::fmt::Display + Hint)) -> String {
    match error.hint() {
        Some(hint) => format!("{error}; {}", hint.trim_end()),
        None => error.to_string(),
    }
}

impl From<BadRequest> for ApiError {
    fn from(error: BadRequest) -> Self {
        let reply = Self::invalid(error.code(), error.to_string());
        match error.param() {
            Some(param) => reply.param(param),
            None => reply,
        }
    }
}

impl From<SlotError> for ApiError {
    fn from(error: SlotError) -> Self {
        let message = said(&error);
        match error {
            SlotError::Unknown { .. } => {
                Self::new(StatusCode::NOT_FOUND, INVALID, "model_not_found", message).param("model")
            }
            SlotError::Failed { retry_after, .. } => Self::unavailable("model_failed", message, Some(retry_after)),
            SlotError::NoRoom(_) => Self::unavailable("no_room", message, Some(Duration::from_secs(5))),
            SlotError::Crowded { .. } | SlotError::NotYetKnown { .. } => {
                Self::unavailable("model_loading", message, Some(Duration::from_secs(5)))
            }
            SlotError::Stopped => Self::unavailable("shutting_down", message, None),
        }
    }
}

impl From<PipelineError> for ApiError {
    fn from(error: PipelineError) -> Self {
        let message = said(&error);
        match error {
            PipelineError::Template(TemplateError::Refused { .. } | TemplateError::Failed { .. }) => {
                Self::invalid("template_error", message).param("messages")
            }
            PipelineError::Template(_) => Self::invalid("no_chat_template", message).param("messages"),
            PipelineError::NoTools { .. } => Self::invalid("unsupported_parameter", message).param("tools"),
            PipelineError::NoSwitch { field, .. } => Self::invalid("unsupported_parameter", message).param(field),
            PipelineError::Constraint {
                field,
                error: ConstraintError::Schema(_) | ConstraintError::Grammar { .. },
            } => Self::invalid("invalid_value", message).param(field),
            PipelineError::Constraint { field, .. } => Self::invalid("unsupported_parameter", message).param(field),
            PipelineError::NoStrict => Self::invalid("unsupported_parameter", message).param("tools"),
            PipelineError::NoEcho => Self::invalid("unsupported_parameter", message).param("echo"),
            PipelineError::Submit(error) => Self::submit(error, message),
            PipelineError::Rejected(rejection) => rejection.into(),
            PipelineError::Engine(error) => error.into(),
            PipelineError::TokensUnknown => Self::invalid("unsupported", message).param("model"),
            PipelineError::NoEmbeddings => Self::invalid("unsupported", message).param("model"),
            PipelineError::Tokenizer(_) | PipelineError::NoTokenizer | PipelineError::Panicked => {
                tracing::error!(error = %message, "a prompt could not be prepared");
                Self::new(StatusCode::INTERNAL_SERVER_ERROR, SERVER, "internal_error", message)
            }
        }
    }
}

impl ApiError {
    fn submit(error: SubmitError, message: String) -> Self {
        match error {
            SubmitError::Busy { retry_after, .. } => Self::unavailable("busy", message, Some(retry_after)),
            SubmitError::Gone { .. } => Self::unavailable("engine_gone", message, Some(Duration::from_secs(1))),
            SubmitError::TooLong { .. } => Self::invalid("context_length_exceeded", message).param("messages"),
            SubmitError::Memory { .. } => {
                Self::unavailable("out_of_memory", message, Some(Duration::from_secs(5))).param("messages")
            }
            SubmitError::Empty | SubmitError::UnknownToken { .. } => {
                Self::invalid("invalid_value", message).param("prompt")
            }
            SubmitError::WrongForm { .. } => {
                Self::new(StatusCode::INTERNAL_SERVER_ERROR, SERVER, "internal_error", message)
            }
            SubmitError::Grammar { .. } => Self::invalid("invalid_schema", message).param("response_format"),
            SubmitError::Unsupported { knob } => Self::invalid("unsupported_parameter", message).param(knob.field()),
        }
    }
}

/// A request that another machine turned down is turned down in the same words here.
impl From<Rejection> for ApiError {
    fn from(rejection: Rejection) -> Self {
        let Rejection { kind, code, message, param, retry_after } = rejection;
        let (status, whose) = match kind {
            RejectionKind::Invalid => (StatusCode::BAD_REQUEST, INVALID),
            RejectionKind::NotFound => (StatusCode::NOT_FOUND, INVALID),
            RejectionKind::Unavailable => (StatusCode::SERVICE_UNAVAILABLE, SERVER),
            RejectionKind::Failed => (StatusCode::INTERNAL_SERVER_ERROR, SERVER),
        };
        let mut error = Self { retry_after, ..Self::new(status, whose, &code, message) };
        error.object.param = param;
        error
    }
}

/// And the way there.
impl From<ApiError> for Rejection {
    fn from(error: ApiError) -> Self {
        let ApiError { status, object, retry_after } = error;
        let kind = match status {
            StatusCode::NOT_FOUND => RejectionKind::NotFound,
            StatusCode::SERVICE_UNAVAILABLE => RejectionKind::Unavailable,
            status if status.is_client_error() => RejectionKind::Invalid,
            _ => RejectionKind::Failed,
        };
        let ErrorObject { message, code, param, .. } = object;
        Self { kind, code: code.unwrap_or_default(), message, param, retry_after }
    }
}

impl From<EngineError> for ApiError {
    fn from(error: EngineError) -> Self {
        let message = error.to_string();
        match error {
            EngineError::Failed { .. } | EngineError::NotBegun { .. } => {
                Self::new(StatusCode::INTERNAL_SERVER_ERROR, SERVER, "engine_failed", message)
            }
            EngineError::Stopped => Self::unavailable("shutting_down", message, None),
        }
    }
}
