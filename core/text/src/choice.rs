//! How a model talks: what its family is known for, and what its own template shows. Templates are nearer to the
//! weights than families are: fine-tunes keep a family's graph and bring a form of calls of their own.

use std::cmp::Reverse;

use mesh_core::{Thinking, UnknownName, registry::Registry};

use crate::dialect::{Dialect, Evidence};

/// The dialect of models that neither family nor template speaks for: text as it comes.
pub const PLAIN: &str = "plain";

/// A dialect and why it is the one.
#[derive(Clone)]
pub struct Choice {
    /// The dialect.
    pub dialect: &'static dyn Dialect,
    /// For the log.
    pub why: String,
}

/// The dialect of a model of a family that is known for `own`, with these templates. A form of calls that a template
/// shows decides; failing that, the markers of reasoning it shows; failing that, the family. Where several dialects
/// are shown alike, the family's own wins, then one without calls for who shows none, then the longer evidence.
pub fn choose(dialects: &Registry<dyn Dialect>, own: Option<&str>, templates: &[&str]) -> Result<Choice, UnknownName> {
    let own = own.map(|id| dialects.get(id)).transpose()?;
    let is_own = |dialect: &dyn Dialect| own.is_some_and(|own| own.id() == dialect.id());
    let shown = |dialect: &'static dyn Dialect| {
        Some((dialect, templates.iter().filter_map(|template| dialect.evidence(template)).max()?))
    };
    let rank = |(dialect, evidence): &(&'static dyn Dialect, Evidence)| match evidence {
        Evidence::Calls(text) => (1, is_own(*dialect), false, text.len(), Reverse(dialect.id())),
        Evidence::Reasoning(text) => (0, is_own(*dialect), !dialect.tools(), text.len(), Reverse(dialect.id())),
    };
    let best = dialects.iter().filter_map(shown).max_by_key(rank);
    Ok(match (best, own) {
        (Some((dialect, Evidence::Calls(text))), _) => {
            Choice { dialect, why: format!("the chat template writes calls with `{text}`") }
        }
        (Some((dialect, Evidence::Reasoning(text))), _) => Choice {
            dialect,
            why: format!("the chat template writes reasoning with `{text}`, and no calls that are known"),
        },
        (None, Some(own)) => {
            Choice { dialect: own, why: "it is the family's, and the chat template shows no other".into() }
        }
        (None, None) => Choice {
            dialect: dialects.get(PLAIN)?,
            why: "no family speaks for the model, and its chat template shows no form that is known".into(),
        },
    })
}

/// Variables that switch reasoning in templates of any family.
const SWITCHES: &[Thinking] = &[Thinking::Variable("enable_thinking"), Thinking::Effort("reasoning_effort")];

/// How reasoning is switched in a model of a family that is known for `own`, with these templates: by a variable that a
/// template reads. One that none reads would switch nothing.
pub fn thinking(own: Thinking, templates: &[&str]) -> Thinking {
    let read = |thinking: &Thinking| match thinking {
        Thinking::Fixed => false,
        Thinking::Variable(name) | Thinking::Effort(name) => templates.iter().any(|template| reads(template, name)),
    };
    [own].iter().chain(SWITCHES).copied().find(read).unwrap_or(Thinking::Fixed)
}

/// Whether a template reads this variable: the word occurs, but not as an attribute, as what is assigned to, nor as a part
/// of a longer word.
fn reads(template: &str, variable: &str) -> bool {
    let of_a_word = |c: char| c.is_alphanumeric() || c == '_';
    template.match_indices(variable).any(|(at, _)| {
        let before = template[..at].chars().next_back();
        let rest = &template[at + variable.len()..];
        let assigned = rest.trim_start().strip_prefix('=').is_some_and(|rest| !rest.starts_with('='));
        let after = rest.chars().next();
        !before.is_some_and(|c| of_a_word(c) || matches!(c, '.' | '\'' | '"' | '<' | '/'))
            && !after.is_some_and(of_a_word)
            && !assigned
    })
}

