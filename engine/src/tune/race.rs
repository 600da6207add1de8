//! Which kernel is how fast: rounds in which every candidate runs beside the default, so that a
//! machine that drifts slows both.
//!
//! The default also races itself, which gives the noise. Candidates then drop out by halves
//! (successive halving, Jamieson and Talwalkar 2016) on the row counts that matter most; the last
//! few race once more, with more rounds. What came out ahead anywhere runs at all row counts, so
//! that one kernel is known at both ends of any interval that it could serve.

use std::collections::BTreeSet;

/// What is raced: a simulated clock in tests.
pub trait Track {
    /// Seconds of one call, or more calls where one is too short to be timed; `None` where the
    /// kernel broke down, which ends its race.
    fn run(&mut self, kernel: usize, num_rows: usize) -> Option<f64>;
    /// Seconds since the race began.
    fn elapsed(&self) -> f64;
}

/// The kernels of a matmul, by index.
pub struct Field<'a> {
    pub num_kernels: usize,
    /// The kernel that serves so many rows where nothing was measured.
    pub default_of: &'a dyn Fn(usize) -> usize,
    /// Whether a kernel can serve so many rows at all, and is allowed to.
    pub can_serve: &'a dyn Fn(usize, usize) -> bool,
    /// Predicted cost, in any unit; lower is tried first.
    pub prior: &'a dyn Fn(usize, usize) -> f64,
    /// Seconds that the machine's limits allow.
    pub limit: &'a dyn Fn(usize) -> f64,
    /// Ratio to the default of what earlier runs have measured, which is not measured again.
    pub known: &'a dyn Fn(usize, usize) -> Option<f64>,
}

impl Field<'_> {
    /// What competes with the default at a row count.
    fn challengers(&self, num_rows: usize) -> impl Iterator<Item = usize> {
        let default = (self.default_of)(num_rows);
        (0..self.num_kernels)
            .filter(move |kernel| *kernel != default && (self.can_serve)(*kernel, num_rows))
    }

    fn is_known(&self, kernel: usize, num_rows: usize) -> bool {
        (self.known)(kernel, num_rows).is_some()
    }
}

/// How much is raced.
#[derive(Clone, Debug)]
pub struct RaceOptions {
    /// Row counts at which candidates drop out, in the order of their weight.
    pub first_rows: Vec<usize>,
    /// Row counts at which the survivors are measured as well.
    pub other_rows: Vec<usize>,
    /// Runs of the default alone before anything is measured.
    pub warmup_rounds: usize,
    /// Rounds before the first half drops out; each later heat has twice as many.
    pub heat_rounds: usize,
    /// How many are left to the final race.
    pub num_finalists: usize,
    /// Rounds of a final, at least and at most; those between run while there is time and no median
    /// is certain.
    pub final_rounds: (usize, usize),
    /// How many of each row count run at all others.
    pub num_survivors: usize,
}

impl Default for RaceOptions {
    fn default() -> RaceOptions {
        RaceOptions {
            first_rows: vec![1, 8, 64, 512, 4, 16, 2, 128],
            other_rows: vec![3, 6, 12, 24, 32, 48, 96, 192, 256],
            warmup_rounds: 9,
            heat_rounds: 2,
            num_finalists: 8,
            final_rounds: (9, 41),
            num_survivors: 3,
        }
    }
}

/// What is known of a kernel at a row count.
#[derive(Clone, Debug, PartialEq)]
pub struct Finish {
    pub kernel: usize,
    pub num_rows: usize,
    /// Microseconds of a call: 10th, 50th and 90th percentile.
    pub us: [f64; 3],
    pub num_samples: usize,
    /// Median of the ratios to the default's time in the same round.
    pub vs_default: f64,
    /// Relative, of the default against itself.
    pub noise: f64,
}

/// Where a kernel stands at one row count.
#[derive(Clone, Debug, Default)]
struct Runner {
    kernel: usize,
    seconds: Vec<f64>,
    ratios: Vec<f64>,
    is_out: bool,
}

