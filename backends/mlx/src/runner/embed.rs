//! Texts that become vectors: read like prompts, chunk by chunk, a few texts of like length at once. Nothing of them is
//! remembered: every state counts, so that none may be left out because it was known.

use mesh_core::{Embedded, EngineError, Pooling};
use mesh_graph::{Cache, Rows, memory};
use mlx_rs::{
    Array,
    error::Exception,
    ops::{self, indexing},
    transforms,
};
use tokio::sync::oneshot;

use super::Runner;
use crate::{
    device::gate,
    engine::{Place, Vectors},
    memory::CHUNK_BYTES_MAX,
    schedule,
    watchdog::Doing,
};

/// Texts that are read at once.
const ROWS_MAX: usize = 32;

/// One request's texts, on their way.
pub struct Embedding {
    job: String,
    inputs: Vec<Vec<u32>>,
    pooling: Pooling,
    /// Texts that have no vector yet and are not under way, the next one last.
    left: Vec<usize>,
    lot: Option<Lot>,
    vectors: Vec<Vec<f32>>,
    answer: oneshot::Sender<Result<Embedded, EngineError>>,
    place: Option<Place>,
}

/// Texts that are read at once. Shorter ones begin with padding.
struct Lot {
    members: Vec<usize>,
    longest: usize,
    cache: Option<Cache>,
    /// What is pooled so far, `[rows, hidden]`.
    pooled: Option<Array>,
}

impl Embedding {
    /// That nothing was read of.
    pub fn new(vectors: Vectors) -> Self {
        let Vectors { job, inputs, pooling, answer, place } = vectors;
        let mut left: Vec<usize> = (0..inputs.len()).collect();
        left.sort_by_key(|input| inputs[*input].len());
        let vectors = vec![Vec::new(); inputs.len()];
        Self { job, inputs, pooling, left, lot: None, vectors, answer, place: Some(place) }
    }

    /// Whether nobody waits for it any more.
    pub fn is_given_up(&self) -> bool {
        self.answer.is_closed()
    }

    /// Ends it.
    pub fn answer(mut self, answer: Result<Embedded, EngineError>) {
        // Before the answer is seen: whoever asked may ask for the next at once.
        self.place = None;
        let _ = self.answer.send(answer);
    }

    /// How many texts are read next: one, or several where padding is less than what it pads, and all of it together no more
    /// than `tokens`.
    fn next(&self, tokens: usize, rows_max: usize) -> usize {
        let length = |at: &usize| self.inputs[*at].len();
        let longest = self.left.last().map_or(0, length);
        let fits = |rows: usize, shortest: usize| {
            rows <= rows_max && rows * longest <= tokens && schedule::fit_together(shortest as u32, longest as u32)
        };
        let others = self.left.iter().rev().skip(1).zip(2..).take_while(|(at, rows)| fits(*rows, length(at)));
        self.left.len().min(1 + others.count())
    }

    /// The columns from `from` to `to` of the texts that are under way, `[rows, to - from]`.
    fn columns(&self, lot: &Lot, from: usize, to: usize) -> Array {
        let column = |input: &[u32], at: usize| (at + input.len()).checked_sub(lot.longest).map_or(0, |at| input[at]);
        let rows = lot.members.iter().map(|member| &self.inputs[*member]);
        let ids: Vec<u32> = rows.flat_map(|input| (from..to).map(move |at| column(input, at))).collect();
        Array::from_slice(&ids, &[lot.members.len() as i32, (to - from) as i32])
    }
}

impl Lot {
    /// Adds what there is to pool of `states`, `[rows, time, hidden]`, which are those of the columns after `from`.
    fn pool(&mut self, states: &Array, from: usize, padding: &[i32], pooling: Pooling) -> Result<(), Exception> {
        let (rows, time, hidden) = (states.dim(0), states.dim(1), states.dim(2));
        let pooled = match pooling {
            Pooling::Mean => {
                let columns = ops::arange::<_, i32>(from as i32, from as i32 + time, None)?.reshape(&[1, time, 1])?;
                let real = columns.ge(Array::from_slice(padding, &[rows, 1, 1]))?;
                let sum = ops::select(&real, states, Array::from_f32(0.0))?.sum_axis(1, false)?;
                self.pooled.as_ref().map_or(Ok(sum.clone()), |before| before.add(&sum))?
            }
            // A copy, so that its values lie in order.
            Pooling::Last => {
                indexing::take_axis(states, Array::from_slice(&[time - 1], &[1]), 1)?.reshape(&[rows, hidden])?
            }
        };
        self.pooled = Some(pooled);
        Ok(())
    }
}

/// The same direction, of length 1. A mean and a sum point the same way.
fn normalised(vector: &[f32]) -> Vec<f32> {
    let length = vector.iter().map(|value| f64::from(*value).powi(2)).sum::<f64>().sqrt();
    match length > 0.0 {
        true => vector.iter().map(|value| (f64::from(*value) / length) as f32).collect(),
        false => vector.to_vec(),
    }
}

