//! What is noted of a request while it is served, for the one line that the log has of it.
//!
//! The record is found through the task that serves the request, so that every surface counts without knowing of it.

use std::{
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use mesh_core::Usage;

use crate::body::BODY_BYTES_MAX;

/// Most bytes of a request and of its answer that the log shows, where it is to show any.
pub const LOGGED_BYTES_MAX: usize = 16 << 10;

tokio::task_local! {
    static CURRENT: Arc<Record>;
}

/// One request.
#[derive(Debug)]
pub(crate) struct Record {
    /// When its head had arrived.
    pub began: Instant,
    /// Longest body that is read.
    pub body_bytes_max: u64,
    /// Whether another server has passed it on, which the next one is not to do.
    pub passed_on: bool,
    /// Whether the log may show what was asked and answered.
    content: bool,
    noted: Mutex<Noted>,
}

/// What was noted so far. Of several answers, sums.
#[derive(Clone, Debug, Default)]
pub(crate) struct Noted {
    /// The name under which the model is served.
    pub model: Option<String>,
    /// Tokens.
    pub usage: Usage,
    /// Whether there were any answers.
    pub answers: usize,
    /// When the first token came, counted from the start.
    pub first_token: Option<Duration>,
    /// Why answers ended.
    pub finish: Vec<&'static str>,
    /// What was asked, if the log may show it.
    pub input: Option<String>,
    /// What was answered, if the log may show it.
    pub output: Option<String>,
}

impl Record {
    pub fn new(body_bytes_max: u64, content: bool, passed_on: bool) -> Arc<Self> {
        Arc::new(Self { began: Instant::now(), body_bytes_max, passed_on, content, noted: Mutex::default() })
    }

    /// The record of the request that is being served.
    pub fn current() -> Option<Arc<Self>> {
        CURRENT.try_with(Arc::clone).ok()
    }

    /// Serves a request under this record.
    pub async fn scope<T>(self: Arc<Self>, serve: impl Future<Output = T>) -> T {
        CURRENT.scope(self, serve).await
    }

    /// The same for a piece of the work.
    pub fn sync_scope<T>(self: &Arc<Self>, work: impl FnOnce() -> T) -> T {
        CURRENT.sync_scope(self.clone(), work)
    }

    fn noted(&self) -> MutexGuard<'_, Noted> {
        self.noted.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What was noted so far.
    pub fn taken(&self) -> Noted {
        std::mem::take(&mut self.noted())
    }

    /// Takes note.
    pub fn note(&self, note: impl FnOnce(&mut Noted)) {
        note(&mut self.noted());
    }

    /// Takes note of a body.
    pub fn asked(&self, body: &[u8]) {
        if self.content {
            let start = &body[..body.len().min(LOGGED_BYTES_MAX + 4)];
            append(self.noted().input.get_or_insert_default(), &String::from_utf8_lossy(start));
        }
    }

    /// Takes note of a piece of an answer.
    pub fn answered(&self, text: &str) {
        if self.content {
            append(self.noted().output.get_or_insert_default(), text);
        }
    }
}

/// Longest body that may be read for the request that is being served.
pub(crate) fn body_bytes_max() -> u64 {
    CURRENT.try_with(|record| record.body_bytes_max).unwrap_or(BODY_BYTES_MAX)
}

/// Whether the request that is being served was passed on by another server.
pub(crate) fn passed_on() -> bool {
    CURRENT.try_with(|record| record.passed_on).unwrap_or(false)
}

/// Appends as much as there is room for, and says where something is missing.
fn append(to: &mut String, text: &str) {
    let room = LOGGED_BYTES_MAX.saturating_sub(to.len());
    if text.len() <= room {
        to.push_str(text);
    } else if !to.ends_with('…') || room > 0 {
        to.push_str(&text[..text.floor_char_boundary(room)]);
        to.push('…');
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_record_is_found_by_whoever_serves_its_request() {
        assert!(Record::current().is_none());
        assert_eq!((body_bytes_max(), passed_on()), (BODY_BYTES_MAX, false));
        let record = Record::new(7, false, true);
        let found = record.clone().scope(async {
            tokio::task::yield_now().await;
            Record::current().unwrap().note(|noted| noted.answers += 1);
            (body_bytes_max(), passed_on())
        });
        assert_eq!((found.await, record.taken().answers), ((7, true), 1));
    }

    #[test]
    fn content_is_kept_where_it_is_asked_for_and_within_bounds() {
        let silent = Record::new(7, false, false);
        silent.asked(b"secret");
        silent.answered("secret");
        let noted = silent.taken();
        assert_eq!((noted.input, noted.output), (None, None));

        let telling = Record::new(7, true, false);
        telling.asked("ä".repeat(LOGGED_BYTES_MAX).as_bytes());
        for _ in 0..LOGGED_BYTES_MAX {
            telling.answered("xyz");
        }
        let noted = telling.taken();
        for text in [noted.input.unwrap(), noted.output.unwrap()] {
            assert!(text.len() <= LOGGED_BYTES_MAX + '…'.len_utf8() && text.ends_with('…'), "{}", text.len());
            assert_eq!(text.matches('…').count(), 1);
        }
    }
}
