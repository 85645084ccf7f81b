//! From the deltas of an answer to events, and to the response they add up to.

use mesh_core::{
    FinishReason,
    chat::{FunctionCall, Message, ToolCall},
};
use mesh_text::Delta;
use serde_json::Value;

use super::{
    input::seal,
    object::{About, Echo, Event, Incomplete, Item, Part, ResponseError, ResponseObject, ResponseUsage, Status},
};
use crate::{
    error::ApiError,
    pipeline::{CallIds, Finish, Finished},
};

/// Writes one response.
#[derive(Debug)]
pub struct Writer {
    response: ResponseObject,
    /// Reasoning is shown as its summary.
    summary: bool,
    sealed: bool,
    call_ids: CallIds,
    calls: usize,
    next: u64,
    /// Whether the last item may still grow.
    open: bool,
}

impl Writer {
    /// A response that is yet to be written.
    pub fn new(id: String, created_at: u64, model: String, echo: Echo, sealed: bool, call_ids: CallIds) -> Self {
        let summary = echo.reasoning.summary.is_some();
        let response = ResponseObject {
            id,
            object: "response",
            created_at,
            status: Status::InProgress,
            background: false,
            error: None,
            incomplete_details: None,
            model,
            output: Vec::new(),
            usage: None,
            echo,
        };
        Self { response, summary, sealed, call_ids, calls: 0, next: 0, open: false }
    }

    /// The response as far as it is written.
    pub fn response(&self) -> &ResponseObject {
        &self.response
    }

    /// What comes first.
    pub fn start(&mut self) -> Vec<Event> {
        ["response.created", "response.in_progress"].map(|kind| self.whole(kind)).into()
    }

    /// A piece of the answer.
    pub fn delta(&mut self, delta: Delta) -> Vec<Event> {
        let mut events = Vec::new();
        match delta {
            Delta::Content(text) | Delta::Malformed { text } => {
                if !matches!((self.open, self.response.output.last()), (true, Some(Item::Message { .. }))) {
                    self.close(Status::Completed, &mut events);
                    let (id, status) = (self.item_id("msg"), Status::InProgress);
                    self.begin(Item::Message { id, status, role: "assistant", content: Vec::new() }, &mut events);
                    self.part(Part::OutputText { text: String::new(), annotations: [], logprobs: [] }, &mut events);
                }
                self.grow(text, &mut events);
            }
            Delta::Reasoning(text) => {
                if !matches!((self.open, self.response.output.last()), (true, Some(Item::Reasoning { .. }))) {
                    self.close(Status::Completed, &mut events);
                    let item = Item::Reasoning {
                        id: self.item_id("rs"),
                        status: Status::InProgress,
                        summary: Vec::new(),
                        content: Vec::new(),
                        encrypted_content: None,
                    };
                    self.begin(item, &mut events);
                    let text = String::new();
                    let part = if self.summary { Part::SummaryText { text } } else { Part::ReasoningText { text } };
                    self.part(part, &mut events);
                }
                self.grow(text, &mut events);
            }
            Delta::ToolCall { name, arguments, .. } => {
                self.close(Status::Completed, &mut events);
                let (id, own) = (self.item_id("fc"), self.item_id("call"));
                let call_id = self.call_ids.id(own, self.calls, &name);
                self.calls += 1;
                let arguments_yet = String::new();
                let status = Status::InProgress;
                let item = Item::FunctionCall { id: id.clone(), status, call_id, name, arguments: arguments_yet };
                self.begin(item, &mut events);
                if let Some(Item::FunctionCall { arguments: whole, .. }) = self.response.output.last_mut() {
                    whole.push_str(&arguments);
                }
                let output_index = self.index();
                let about = About::ArgumentsDelta { item_id: id, output_index, delta: arguments };
                events.push(self.event("response.function_call_arguments.delta", about));
                self.close(Status::Completed, &mut events);
            }
        }
        events
    }

    /// The end of the answer.
    pub fn finish(&mut self, finished: &Finished) -> Vec<Event> {
        let mut events = Vec::new();
        let cut = finished.finish == Finish::Engine(FinishReason::Length);
        let status = if cut { Status::Incomplete } else { Status::Completed };
        self.close(status, &mut events);
        self.response.status = status;
        self.response.incomplete_details = cut.then_some(Incomplete { reason: "max_output_tokens" });
        self.response.usage = Some(ResponseUsage::new(finished.usage, finished.reasoning_tokens));
        events.push(self.whole(if cut { "response.incomplete" } else { "response.completed" }));
        events
    }

    /// The end of an answer that broke off.
    pub fn fail(&mut self, error: &ApiError) -> Vec<Event> {
        let mut events = Vec::new();
        let object = error.body().error;
        let code = object.code.unwrap_or_else(|| "server_error".into());
        self.close(Status::Incomplete, &mut events);
        if code == "cancelled" {
            self.response.status = Status::Cancelled;
            let about = About::Error { code, message: object.message, param: None };
            events.push(self.event("error", about));
        } else {
            self.response.status = Status::Failed;
            self.response.error = Some(ResponseError { code, message: object.message });
            events.push(self.whole("response.failed"));
        }
        events
    }

    /// The client left.
    pub fn leave(&mut self) {
        self.close(Status::Incomplete, &mut Vec::new());
        self.response.status = Status::Cancelled;
    }

