//! Machine code as the disassembler shows it: how many instructions a kernel has, and what its
//! hottest loop is made of.
//!
//! A loop is the code from a label to the last branch back to it. The hottest is the one with the
//! most tensor-core instructions of those that contain no other such loop; without any, the
//! innermost with the most instructions.

use std::collections::BTreeMap;

/// Instructions by kind. Kinds of memory accesses end in their bits a thread.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    pub instructions: usize,
    pub kinds: BTreeMap<String, usize>,
}

/// What a kernel is made of.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Statistics {
    pub all: Counts,
    /// Of the hottest loop, if there is a loop.
    pub hot_loop: Option<Counts>,
}

/// An instruction: its mnemonic with modifiers, and the label it names.
struct Instruction<'a> {
    opcode: &'a str,
    label: Option<&'a str>,
}

/// Reads the output of `nvdisasm -c` on a cubin with one kernel.
pub fn read(text: &str) -> Statistics {
    let mut labels: BTreeMap<&str, usize> = BTreeMap::new();
    let mut instructions = Vec::new();
    for line in text.lines().map(str::trim) {
        if let Some(label) = line.strip_suffix(':') {
            labels.insert(label, instructions.len());
        } else if let Some(instruction) = instruction(line) {
            instructions.push(instruction);
        }
    }
    // NOTE: code ends in a branch to itself and padding, which never run.
    let is_end = |idx: usize, instruction: &Instruction<'_>| {
        instruction.opcode == "BRA" && instruction.label.and_then(|l| labels.get(l)) == Some(&idx)
    };
    if let Some(end) = instructions.iter().enumerate().position(|(idx, i)| is_end(idx, i)) {
        instructions.truncate(end);
    }
    let hot_loop = hottest(&loops(&instructions, &labels), &instructions);
    Statistics { all: count(&instructions), hot_loop }
}

/// `LDG.E.128` of `/*0010*/ @!P0 LDG.E.128 R4, desc[UR4][R2.64] ;`
fn instruction(line: &str) -> Option<Instruction<'_>> {
    let (_, rest) = line.strip_prefix("/*")?.split_once("*/")?;
    let mut words = rest.split_whitespace().peekable();
    while words.next_if(|word| word.starts_with('@') || *word == "{").is_some() {}
    let opcode = words.next()?.trim_end_matches(';');
    if !opcode.starts_with(|c: char| c.is_ascii_uppercase()) {
        return None;
    }
    let label = rest.split_once("`(").and_then(|(_, label)| label.split(')').next());
    Some(Instruction { opcode, label })
}

