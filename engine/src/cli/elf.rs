//! Names and sizes of the functions of an ELF64 little-endian executable.

use std::io::{self, Read, Seek, SeekFrom};

/// Magic number, 64 bits, little-endian.
const MAGIC: [u8; 6] = [0x7F, b'E', b'L', b'F', 2, 1];
const HEADER_LEN: usize = 64;
const SECTION_LEN: usize = 64;
const SYMBOL_LEN: usize = 24;
const SYMBOL_TABLE: u32 = 2;
const FUNCTION: u8 = 2;

/// Largest table that is read.
const TABLE_BYTES_MAX: u64 = 256 << 20;

/// A section's kind, place in the file, size, and the section it refers to.
struct Section {
    kind: u32,
    offset: u64,
    len: u64,
    link: u32,
}

/// The mangled name and code size of every function in the symbol table of an executable.
pub(super) fn functions(file: &mut (impl Read + Seek)) -> io::Result<Vec<(String, u64)>> {
    let header = read_at(file, 0, HEADER_LEN as u64)?;
    if header[..6] != MAGIC {
        return Err(invalid("no ELF64 file"));
    }
    let offset = u64_at(&header, 40)?;
    let num_sections = u64::from(u16_at(&header, 60)?);
    let table = read_at(file, offset, num_sections * SECTION_LEN as u64)?;
    let sections: Vec<Section> =
        table.chunks_exact(SECTION_LEN).map(section).collect::<io::Result<_>>()?;
    let Some(symbols) = sections.iter().find(|section| section.kind == SYMBOL_TABLE) else {
        return Ok(Vec::new());
    };
    let names = sections.get(symbols.link as usize).ok_or_else(|| invalid("no names"))?;
    let names = read_at(file, names.offset, names.len)?;
    let symbols = read_at(file, symbols.offset, symbols.len)?;
    let mut functions = Vec::new();
    for symbol in symbols.chunks_exact(SYMBOL_LEN) {
        if symbol[4] & 15 != FUNCTION {
            continue;
        }
        let start = u32_at(symbol, 0)? as usize;
        let name = names.get(start..).and_then(|rest| rest.split(|byte| *byte == 0).next());
        let name = name.ok_or_else(|| invalid("a name outside its table"))?;
        functions.push((String::from_utf8_lossy(name).into_owned(), u64_at(symbol, 16)?));
    }
    Ok(functions)
}

/// An executable without what is not loaded: symbols, their names, and the list of sections. Other
/// files stay as they are.
#[cfg(feature = "make")]
pub(super) fn stripped(program: &[u8]) -> Vec<u8> {
    let mut program = program.to_vec();
    if let Ok(end) = end_of_segments(&program) {
        program.truncate(end);
        // Offset, number and names of the sections.
        program[40..48].fill(0);
        program[58..64].fill(0);
    }
    program
}

/// Where the last segment ends in the file.
#[cfg(feature = "make")]
fn end_of_segments(program: &[u8]) -> io::Result<usize> {
    if program.get(..6) != Some(&MAGIC) {
        return Err(invalid("no ELF64 file"));
    }
    let (table, entry_len) = (u64_at(program, 32)?, usize::from(u16_at(program, 54)?));
    let table = usize::try_from(table).map_err(|_| invalid("an offset is too large"))?;
    let mut end = HEADER_LEN;
    for idx in 0..usize::from(u16_at(program, 56)?) {
        let at = table.checked_add(idx * entry_len).ok_or_else(|| invalid("an offset"))?;
        let segment_end = u64_at(program, at + 8)?.checked_add(u64_at(program, at + 32)?);
        let segment_end = segment_end.and_then(|end| usize::try_from(end).ok());
        let inside = segment_end.filter(|end| *end <= program.len());
        end = end.max(inside.ok_or_else(|| invalid("a segment outside the file"))?);
    }
    Ok(end)
}

