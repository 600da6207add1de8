//! Tables of intervals: an exact search for the cheapest one that few kernels can serve.

/// A measured row count.
#[derive(Clone, Debug)]
pub(super) struct Point {
    pub(super) weight: f64,
    pub(super) default_us: f64,
    /// Relative.
    pub(super) noise: f64,
}

/// A kernel that may serve some of the points.
#[derive(Clone, Debug)]
pub(super) struct Candidate {
    pub(super) bytes: usize,
    /// In every binary anyway: counts neither as a variant nor by its bytes.
    pub(super) is_free: bool,
    /// Microseconds at each point; `None` outside of what was measured.
    pub(super) us: Vec<Option<f64>>,
    /// Where the time is measured, not interpolated: intervals begin and end there.
    pub(super) is_measured: Vec<bool>,
    /// Where it is what serves without a lock.
    pub(super) is_default: Vec<bool>,
}

/// What has to be better than the default by the margin.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum MarginOver {
    /// Each interval that a kernel other than the default serves.
    Interval,
    /// The whole table: of a layout that the default cannot read.
    Table,
}

/// Points in ascending order, and the kernels that may serve them in canonical order.
#[derive(Clone, Debug)]
pub(super) struct Instance {
    pub(super) points: Vec<Point>,
    pub(super) candidates: Vec<Candidate>,
    pub(super) margin_over: MarginOver,
    /// The least gain, whatever the noise.
    pub(super) margin_min: f64,
    /// Kernels that are not free.
    pub(super) variants_max: usize,
    pub(super) intervals_max: usize,
}

/// A table: which candidate serves up to and with which point.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Table {
    pub(super) cost: f64,
    /// Of the kernels that are not free, each once.
    pub(super) bytes: usize,
    /// (last point, candidate)
    pub(super) intervals: Vec<(usize, usize)>,
}

/// Which tables are wanted.
struct Search<'a> {
    instance: &'a Instance,
    /// Cost of an interval by candidate, first and last point; infinite where it is none.
    costs: Vec<f64>,
    counts_bytes: bool,
    found: Vec<Table>,
}

impl Instance {
    /// All tables than which none is cheaper with as few bytes, by bytes ascending; without
    /// `counts_bytes` the cheapest alone. Empty where the candidates cannot serve all points.
    pub(super) fn frontier(&self, counts_bytes: bool) -> Vec<Table> {
        let mut search =
            Search { instance: self, costs: self.costs(), counts_bytes, found: Vec::new() };
        let mut set = self.free();
        // The most promising first, so that the bounds cut early.
        let mut order = self.bought();
        let costs: Vec<f64> =
            order.iter().map(|idx| -self.gain(*idx, &self.default_us())).collect();
        let mut by_gain: Vec<usize> = (0..order.len()).collect();
        by_gain.sort_by(|a, b| costs[*a].total_cmp(&costs[*b]).then(a.cmp(b)));
        order = by_gain.into_iter().map(|idx| order[idx]).collect();
        search.extend(&mut set, &order, self.variants_max);
        search.found.sort_by(|a, b| a.bytes.cmp(&b.bytes).then(a.cost.total_cmp(&b.cost)));
        search.found
    }

    /// The first table in canonical order, of as few bought kernels as possible, that costs no more
    /// than `cost_max` and has no more than `bytes_max`. Kernels that are used elsewhere already
    /// come first.
    pub(super) fn choose(
        &self,
        cost_max: f64,
        bytes_max: usize,
        is_used: &dyn Fn(usize) -> bool,
    ) -> Option<Table> {
        let costs = self.costs();
        let mut order = self.bought();
        order.sort_by_key(|idx| !is_used(*idx));
        (0..=self.variants_max.min(order.len())).find_map(|num| {
            self.first_of(&costs, &mut self.free(), &order, num, (cost_max, bytes_max))
        })
    }

    fn first_of(
        &self,
        costs: &[f64],
        set: &mut Vec<usize>,
        order: &[usize],
        num: usize,
        limits: (f64, usize),
    ) -> Option<Table> {
        let (cost_max, bytes_max) = limits;
        if self.bytes(set) > bytes_max || self.bound(set, order, num) > cost_max {
            return None;
        }
        if num == 0 {
            return self.solve(costs, set).filter(|table| table.cost <= cost_max);
        }
        for (place, idx) in order.iter().enumerate() {
            set.push(*idx);
            let found = self.first_of(costs, set, &order[place + 1..], num - 1, limits);
            set.pop();
            if found.is_some() {
                return found;
            }
        }
        None
    }