/// A race at one row count.
struct Race<'a, T: Track> {
    track: &'a mut T,
    default: usize,
    num_rows: usize,
    /// Seconds on the track's clock at which it ends.
    deadline: f64,
    runners: Vec<Runner>,
    num_rounds: usize,
    default_seconds: Vec<f64>,
    /// Of two runs of the default that stand around others, the second to the first.
    default_ratios: Vec<f64>,
    limit: f64,
}

/// Samples of a measurement that a choice may rest on.
const SAMPLES_MIN: usize = bespoke_kernel_gen::tuning::record::SAMPLES_MIN;
/// Candidates that run between two runs of the default.
const NUM_BETWEEN: usize = 3;
/// Standard error at which a median ratio is certain enough.
const ERROR_MAX: f64 = 0.003;
/// A kernel this near the physical limit, twice, cannot be beaten by more than noise.
const LIMIT_SHARE: f64 = 0.97;

/// Races the kernels of one matmul for `budget` seconds of the track's clock; `take` gets what came
/// out, as soon as it is known, and ends the race by giving `false`.
pub fn race<T: Track>(
    track: &mut T,
    field: &Field<'_>,
    options: &RaceOptions,
    budget: f64,
    take: &mut dyn FnMut(Finish) -> bool,
) {
    let end = track.elapsed() + budget;
    // NOTE: a third of the time is for the survivors at the other row counts.
    let first_end = track.elapsed() + budget * 0.65;
    let mut survivors = BTreeSet::new();
    let mut done: BTreeSet<(usize, usize)> = BTreeSet::new();
    let num_first = options.first_rows.len();
    for (idx, &num_rows) in options.first_rows.iter().enumerate() {
        let now = track.elapsed();
        // Many rows take longer, yet few rows have more to gain from repeats.
        let deadline = now + (first_end - now).max(0.0) / (num_first - idx) as f64 * 1.5;
        let deadline = deadline.min(first_end);
        let candidates = candidates(field, num_rows);
        if candidates.is_empty() && field.is_known((field.default_of)(num_rows), num_rows) {
            survivors.extend(fastest(field, &[], num_rows, options.num_survivors));
            continue;
        }
        let mut one = Race::new(track, field, num_rows, deadline, &candidates);
        one.warm_up(options.warmup_rounds);
        one.heats(options);
        let finishes = one.finishes();
        survivors.extend(fastest(field, &finishes, num_rows, options.num_survivors));
        for finish in finishes {
            done.insert((finish.kernel, num_rows));
            if !take(finish) {
                return;
            }
        }
    }
    let all_rows = options.first_rows.iter().chain(&options.other_rows);
    let all_rows: Vec<usize> = all_rows.copied().collect();
    for (idx, &num_rows) in all_rows.iter().enumerate() {
        let is_new =
            |kernel| !done.contains(&(kernel, num_rows)) && !field.is_known(kernel, num_rows);
        let candidates: Vec<usize> = field
            .challengers(num_rows)
            .filter(|kernel| survivors.contains(kernel) && is_new(*kernel))
            .collect();
        let default = (field.default_of)(num_rows);
        let is_new = is_new(default);
        if candidates.is_empty() && !is_new {
            continue;
        }
        let now = track.elapsed();
        let deadline = now + (end - now).max(0.0) / (all_rows.len() - idx) as f64 * 2.0;
        let mut one = Race::new(track, field, num_rows, deadline.min(end), &candidates);
        one.warm_up(options.warmup_rounds);
        one.last_rounds(options);
        for finish in one.finishes() {
            let is_repeated = finish.kernel == default && !is_new;
            if !is_repeated && !take(finish) {
                return;
            }
        }
    }
}

