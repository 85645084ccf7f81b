//! Finding markers in streamed text: what dialects are written with.

/// Where the earliest of `markers` begins in `text`, and which it is; of several at one place, the longest.
pub fn find_first<'m>(text: &str, markers: &[&'m str]) -> Option<(usize, &'m str)> {
    let found = markers.iter().filter_map(|marker| text.find(marker).map(|at| (at, *marker)));
    found.min_by_key(|(at, marker)| (*at, std::cmp::Reverse(marker.len())))
}

/// Length of `text` before the longest ending that is a proper beginning of one of `markers`: what can go out while
/// the rest waits.
pub fn settled_len(text: &str, markers: &[&str]) -> usize {
    let longest = markers.iter().map(|marker| marker.len()).max().unwrap_or(0);
    let from = (text.len() + 1).saturating_sub(longest);
    let begins =
        |at: usize| markers.iter().any(|marker| marker.len() > text.len() - at && marker.starts_with(&text[at..]));
    (from..text.len()).find(|&at| text.is_char_boundary(at) && begins(at)).unwrap_or(text.len())
}
