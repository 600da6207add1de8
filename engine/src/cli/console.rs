//! Where a command writes: results to one stream, everything else to another.

use std::io::{self, ErrorKind, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use serde::Serialize;

use super::Exit;
use crate::bundle::Bundle;
use crate::error::Error;
use crate::import::cache::{self, Cache};
use crate::import::environment;
#[cfg(feature = "make")]
use crate::import::pull::PullOptions;
use crate::kernels::KernelTable;
use crate::model::safetensors::has_weights;
use crate::packed::PackedCache;
use crate::source::{ModelFolder, ModelSource, WeightsSource};

/// The streams of a command, and the kernels of the binary that it runs in.
pub struct Console<'a> {
    /// Results.
    pub out: &'a mut dyn Write,
    /// Messages, progress and errors.
    pub err: &'a mut dyn Write,
    /// Whether a person watches `err`: progress bars are drawn there.
    pub is_terminal: bool,
    pub kernels: KernelTable,
    /// Folder of the model cache; `None`: what the environment says.
    pub home: Option<PathBuf>,
    /// The program's own file, which some commands run once more in a process with limits; `None`
    /// where the command line runs within another program.
    pub program: Option<PathBuf>,
    /// The model that the program brings.
    pub bundle: Option<Arc<Bundle>>,
    /// When the program's own code began.
    pub start: Instant,
    /// Processor time that the process had taken then, where the system says.
    pub before_main: Option<Duration>,
}

impl Console<'_> {
    /// Writes to the results, at once.
    pub(super) fn print(&mut self, text: &str) -> anyhow::Result<()> {
        self.out
            .write_all(text.as_bytes())
            .and_then(|()| self.out.flush())
            .context("cannot write to standard output")
    }

    /// Writes one JSON value and a line end to the results.
    pub(super) fn print_json(&mut self, value: &impl Serialize) -> anyhow::Result<()> {
        self.print(&format!("{}\n", serde_json::to_string(value)?))
    }

    /// A message beside the results. Nobody could be told that it cannot be written.
    pub(super) fn report(&mut self, text: &str) {
        let _ = self.err.write_all(text.as_bytes()).and_then(|()| self.err.flush());
    }

    /// The model cache.
    pub(super) fn cache(&self) -> Result<Cache, Error> {
        match &self.home {
            Some(root) => Ok(Cache { root: root.clone() }),
            None => environment::cache(),
        }
    }

    #[cfg(feature = "make")]
    pub(super) fn pull_options(&self) -> Result<PullOptions, Error> {
        Ok(PullOptions { cache: self.cache()?, ..environment::pull_options()? })
    }

    /// Where the weights of loaded models are kept as kernels read them. A system without a folder
    /// for that goes without.
    fn packed_cache(&self) -> Option<PackedCache> {
        Some(PackedCache::new(self.cache().ok()?.root.join("packed")))
    }

    /// A model given as a path, a cached name, a preset, or the name of the one that the program
    /// brings.
    pub(super) fn source(&self, model: &str) -> Result<ModelSource, Error> {
        let packed_cache = self.packed_cache();
        if let Some(bundle) = &self.bundle {
            let files = ModelFolder::Bundle(bundle.clone());
            if model == bundle.name() {
                if let Some(weights) = bundle.weights()? {
                    let weights = WeightsSource::Packed(weights);
                    return Ok(ModelSource { files, weights, packed_cache });
                }
                if !Path::new(model).exists() {
                    return Err(Error::Request(format!(
                        "this program brings the model {model} without its weights; give the \
                         folder that has them with --model DIR"
                    )));
                }
            }
            let dir = PathBuf::from(model);
            if has_weights(&dir) && !cache::is_model_dir(&dir) {
                return Ok(ModelSource { files, packed_cache, ..ModelSource::folder(dir) });
            }
        }
        Ok(ModelSource { packed_cache, ..ModelSource::folder(self.resolve(model)?) })
    }

    /// The folder of a model given as a path, a cached name or a preset.
    pub(super) fn resolve(&self, model: &str) -> Result<PathBuf, Error> {
        cache::resolve(model, || self.cache())
    }

    /// Runs `command` and reports its error.
    pub(super) fn end(&mut self, command: impl FnOnce(&mut Self) -> anyhow::Result<()>) -> Exit {
        match command(self) {
            Ok(()) => Exit::Done,
            Err(error) if is_reader_gone(&error) => Exit::Done,
            Err(error) => {
                self.report(&format!("error: {error:#}\n"));
                Exit::Failed
            }
        }
    }
}

/// Whether the reader of the results went away, as `head` does when it has seen enough.
fn is_reader_gone(error: &anyhow::Error) -> bool {
    let io = error.downcast_ref::<io::Error>();
    io.is_some_and(|error| error.kind() == ErrorKind::BrokenPipe)
}