/// The path of a mangled Rust name: both mangling schemes write each part after its length.
pub(super) fn name_parts(name: &str) -> impl Iterator<Item = &str> {
    let is_start = move |at: &usize| {
        let bytes = name.as_bytes();
        bytes[*at].is_ascii_digit() && (*at == 0 || !bytes[at - 1].is_ascii_digit())
    };
    (0..name.len()).filter(is_start).filter_map(move |at| {
        let digits = name[at..].bytes().take_while(u8::is_ascii_digit).count();
        let len: usize = name[at..at + digits].parse().ok()?;
        let rest = &name[at + digits..];
        rest.get(..len).or_else(|| rest.strip_prefix('_')?.get(..len))
    })
}

fn section(bytes: &[u8]) -> io::Result<Section> {
    Ok(Section {
        kind: u32_at(bytes, 4)?,
        offset: u64_at(bytes, 24)?,
        len: u64_at(bytes, 32)?,
        link: u32_at(bytes, 40)?,
    })
}

fn read_at(file: &mut (impl Read + Seek), offset: u64, len: u64) -> io::Result<Vec<u8>> {
    if len > TABLE_BYTES_MAX {
        return Err(invalid("a table is too large"));
    }
    file.seek(SeekFrom::Start(offset))?;
    let mut bytes = Vec::new();
    // Grows with what is there, not with what the file claims.
    file.take(len).read_to_end(&mut bytes)?;
    if bytes.len() as u64 != len {
        return Err(invalid("the file is too short"));
    }
    Ok(bytes)
}

fn bytes_at<const N: usize>(bytes: &[u8], at: usize) -> io::Result<[u8; N]> {
    let slice = bytes.get(at..at + N).and_then(|slice| slice.try_into().ok());
    slice.ok_or_else(|| invalid("the file is too short"))
}

fn u16_at(bytes: &[u8], at: usize) -> io::Result<u16> {
    bytes_at(bytes, at).map(u16::from_le_bytes)
}

fn u32_at(bytes: &[u8], at: usize) -> io::Result<u32> {
    bytes_at(bytes, at).map(u32::from_le_bytes)
}

fn u64_at(bytes: &[u8], at: usize) -> io::Result<u64> {
    bytes_at(bytes, at).map(u64::from_le_bytes)
}

fn invalid(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn splits_mangled_names() {
        let parts = |name| name_parts(name).collect::<Vec<&str>>();
        let legacy = "_ZN7bespoke7kernels18gemm_n8_k8__avx51217h0123456789abcdefE";
        assert_eq!(parts(legacy)[..3], ["bespoke", "kernels", "gemm_n8_k8__avx512"]);
        let modern = "_RNvNtCs1_7bespoke7kernels11_8portable_";
        assert!(parts(modern).contains(&"kernels"));
        assert_eq!(parts("plain"), [""; 0]);
        assert_eq!(parts("99999999999999999999999x"), [""; 0]);
    }

    #[test]
    #[inline(never)]
    fn finds_this_test() {
        let bytes = std::fs::read(std::env::current_exe().unwrap()).unwrap();
        let is_elf = bytes.starts_with(b"\x7FELF");
        let functions = functions(&mut io::Cursor::new(&bytes)).unwrap_or_default();
        let is_this = |name: &str| name_parts(name).any(|part| part == "finds_this_test");
        assert_eq!(is_elf, functions.iter().any(|(name, size)| is_this(name) && *size > 0));
    }

    #[test]
    #[cfg(feature = "make")]
    fn strips_what_is_not_loaded() {
        let bytes = std::fs::read(std::env::current_exe().unwrap()).unwrap();
        let stripped = stripped(&bytes);
        if bytes.starts_with(&MAGIC) {
            assert!(stripped.len() < bytes.len());
            assert_eq!(end_of_segments(&stripped).unwrap(), stripped.len());
            assert_eq!(functions(&mut io::Cursor::new(&stripped)).unwrap(), []);
        }
        let cut = [&MAGIC[..], &[0x11; 100]].concat();
        assert_eq!(super::stripped(&cut), cut);
        assert_eq!(super::stripped(b"#!"), b"#!");
    }

    #[test]
    fn refuses_other_files() {
        let check = |bytes: &[u8]| assert!(functions(&mut io::Cursor::new(bytes)).is_err());
        check(b"");
        check(&[0; 100]);
        let magic = b"\x7FELF\x02\x01";
        check(&[magic.as_slice(), &[0xFF; 100]].concat());
        check(&[magic.as_slice(), &[0x11; 100]].concat());
    }
}
