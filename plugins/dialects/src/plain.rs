//! No format at all: the answer is content.

use mesh_text::{Delta, Dialect, DialectParser, ParserContext, register_dialect};

/// The dialect `plain`.
pub struct Plain;

register_dialect!(&Plain);

impl Dialect for Plain {
    fn id(&self) -> &'static str {
        "plain"
    }

    fn tools(&self) -> bool {
        false
    }

    fn parser(&self, _context: &ParserContext) -> Box<dyn DialectParser> {
        Box::new(Passthrough)
    }
}

/// Takes everything for content.
pub(crate) struct Passthrough;

impl DialectParser for Passthrough {
    fn push(&mut self, text: &str) -> Vec<Delta> {
        if text.is_empty() { Vec::new() } else { vec![Delta::Content(text.to_owned())] }
    }

    fn finish(&mut self) -> Vec<Delta> {
        Vec::new()
    }
}

#[cfg(test)]
mod tests {
    use super::Plain;
    use crate::contract;

    #[test]
    fn everything_is_content() {
        let text = "\n<think>no</think>\n<tool_call>{}</tool_call>\n";
        for context in contract::contexts() {
            assert_eq!(contract::answer(&Plain, &context, text).content, text);
        }
    }

    #[test]
    fn keeps_the_contract() {
        contract::check(&Plain, &["<think>", "\n", "é"]);
    }
}
