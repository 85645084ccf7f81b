//! Rows put into a batch, taken out of it, and taken up again from what was kept of them.

use mesh_graph::{Cache, CausalModel, needs_points};

use crate::{
    models::{difference, model, prompt, run, run_one},
    properties::for_each_golden,
};

/// What a sequence is computed from, and its logits for the tokens after that, alone.
fn begun(model: &dyn CausalModel, ids: &[u32], next: &[u32]) -> (Cache, Vec<mlx_rs::Array>) {
    let mut cache = model.new_cache();
    run_one(model, &mut cache, ids);
    let mut alone = cache.clone();
    let logits = next.iter().map(|id| run_one(model, &mut alone, &[*id])).collect();
    (cache, logits)
}

#[test]
fn rows_come_and_go_and_are_each_alone() {
    for_each_golden("rows_come_and_go_and_are_each_alone", |name, profile, same, faults| {
        let (model, ids) = (model(profile), prompt(&profile.root));
        let long: Vec<u32> = ids.iter().copied().cycle().take(300).collect();
        let next = [5, 6, 7, 8, 9, 10];
        let starts = [&ids[..], &ids[..3], &long[..], &ids[5..6]].map(|ids| begun(&*model, ids, &next));
        let mut faulty = |what: &str, found: f32| {
            if found > same {
                faults.push(format!("{name}: {what} differs by {found:.1e}"));
            }
        };
        let step = |cache: &mut Cache, at: &[usize]| {
            let tokens: Vec<[u32; 1]> = at.iter().map(|at| [next[*at]]).collect();
            let rows: Vec<&[u32]> = tokens.iter().map(|token| &token[..]).collect();
            run(&*model, cache, &rows)
        };
        // Two, then a longer one comes, then the first leaves, then a fourth comes.
        let mut batch = Cache::merge(&[starts[0].0.clone(), starts[1].0.clone()]).expect("a batch");
        for (row, logits) in step(&mut batch, &[0, 0]).iter().enumerate() {
            faulty("a pair", difference(logits, &starts[row].1[0]));
        }
        let mut batch = Cache::merge(&[batch, starts[2].0.clone()]).expect("a batch");
        assert_eq!(batch.lengths(), [25, 4, 300]);
        for (row, (logits, at)) in step(&mut batch, &[1, 1, 0]).iter().zip([1, 1, 0]).enumerate() {
            faulty("after a longer one came", difference(logits, &starts[row].1[at]));
        }
        let batch = batch.select(&[2, 1]).expect("two of three");
        let mut batch = Cache::merge(&[batch, starts[3].0.clone()]).expect("a batch");
        for (logits, (row, at)) in step(&mut batch, &[1, 2, 0]).iter().zip([(2, 1), (1, 2), (3, 0)]) {
            faulty("after one left and one came", difference(logits, &starts[row].1[at]));
        }
        // The long one leaves: what was padding for it alone goes.
        let mut batch = batch.select(&[1, 2]).expect("two of three");
        assert!(batch.len() < 256, "{name}: {} columns are left", batch.len());
        for (logits, (row, at)) in step(&mut batch, &[3, 1]).iter().zip([(1, 3), (3, 1)]) {
            faulty("after the longest left", difference(logits, &starts[row].1[at]));
        }
        let mut alone = batch.select(&[0]).expect("one");
        assert_eq!((alone.len(), alone.batch()), (7, 1));
        faulty("alone again", difference(&step(&mut alone, &[4])[0], &starts[1].1[4]));
    });
}

