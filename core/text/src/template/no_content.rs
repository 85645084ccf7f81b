//! How a message without text has to be put to a template.

use chrono::NaiveDateTime;
use serde_json::{Map, Value, json};

use super::{Template, TemplateInput};

impl Template {
    /// Whether a message that holds calls and no text may have `none` for its content. Some templates put text together with
    /// it and fail, others write "None". Those have to be given empty text, which says the same.
    pub fn takes_no_content(&self) -> bool {
        *self.takes_no_content.get_or_init(|| match (self.called(Value::Null), self.called("".into())) {
            (None, Some(_)) => false,
            (Some(without), Some(empty)) => !without.contains("None") || empty.contains("None"),
            (_, None) => true,
        })
    }

    /// A conversation with a call, beside which the message has this content.
    fn called(&self, content: Value) -> Option<String> {
        // Some templates take no other length of an id.
        let id = "xxxxxxxxx";
        let call = json!({ "id": id, "type": "function", "function": { "name": "x", "arguments": {} } });
        let messages = json!([
            { "role": "user", "content": "x" },
            { "role": "assistant", "content": content, "tool_calls": [call] },
            { "role": "tool", "tool_call_id": id, "name": "x", "content": "x" },
        ]);
        self.render(&TemplateInput {
            messages: &messages,
            tools: None,
            add_generation_prompt: true,
            bos_token: Some(""),
            eos_token: Some(""),
            kwargs: &Map::new(),
            now: NaiveDateTime::default(),
        })
        .ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_template_is_asked() {
        let takes = |source: &str| Template::compile(source).unwrap().takes_no_content();
        assert!(takes("{% for m in messages %}{% if m.content %}{{ m.content }}{% endif %}{% endfor %}"));
        assert!(!takes("{% for m in messages %}{{ m.role + m.content }}{% endfor %}"), "it fails");
        assert!(!takes("{% for m in messages %}{{ m.content }}{% endfor %}"), "it writes None");
        assert!(takes("{% for m in messages %}{{ m.content }}{% endfor %} None"), "it writes that anyway");
        assert!(takes("{{ raise_exception('no') }}"), "nothing helps");
    }
}
