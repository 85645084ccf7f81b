//! Several answers as one stream.

use std::{
    pin::Pin,
    task::{Context, Poll, ready},
};

use futures::{Stream, StreamExt, stream::SelectAll};
use mesh_core::EngineError;
use mesh_text::Answer;

use super::{AnswerStream, Finished, Part};

type Numbered = Pin<Box<dyn Stream<Item = (u32, Result<Part, EngineError>)> + Send>>;

/// The answers to one request, each part with the number of its answer. The first error ends all of them, and dropping it
/// cancels them.
pub struct Choices(SelectAll<Numbered>);

impl From<Vec<AnswerStream>> for Choices {
    fn from(answers: Vec<AnswerStream>) -> Self {
        let numbered = (0..).zip(answers).map(|(index, answer)| answer.map(move |part| (index, part)).boxed());
        Self(numbered.collect())
    }
}

impl From<AnswerStream> for Choices {
    fn from(answer: AnswerStream) -> Self {
        vec![answer].into()
    }
}

impl Stream for Choices {
    type Item = (u32, Result<Part, EngineError>);

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let part = ready!(self.0.poll_next_unpin(cx));
        if matches!(part, Some((_, Err(_)))) {
            self.0.clear();
        }
        Poll::Ready(part)
    }
}

/// The `n` likeliest of each `of` answers that follow one another, the likeliest first.
pub fn likeliest(answers: Vec<(Answer, Finished)>, of: usize, n: usize) -> Vec<(Answer, Finished)> {
    let mean = |finished: &Finished| finished.logprob_mean.unwrap_or(f32::NEG_INFINITY);
    let mut rest = answers.into_iter();
    let mut best = Vec::new();
    loop {
        let mut group: Vec<_> = rest.by_ref().take(of.max(1)).collect();
        if group.is_empty() {
            return best;
        }
        group.sort_by(|(_, one), (_, other)| mean(other).total_cmp(&mean(one)));
        best.extend(group.into_iter().take(n));
    }
}
