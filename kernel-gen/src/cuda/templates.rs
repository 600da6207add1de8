//! The text of the CUDA templates.

/// A template file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Template<'a> {
    /// Path below `templates/`.
    pub path: &'a str,
    pub text: &'a str,
}

macro_rules! templates {
    ($($path:literal,)*) => {
        /// Every file that a body may include, and the bodies, sorted by their paths.
        pub const ALL: &[Template<'static>] = &[
            $(Template { path: $path, text: include_str!(concat!("../../templates/", $path)) },)*
        ];
    };
}

templates! {
    "awq_gemm/awq_gemm.cuh",
    "common/dequant.cuh",
    "common/matmul.cuh",
    "common/pages.cuh",
    "common/params.h",
    "common/ptx.cuh",
    "common/types.cuh",
    "common/words.cuh",
    "embed/embed.cuh",
    "gemm/gemm.cuh",
    "paged_attention/paged_attention.cuh",
    "rms_norm/rms_norm.cuh",
    "rope/rope.cuh",
    "sample/sample.cuh",
    "silu_and_mul/silu_and_mul.cuh",
}

/// The file with one function per PTX instruction, which the tests replace.
pub const PTX: &str = "common/ptx.cuh";

/// The template at `path` below `templates/`.
pub fn find(path: &str) -> Option<Template<'static>> {
    ALL.iter().copied().find(|template| template.path == path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_cuda_file_is_listed() {
        let root = concat!(env!("CARGO_MANIFEST_DIR"), "/templates");
        let mut found = Vec::new();
        for folder in std::fs::read_dir(root).unwrap().map(|entry| entry.unwrap().path()) {
            for file in std::fs::read_dir(&folder).into_iter().flatten() {
                let path = file.unwrap().path();
                if path.extension().is_some_and(|extension| extension == "cuh" || extension == "h")
                {
                    let relative = path.strip_prefix(root).unwrap();
                    found.push(relative.to_string_lossy().into_owned());
                }
            }
        }
        found.sort();
        let listed: Vec<&str> = ALL.iter().map(|template| template.path).collect();
        assert_eq!(listed, found);
    }
}