/// What can be raced at a row count beside the default, the most promising first.
fn candidates(field: &Field<'_>, num_rows: usize) -> Vec<usize> {
    let is_open = |kernel: &usize| !field.is_known(*kernel, num_rows);
    let mut open: Vec<usize> = field.challengers(num_rows).filter(is_open).collect();
    open.sort_by(|a, b| (field.prior)(*a, num_rows).total_cmp(&(field.prior)(*b, num_rows)));
    open
}

/// The fastest of those that have just finished and those that were known before.
fn fastest(field: &Field<'_>, finishes: &[Finish], num_rows: usize, num: usize) -> Vec<usize> {
    let known = field
        .challengers(num_rows)
        .filter_map(|kernel| Some((kernel, (field.known)(kernel, num_rows)?)));
    let finished = finishes.iter().map(|finish| (finish.kernel, finish.vs_default));
    let mut all: Vec<(usize, f64)> = finished.chain(known).collect();
    all.sort_by(|a, b| a.1.total_cmp(&b.1).then(a.0.cmp(&b.0)));
    all.into_iter().take(num).map(|(kernel, _)| kernel).collect()
}

impl<'a, T: Track> Race<'a, T> {
    fn new(
        track: &'a mut T,
        field: &Field<'_>,
        num_rows: usize,
        deadline: f64,
        candidates: &[usize],
    ) -> Race<'a, T> {
        let runner = |kernel: &usize| Runner { kernel: *kernel, ..Runner::default() };
        Race {
            track,
            default: (field.default_of)(num_rows),
            num_rows,
            deadline,
            runners: candidates.iter().map(runner).collect(),
            num_rounds: 0,
            default_seconds: Vec::new(),
            default_ratios: Vec::new(),
            limit: (field.limit)(num_rows),
        }
    }

    fn is_over(&self) -> bool {
        self.track.elapsed() >= self.deadline
    }

    /// Brings the machine to the speed that it keeps: the first calls find nothing in the caches.
    fn warm_up(&mut self, num_rounds: usize) {
        let mut before = self.track.run(self.default, self.num_rows);
        for _ in 0..num_rounds {
            let after = self.track.run(self.default, self.num_rows);
            if let (Some(before), Some(after)) = (before, after) {
                self.default_ratios.push(after / before);
                self.default_seconds.push(after);
            }
            before = after;
        }
    }

    /// The default against itself: by how much the median of as many ratios as a kernel has may be
    /// off.
    fn noise(&self) -> f64 {
        let num_ratios = self.runners.iter().map(|runner| runner.ratios.len()).max().unwrap_or(1);
        let middle = (median(&self.default_ratios).unwrap_or(1.0) - 1.0).abs();
        (middle + error_of(&self.default_ratios, num_ratios.max(SAMPLES_MIN))).min(1.0)
    }

    /// Drops the slower half after ever more rounds; then the finalists race.
    fn heats(&mut self, options: &RaceOptions) {
        let mut num_rounds = options.heat_rounds;
        while self.num_left() > options.num_finalists && !self.is_over() {
            self.rounds(num_rounds);
            let num_kept = self.num_left().div_ceil(2).max(options.num_finalists);
            self.drop_behind(num_kept);
            num_rounds *= 2;
        }
        self.drop_behind(options.num_finalists);
        self.last_rounds(options);
    }

    fn last_rounds(&mut self, options: &RaceOptions) {
        let (at_least, at_most) = options.final_rounds;
        self.rounds(at_least);
        for _ in at_least..at_most {
            let mut left = self.runners.iter().filter(|runner| !runner.is_out);
            let is_open =
                |runner: &Runner| error_of(&runner.ratios, runner.ratios.len()) > ERROR_MAX;
            if !left.any(is_open) {
                return;
            }
            self.rounds(1);
        }
    }

    fn num_left(&self) -> usize {
        self.runners.iter().filter(|runner| !runner.is_out).count()
    }

    fn drop_behind(&mut self, num_kept: usize) {
        let mut order: Vec<usize> =
            (0..self.runners.len()).filter(|idx| !self.runners[*idx].is_out).collect();
        let ratio = |runner: &Runner| median(&runner.ratios).unwrap_or(f64::INFINITY);
        order.sort_by(|a, b| ratio(&self.runners[*a]).total_cmp(&ratio(&self.runners[*b])));
        for idx in order.into_iter().skip(num_kept) {
            self.runners[idx].is_out = true;
        }
    }

    /// Runs all that are left so often, the default before and after every few of them.
    fn rounds(&mut self, num_rounds: usize) {
        for _ in 0..num_rounds {
            self.num_rounds += 1;
            if self.is_over() || self.is_decided() {
                return;
            }
            let mut left: Vec<usize> =
                (0..self.runners.len()).filter(|idx| !self.runners[*idx].is_out).collect();
            // Nobody always runs behind the same one.
            let len = left.len().max(1);
            left.rotate_left((self.num_rounds * 5) % len);
            for few in left.chunks(NUM_BETWEEN) {
                if self.is_over() {
                    return;
                }
                self.run_beside_default(few);
            }
        }
    }

    fn run_beside_default(&mut self, few: &[usize]) {
        let before = self.track.run(self.default, self.num_rows);
        let times: Vec<Option<f64>> = few
            .iter()
            .map(|idx| self.track.run(self.runners[*idx].kernel, self.num_rows))
            .collect();
        let after = self.track.run(self.default, self.num_rows);
        let (Some(before), Some(after)) = (before, after) else { return };
        self.default_seconds.extend([before, after]);
        self.default_ratios.push(after / before);
        let default = (before + after) / 2.0;
        for (idx, seconds) in few.iter().zip(times) {
            let runner = &mut self.runners[*idx];
            match seconds {
                Some(seconds) => {
                    runner.seconds.push(seconds);
                    runner.ratios.push(seconds / default);
                }
                None => {
                    runner.is_out = true;
                    runner.ratios.clear();
                }
            }
        }
    }

    /// Whether one of them is as fast as the machine can be, which two samples show.
    fn is_decided(&self) -> bool {
        let is_at_limit = |runner: &Runner| {
            let near = runner.seconds.iter().filter(|s| **s * LIMIT_SHARE <= self.limit);
            runner.ratios.len() >= SAMPLES_MIN && near.count() >= 2
        };
        self.runners.iter().any(is_at_limit)
    }

    /// What is known well enough, the default first. Of those that dropped out early few samples
    /// are enough: to know that they are not to be tried again.
    fn finishes(self) -> Vec<Finish> {
        let (num_rows, noise) = (self.num_rows, self.noise());
        let of = |kernel, seconds: &[f64], vs_default| Finish {
            kernel,
            num_rows,
            us: percentiles(seconds),
            num_samples: seconds.len(),
            vs_default,
            noise,
        };
        let mut all = Vec::new();
        if self.default_seconds.len() >= SAMPLES_MIN {
            all.push(of(self.default, &self.default_seconds, 1.0));
        }
        let known = self.runners.iter().filter(|runner| {
            let num_samples = runner.ratios.len();
            num_samples >= SAMPLES_MIN || (runner.is_out && num_samples > 0)
        });
        all.extend(known.filter_map(|runner| {
            Some(of(runner.kernel, &runner.seconds, median(&runner.ratios)?))
        }));
        all
    }
}

