//! Of the files about tokens, what a profile needs. They are long, and most of what is in them is passed over where it
//! lies: as JSON values they would take many times their size.

use std::{borrow::Cow, fmt, fs::File, path::Path};

use memmap2::Mmap;
use mesh_core::{ChatTemplate, ProbeError};
use serde::{
    Deserialize, Deserializer,
    de::{Error, IgnoredAny, MapAccess, SeqAccess, Visitor},
};

use super::{malformed, template};

/// Most added tokens that are looked at.
const ADDED_MAX: usize = 1 << 16;
/// Longest text of a token, in bytes.
const TOKEN_BYTES_MAX: usize = 1 << 10;
/// Most named chat templates.
const TEMPLATES_MAX: usize = 64;

/// tokenizer_config.json, special_tokens_map.json and chat_template.json.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct TokenizerConfig {
    pub bos_token: Token,
    pub eos_token: Token,
    pub chat_template: Template,
}

/// A token's text, as such or in an object's `content`.
#[derive(Debug, Default)]
pub(super) struct Token(pub Option<String>);

/// A chat template: a text, or a list of named ones.
#[derive(Debug, Default)]
pub(super) struct Template(pub Option<ChatTemplate>);

/// A token of tokenizer.json that is not of its vocabulary.
#[derive(Debug, Deserialize)]
pub(super) struct AddedToken {
    pub id: u32,
    pub content: String,
}

/// `added_tokens` of tokenizer.json; the vocabulary is skipped over. `None` if there is no such file.
pub(super) fn added_tokens(path: &Path, bytes_max: u64) -> Result<Option<Vec<AddedToken>>, ProbeError> {
    #[derive(Deserialize)]
    struct Tokenizer {
        #[serde(default)]
        added_tokens: Added,
    }
    let io = |source| ProbeError::Io { path: path.to_owned(), source };
    let file = match File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(io(error)),
    };
    match file.metadata().map_err(io)?.len() {
        0 => return Err(malformed(path, "the file is empty")),
        bytes if bytes > bytes_max => {
            return Err(malformed(path, format!("larger than the {bytes_max} bytes that are read")));
        }
        _ => {}
    }
    // SAFETY: the map is only read, and dropped at the end of this function. Model files are replaced by renaming.
    let map = unsafe { Mmap::map(&file) }.map_err(io)?;
    let tokenizer: Tokenizer = serde_json::from_slice(&map).map_err(|error| malformed(path, error.to_string()))?;
    Ok(Some(tokenizer.added_tokens.0))
}

#[derive(Default)]
struct Added(Vec<AddedToken>);

impl<'de> Deserialize<'de> for Added {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct List;
        impl<'de> Visitor<'de> for List {
            type Value = Added;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a list of tokens")
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut tokens: A) -> Result<Added, A::Error> {
                #[derive(Deserialize)]
                struct Borrowed<'a> {
                    id: u32,
                    #[serde(borrow)]
                    content: Cow<'a, str>,
                }
                let mut added = Vec::new();
                while let Some(Borrowed { id, content }) = tokens.next_element()? {
                    if added.len() == ADDED_MAX {
                        return Err(A::Error::custom(format!("more than {ADDED_MAX} added tokens are not read")));
                    }
                    if content.len() <= TOKEN_BYTES_MAX {
                        added.push(AddedToken { id, content: content.into_owned() });
                    }
                }
                Ok(Added(added))
            }
        }
        deserializer.deserialize_seq(List)
    }
}

/// Passes over whatever is left of a list.
fn skip_seq<'de, A: SeqAccess<'de>>(mut list: A) -> Result<(), A::Error> {
    while list.next_element::<IgnoredAny>()?.is_some() {}
    Ok(())
}

/// What is neither text, list nor object says nothing.
macro_rules! nothing_else {
    ($nothing:expr) => {
        fn visit_unit<E: Error>(self) -> Result<Self::Value, E> {
            Ok($nothing)
        }

        fn visit_bool<E: Error>(self, _: bool) -> Result<Self::Value, E> {
            Ok($nothing)
        }

        fn visit_i64<E: Error>(self, _: i64) -> Result<Self::Value, E> {
            Ok($nothing)
        }

        fn visit_u64<E: Error>(self, _: u64) -> Result<Self::Value, E> {
            Ok($nothing)
        }

        fn visit_f64<E: Error>(self, _: f64) -> Result<Self::Value, E> {
            Ok($nothing)
        }
    };
}

impl<'de> Deserialize<'de> for Token {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Text;
        impl<'de> Visitor<'de> for Text {
            type Value = Token;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a token")
            }

            fn visit_str<E: Error>(self, text: &str) -> Result<Token, E> {
                Ok(Token((text.len() <= TOKEN_BYTES_MAX).then(|| text.to_owned())))
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Token, A::Error> {
                let mut content = Token(None);
                while let Some(key) = map.next_key::<Cow<'_, str>>()? {
                    if key == "content" {
                        content = map.next_value()?;
                    } else {
                        map.next_value::<IgnoredAny>()?;
                    }
                }
                Ok(content)
            }

            fn visit_seq<A: SeqAccess<'de>>(self, list: A) -> Result<Token, A::Error> {
                skip_seq(list).map(|()| Token(None))
            }

            nothing_else!(Token(None));
        }
        deserializer.deserialize_any(Text)
    }
}

impl<'de> Deserialize<'de> for Template {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Sources;
        impl<'de> Visitor<'de> for Sources {
            type Value = Template;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a chat template")
            }

            fn visit_str<E: Error>(self, text: &str) -> Result<Template, E> {
                if text.len() as u64 > template::TEMPLATE_BYTES_MAX {
                    let most = template::TEMPLATE_BYTES_MAX;
                    return Err(E::custom(format!("a chat template of more than {most} bytes is not read")));
                }
                Ok(Template(template::from_named(&[("default", text)])))
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Template, A::Error> {
                #[derive(Deserialize)]
                struct Named {
                    name: Option<String>,
                    template: Option<String>,
                }
                let (mut named, mut bytes) = (Vec::new(), 0);
                while let Some(Named { name, template }) = list.next_element()? {
                    let Some((name, text)) = name.zip(template) else { continue };
                    bytes += name.len() + text.len();
                    if named.len() == TEMPLATES_MAX || bytes as u64 > template::TEMPLATE_BYTES_MAX {
                        return Err(A::Error::custom("so many or so long chat templates are not read"));
                    }
                    named.push((name, text));
                }
                let pairs: Vec<_> = named.iter().map(|(name, text)| (name.as_str(), text.as_str())).collect();
                Ok(Template(template::from_named(&pairs)))
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Template, A::Error> {
                while map.next_entry::<IgnoredAny, IgnoredAny>()?.is_some() {}
                Ok(Template(None))
            }

            nothing_else!(Template(None));
        }
        deserializer.deserialize_any(Sources)
    }
}
