//! `{% generation %}` marks the assistant's words for training. transformers has an extension for it; minijinja takes no
//! new tags, so that tag alone is replaced by one that renders and scopes the same: `{% with %}`.

/// The template with `generation` tags as `with` tags, everything else as it is, line by line.
pub fn plain_blocks(source: &str) -> String {
    let mut output = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(at) = rest.find('{') {
        let (before, tag) = rest.split_at(at);
        output.push_str(before);
        let (kept, after) = match tag.as_bytes().get(1) {
            Some(b'#') => tag.split_at(tag.find("#}").map_or(tag.len(), |end| end + 2)),
            Some(b'{') => tag.split_at(code_len(tag, "}}")),
            Some(b'%') => {
                let (code, after) = tag.split_at(code_len(tag, "%}"));
                let name = code[2..].trim_start_matches(['-', '+']).trim_start();
                let word = name.split(|c: char| !c.is_alphanumeric() && c != '_').next().unwrap_or_default();
                let replacement = match word {
                    "generation" => "with",
                    "endgeneration" => "endwith",
                    "raw" => {
                        // Up to the name of the tag that ends it.
                        let (raw, after) = rest[at..].split_at(tag.find("endraw").unwrap_or(tag.len()));
                        output.push_str(raw);
                        rest = after;
                        continue;
                    }
                    _ => word,
                };
                output.push_str(&code[..code.len() - name.len()]);
                output.push_str(replacement);
                (&name[word.len()..], after)
            }
            _ => tag.split_at(1),
        };
        output.push_str(kept);
        rest = after;
    }
    output.push_str(rest);
    output
}

/// Length of the code that `text` begins with, up to and with its closing marker; strings may hold the marker.
fn code_len(text: &str, close: &str) -> usize {
    let mut quote = None;
    let mut escaped = false;
    for (at, c) in text.char_indices().skip(2) {
        match quote {
            Some(_) if escaped => escaped = false,
            Some(_) if c == '\\' => escaped = true,
            Some(open) if c == open => quote = None,
            Some(_) => {}
            None if text[at..].starts_with(close) => return at + close.len(),
            None if c == '\'' || c == '"' => quote = Some(c),
            None => {}
        }
    }
    text.len()
}

#[cfg(test)]
mod tests {
    use super::plain_blocks;

    #[test]
    fn only_the_tag_is_replaced() {
        assert_eq!(plain_blocks("{%- generation -%}x{% endgeneration +%}"), "{%- with -%}x{% endwith +%}");
        assert_eq!(plain_blocks("{%generation%}{%-endgeneration%}"), "{%with%}{%-endwith%}");
        for same in [
            "{# {% generation %} #}",
            "{{ '{% generation %}' }}",
            "{% set x = \"%}{% generation %}\" %}",
            "{% raw %}{% generation %}{% endraw %}",
            "{% set generation = 1 %}generation{{ generation }}",
            "{% generations %}{ % generation %}",
            "{% generate",
            "{{ 'open",
            "{# open",
            "{",
            "é{é",
        ] {
            assert_eq!(plain_blocks(same), same);
        }
    }
}
