//! Patterns as the child can be trusted with. It takes an expression's characters for those of the JSON text that is written,
//! where quotes, backslashes and line ends have other forms than in the text that is meant, and lets everything pass where it
//! knows a construct not. What it gets is therefore written anew, of characters, classes, groups and counts alone.

use regex_syntax::{
    ParserBuilder,
    hir::{Class, ClassUnicode, ClassUnicodeRange, Hir, HirKind, Look},
};

/// Longest expression that is sent, in bytes.
const PATTERN_BYTES_MAX: usize = 64 << 10;
const NESTED_MAX: u32 = 64;

/// What stands for itself in a text of JSON.
const PLAIN: [(char, char); 4] = [(' ', '!'), ('#', '['), (']', '~'), ('\u{80}', '\u{10ffff}')];
/// What has another form in a text of JSON.
const ESCAPED: [(char, &str); 7] = [
    ('"', r#"\\""#),
    ('\\', r"\\\\"),
    ('\n', r"\\n"),
    ('\r', r"\\r"),
    ('\t', r"\\t"),
    ('\u{8}', r"\\b"),
    ('\u{c}', r"\\f"),
];

/// An expression for the child, and how many repetitions it counts. It matches no text that `pattern` does not match.
pub(super) fn translated(pattern: &str) -> Result<(String, u64), String> {
    let parsed = ParserBuilder::new().nest_limit(NESTED_MAX).build().parse(&in_rust(pattern)?);
    let parsed = parsed.map_err(|error| match error {
        regex_syntax::Error::Parse(error) => error.kind().to_string(),
        regex_syntax::Error::Translate(error) => error.kind().to_string(),
        _ => "it cannot be read".to_owned(),
    })?;
    let mut writer = Writer { text: "^(".to_owned(), repetitions: 0 };
    for (index, branch) in branches(&parsed).into_iter().enumerate() {
        if index > 0 {
            writer.text.push('|');
        }
        writer.branch(branch)?;
    }
    writer.text.push_str(")$");
    Ok((writer.text, writer.repetitions))
}

/// The same expression for a parser of Rust's, which differs from JavaScript's in details. Where readers of schemas do not
/// agree on a class, it becomes what they have in common.
fn in_rust(pattern: &str) -> Result<String, String> {
    let (mut rust, mut in_class) = (String::new(), false);
    let mut rest = pattern.chars().peekable();
    while let Some(char) = rest.next() {
        match char {
            '\\' => match rest.next().ok_or("it ends with a backslash")? {
                'd' => rust.push_str("[0-9]"),
                'w' => rust.push_str("[0-9A-Za-z_]"),
                's' => rust.push_str(r"[\t\n\r ]"),
                'S' => rust.push_str(r"[^\s\u{feff}]"),
                known @ ('D' | 'W' | 'n' | 'r' | 't' | 'f' | 'v' | 'b' | 'B' | 'p' | 'P') => rust.extend(['\\', known]),
                hex @ ('x' | 'u') => {
                    let digits: String = rest.by_ref().take(if hex == 'x' { 2 } else { 4 }).collect();
                    if !digits.chars().all(|digit| digit.is_ascii_hexdigit()) {
                        return Err(format!("`\\{hex}{digits}` is no character"));
                    }
                    rust.push_str(&format!("\\{hex}{digits}"));
                }
                other if other.is_ascii_alphanumeric() => return Err(format!("`\\{other}` is not supported")),
                mark => rust.push_str(&regex_syntax::escape(mark.encode_utf8(&mut [0; 4]))),
            },
            '[' if in_class => rust.push_str(r"\["),
            '[' => {
                in_class = true;
                rust.push('[');
                rust.extend(rest.next_if_eq(&'^'));
                if rest.peek() == Some(&']') {
                    return Err("an empty class is not supported".into());
                }
            }
            ']' => {
                in_class = false;
                rust.push(']');
            }
            '&' | '~' if in_class => rust.extend(['\\', char]),
            '-' if in_class && rest.peek() == Some(&'-') => return Err("`--` in a class is not supported".into()),
            '.' if !in_class => rust.push_str(r"[^\n\r\u{2028}\u{2029}]"),
            '{' if !in_class && rest.peek() == Some(&',') => {
                return Err("a count without its least is not supported".into());
            }
            other => rust.push(other),
        }
    }
    Ok(rust)
}

/// What an expression may be, each with anchors of its own.
fn branches(whole: &Hir) -> Vec<&Hir> {
    match whole.kind() {
        HirKind::Alternation(branches) => branches.iter().collect(),
        HirKind::Capture(capture) => branches(&capture.sub),
        _ => vec![whole],
    }
}

struct Writer {
    text: String,
    repetitions: u64,
}

impl Writer {
    /// One of the expressions that a text may match. What it leaves open before and after is anything.
    fn branch(&mut self, branch: &Hir) -> Result<(), String> {
        let look = |hir: Option<&Hir>, wanted| hir.is_some_and(|hir| *hir.kind() == HirKind::Look(wanted));
        let mut parts = match branch.kind() {
            HirKind::Concat(parts) => &parts[..],
            _ => std::slice::from_ref(branch),
        };
        let begins = look(parts.first(), Look::Start);
        parts = if begins { &parts[1..] } else { parts };
        let ends = look(parts.last(), Look::End);
        parts = if ends { &parts[..parts.len() - 1] } else { parts };
        let anything = PLAIN.map(|(first, last)| ClassUnicodeRange::new(first, last));
        let anything = |writer: &mut Self| {
            writer.class(&ClassUnicode::new(anything))?;
            writer.text.push('*');
            Ok::<_, String>(())
        };
        if !begins {
            anything(self)?;
        }
        if parts.is_empty() {
            self.text.push_str("()");
        }
        parts.iter().try_for_each(|part| self.write(part))?;
        if !ends {
            anything(self)?;
        }
        Ok(())
    }

    fn write(&mut self, hir: &Hir) -> Result<(), String> {
        if self.text.len() > PATTERN_BYTES_MAX {
            return Err(format!("it takes more than {PATTERN_BYTES_MAX} bytes, its classes written out"));
        }
        match hir.kind() {
            HirKind::Empty => self.text.push_str("()"),
            HirKind::Literal(literal) => {
                let literal = str::from_utf8(&literal.0).map_err(|_| "it is about bytes")?;
                literal.chars().try_for_each(|char| self.class(&one(char)))?;
            }
            HirKind::Class(Class::Unicode(class)) => self.class(class)?,
            HirKind::Class(Class::Bytes(_)) => return Err("it is about bytes".into()),
            HirKind::Look(_) => return Err("anchors inside and word boundaries are not supported".into()),
            HirKind::Repetition(repetition) => {
                self.group(std::slice::from_ref(&*repetition.sub), "")?;
                let (least, most) = (repetition.min, repetition.max);
                self.repetitions += u64::from(most.unwrap_or(least));
                match most {
                    Some(most) => self.text.push_str(&format!("{{{least},{most}}}")),
                    None if least == 0 => self.text.push('*'),
                    None => self.text.push_str(&format!("{{{least},}}")),
                }
            }
            HirKind::Capture(capture) => self.group(std::slice::from_ref(&*capture.sub), "")?,
            HirKind::Concat(parts) => parts.iter().try_for_each(|part| self.write(part))?,
            HirKind::Alternation(branches) => self.group(branches, "|")?,
        }
        Ok(())
    }

    fn group(&mut self, parts: &[Hir], between: &str) -> Result<(), String> {
        self.text.push('(');
        for (index, part) in parts.iter().enumerate() {
            if index > 0 {
                self.text.push_str(between);
            }
            self.write(part)?;
        }
        self.text.push(')');
        Ok(())
    }

    /// One character of a class, as JSON has it.
    fn class(&mut self, class: &ClassUnicode) -> Result<(), String> {
        let mut plain = class.clone();
        plain.intersect(&ClassUnicode::new(PLAIN.map(|(first, last)| ClassUnicodeRange::new(first, last))));
        let holds = |char: char| class.ranges().iter().any(|range| (range.start()..=range.end()).contains(&char));
        let mut ways: Vec<String> = Vec::new();
        match plain.ranges() {
            [] => {}
            [only] if only.start() == only.end() => ways.push(character(only.start())),
            ranges => {
                let range = |range: &ClassUnicodeRange| match range.start() == range.end() {
                    true => character(range.start()),
                    false => format!("{}-{}", character(range.start()), character(range.end())),
                };
                ways.push(format!("[{}]", ranges.iter().map(range).collect::<String>()));
            }
        }
        ways.extend(ESCAPED.iter().filter(|(char, _)| holds(*char)).map(|(_, form)| (*form).to_owned()));
        match &ways[..] {
            [] => return Err("it matches nothing but control characters, or nothing".into()),
            [only] => self.text.push_str(only),
            several => self.text.push_str(&format!("({})", several.join("|"))),
        }
        Ok(())
    }
}

fn one(char: char) -> ClassUnicode {
    ClassUnicode::new([ClassUnicodeRange::new(char, char)])
}

/// A character that means nothing else, in a class and out of it.
fn character(char: char) -> String {
    match char {
        _ if char.is_ascii_alphanumeric() => char.to_string(),
        ' '..='~' => format!("\\x{:02x}", u32::from(char)),
        _ => char.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn expressions_are_written_of_what_the_child_knows() {
        for (pattern, wanted) in [
            ("^abc$", "^(abc)$"),
            ("^[0-9]{3}$", "^(([0-9]){3,3})$"),
            (r"^\d+-\w?$", r"^(([0-9]){1,}\x2d([0-9A-Z\x5fa-z]){0,1})$"),
            ("^(?:a|bc)*$", "^(((a|bc))*)$"),
            (r#"^"\\$"#, r#"^(\\"\\\\)$"#),
            (r"^[\n\t]$", r"^((\\n|\\t))$"),
            ("^é[à-ü]$", "^(é[à-ü])$"),
            ("^$", "^(())$"),
        ] {
            assert_eq!(translated(pattern).unwrap().0, wanted, "{pattern}");
        }
        let (open, _) = translated("b+").unwrap();
        assert!(open.starts_with(r"^([\x20-\x21\x23-\x5b\x5d-\x7e") && open.contains("]*(b){1,}["), "{open}");
        assert_eq!(translated("^a|bc$").unwrap().0.matches('*').count(), 2);
        let (not, _) = translated("^[^x]$").unwrap();
        assert!(not.contains(r#"|\\"|"#) && not.contains("w") && !not.contains(r"\x78"), "{not}");
    }

    #[test]
    fn what_cannot_be_written_is_refused() {
        for (pattern, why) in [
            ("(?=a)b", "look-around"),
            (r"^\bfoo$", "word boundaries"),
            ("^(a$|b)c$", "anchors"),
            (r"(a)\1", r"`\1`"),
            (r"^\cA$", r"`\c`"),
            (r"^\x4g$", "no character"),
            ("^[]a]$", "empty class"),
            ("^[a--b]$", "`--`"),
            ("^a{,3}$", "least"),
            ("^(a$", "unclosed group"),
            ("a\\", "backslash"),
            (r"^\x01$", "control characters"),
        ] {
            let error = translated(pattern).unwrap_err();
            assert!(error.contains(why), "{pattern}: {error}");
        }
        let classes = r"\p{L}".repeat(50);
        assert!(translated(&classes).unwrap_err().contains("bytes"));
        assert_eq!(translated("^(a{100}){7,9}b{3,}$").unwrap().1, 112);
    }
}