impl Runner {
    /// The texts that are read next.
    pub(super) fn next_embedding(&self) -> Option<schedule::Embedding> {
        let embedding = self.embeds.front()?;
        let (rows, longest, begun) = match &embedding.lot {
            Some(lot) => (lot.members.len(), lot.longest, lot.cache.is_some()),
            None => {
                let (rows, longest) = self.lot_of(embedding);
                (rows, longest, false)
            }
        };
        let bytes = self.footprint.bytes(longest as u64).saturating_mul(rows as u64);
        Some(schedule::Embedding { bytes, begun })
    }

    fn lot_of(&self, embedding: &Embedding) -> (usize, usize) {
        let longest = embedding.left.last().map_or(0, |at| embedding.inputs[*at].len());
        // Answers are to keep most of the memory.
        let room = self.memory_now / 4 / self.footprint.bytes(longest as u64).max(1);
        // Rows of which some are beyond the model's length limit are not computed as each alone.
        let most = if self.model.length_limit().is_some() { 1 } else { ROWS_MAX };
        let rows = embedding.next(self.limits.chunk_tokens_in_company as usize, most.min(room as usize));
        (rows, longest)
    }

    /// Bytes that texts under way hold.
    pub(super) fn embedding_bytes(&self) -> u64 {
        let lots = self.embeds.iter().filter_map(|embedding| embedding.lot.as_ref());
        let held = lots.filter_map(|lot| lot.cache.as_ref());
        held.map(|cache| self.footprint.bytes(cache.len() as u64).saturating_mul(cache.batch() as u64)).sum()
    }

    /// One chunk of the texts that are next.
    pub(super) fn embed(&mut self, tokens: u32) {
        let Some(mut embedding) = self.embeds.pop_front() else { return };
        let mut lot = embedding.lot.take().unwrap_or_else(|| {
            let (rows, longest) = self.lot_of(&embedding);
            let members = embedding.left.split_off(embedding.left.len() - rows);
            Lot { members, longest, cache: None, pooled: None }
        });
        self.forget_what_is_in_the_way();
        let read = self.read_lot(&embedding, &mut lot, tokens);
        let vectors = match read {
            Ok(Some(vectors)) => vectors,
            Ok(None) => {
                embedding.lot = Some(lot);
                return self.embeds.push_front(embedding);
            }
            Err(error) => {
                memory::clear_cache();
                tracing::error!(request = embedding.job, "no vectors: {}", error.what());
                return embedding.answer(Err(EngineError::Failed { what: error.what().into() }));
            }
        };
        for (member, vector) in lot.members.iter().zip(vectors) {
            embedding.vectors[*member] = vector;
        }
        if embedding.left.is_empty() {
            let prompt_tokens = embedding.inputs.iter().map(|input| input.len() as u32).fold(0, u32::saturating_add);
            let vectors = std::mem::take(&mut embedding.vectors);
            return embedding.answer(Ok(Embedded { vectors, prompt_tokens }));
        }
        // Whoever else has texts is next.
        self.embeds.push_back(embedding);
    }

    /// Reads a chunk; gives the vectors once all is read.
    fn read_lot(
        &mut self,
        embedding: &Embedding,
        lot: &mut Lot,
        tokens: u32,
    ) -> Result<Option<Vec<Vec<f32>>>, Exception> {
        let length = |member: &usize| embedding.inputs[*member].len();
        let padding: Vec<i32> = lot.members.iter().map(|member| (lot.longest - length(member)) as i32).collect();
        let mut cache = lot.cache.take().unwrap_or_else(|| match &padding[..] {
            [_] => self.model.new_cache(),
            padding => Cache::padded(&self.model.layout(), padding),
        });
        let tokens = self.sizes.chunk_within(tokens, lot.longest as u64, CHUNK_BYTES_MAX) as usize;
        let from = cache.len() as usize;
        let to = (from + (tokens / padding.len()).max(1)).min(lot.longest);
        let is_last = to == lot.longest;
        let _gate = gate();
        let _doing = self.shared.doing(Doing::Embed);
        cache.expect(lot.longest as i32);
        let input = embedding.columns(lot, from, to);
        let states = self.model.forward(&input, &mut cache, Rows::States)?;
        if is_last || embedding.pooling == Pooling::Mean {
            lot.pool(&states, from, &padding, embedding.pooling)?;
        }
        transforms::eval(cache.arrays().chain(&lot.pooled))?;
        drop(states);
        if !is_last {
            lot.cache = Some(cache);
            memory::clear_cache();
            return Ok(None);
        }
        drop(cache);
        let Some(pooled) = &lot.pooled else { return Err(Exception::custom("nothing was pooled")) };
        let all = pooled.to_vec_exact::<f32>().map_err(|error| Exception::custom(error.to_string()))?;
        memory::clear_cache();
        Ok(Some(all.chunks(pooled.dim(1).max(1) as usize).map(normalised).collect()))
    }
}