/// First and last instruction of every loop.
fn loops(instructions: &[Instruction<'_>], labels: &BTreeMap<&str, usize>) -> Vec<(usize, usize)> {
    let mut found: BTreeMap<usize, usize> = BTreeMap::new();
    for (idx, instruction) in instructions.iter().enumerate() {
        let target = instruction.label.and_then(|label| labels.get(label));
        if let Some(target) = target.filter(|target| **target < idx)
            && instruction.opcode.starts_with("BRA")
        {
            let last = found.entry(*target).or_insert(idx);
            *last = idx.max(*last);
        }
    }
    found.into_iter().collect()
}

fn hottest(loops: &[(usize, usize)], instructions: &[Instruction<'_>]) -> Option<Counts> {
    let counts: Vec<Counts> =
        loops.iter().map(|(first, last)| count(&instructions[*first..=*last])).collect();
    let has_tensor_cores = counts.iter().any(|counts| counts.of("HMMA") > 0);
    let is_candidate = |idx: &usize| !has_tensor_cores || counts[*idx].of("HMMA") > 0;
    let is_innermost = |idx: &usize| {
        let (first, last) = loops[*idx];
        let mut others = (0..loops.len()).filter(|other| other != idx).filter(is_candidate);
        !others.any(|other| loops[other].0 >= first && loops[other].1 <= last)
    };
    let weight = |idx: &usize| (counts[*idx].of("HMMA"), counts[*idx].instructions);
    let candidates = (0..loops.len()).filter(is_candidate).filter(is_innermost);
    candidates.max_by_key(weight).map(|idx| counts[idx].clone())
}

fn count(instructions: &[Instruction<'_>]) -> Counts {
    let mut counts = Counts { instructions: instructions.len(), kinds: BTreeMap::new() };
    for instruction in instructions {
        if let Some(kind) = kind(instruction.opcode) {
            *counts.kinds.entry(kind).or_insert(0) += 1;
        }
    }
    counts
}

/// The kinds that say something about a kernel's quality; others are counted in the sum alone.
fn kind(opcode: &str) -> Option<String> {
    let mut parts = opcode.split('.');
    let name = parts.next()?;
    match name {
        "LDG" | "STG" | "LDS" | "STS" | "LDL" | "STL" | "LDGSTS" | "LD" | "ST" => {
            Some(format!("{name}.{}", access_bits(parts)))
        }
        "HMMA" | "HGMMA" | "LDSM" | "LOP3" | "PRMT" | "HADD2" | "HFMA2" | "HMUL2" | "FFMA"
        | "FMUL" | "FADD" | "MUFU" | "SHFL" | "BAR" | "ATOMG" | "RED" | "UBLKCP" | "SYNCS" => {
            Some(name.to_string())
        }
        _ => None,
    }
}

fn access_bits<'a>(modifiers: impl Iterator<Item = &'a str>) -> usize {
    let bits = |modifier: &str| match modifier {
        "U8" | "S8" => Some(8),
        "U16" | "S16" => Some(16),
        "64" => Some(64),
        "128" => Some(128),
        _ => None,
    };
    modifiers.filter_map(bits).last().unwrap_or(32)
}

impl Counts {
    pub fn of(&self, kind: &str) -> usize {
        self.kinds.get(kind).copied().unwrap_or(0)
    }

    /// Accesses to local memory: registers that did not suffice.
    pub fn local(&self) -> usize {
        let local = self
            .kinds
            .iter()
            .filter(|(kind, _)| kind.starts_with("LDL.") || kind.starts_with("STL."));
        local.map(|(_, count)| count).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = "
\t.section\t.text.kernel,\"ax\",@progbits
.text.kernel:
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/                   S2R R0, SR_TID.X ;
.L_x_1:
        /*0020*/                   LDG.E.64.CONSTANT R4, desc[UR4][R2.64] ;
.L_x_0:
        /*0030*/                   LDS.128 R8, [R6] ;
        /*0040*/                   HMMA.16816.F32 R12, R8, R4, R12 ;
        /*0050*/              @!P0 BRA `(.L_x_0) ;
        /*0060*/               @P1 BRA `(.L_x_1) ;
.L_x_2:
        /*0070*/                   LDG.E.U16 R4, desc[UR4][R2.64] ;
        /*0080*/                   FADD R4, R4, R5 ;
        /*0090*/                   FADD R4, R4, R5 ;
        /*00a0*/                   FADD R4, R4, R5 ;
        /*00b0*/               @P2 BRA `(.L_x_2) ;
        /*00c0*/              @!PT STL [R1], R4 ;
        /*00d0*/                   EXIT ;
.L_x_3:
        /*00e0*/                   BRA `(.L_x_3);
        /*00f0*/                   NOP;
";

    #[test]
    fn loops_and_widths_are_found() {
        let statistics = read(TEXT);
        assert_eq!(statistics.all.instructions, 14);
        assert_eq!(statistics.all.of("LDG.64"), 1);
        assert_eq!(statistics.all.of("LDG.16"), 1);
        assert_eq!(statistics.all.local(), 1);
        let hot = statistics.hot_loop.unwrap();
        assert_eq!((hot.instructions, hot.of("HMMA"), hot.of("LDS.128")), (3, 1, 1));
    }

    #[test]
    fn without_tensor_cores_the_longest_inner_loop_counts() {
        let statistics = read(&TEXT.replace("HMMA.16816.F32", "FFMA"));
        assert_eq!(statistics.hot_loop.unwrap().of("FADD"), 3);
        let straight = read("/*0000*/ MOV R1, R2 ;\n/*0010*/ EXIT ;\n");
        assert_eq!(straight.all.instructions, 2);
        assert_eq!(straight.hot_loop, None);
        assert_eq!(read("").all.instructions, 0);
    }
}