    /// The answer as a message, for what may follow.
    pub fn message(&self) -> Message {
        let mut message = Message { role: "assistant".into(), ..Message::default() };
        for item in &self.response.output {
            match item {
                Item::Reasoning { summary, content, .. } => {
                    let reasoning = message.reasoning_content.get_or_insert_default();
                    content.iter().chain(summary).for_each(|part| reasoning.push_str(part.text()));
                }
                Item::Message { content, .. } => {
                    let text = message.content.get_or_insert_default();
                    content.iter().for_each(|part| text.push_str(part.text()));
                }
                Item::FunctionCall { call_id, name, arguments, .. } => message.tool_calls.push(ToolCall {
                    id: call_id.clone(),
                    kind: "function".into(),
                    function: FunctionCall {
                        name: name.clone(),
                        arguments: serde_json::from_str(arguments)
                            .unwrap_or_else(|_| Value::Object(Default::default())),
                    },
                }),
            }
        }
        if message.content.is_none() && message.tool_calls.is_empty() {
            message.content = Some(String::new());
        }
        message
    }

    fn event(&mut self, kind: &'static str, about: About) -> Event {
        let sequence_number = self.next;
        self.next += 1;
        Event { kind, sequence_number, about }
    }

    fn whole(&mut self, kind: &'static str) -> Event {
        let response = Box::new(self.response.clone());
        self.event(kind, About::Response { response })
    }

    fn index(&self) -> usize {
        self.response.output.len().saturating_sub(1)
    }

    /// The id of the item that comes next. Derived, so that every id of a response is its own.
    fn item_id(&self, kind: &str) -> String {
        let id = self.response.id.rsplit('_').next().unwrap_or_default();
        format!("{kind}_{id}_{}", self.response.output.len())
    }

    fn begin(&mut self, item: Item, events: &mut Vec<Event>) {
        self.response.output.push(item.clone());
        self.open = true;
        let output_index = self.index();
        events.push(self.event("response.output_item.added", About::Item { output_index, item }));
    }

    /// The one part of the last item.
    fn last_part(&mut self) -> Option<&mut Part> {
        match self.response.output.last_mut()? {
            Item::Reasoning { summary, content, .. } => content.last_mut().or(summary.last_mut()),
            Item::Message { content, .. } => content.last_mut(),
            Item::FunctionCall { .. } => None,
        }
    }

    fn last_id(&self) -> String {
        self.response.output.last().map(|item| item.id().to_owned()).unwrap_or_default()
    }

    fn part(&mut self, part: Part, events: &mut Vec<Event>) {
        match self.response.output.last_mut() {
            Some(Item::Reasoning { summary, .. }) if matches!(part, Part::SummaryText { .. }) => {
                summary.push(part.clone())
            }
            Some(Item::Reasoning { content, .. } | Item::Message { content, .. }) => content.push(part.clone()),
            Some(Item::FunctionCall { .. }) | None => return,
        }
        events.push(self.of_part(part, "added"));
    }

    fn of_part(&mut self, part: Part, stage: &str) -> Event {
        let (item_id, output_index) = (self.last_id(), self.index());
        if matches!(part, Part::SummaryText { .. }) {
            let added = stage == "added";
            let kind =
                if added { "response.reasoning_summary_part.added" } else { "response.reasoning_summary_part.done" };
            return self.event(kind, About::SummaryPart { item_id, output_index, summary_index: 0, part });
        }
        let kind = if stage == "added" { "response.content_part.added" } else { "response.content_part.done" };
        self.event(kind, About::Part { item_id, output_index, content_index: 0, part })
    }

    fn grow(&mut self, delta: String, events: &mut Vec<Event>) {
        let (item_id, output_index, content_index) = (self.last_id(), self.index(), 0);
        let Some(part) = self.last_part() else { return };
        part.push(&delta);
        let (kind, about) = match part {
            Part::OutputText { .. } => (
                "response.output_text.delta",
                About::TextDelta { item_id, output_index, content_index, delta, logprobs: [] },
            ),
            Part::ReasoningText { .. } => {
                ("response.reasoning_text.delta", About::ReasoningDelta { item_id, output_index, content_index, delta })
            }
            Part::SummaryText { .. } => (
                "response.reasoning_summary_text.delta",
                About::SummaryDelta { item_id, output_index, summary_index: 0, delta },
            ),
        };
        events.push(self.event(kind, about));
    }

    /// Ends the last item, if it is not over.
    fn close(&mut self, status: Status, events: &mut Vec<Event>) {
        if !std::mem::take(&mut self.open) {
            return;
        }
        let (item_id, output_index, content_index) = (self.last_id(), self.index(), 0);
        if let Some(part) = self.last_part().map(|part| part.clone()) {
            let text = part.text().to_owned();
            let (kind, about) = match &part {
                Part::OutputText { .. } => (
                    "response.output_text.done",
                    About::Text { item_id, output_index, content_index, text, logprobs: [] },
                ),
                Part::ReasoningText { .. } => {
                    ("response.reasoning_text.done", About::Reasoning { item_id, output_index, content_index, text })
                }
                Part::SummaryText { .. } => (
                    "response.reasoning_summary_text.done",
                    About::Summary { item_id, output_index, summary_index: 0, text },
                ),
            };
            events.push(self.event(kind, about));
            events.push(self.of_part(part, "done"));
        } else if let Some(Item::FunctionCall { name, arguments, .. }) = self.response.output.last() {
            let (name, arguments) = (name.clone(), arguments.clone());
            let about = About::Arguments { item_id, output_index, name, arguments };
            events.push(self.event("response.function_call_arguments.done", about));
        }
        let sealed = self.sealed;
        let Some(item) = self.response.output.last_mut() else { return };
        item.set_status(status);
        if let (true, Item::Reasoning { summary, content, encrypted_content, .. }) = (sealed, &mut *item) {
            let text: String = content.iter().chain(&*summary).map(Part::text).collect();
            *encrypted_content = Some(seal(&text));
        }
        let item = item.clone();
        events.push(self.event("response.output_item.done", About::Item { output_index, item }));
    }
}