/// Of unsorted numbers; the lower middle one of an even count.
pub(super) fn median(values: &[f64]) -> Option<f64> {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let middle = sorted.len().checked_sub(1)? / 2;
    let upper = sorted.len() / 2;
    Some((sorted[middle] + sorted[upper]) / 2.0)
}

/// Standard error of the median of so many values that vary as these do.
fn error_of(values: &[f64], num_values: usize) -> f64 {
    // √(π/2): by how much more a median varies than a mean.
    1.2533 * deviation(values) / (num_values.max(1) as f64).sqrt()
}

/// Standard deviation, from the median of the distances to the median.
fn deviation(values: &[f64]) -> f64 {
    let Some(middle) = median(values) else { return 0.0 };
    let distances: Vec<f64> = values.iter().map(|value| (value - middle).abs()).collect();
    1.4826 * median(&distances).unwrap_or(0.0)
}

/// The 10th, 50th and 90th, in microseconds.
fn percentiles(seconds: &[f64]) -> [f64; 3] {
    let mut sorted = seconds.to_vec();
    sorted.sort_by(f64::total_cmp);
    let last = sorted.len().saturating_sub(1);
    [0.1, 0.5, 0.9].map(|share| sorted[(share * last as f64).round() as usize] * 1e6)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    /// A machine of planted times that gets slower and slower, and is noisy.
    struct Simulated {
        now: f64,
        drift: f64,
        noise: f64,
        random: u64,
        num_runs: usize,
        /// Breaks down, and what it costs until that is known.
        broken: Option<(usize, f64)>,
    }

    /// Seconds of a kernel: the default of few rows is 0, of many 1.
    fn planted(kernel: usize, num_rows: usize) -> f64 {
        let rows = num_rows as f64;
        let factor = match kernel {
            0 => 1.0 + rows / 64.0,
            1 => 1.5 + rows / 128.0,
            // The best of few rows, and of many.
            7 => 0.8 + rows / 60.0,
            11 => 1.4 + rows / 200.0,
            kernel => 1.2 + kernel as f64 / 50.0 + rows / 64.0,
        };
        20e-6 * factor
    }

    impl Simulated {
        fn new() -> Simulated {
            Simulated {
                now: 0.0,
                drift: 0.5,
                noise: 0.02,
                random: 9,
                num_runs: 0,
                broken: Some((4, 0.05)),
            }
        }

        fn random(&mut self) -> f64 {
            self.random = self.random.wrapping_mul(6364136223846793005).wrapping_add(1);
            (self.random >> 33) as f64 / (1u64 << 31) as f64
        }
    }

    impl Track for Simulated {
        fn run(&mut self, kernel: usize, num_rows: usize) -> Option<f64> {
            self.num_runs += 1;
            if let Some((broken, seconds)) = self.broken
                && broken == kernel
            {
                self.now += seconds;
                return None;
            }
            let noise = 1.0 + self.noise * (self.random() - 0.5);
            let seconds = planted(kernel, num_rows) * noise * (1.0 + self.drift * self.now);
            self.now += seconds;
            Some(seconds)
        }

        fn elapsed(&self) -> f64 {
            self.now
        }
    }

    fn field<'a>(known: &'a dyn Fn(usize, usize) -> Option<f64>) -> Field<'a> {
        Field {
            num_kernels: 24,
            default_of: &|num_rows| usize::from(num_rows > 8),
            can_serve: &|_, _| true,
            prior: &|kernel, _| 24.0 - kernel as f64,
            limit: &|_| 0.0,
            known,
        }
    }

    fn run(
        track: &mut Simulated,
        budget: f64,
        known: &BTreeMap<(usize, usize), f64>,
    ) -> Vec<Finish> {
        let known = |kernel, rows| known.get(&(kernel, rows)).copied();
        let mut all = Vec::new();
        let options = RaceOptions::default();
        race(track, &field(&known), &options, budget, &mut |finish| {
            all.push(finish);
            true
        });
        all
    }

    fn best(all: &[Finish], num_rows: usize) -> &Finish {
        let of_rows = all.iter().filter(|finish| finish.num_rows == num_rows);
        of_rows.min_by(|a, b| a.vs_default.total_cmp(&b.vs_default)).unwrap()
    }

    #[test]
    fn the_fastest_win_on_a_machine_that_drifts() {
        let all = run(&mut Simulated::new(), 2.0, &BTreeMap::new());
        for rows in [1, 2, 4, 8] {
            assert_eq!(best(&all, rows).kernel, 7, "{rows} rows");
        }
        for rows in [64, 128, 512] {
            assert_eq!(best(&all, rows).kernel, 11, "{rows} rows");
        }
        let finish = best(&all, 1);
        let ratio = planted(7, 1) / planted(0, 1);
        assert!((finish.vs_default / ratio - 1.0).abs() < 0.02, "{finish:?}");
        assert!(finish.noise < 0.05, "{finish:?}");
        assert!(all.iter().all(|finish| finish.kernel != 4), "what breaks down is not measured");
    }

    #[test]
    fn survivors_are_known_at_all_row_counts() {
        let all = run(&mut Simulated::new(), 4.0, &BTreeMap::new());
        let options = RaceOptions::default();
        for rows in options.first_rows.iter().chain(&options.other_rows) {
            for kernel in [7, 11] {
                let is_there = all.iter().any(|f| f.kernel == kernel && f.num_rows == *rows);
                assert!(is_there, "kernel {kernel} at {rows} rows");
            }
        }
    }

    #[test]
    fn the_budget_is_kept() {
        for budget in [0.02, 0.1, 0.5] {
            let mut track = Simulated { broken: None, ..Simulated::new() };
            run(&mut track, budget, &BTreeMap::new());
            // A race that has begun measures its noise.
            let noise: f64 = [1, 8, 64, 512, 4, 16, 2, 128, 3, 6, 12, 24, 32, 48, 96, 192, 256]
                .iter()
                .map(|rows| 2.0 * 12.0 * planted(1, *rows))
                .sum();
            assert!(track.now < budget + 2.0 * noise, "{} of {budget}", track.now);
        }
    }

    #[test]
    fn nothing_is_measured_twice() {
        let first = run(&mut Simulated::new(), 4.0, &BTreeMap::new());
        let known = ratios(&first);
        assert_eq!(known.len(), first.len(), "each once");
        let second = run(&mut Simulated::new(), 4.0, &known);
        let repeated = second.iter().filter(|f| {
            // The default is raced against by whoever is new, and what breaks down is tried again.
            known.contains_key(&(f.kernel, f.num_rows)) && f.kernel > 1
        });
        assert_eq!(repeated.count(), 0);
        let is_first = |rows: &usize| RaceOptions::default().first_rows.contains(rows);
        let again = second.iter().filter(|f| f.kernel > 1 && is_first(&f.num_rows)).count();
        assert_eq!(again, 0, "those that dropped out do not race again");
    }

    #[test]
    fn survivors_of_an_earlier_run_go_on() {
        let options = RaceOptions::default();
        let mut known = ratios(&run(&mut Simulated::new(), 4.0, &BTreeMap::new()));
        known.retain(|(_, rows), _| options.first_rows.contains(rows));
        let second = run(&mut Simulated::new(), 4.0, &known);
        for rows in &options.other_rows {
            let is_there = second.iter().any(|f| f.kernel == 7 && f.num_rows == *rows);
            assert!(is_there, "kernel 7 at {rows} rows");
        }
    }

    fn ratios(all: &[Finish]) -> BTreeMap<(usize, usize), f64> {
        all.iter().map(|f| ((f.kernel, f.num_rows), f.vs_default)).collect()
    }

    #[test]
    fn a_race_ends_when_it_is_told_to() {
        let mut num_taken = 0;
        let known = |_, _| None;
        let mut track = Simulated::new();
        race(&mut track, &field(&known), &RaceOptions::default(), 5.0, &mut |_| {
            num_taken += 1;
            num_taken < 3
        });
        assert_eq!(num_taken, 3);
    }

    #[test]
    fn the_limit_ends_a_race_early() {
        let never = |_, _| None;
        let runs_with = |limit: f64| {
            let mut track = Simulated::new();
            let limit = move |_: usize| limit;
            let field = Field { limit: &limit, ..field(&never) };
            let options = RaceOptions { other_rows: Vec::new(), ..RaceOptions::default() };
            race(&mut track, &field, &options, 50.0, &mut |_| true);
            track.num_runs
        };
        assert!(runs_with(1.0) < runs_with(0.0));
    }
}