    fn free(&self) -> Vec<usize> {
        (0..self.candidates.len()).filter(|idx| self.candidates[*idx].is_free).collect()
    }

    fn bought(&self) -> Vec<usize> {
        (0..self.candidates.len()).filter(|idx| !self.candidates[*idx].is_free).collect()
    }

    fn bytes(&self, set: &[usize]) -> usize {
        let bought = set.iter().map(|idx| &self.candidates[*idx]).filter(|found| !found.is_free);
        bought.map(|found| found.bytes).sum()
    }

    /// Microseconds of a candidate where it may serve: not slower than the default beyond noise.
    fn us(&self, idx: usize, point_idx: usize) -> Option<f64> {
        let Point { default_us, noise, .. } = self.points[point_idx];
        let found = &self.candidates[idx];
        if found.is_default[point_idx] {
            return Some(default_us);
        }
        found.us[point_idx].filter(|us| *us <= default_us * (1.0 + noise))
    }

    fn default_us(&self) -> Vec<f64> {
        self.points.iter().map(|point| point.default_us).collect()
    }

    /// What a candidate can save at most beside kernels that take `us`.
    fn gain(&self, idx: usize, us: &[f64]) -> f64 {
        let saved = |point_idx: usize| {
            let found = self.us(idx, point_idx).unwrap_or(f64::INFINITY);
            (us[point_idx] - found).max(0.0) * self.points[point_idx].weight
        };
        (0..self.points.len()).map(saved).sum()
    }

    /// No table of `set` and `num` more of `order` costs less.
    fn bound(&self, set: &[usize], order: &[usize], num: usize) -> f64 {
        let fastest = |candidates: &mut dyn Iterator<Item = usize>, point_idx: usize| {
            let us = candidates.filter_map(|idx| self.us(idx, point_idx));
            us.fold(f64::INFINITY, f64::min)
        };
        let more = if num == 0 { &[] } else { order };
        let points = 0..self.points.len();
        let own: Vec<f64> = points.clone().map(|p| fastest(&mut set.iter().copied(), p)).collect();
        let cost = |us: &[f64]| -> f64 {
            us.iter().zip(&self.points).map(|(us, point)| us * point.weight).sum()
        };
        let all = set.iter().chain(more).copied();
        let best: Vec<f64> = points.map(|p| fastest(&mut all.clone(), p)).collect();
        let simple = cost(&best);
        if own.iter().any(|us| us.is_infinite()) {
            return simple * (1.0 - 1e-12);
        }
        // Each further kernel saves at most what it would save alone.
        let mut gains: Vec<f64> = more.iter().map(|idx| self.gain(*idx, &own)).collect();
        gains.sort_by(|a, b| b.total_cmp(a));
        let saved: f64 = gains.iter().take(num).sum();
        // NOTE: sums in another order differ in their last bits.
        simple.max(cost(&own) - saved) * (1.0 - 1e-12)
    }

    fn costs(&self) -> Vec<f64> {
        let num = self.points.len();
        let mut costs = vec![f64::INFINITY; self.candidates.len() * num * num];
        for idx in 0..self.candidates.len() {
            for first in 0..num {
                for last in first..num {
                    if let Some(cost) = self.interval_cost(idx, first, last) {
                        costs[(idx * num + first) * num + last] = cost;
                    }
                }
            }
        }
        costs
    }

    /// Cost of a candidate from point `first` to `last`, if it may serve there.
    fn interval_cost(&self, idx: usize, first: usize, last: usize) -> Option<f64> {
        let found = &self.candidates[idx];
        let is_end = |point_idx: usize| found.is_measured[point_idx] || found.is_default[point_idx];
        if !is_end(first) || !is_end(last) {
            return None;
        }
        let (mut cost, mut other, mut default) = (0.0, 0.0, 0.0);
        let (mut noise, mut num_other) = (0.0, 0);
        for point_idx in first..=last {
            let us = self.us(idx, point_idx)?;
            let point = &self.points[point_idx];
            cost += us * point.weight;
            if !found.is_default[point_idx] {
                other += us * point.weight;
                default += point.default_us * point.weight;
                noise += point.noise;
                num_other += 1;
            }
        }
        if self.margin_over == MarginOver::Interval && num_other > 0 {
            let margin = self.margin_min.max(2.0 * noise / f64::from(num_other));
            if other > default * (1.0 - margin) {
                return None;
            }
        }
        Some(cost)
    }

