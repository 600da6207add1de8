//! The assembler's report: what a kernel takes of a multiprocessor, and what must not be in it.

/// What a kernel takes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// Of a thread.
    pub registers: usize,
    /// Bytes of local memory for variables, of a thread.
    pub stack_bytes: usize,
    /// Bytes of local memory that registers are stored to, of a thread.
    pub spill_store_bytes: usize,
    pub spill_load_bytes: usize,
    /// Statically allocated, of a block.
    pub shared_bytes: usize,
}

/// Messages that mean a kernel does not do what it was written for.
const REFUSED: [(&str, &str); 2] =
    [("C7508", "setmaxnreg is ignored"), ("C7510", "wgmma instructions are serialized")];

/// Reads the report of `ptxas -v` on the kernel `symbol`.
///
/// Spills, local memory, static shared memory and the messages of `REFUSED` are errors.
pub fn check(report: &str, symbol: &str) -> Result<Usage, String> {
    let usage = read(report, symbol)?;
    let mut faults = Vec::new();
    if usage.spill_store_bytes + usage.spill_load_bytes > 0 {
        faults.push(format!(
            "registers spill: {} bytes stored, {} loaded",
            usage.spill_store_bytes, usage.spill_load_bytes
        ));
    }
    if usage.stack_bytes > 0 {
        faults.push(format!(
            "{} bytes of local memory; index arrays by constants only",
            usage.stack_bytes
        ));
    }
    if usage.shared_bytes > 0 {
        faults.push(format!("{} bytes of static shared memory", usage.shared_bytes));
    }
    for (code, meaning) in REFUSED {
        if report.contains(code) {
            faults.push(format!("{meaning} ({code})"));
        }
    }
    match faults.is_empty() {
        true => Ok(usage),
        false => Err(format!("{} ({} registers)", faults.join("; "), usage.registers)),
    }
}

fn read(report: &str, symbol: &str) -> Result<Usage, String> {
    let no_report = || format!("the assembler said nothing about {symbol}");
    let entry = format!("Compiling entry function '{symbol}'");
    let start = report.find(&entry).ok_or_else(no_report)?;
    let rest = &report[start + entry.len()..];
    let section = rest.split("Compiling entry function").next().unwrap_or(rest);
    let number = |unit: &str| number_before(section, unit);
    Ok(Usage {
        registers: number(" registers").ok_or_else(no_report)?,
        stack_bytes: number(" bytes stack frame").ok_or_else(no_report)?,
        spill_store_bytes: number(" bytes spill stores").ok_or_else(no_report)?,
        spill_load_bytes: number(" bytes spill loads").ok_or_else(no_report)?,
        shared_bytes: number(" bytes smem").unwrap_or(0),
    })
}

/// The number that stands before `unit`.
fn number_before(text: &str, unit: &str) -> Option<usize> {
    let before = &text[..text.find(unit)?];
    let digits = before.rfind(|c: char| !c.is_ascii_digit()).map_or(0, |end| end + 1);
    before[digits..].parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report(properties: &str, used: &str) -> String {
        format!(
            "ptxas info    : 0 bytes gmem\n\
             ptxas info    : Compiling entry function 'embed_h8' for 'sm_90a'\n\
             ptxas info    : Function properties for embed_h8\n    \
                 {properties}\n\
             ptxas info    : Used {used}, used 1 barriers\n\
             ptxas info    : Compile time = 4.059 ms\n"
        )
    }

    const CLEAN: &str = "0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads";

    #[test]
    fn a_clean_kernel_passes() {
        let expected = Usage { registers: 40, ..Usage::default() };
        assert_eq!(check(&report(CLEAN, "40 registers"), "embed_h8"), Ok(expected));
    }

    #[test]
    fn waste_is_refused_with_its_numbers() {
        let spills = "24 bytes stack frame, 16 bytes spill stores, 8 bytes spill loads";
        let error = check(&report(spills, "255 registers"), "embed_h8").unwrap_err();
        for part in ["16 bytes stored, 8 loaded", "24 bytes of local", "255 registers"] {
            assert!(error.contains(part), "{error}");
        }
        let shared = check(&report(CLEAN, "9 registers, 400 bytes smem"), "embed_h8");
        assert!(shared.unwrap_err().contains("400 bytes of static shared"));
    }

    #[test]
    fn serialized_instructions_are_refused() {
        for (code, meaning) in REFUSED {
            let text = format!(
                "{}ptxas info    : ({code}) Potential Performance Loss\n",
                report(CLEAN, "40 registers")
            );
            assert!(check(&text, "embed_h8").unwrap_err().contains(meaning));
        }
    }

    #[test]
    fn a_missing_report_is_no_clean_one() {
        for text in ["", "ptxas info    : 0 bytes gmem", &report(CLEAN, "x registers")] {
            assert!(check(text, "embed_h8").is_err(), "{text}");
        }
        assert!(check(&report(CLEAN, "40 registers"), "embed_h16").is_err());
    }
}
