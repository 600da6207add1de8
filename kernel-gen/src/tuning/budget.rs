//! Budgets: one table for each problem, as cheap as all tables' bytes together allow.

/// A table of one problem: (bytes, cost).
pub(super) type Choice = (usize, f64);

/// Bytes and cost of all problems together, and which choice each problem has.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Allocation {
    pub(super) bytes: usize,
    pub(super) cost: f64,
    pub(super) choices: Vec<usize>,
}

/// Sums of the frontier at most; beyond, there are no allocations.
const NUM_SUMS_MAX: usize = 1 << 16;

/// All allocations than which none is cheaper with as few bytes, up to `bytes_max`, by bytes
/// ascending: the frontier of sums, taken over problem by problem (a multiple-choice knapsack).
///
/// `None` where more than 65536 sums are possible: the budget has to be chosen by problem then.
pub(super) fn allocations(problems: &[Vec<Choice>], bytes_max: usize) -> Option<Vec<Allocation>> {
    let mut sums = vec![Allocation { bytes: 0, cost: 0.0, choices: Vec::new() }];
    for choices in problems {
        let mut next: Vec<Allocation> = Vec::new();
        for sum in &sums {
            for (idx, (bytes, cost)) in choices.iter().enumerate() {
                let bytes = sum.bytes.saturating_add(*bytes);
                if bytes <= bytes_max {
                    let mut choices = sum.choices.clone();
                    choices.push(idx);
                    next.push(Allocation { bytes, cost: sum.cost + cost, choices });
                }
            }
        }
        next.sort_by(|a, b| {
            let by_cost = a.bytes.cmp(&b.bytes).then(a.cost.total_cmp(&b.cost));
            by_cost.then_with(|| a.choices.cmp(&b.choices))
        });
        let mut cheapest = f64::INFINITY;
        next.retain(|sum| {
            let is_cheaper = sum.cost < cheapest;
            cheapest = cheapest.min(sum.cost);
            is_cheaper
        });
        if next.len() > NUM_SUMS_MAX {
            return None;
        }
        sums = next;
    }
    Some(sums)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn brute(problems: &[Vec<Choice>], bytes_max: usize) -> f64 {
        match problems.split_first() {
            None => 0.0,
            Some((first, rest)) => {
                let fitting = first.iter().filter(|choice| choice.0 <= bytes_max);
                let costs = fitting.map(|choice| choice.1 + brute(rest, bytes_max - choice.0));
                costs.fold(f64::INFINITY, f64::min)
            }
        }
    }

    proptest! {
        #[test]
        fn every_budget_gets_its_cheapest_allocation(
            problems in prop::collection::vec(
                prop::collection::vec((0..50_usize, 1..100_u32), 1..5), 1..5),
            budget in 0..200_usize,
        ) {
            let choice = |(bytes, cost): &(usize, u32)| (*bytes, f64::from(*cost));
            let problems: Vec<Vec<Choice>> =
                problems.iter().map(|choices| choices.iter().map(choice).collect()).collect();
            let found = allocations(&problems, budget).unwrap();
            let cheapest = found.last().map_or(f64::INFINITY, |last| last.cost);
            prop_assert_eq!(cheapest, brute(&problems, budget));
            for sum in &found {
                let chosen = problems.iter().zip(&sum.choices).map(|(all, idx)| all[*idx]);
                let total = chosen.fold((0, 0.0), |sum, (b, c)| (sum.0 + b, sum.1 + c));
                prop_assert_eq!(total, (sum.bytes, sum.cost));
                prop_assert!(sum.bytes <= budget);
            }
        }
    }
}
