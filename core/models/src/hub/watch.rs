//! What is told of a download: each file, and all of them.

use std::{
    collections::BTreeMap,
    sync::{Mutex, PoisonError},
};

use mesh_core::{ProgressSink, Stage};

/// Passes on the progress of files that come at once.
pub(super) struct Watch {
    sink: ProgressSink,
    /// All of them; absent where there is but one.
    whole: Option<(Stage, u64)>,
    files: Mutex<BTreeMap<String, u64>>,
}

impl Watch {
    /// For `count` files of `bytes` together.
    pub fn new(sink: &ProgressSink, repo: &str, count: usize, bytes: u64) -> Self {
        let whole = (count > 1).then(|| (Stage::Download { file: format!("{repo}, {count} files") }, bytes));
        if let Some((stage, bytes)) = &whole {
            sink.report(stage, 0, Some(*bytes));
        }
        Self { sink: sink.clone(), whole, files: Mutex::default() }
    }

    /// So much of a file is there.
    pub fn at(&self, file: &str, done: u64, bytes: u64) {
        let mut files = self.files.lock().unwrap_or_else(PoisonError::into_inner);
        // That it is over is said when it is in place.
        let done = done.min(bytes.saturating_sub(1));
        self.sink.report(&Stage::Download { file: file.to_owned() }, done, Some(bytes));
        files.insert(file.to_owned(), done);
        self.total(&files);
    }

    /// A file is in place.
    pub fn over(&self, file: &str, bytes: u64) {
        let mut files = self.files.lock().unwrap_or_else(PoisonError::into_inner);
        self.sink.report(&Stage::Download { file: file.to_owned() }, bytes, Some(bytes));
        files.insert(file.to_owned(), bytes);
        self.total(&files);
    }

    fn total(&self, files: &BTreeMap<String, u64>) {
        if let Some((stage, bytes)) = &self.whole {
            self.sink.report(stage, files.values().sum::<u64>().min(*bytes), Some(*bytes));
        }
    }
}
