//! Requests that look for trouble: lengths around page borders, prompts that repeat, continue,
//! shorten or nearly equal earlier ones, in several namespaces.

use super::grammar::grammar;
use super::{Random, VOCAB};
use crate::kv_cache::Namespace;
use crate::request::Request;
use crate::sampling::SamplingParams;

/// Prompts that are remembered to be used again.
const PROMPTS_MAX: usize = 24;
const NUM_NAMESPACES: u64 = 3;

/// What requests are made from.
pub(super) struct Workload {
    page_size: usize,
    len_max: usize,
    prompts: Vec<Vec<u32>>,
}

impl Workload {
    pub(super) fn new(page_size: usize, len_max: usize) -> Workload {
        Workload { page_size, len_max, prompts: Vec::new() }
    }

    /// Tokens that later prompts may begin with.
    pub(super) fn remember(&mut self, tokens: Vec<u32>, random: &mut Random) {
        if self.prompts.len() < PROMPTS_MAX {
            self.prompts.push(tokens);
        } else {
            let idx = random.below(PROMPTS_MAX);
            self.prompts[idx] = tokens;
        }
    }

    pub(super) fn request(&mut self, random: &mut Random) -> Request {
        let prompt_ids = self.prompt(random);
        self.remember(prompt_ids.clone(), random);
        Request {
            prompt_ids,
            max_tokens: self.max_tokens(random),
            sampling: sampling(random),
            stop_token_ids: if random.one_in(2) { vec![0] } else { Vec::new() },
            grammar: random.one_in(4).then(grammar),
            num_choices: if random.one_in(8) { 1 + random.below(4) } else { 1 },
            namespace: Namespace(random.below(NUM_NAMESPACES as usize) as u64),
            ..Request::default()
        }
    }

    /// Answers of one token, of a few, and such that end with a page.
    fn max_tokens(&self, random: &mut Random) -> usize {
        match random.below(8) {
            0 => 1,
            1 => self.page_size,
            2 => self.len_max,
            _ => 1 + random.below(12),
        }
    }

    fn prompt(&self, random: &mut Random) -> Vec<u32> {
        let len = self.len(random);
        if self.prompts.is_empty() || random.one_in(3) {
            return tokens(len, random);
        }
        let earlier = &self.prompts[random.below(self.prompts.len())];
        let border = earlier.len() / self.page_size * self.page_size;
        match random.below(6) {
            0 => earlier.clone(),
            1 if border > 0 => earlier[..border].to_vec(),
            2 => {
                let mut changed = earlier.clone();
                changed[0] = (changed[0] + 1) % VOCAB as u32;
                changed
            }
            // The same pages behind another first page.
            3 if earlier.len() > self.page_size => {
                let mut moved = tokens(self.page_size, random);
                moved.extend_from_slice(&earlier[self.page_size..]);
                moved
            }
            4 => earlier[..1 + random.below(earlier.len())].to_vec(),
            _ => [earlier.clone(), tokens(1 + random.below(6), random)].concat(),
        }
    }

    fn len(&self, random: &mut Random) -> usize {
        let around_border = self.page_size * (1 + random.below(3)) + random.below(3);
        match random.below(8) {
            0 => 1,
            1 => self.len_max - 1,
            2..=4 => around_border - 1,
            _ => 1 + random.below(self.len_max),
        }
        .max(1)
    }
}

/// Half of the requests take the likeliest token; some look back at what they generated.
fn sampling(random: &mut Random) -> SamplingParams {
    SamplingParams {
        temperature: if random.one_in(2) { 1.0 } else { 0.0 },
        seed: random.below(4) as u64,
        presence_penalty: if random.one_in(6) { 1.5 } else { 0.0 },
        repetition_penalty: if random.one_in(6) { 1.2 } else { 1.0 },
        min_tokens: if random.one_in(6) { 3 } else { 0 },
        ..SamplingParams::default()
    }
}

fn tokens(len: usize, random: &mut Random) -> Vec<u32> {
    // Few different first tokens, so that unrelated prompts begin alike.
    (0..len).map(|idx| random.below(if idx == 0 { 3 } else { VOCAB }) as u32).collect()
}
