//! Which experts a token goes to, and how much each counts.

use mlx_rs::{
    Array, Dtype,
    error::Exception,
    ops::{self, indexing},
};

use crate::{elementwise::scale, model::GraphError};

/// How scores become a choice.
#[derive(Clone, Debug, PartialEq)]
pub struct RouterSpec {
    /// Experts to choose from.
    pub experts: i32,
    /// Experts a token goes to.
    pub top_k: i32,
    /// What is made of the logits.
    pub score: Score,
    /// Whether the chosen weights are made to sum to one.
    pub normalize: bool,
    /// Experts stand in groups, of which only the best are chosen from.
    pub groups: Option<Groups>,
    /// Multiplies the chosen weights.
    pub scaling_factor: f32,
}

/// What is made of the logits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Score {
    /// Softmax over all experts, then the best.
    Softmax,
    /// The best logits, then softmax over these.
    SoftmaxOfChosen,
    /// A sigmoid of each. A correction bias, where there is one, takes part in choosing alone.
    Sigmoid,
}

/// Groups of experts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Groups {
    /// How many there are.
    pub count: i32,
    /// How many are chosen from: those whose two best experts sum highest.
    pub chosen: i32,
}

impl RouterSpec {
    /// Chooses `top_k` of `experts` with their scores as weights; an error names what cannot be chosen.
    pub fn new(experts: i32, top_k: i32, score: Score) -> Result<Self, GraphError> {
        let this = Self { experts, top_k, score, normalize: false, groups: None, scaling_factor: 1.0 };
        this.check().map(|()| this)
    }

    /// Names what cannot be computed.
    pub fn check(&self) -> Result<(), GraphError> {
        let Self { experts, top_k, .. } = *self;
        let wrong = |what: String| Err(GraphError::Config(what));
        if experts < 1 || top_k < 1 || top_k > experts {
            return wrong(format!("{top_k} of {experts} experts cannot be chosen"));
        }
        match self.groups {
            Some(Groups { count, chosen }) if count < 1 || experts % count != 0 || chosen < 1 || chosen > count => {
                wrong(format!("{experts} experts cannot stand in {count} groups of which {chosen} are chosen"))
            }
            Some(Groups { count, chosen }) if chosen * (experts / count) < top_k => {
                wrong(format!("{chosen} of {count} groups of {experts} experts hold fewer than the {top_k} to choose"))
            }
            _ => Ok(()),
        }
    }

    /// From logits (`[…, experts]`), the chosen experts and their weights in f32, both `[…, top_k]`.
    pub fn route(&self, logits: &Array, correction_bias: Option<&Array>) -> Result<(Array, Array), Exception> {
        let logits = logits.as_dtype(Dtype::Float32)?;
        let scores = match self.score {
            Score::Softmax => ops::softmax_axis(&logits, -1, true)?,
            Score::SoftmaxOfChosen => logits,
            Score::Sigmoid => ops::sigmoid(&logits)?,
        };
        let ranked = match correction_bias {
            Some(bias) => scores.add(bias)?,
            None => scores.clone(),
        };
        let ranked = match self.groups {
            Some(groups) if groups.chosen < groups.count => self.within_groups(&ranked, groups)?,
            _ => ranked,
        };
        let chosen = largest(&ranked, self.top_k)?;
        let mut weights = indexing::take_along_axis(&scores, &chosen, -1)?;
        if self.score == Score::SoftmaxOfChosen {
            weights = ops::softmax_axis(&weights, -1, true)?;
        } else if self.normalize {
            // The published implementations add this to the sum.
            let sum = weights.sum_axis(-1, true)?.add(Array::from_f32(1e-20))?;
            weights = weights.divide(sum)?;
        }
        Ok((chosen, scale(&weights, self.scaling_factor)?))
    }

    /// `scores` with all experts outside the best groups made unchoosable.
    fn within_groups(&self, scores: &Array, groups: Groups) -> Result<Array, Exception> {
        let mut shape = scores.shape().to_vec();
        let size = self.experts / groups.count;
        shape.pop();
        shape.extend([groups.count, size]);
        let grouped = scores.reshape(&shape)?;
        let best = match size {
            1 => grouped.clone(),
            _ => indexing::take_along_axis(&grouped, &largest(&grouped, 2)?, -1)?,
        };
        let best = best.sum_axis(-1, false)?;
        let worst = {
            let order = ops::argpartition_axis(&best, groups.count - groups.chosen, -1)?;
            order.split_at_indices(&[groups.count - groups.chosen], -1)?.swap_remove(0)
        };
        let never = Array::from_f32(f32::NEG_INFINITY);
        indexing::put_along_axis(&grouped, &worst.expand_dims(-1)?, never, -2)?.reshape(scores.shape())
    }
}