    /// The cheapest table of these candidates, by a dynamic programme over points and intervals.
    fn solve(&self, costs: &[f64], set: &[usize]) -> Option<Table> {
        let num = self.points.len();
        // best[intervals][points]: cost of the first points, and the last interval's start and
        // candidate.
        let mut best = vec![vec![(f64::INFINITY, 0, 0); num + 1]; self.intervals_max + 1];
        best[0][0].0 = 0.0;
        for num_intervals in 1..=self.intervals_max {
            for last in 0..num {
                for first in 0..=last {
                    let before = best[num_intervals - 1][first].0;
                    if before.is_infinite() {
                        continue;
                    }
                    for idx in set {
                        let cost = before + costs[(idx * num + first) * num + last];
                        if cost < best[num_intervals][last + 1].0 {
                            best[num_intervals][last + 1] = (cost, first, *idx);
                        }
                    }
                }
            }
        }
        let (mut num_intervals, mut end) = (0, num);
        for count in 1..=self.intervals_max {
            if best[count][num].0 < best[num_intervals][num].0 {
                num_intervals = count;
            }
        }
        let cost = best[num_intervals][num].0;
        if !cost.is_finite() || !self.has_margin(cost) {
            return None;
        }
        let mut intervals: Vec<(usize, usize)> = Vec::new();
        while end > 0 {
            let (_, first, idx) = best[num_intervals][end];
            // NOTE: two intervals of one kernel in a row are one.
            if intervals.last().is_none_or(|(_, after)| *after != idx) {
                intervals.push((end - 1, idx));
            }
            (num_intervals, end) = (num_intervals - 1, first);
        }
        intervals.reverse();
        let mut used: Vec<usize> = intervals.iter().map(|(_, idx)| *idx).collect();
        used.sort_unstable();
        used.dedup();
        Some(Table { cost, bytes: self.bytes(&used), intervals })
    }

    fn has_margin(&self, cost: f64) -> bool {
        if self.margin_over == MarginOver::Interval {
            return true;
        }
        let default: f64 = self.points.iter().map(|point| point.default_us * point.weight).sum();
        let noise = self.points.iter().map(|point| point.noise).sum::<f64>();
        let margin = self.margin_min.max(2.0 * noise / self.points.len() as f64);
        cost <= default * (1.0 - margin)
    }
}

