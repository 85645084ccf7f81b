//! The log as lines of JSON in the data model of OpenTelemetry: `Timestamp`, `SeverityText`, `Body`, `Attributes`, and the
//! ids of the trace that a request belongs to.

use std::fmt::{self, Write};

use chrono::{SecondsFormat, Utc};
use serde_json::{Map, Value, json};
use tracing::{
    Event, Level, Subscriber,
    field::{Field, Visit},
};
use tracing_subscriber::{
    fmt::{
        FmtContext, FormatEvent, FormatFields, FormattedFields,
        format::{JsonFields, Writer},
    },
    registry::LookupSpan,
};

/// Formats events. Spans have to be formatted by [`JsonFields`], which [`Json::fields`] gives.
#[derive(Clone, Copy, Debug, Default)]
pub struct Json;

impl Json {
    /// How the fields of spans are kept.
    pub fn fields() -> JsonFields {
        JsonFields::new()
    }
}

impl<S> FormatEvent<S, JsonFields> for Json
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    JsonFields: for<'writer> FormatFields<'writer>,
{
    fn format_event(
        &self,
        context: &FmtContext<'_, S, JsonFields>,
        mut writer: Writer<'_>,
        event: &Event<'_>,
    ) -> fmt::Result {
        let mut line = Map::new();
        let mut attributes = Map::new();
        for span in context.event_scope().into_iter().flat_map(|scope| scope.from_root()) {
            let extensions = span.extensions();
            let fields = extensions.get::<FormattedFields<JsonFields>>();
            let Some(Value::Object(fields)) = fields.and_then(|fields| serde_json::from_str(&fields.fields).ok())
            else {
                continue;
            };
            for (key, value) in fields {
                match key.as_str() {
                    "trace_id" => drop(line.insert("TraceId".into(), value)),
                    "span_id" => drop(line.insert("SpanId".into(), value)),
                    _ => drop(attributes.insert(format!("{}.{key}", span.name()), value)),
                }
            }
        }
        event.record(&mut Attributes(&mut attributes));
        let (text, number) = severity(event.metadata().level());
        let body = attributes.remove("message").unwrap_or_default();
        line.insert("Timestamp".into(), Utc::now().to_rfc3339_opts(SecondsFormat::Nanos, true).into());
        line.insert("SeverityText".into(), text.into());
        line.insert("SeverityNumber".into(), number.into());
        line.insert("Body".into(), body);
        line.insert(
            "Resource".into(),
            json!({ "service.name": "mesh-llm", "service.version": env!("CARGO_PKG_VERSION") }),
        );
        line.insert("InstrumentationScope".into(), json!({ "Name": event.metadata().target() }));
        line.insert("Attributes".into(), attributes.into());
        writeln!(writer, "{}", Value::Object(line))
    }
}

fn severity(level: &Level) -> (&'static str, u32) {
    match *level {
        Level::TRACE => ("TRACE", 1),
        Level::DEBUG => ("DEBUG", 5),
        Level::INFO => ("INFO", 9),
        Level::WARN => ("WARN", 13),
        Level::ERROR => ("ERROR", 17),
    }
}

/// An event's fields as JSON.
struct Attributes<'a>(&'a mut Map<String, Value>);

impl Attributes<'_> {
    fn set(&mut self, field: &Field, value: Value) {
        // A name that Rust reserves has a prefix which is no part of it.
        self.0.insert(field.name().replace("r#", ""), value);
    }
}

impl Visit for Attributes<'_> {
    fn record_f64(&mut self, field: &Field, value: f64) {
        self.set(field, value.into());
    }

    fn record_i64(&mut self, field: &Field, value: i64) {
        self.set(field, value.into());
    }

    fn record_u64(&mut self, field: &Field, value: u64) {
        self.set(field, value.into());
    }

    fn record_bool(&mut self, field: &Field, value: bool) {
        self.set(field, value.into());
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        self.set(field, value.into());
    }

    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        let mut text = String::new();
        write!(text, "{value:?}").ok();
        self.set(field, text.into());
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use super::*;

    #[test]
    fn a_line_is_what_opentelemetry_calls_a_log_record() {
        let lines = Arc::new(Mutex::new(Vec::<u8>::new()));
        struct To(Arc<Mutex<Vec<u8>>>);
        impl std::io::Write for To {
            fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
                self.0.lock().unwrap().extend_from_slice(bytes);
                Ok(bytes.len())
            }
            fn flush(&mut self) -> std::io::Result<()> {
                Ok(())
            }
        }
        let to = lines.clone();
        let log = tracing_subscriber::fmt()
            .with_writer(move || To(to.clone()))
            .fmt_fields(Json::fields())
            .event_format(Json)
            .finish();
        tracing::subscriber::with_default(log, || {
            let span = tracing::info_span!("request", id = "req_1", trace_id = tracing::field::Empty, span_id = "b7");
            span.record("trace_id", "0af7");
            let _entered = span.enter();
            let none: Option<u64> = None;
            tracing::warn!(
                url.path = "/\"x\"",
                error.r#type = "odd",
                gen_ai.usage.input_tokens = 7,
                none,
                "two\nlines"
            );
        });
        let text = String::from_utf8(lines.lock().unwrap().clone()).unwrap();
        assert_eq!(text.lines().count(), 1, "{text}");
        let mut line: Value = serde_json::from_str(&text).unwrap();
        let time = line["Timestamp"].take();
        assert!(chrono::DateTime::parse_from_rfc3339(time.as_str().unwrap()).is_ok(), "{time}");
        line.as_object_mut().unwrap().remove("Timestamp");
        line.as_object_mut().unwrap().remove("Resource");
        assert_eq!(
            line,
            json!({
                "TraceId": "0af7", "SpanId": "b7", "SeverityText": "WARN", "SeverityNumber": 13, "Body": "two\nlines",
                "InstrumentationScope": { "Name": "mesh_llm::otel::tests" },
                "Attributes": {
                    "request.id": "req_1", "url.path": "/\"x\"", "error.type": "odd", "gen_ai.usage.input_tokens": 7,
                },
            })
        );
    }
}
