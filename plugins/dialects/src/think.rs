//! `<think>…</think>` and then content: DeepSeek-R1, QwQ and their kin. See [`Reasoning`] for newlines.

use mesh_text::{Delta, Dialect, DialectParser, Evidence, ParserContext, ReasoningForm, register_dialect};

use crate::reasoning::Reasoning;

/// The marker that opens reasoning.
pub const OPEN: &str = "<think>";
/// The marker that closes it.
pub const CLOSE: &str = "</think>";

/// The dialect `think`.
pub struct Think;

register_dialect!(&Think);

impl Dialect for Think {
    fn id(&self) -> &'static str {
        "think"
    }

    fn tools(&self) -> bool {
        false
    }

    fn parser(&self, context: &ParserContext) -> Box<dyn DialectParser> {
        Box::new(Parser(reasoning(context)))
    }

    fn reasoning(&self) -> Option<ReasoningForm> {
        Some(ReasoningForm { open: OPEN, close: CLOSE, content: "" })
    }

    fn evidence(&self, template: &str) -> Option<Evidence> {
        // Templates that only cut reasoning out of the history name the closing marker alone.
        [OPEN, CLOSE].into_iter().find(|marker| template.contains(marker)).map(Evidence::Reasoning)
    }

    fn markers(&self, _context: &ParserContext) -> &'static [&'static str] {
        &[OPEN, CLOSE]
    }
}

/// The reasoning of dialects that write it between these markers.
pub fn reasoning(context: &ParserContext) -> Reasoning {
    Reasoning::new(OPEN, CLOSE, context.prompt_opens_reasoning)
}

struct Parser(Reasoning);

impl DialectParser for Parser {
    fn push(&mut self, text: &str) -> Vec<Delta> {
        self.0.push(text)
    }

    fn finish(&mut self) -> Vec<Delta> {
        self.0.finish()
    }
}

#[cfg(test)]
mod tests {
    use mesh_text::{Dialect, ParserContext};

    use super::Think;
    use crate::contract;

    fn split(opened: bool, text: &str) -> (String, String) {
        let context = ParserContext { prompt_opens_reasoning: opened, ..ParserContext::default() };
        let answer = contract::answer(&Think, &context, text);
        (answer.reasoning, answer.content)
    }

    #[test]
    fn reasoning_and_content_are_told_apart() {
        let cases = [
            // opened, text, reasoning, content
            (false, "Paris.", "", "Paris."),
            (false, "<think>hmm</think>Paris.", "hmm", "Paris."),
            (false, "\n <think>\n\na\n\nb\n\n</think>\n\nParis.\n", "a\n\nb", "Paris.\n"),
            (false, "<think>\n\n</think>\n\nParis.", "", "Paris."),
            (false, "<think>not closed\n", "not closed\n", ""),
            (true, "hmm\n</think>\n\nParis.", "hmm", "Paris."),
            (true, "\n<think>\nhmm</think>Paris.", "hmm", "Paris."),
            (true, "<thin", "<thin", ""),
            (true, "cut off", "cut off", ""),
            (false, "\n\nParis.", "", "\n\nParis."),
            (false, "the tag <think>x</think> is text", "", "the tag <think>x</think> is text"),
            (false, "<think>a</think>b</think>c<think>d", "a", "b</think>c<think>d"),
            (false, "</think>", "", "</think>"),
            (false, "<thinking>", "", "<thinking>"),
            (false, "  <thin", "", "  <thin"),
            (false, "", "", ""),
        ];
        for (opened, text, reasoning, content) in cases {
            assert_eq!(split(opened, text), (reasoning.to_owned(), content.to_owned()), "{text:?}");
        }
    }

    #[test]
    fn a_prompt_says_whether_it_opens_reasoning() {
        assert!(Think.opens_reasoning("<|assistant|>\n<think>\n"));
        assert!(!Think.opens_reasoning("<|assistant|>\n<think>\n\n</think>\n\n"));
        assert!(!Think.opens_reasoning("what does <think> mean?<|assistant|>\n"));
    }

    #[test]
    fn keeps_the_contract() {
        contract::check(&Think, &["<think>", "</think>", "<thi", "</", "\n", " ", "é"]);
    }
}
