//! From a loaded model to a file.

use std::collections::BTreeMap;
use std::io::{self, Write};

use super::checksum::checksum;
use super::format::{Array, Header, Linear, MAGIC, PAGE, PREFIX_LEN, TABLE, VERSION};
use super::parts::{array_name, linear_name, norm_name};
use crate::backend::cpu::CpuBackend;
use crate::backend::cpu::memory::ALIGNMENT;
use crate::model::decoder::{Decoder, PartRef};

/// Bytes of a file of the decoder's weights, within a thousandth or so.
pub fn packed_bytes(decoder: &Decoder<CpuBackend>) -> u64 {
    decoder.weights_bytes() as u64
}

/// Writes the weights of a decoder that was loaded from `source`; gives the bytes written.
pub fn write(decoder: &Decoder<CpuBackend>, source: &str, out: &mut dyn Write) -> io::Result<u64> {
    let (arrays, linears) = collect(decoder);
    let target = decoder.backend().target().name().to_owned();
    let source = source.to_owned();
    let mut header = Header { source, target, file_len: 0, arrays: BTreeMap::new(), linears };
    for (name, bytes) in &arrays {
        let (len, checksum) = (bytes.len() as u64, checksum(bytes));
        header.arrays.insert(name.clone(), Array { offset: 0, len, checksum });
    }
    let text = place(&mut header, &arrays);
    out.write_all(&MAGIC)?;
    out.write_all(&VERSION.to_le_bytes())?;
    out.write_all(&[0; 4])?;
    out.write_all(&(text.len() as u64).to_le_bytes())?;
    out.write_all(blake3::hash(&text).as_bytes())?;
    out.write_all(&text)?;
    let mut at = (PREFIX_LEN + text.len()) as u64;
    for (name, bytes) in &arrays {
        let offset = header.arrays[name].offset;
        out.write_all(&vec![0; (offset - at) as usize])?;
        out.write_all(bytes)?;
        at = offset + bytes.len() as u64;
    }
    Ok(at)
}

/// Gives every array its place behind the header, whose text this is: longer offsets make a longer
/// header, so places are sought until they fit.
fn place(header: &mut Header, arrays: &[(String, &[u8])]) -> Vec<u8> {
    let mut header_len = 0;
    loop {
        let mut at = (PREFIX_LEN + header_len) as u64;
        for (name, bytes) in arrays {
            let len = bytes.len() as u64;
            let alignment = if len >= PAGE { PAGE } else { ALIGNMENT as u64 };
            let offset = at.next_multiple_of(alignment);
            if let Some(array) = header.arrays.get_mut(name) {
                array.offset = offset;
            }
            at = offset + len;
        }
        header.file_len = at;
        // NOTE: maps with text as keys, and numbers: nothing of it can fail.
        let mut text = serde_json::to_vec(header).expect("a header is JSON");
        if text.len() <= header_len {
            text.resize(header_len, b' ');
            return text;
        }
        header_len = text.len() + 64;
    }
}

type Collected<'a> = (Vec<(String, &'a [u8])>, BTreeMap<String, Linear>);

/// The arrays in the order in which they are kept, and the layouts of the linears.
fn collect(decoder: &Decoder<CpuBackend>) -> Collected<'_> {
    let (mut arrays, mut linears) = (Vec::new(), BTreeMap::new());
    for part in decoder.parts() {
        match part {
            PartRef::Embedding(table) => arrays.push((TABLE.to_owned(), table.bytes())),
            PartRef::FinalNorm(norm) => arrays.push(("final_norm".to_owned(), norm.bytes())),
            PartRef::Norms { layer_idx, norms } => {
                for (idx, norm) in norms.into_iter().enumerate() {
                    arrays.extend(norm.map(|norm| (norm_name(layer_idx, idx), norm.bytes())));
                }
            }
            PartRef::Linear { layer_idx, role, linear } => {
                let name = linear_name(role, layer_idx);
                let layout = decoder.backend().layout_of_linear(linear);
                for (array, bytes) in layout.arrays().iter().zip(linear.arrays()) {
                    arrays.push((array_name(&name, array.name), bytes));
                }
                arrays.extend(linear.bias_bytes().map(|bias| (array_name(&name, "bias"), bias)));
                linears.insert(name, Linear::of(&layout));
            }
        }
    }
    (arrays, linears)
}
