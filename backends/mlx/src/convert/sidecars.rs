//! What stands beside the weights and goes with them. Programs do not.

use std::{fs, path::Path};

use super::{CONFIG, ConvertError, INDEX};

/// Endings of files that are copied.
const ENDINGS: [&str; 6] = [".json", ".jinja", ".model", ".txt", ".tiktoken", ".md"];
/// Beginnings of others.
const BEGINNINGS: [&str; 2] = ["LICENSE", "NOTICE"];
/// Chat templates besides the first.
const TEMPLATES: &str = "additional_chat_templates";
/// Largest file that is copied, in bytes.
const BYTES_MAX: u64 = 128 << 20;
/// Most files.
const FILES_MAX: usize = 1000;

/// Copies them. What is a link is copied as the file that it leads to.
pub(super) fn copy(from: &Path, to: &Path) -> Result<(), ConvertError> {
    copy_files(from, to, |name| {
        let written = name == CONFIG || name.ends_with(INDEX) || name.ends_with(".index.json");
        let fits = ENDINGS.iter().any(|ending| name.ends_with(ending))
            || BEGINNINGS.iter().any(|beginning| name.starts_with(beginning));
        fits && !written
    })?;
    let templates = from.join(TEMPLATES);
    if templates.is_dir() {
        let to = to.join(TEMPLATES);
        fs::create_dir(&to).map_err(ConvertError::io(&to))?;
        copy_files(&templates, &to, |name| name.ends_with(".jinja"))?;
    }
    Ok(())
}

fn copy_files(from: &Path, to: &Path, wanted: impl Fn(&str) -> bool) -> Result<(), ConvertError> {
    for entry in fs::read_dir(from).map_err(ConvertError::io(from))?.take(FILES_MAX) {
        let entry = entry.map_err(ConvertError::io(from))?;
        let (path, name) = (entry.path(), entry.file_name());
        let Some(name) = name.to_str().filter(|name| wanted(name)) else { continue };
        let metadata = fs::metadata(&path).map_err(ConvertError::io(&path))?;
        if metadata.is_file() && metadata.len() <= BYTES_MAX {
            fs::copy(&path, to.join(name)).map_err(ConvertError::io(&path))?;
        }
    }
    Ok(())
}
