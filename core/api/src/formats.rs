//! What texts of a JSON schema's `format` look like, as regular expressions, for formats that grammars would be too generous
//! with: they know neither calendar nor lengths.

/// The formats that [`pattern`] knows.
pub const NAMES: [&str; 11] =
    ["date-time", "time", "date", "email", "hostname", "uuid", "uuid1", "uuid2", "uuid3", "uuid4", "uuid5"];

/// Every fourth year's 29 February; full centuries are left out.
const DATE: &str = "(?:[0-9]{4}-(?:(?:0[13578]|1[02])-(?:0[1-9]|[12][0-9]|3[01])|(?:0[469]|11)-(?:0[1-9]|[12][0-9]|30)\
                    |02-(?:0[1-9]|1[0-9]|2[0-8]))|[0-9]{2}(?:0[48]|[2468][048]|[13579][26])-02-29)";
/// Without leap seconds, of which only some are times.
const TIME: &str = "(?:[01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](?:\\.[0-9]{1,9})?\
                    (?:Z|[+-](?:[01][0-9]|2[0-3]):[0-5][0-9])";
const LABEL: &str = "[A-Za-z0-9]{1,14}(?:-[A-Za-z0-9]{1,14}){0,3}";
const HEX: &str = "[0-9a-fA-F]";

/// A pattern, anchored at both ends, whose texts are all of `format`.
#[must_use]
pub fn pattern(format: &str) -> Option<String> {
    Some(match format {
        "date" => format!("^{DATE}$"),
        "time" => format!("^{TIME}$"),
        "date-time" => format!("^{DATE}T{TIME}$"),
        "hostname" => format!("^{LABEL}(?:\\.{LABEL}){{0,3}}$"),
        "email" => format!("^[A-Za-z0-9_+-]{{1,20}}(?:\\.[A-Za-z0-9_+-]{{1,20}}){{0,2}}@{LABEL}(?:\\.{LABEL}){{1,2}}$"),
        "uuid" => format!("^{HEX}{{8}}(?:-{HEX}{{4}}){{3}}-{HEX}{{12}}$"),
        _ => {
            let version =
                format.strip_prefix("uuid").filter(|version| matches!(*version, "1" | "2" | "3" | "4" | "5"))?;
            format!("^{HEX}{{8}}-{HEX}{{4}}-{version}{HEX}{{3}}-[89abAB]{HEX}{{3}}-{HEX}{{12}}$")
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_name_has_a_pattern() {
        assert!(NAMES.iter().all(|name| pattern(name).is_some()));
        assert_eq!((pattern("uuid6"), pattern("uri")), (None, None));
    }
}