#[test]
fn what_was_kept_goes_on_as_before() {
    for_each_golden("what_was_kept_goes_on_as_before", |name, profile, same, faults| {
        let (model, ids) = (model(profile), prompt(&profile.root));
        let long: Vec<u32> = ids.iter().copied().cycle().take(300).collect();
        let (cut, end) = (270, 300);
        let mut cache = model.new_cache();
        run_one(&*model, &mut cache, &long[..cut]);
        let (first, point) = (cache.segment(0, cut as i32).expect("kept"), cache.point().expect("kept"));
        let expected = run_one(&*model, &mut cache, &long[cut..]);
        let second = cache.segment(cut as i32, end as i32).expect("kept");
        let blueprint = cache.blueprint();
        let restored = |segments: &[_], length: usize| {
            Cache::restore(&blueprint, segments, Some(&point), length as i32).expect("restored")
        };
        let mut found = Vec::new();
        let mut again = restored(&[(&first, cut)], cut);
        found.push(difference(&run_one(&*model, &mut again, &long[cut..]), &expected));
        let (left, right) = first.split(100).expect("cut in two");
        let mut again = restored(&[(&left, 100), (&right, cut - 100)], cut);
        found.push(difference(&run_one(&*model, &mut again, &long[cut..]), &expected));
        if needs_points(&model.layout()) {
            let whole = first.bytes() + point.bytes();
            assert!(point.bytes() > 0 && whole > 0, "{name}");
        } else {
            // Full attention goes on from anywhere.
            let mut again =
                Cache::restore(&blueprint, &[(&first, cut), (&second, 10)], None, cut as i32 + 10).expect("restored");
            let rest = run_one(&*model, &mut again, &long[cut + 10..]);
            found.push(difference(&rest, &crate::models::rows(&expected, 10, end - cut)));
        }
        if let Some(worst) = found.into_iter().reduce(f32::max).filter(|worst| *worst > same) {
            faults.push(format!("{name}: differs by {worst:.1e}"));
        }
        let footprint = cache.footprint();
        let held: u64 = cache.arrays().map(|array| array.nbytes() as u64).sum();
        let said = footprint.bytes(end as u64);
        assert!(held <= said && said <= held * 2, "{name}: {held} bytes held, {said} predicted: {footprint:?}");
    });
}

/// The finalizer of SplitMix64, as a source of repeatable choices.
struct Choices(u64);

impl Choices {
    fn below(&mut self, bound: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let x = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        let x = (x ^ (x >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        ((x ^ (x >> 31)) % bound as u64) as usize
    }
}

/// Any order of coming and going: every row's logits are those it has alone, to 1e-4.
#[test]
fn any_order_of_arrivals_and_departures_leaves_everybody_alone() {
    const STEPS: usize = 8;
    const SAME: f32 = 1e-4;
    for_each_golden("any_order_of_arrivals_and_departures", |name, profile, _, faults| {
        let (model, ids) = (model(profile), prompt(&profile.root));
        let seed = name.bytes().fold(7_u64, |seed, byte| seed.wrapping_mul(31).wrapping_add(byte.into()));
        let mut choices = Choices(seed);
        let many: Vec<u32> = ids.iter().copied().cycle().take(600).collect();
        let next: Vec<u32> = ids[..STEPS].to_vec();
        let mut coming: Vec<_> = (0..6)
            .map(|at| {
                let length = if at == 0 { 280 } else { 1 + choices.below(40) };
                let from = choices.below(many.len() - length);
                begun(&*model, &many[from..from + length], &next)
            })
            .collect();
        // Each row: its logits alone, and how many steps it has had.
        let mut rows: Vec<(Vec<mlx_rs::Array>, usize)> = Vec::new();
        let mut batch: Option<Cache> = None;
        let (mut worst, mut widest) = (0.0_f32, 0);
        while !coming.is_empty() || !rows.is_empty() {
            if !coming.is_empty() && (rows.len() < 2 || choices.below(2) == 0) {
                let (cache, logits) = coming.swap_remove(choices.below(coming.len()));
                let joined = match batch.take() {
                    Some(batch) => Cache::merge(&[batch, cache]),
                    None => Ok(cache),
                };
                batch = Some(joined.expect("a batch"));
                rows.push((logits, 0));
            }
            widest = widest.max(rows.len());
            let Some(cache) = batch.as_mut() else { continue };
            let tokens: Vec<[u32; 1]> = rows.iter().map(|(_, at)| [next[*at]]).collect();
            let fed: Vec<&[u32]> = tokens.iter().map(|token| &token[..]).collect();
            for (found, (alone, at)) in run(&*model, cache, &fed).iter().zip(&mut rows) {
                worst = worst.max(difference(found, &alone[*at]));
                *at += 1;
            }
            // Who is through leaves, and now and then somebody who is not.
            let stays: Vec<usize> =
                (0..rows.len()).filter(|row| rows[*row].1 < STEPS && choices.below(12) > 0).collect();
            if stays.len() < rows.len() {
                let left = batch.take().filter(|_| !stays.is_empty());
                batch = left.map(|batch| batch.select(&stays).expect("the others"));
                rows = stays.into_iter().map(|row| rows[row].clone()).collect();
            }
        }
        assert!(widest > 1, "{name}: the schedule has rows in company");
        if worst > SAME {
            faults.push(format!("{name}: differs by {worst:.1e}"));
        }
    });
}