#[cfg(test)]
mod tests {
    use mesh_core::{Thinking, registry::Registry};

    use super::{choose, thinking};
    use crate::dialect::{Dialect, DialectParser, Evidence, ParserContext};

    struct Fake {
        id: &'static str,
        calls: &'static str,
        reasoning: &'static str,
    }

    impl Dialect for Fake {
        fn id(&self) -> &'static str {
            self.id
        }

        fn tools(&self) -> bool {
            !self.calls.is_empty()
        }

        fn parser(&self, _: &ParserContext) -> Box<dyn DialectParser> {
            unreachable!("nothing is parsed here")
        }

        fn evidence(&self, template: &str) -> Option<Evidence> {
            let shows = |text: &str| !text.is_empty() && template.contains(text);
            match (shows(self.calls), shows(self.reasoning)) {
                (true, _) => Some(Evidence::Calls(self.calls)),
                (_, true) => Some(Evidence::Reasoning(self.reasoning)),
                _ => None,
            }
        }
    }

    static FAKES: [Fake; 4] = [
        Fake { id: "json", calls: "<call>", reasoning: "<think>" },
        Fake { id: "plain", calls: "", reasoning: "" },
        Fake { id: "think", calls: "", reasoning: "<think>" },
        Fake { id: "xml", calls: "<call=", reasoning: "<think>" },
    ];

    #[test]
    fn the_template_decides_and_the_family_where_it_is_silent() {
        let dialects =
            Registry::collect("dialect", FAKES.iter().map(|fake| (fake.id, "here", fake as &'static dyn Dialect)))
                .unwrap();
        let cases: [(Option<&str>, &[&str], &str, &str); 10] = [
            (None, &[], "plain", "no family"),
            (Some("json"), &[], "json", "family's"),
            (Some("json"), &["hello"], "json", "family's"),
            (Some("json"), &["<call=f>"], "xml", "`<call=`"),
            (Some("plain"), &["<think>", "<call>"], "json", "`<call>`"),
            (None, &["<call><think>"], "json", "`<call>`"),
            (None, &["<think>"], "think", "`<think>`"),
            (Some("xml"), &["<think>"], "xml", "`<think>`"),
            (Some("plain"), &["<think>"], "think", "`<think>`"),
            (Some("xml"), &["<call> and <call=f>"], "xml", "`<call=`"),
        ];
        for (own, templates, expected, why) in cases {
            let choice = choose(&dialects, own, templates).unwrap();
            assert_eq!(choice.dialect.id(), expected, "{own:?} {templates:?}");
            assert!(choice.why.contains(why), "{}", choice.why);
        }
        assert!(choose(&dialects, Some("nobody's"), &[]).is_err());
    }

    #[test]
    fn a_switch_is_what_the_template_reads() {
        let (enable, own) = (Thinking::Variable("enable_thinking"), Thinking::Variable("thinking"));
        let effort = Thinking::Effort("reasoning_effort");
        assert_eq!(thinking(enable, &["{% if enable_thinking %}"]), enable);
        assert_eq!(thinking(Thinking::Fixed, &["{% if enable_thinking %}"]), enable);
        assert_eq!(thinking(own, &["{% if thinking is not defined %}{% set thinking = enable_thinking %}"]), own);
        assert_eq!(thinking(own, &["", "{% if not enable_thinking %}"]), enable);
        assert_eq!(thinking(own, &["{{ message.thinking }}{{ m['thinking'] }}</thinking>"]), Thinking::Fixed);
        assert_eq!(thinking(enable, &["{% set ns = namespace(enable_thinking=true) %}"]), Thinking::Fixed);
        assert_eq!(thinking(enable, &["{{ reasoning_effort }}"]), effort);
        assert_eq!(thinking(enable, &["{{ messages }}"]), Thinking::Fixed);
        assert_eq!(thinking(enable, &[]), Thinking::Fixed);
    }
}