impl Search<'_> {
    fn extend(&mut self, set: &mut Vec<usize>, order: &[usize], num: usize) {
        let bytes = if self.counts_bytes { self.instance.bytes(set) } else { 0 };
        let bound = self.instance.bound(set, order, num);
        if !bound.is_finite() || self.is_covered(bytes, bound) {
            return;
        }
        if let Some(table) = self.instance.solve(&self.costs, set) {
            self.add(table);
        }
        if num == 0 {
            return;
        }
        for (place, idx) in order.iter().enumerate() {
            set.push(*idx);
            self.extend(set, &order[place + 1..], num - 1);
            set.pop();
        }
    }

    fn is_covered(&self, bytes: usize, cost: f64) -> bool {
        let has_as_few = |table: &Table| !self.counts_bytes || table.bytes <= bytes;
        self.found.iter().any(|table| has_as_few(table) && table.cost <= cost)
    }

    fn add(&mut self, table: Table) {
        if self.is_covered(table.bytes, table.cost) {
            return;
        }
        let counts_bytes = self.counts_bytes;
        self.found.retain(|old| {
            let has_as_few = !counts_bytes || table.bytes <= old.bytes;
            !(has_as_few && table.cost <= old.cost)
        });
        self.found.push(table);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// The cheapest cost of every set of bought kernels, by trying all assignments of points.
    fn brute(instance: &Instance) -> Vec<(usize, f64)> {
        let (num, choices) = (instance.points.len(), instance.candidates.len());
        let mut all = Vec::new();
        for code in 0..choices.pow(num as u32) {
            let digit = |point_idx: usize| code / choices.pow(point_idx as u32) % choices;
            let row: Vec<usize> = (0..num).map(digit).collect();
            let mut cuts = vec![0];
            cuts.extend((1..num).filter(|idx| row[*idx] != row[idx - 1]));
            cuts.push(num);
            let mut used: Vec<usize> = row.clone();
            used.sort_unstable();
            used.dedup();
            let num_bought = used.iter().filter(|idx| !instance.candidates[**idx].is_free).count();
            if cuts.len() - 1 > instance.intervals_max || num_bought > instance.variants_max {
                continue;
            }
            let costs =
                cuts.windows(2).map(|cut| instance.interval_cost(row[cut[0]], cut[0], cut[1] - 1));
            let Some(cost) = costs.sum::<Option<f64>>() else { continue };
            if instance.has_margin(cost) {
                all.push((instance.bytes(&used), cost));
            }
        }
        all
    }

    prop_compose! {
        fn instances()(
            num_points in 1..5_usize,
            num_candidates in 1..6_usize,
            margin_over in prop_oneof![Just(MarginOver::Interval), Just(MarginOver::Table)],
            variants_max in 0..4_usize,
            intervals_max in 1..5_usize,
            noise in prop_oneof![Just(0.0), Just(0.02)],
            seeds in prop::collection::vec((0.5..1.5_f64, 0..8_u8, 1..9_usize), 30),
        ) -> Instance {
            let seed = |idx: usize, point_idx: usize| seeds[(idx * 5 + point_idx) % 30];
            let point = |point_idx: usize| Point {
                weight: 1.0 + point_idx as f64,
                default_us: 100.0,
                noise,
            };
            let candidate = |idx: usize| {
                let points = 0..num_points;
                // The first is the default of all points but the last, or of all.
                let is_first = idx == 0 && margin_over == MarginOver::Interval;
                let is_default =
                    points.clone().map(|p| is_first && (p + 1 < num_points || p == 0));
                Candidate {
                    bytes: seed(idx, 0).2 * 100,
                    is_free: is_first,
                    us: points.clone().map(|p| {
                        (seed(idx, p).1 > 0).then_some(100.0 * seed(idx, p).0)
                    }).collect(),
                    is_measured: points.map(|p| seed(idx, p).1 > 1).collect(),
                    is_default: is_default.collect(),
                }
            };
            Instance {
                points: (0..num_points).map(point).collect(),
                candidates: (0..num_candidates).map(candidate).collect(),
                margin_over,
                margin_min: 0.03,
                variants_max,
                intervals_max,
            }
        }
    }

    proptest! {
        #[test]
        fn the_frontier_is_that_of_all_tables(instance in instances()) {
            let all = brute(&instance);
            let frontier = instance.frontier(true);
            let cheapest = |bytes_max: usize| {
                let costs = all.iter().filter(|found| found.0 <= bytes_max).map(|found| found.1);
                costs.fold(f64::INFINITY, f64::min)
            };
            // NOTE: rows of one kernel that only together have the margin, and sums in another
            // order, are the differences there may be.
            for table in &frontier {
                prop_assert!(table.cost <= cheapest(table.bytes) + 1e-6);
                let intervals = table.intervals.len();
                prop_assert!(intervals <= instance.intervals_max);
            }
            for (bytes, _) in &all {
                let found = frontier.iter().filter(|table| table.bytes <= *bytes);
                let cost = found.map(|table| table.cost).fold(f64::INFINITY, f64::min);
                prop_assert!(cost <= cheapest(*bytes) + 1e-6, "{cost} {}", cheapest(*bytes));
            }
            prop_assert_eq!(frontier.is_empty(), all.is_empty());
            let single = instance.frontier(false);
            prop_assert_eq!(single.len(), usize::from(!all.is_empty()));
            if let Some(table) = single.first() {
                prop_assert!((table.cost - cheapest(usize::MAX)).abs() < 1e-6);
                let cost_max = table.cost * (1.0 + 1e-9);
                let chosen = instance.choose(cost_max, usize::MAX, &|_| false).unwrap();
                prop_assert!((table.cost - chosen.cost).abs() < 1e-6);
            }
        }
    }
}