/// Indices of the `count` largest values of the last axis, in no order.
fn largest(x: &Array, count: i32) -> Result<Array, Exception> {
    let size = x.dim(-1);
    if count >= size {
        return ops::argsort_axis(x, -1);
    }
    let order = ops::argpartition_axis(x, size - count, -1)?;
    Ok(order.split_at_indices(&[size - count], -1)?.swap_remove(1))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(score: Score) -> RouterSpec {
        RouterSpec { experts: 4, top_k: 2, score, normalize: false, groups: None, scaling_factor: 1.0 }
    }

    fn routed(spec: &RouterSpec, logits: &[f32], bias: Option<&[f32]>) -> Vec<(u32, f32)> {
        spec.check().unwrap();
        let shape = [1, logits.len() as i32];
        let bias = bias.map(|bias| Array::from_slice(bias, &[bias.len() as i32]));
        let (chosen, weights) = spec.route(&Array::from_slice(logits, &shape), bias.as_ref()).unwrap();
        let chosen = chosen.as_dtype(Dtype::Uint32).unwrap().to_vec_exact::<u32>().unwrap();
        let mut routed: Vec<_> = chosen.into_iter().zip(weights.to_vec_exact::<f32>().unwrap()).collect();
        routed.sort_by_key(|(expert, _)| *expert);
        routed
    }

    fn near(found: &[(u32, f32)], expected: &[(u32, f32)]) {
        assert_eq!(found.len(), expected.len());
        for ((a, x), (b, y)) in found.iter().zip(expected) {
            assert!(a == b && (x - y).abs() < 1e-5, "{found:?} {expected:?}");
        }
    }

    #[test]
    fn softmax_before_or_after_choosing() {
        let logits = [1.0, 3.0, 2.0, 0.0];
        let e = |x: f32| x.exp();
        let all = e(1.0) + e(3.0) + e(2.0) + 1.0;
        near(&routed(&spec(Score::Softmax), &logits, None), &[(1, e(3.0) / all), (2, e(2.0) / all)]);
        let two = e(3.0) + e(2.0);
        near(&routed(&spec(Score::SoftmaxOfChosen), &logits, None), &[(1, e(3.0) / two), (2, e(2.0) / two)]);
        let normalized = RouterSpec { normalize: true, scaling_factor: 2.0, ..spec(Score::Softmax) };
        near(&routed(&normalized, &logits, None), &[(1, 2.0 * e(3.0) / two), (2, 2.0 * e(2.0) / two)]);
    }

    #[test]
    fn a_correction_chooses_and_does_not_weigh() {
        let bias = [0.0, -9.0, 0.0, 9.0];
        let sigmoid = |x: f32| 1.0 / (1.0 + (-x).exp());
        let found = routed(&spec(Score::Sigmoid), &[1.0, 3.0, 2.0, 0.0], Some(&bias));
        near(&found, &[(2, sigmoid(2.0)), (3, 0.5)]);
    }

    #[test]
    fn only_the_best_groups_are_chosen_from() {
        // The best single expert, 0, stands in the group whose best two sum lower; negative scores change nothing.
        let groups = Some(Groups { count: 2, chosen: 1 });
        let bias = [-2.0; 4];
        let found = routed(&RouterSpec { groups, ..spec(Score::Sigmoid) }, &[2.0, -9.0, 1.9, 1.8], Some(&bias));
        assert_eq!(found.iter().map(|(expert, _)| *expert).collect::<Vec<_>>(), [2, 3]);
    }

    #[test]
    fn impossible_choices_are_named() {
        let error = RouterSpec { top_k: 5, ..spec(Score::Softmax) }.check().unwrap_err();
        assert!(error.to_string().contains("5 of 4 experts"), "{error}");
        let groups = Some(Groups { count: 3, chosen: 1 });
        let error = RouterSpec { groups, ..spec(Score::Sigmoid) }.check().unwrap_err();
        assert!(error.to_string().contains("3 groups"), "{error}");
    }
}
