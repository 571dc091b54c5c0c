//! What can go wrong between a checkpoint folder and a token.
//!
//! Every variant names the file or the tensor, what was expected, what was got, and what to do about it.

use std::path::{Path, PathBuf};

use crate::runner::OptionError;

/// The result of loading or running a model.
pub type Result<T> = std::result::Result<T, Error>;

/// A failure to load or to run a model.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A file of the checkpoint could not be read.
    #[error("{}: cannot be read", file.display())]
    File {
        /// The file.
        file: PathBuf,
        /// Why. The message leaves it to those who print the causes of an error, so that it stands there once.
        source: std::io::Error,
    },
    /// A file of the checkpoint is not what its name says.
    #[error("{}: {what}", file.display())]
    Format {
        /// The file.
        file: PathBuf,
        /// What is wrong with it.
        what: String,
    },
    /// A field of a configuration file is absent, or has a value that cannot be used.
    #[error("{}: field `{field}`: expected {expected}, got {got}; {remedy}", file.display())]
    Config {
        /// The file.
        file: PathBuf,
        /// The field, dotted when nested.
        field: String,
        /// What would be right.
        expected: String,
        /// What stands there.
        got: String,
        /// What to do.
        remedy: String,
    },
    /// The checkpoint's architecture has no entry in the registry.
    #[error("architecture `{got}` is not supported; supported: {}", supported.join(", "))]
    Architecture {
        /// The architecture that `config.json` names.
        got: String,
        /// The names in the registry.
        supported: Vec<&'static str>,
    },
    /// Tensors that the model needs are not in the checkpoint.
    #[error("{} tensor(s) missing from {}: {}", names.len(), dir.display(), listed(names))]
    MissingTensors {
        /// The checkpoint folder.
        dir: PathBuf,
        /// Their names.
        names: Vec<String>,
    },
    /// Tensors of the checkpoint that the model did not use: a sign of the wrong architecture or of a forgotten part.
    #[error("{} tensor(s) of {} were not used by the model: {}", names.len(), dir.display(), listed(names))]
    UnusedTensors {
        /// The checkpoint folder.
        dir: PathBuf,
        /// Their names.
        names: Vec<String>,
    },
    /// A tensor has another shape or element type than the configuration asks for.
    #[error("tensor `{name}`: expected {expected}, got {got}")]
    TensorMismatch {
        /// Its name in the checkpoint.
        name: String,
        /// What the configuration asks for.
        expected: String,
        /// What the file holds.
        got: String,
    },
    /// The tokenizer refused its input.
    #[error("tokenizer: {0}")]
    Tokenizer(String),
    /// Text is wanted of a runner that was loaded without a tokenizer.
    #[error("the tokenizer was skipped (`skip_tokenizer_init`); work with token ids, or load it")]
    NoTokenizer,
    /// The chat template failed or refused the messages.
    #[error("chat template: {0}")]
    Chat(String),
    /// A sampling parameter is out of its range.
    #[error("sampling parameter `{field}`: expected {expected}, got {got}")]
    Sampling {
        /// The parameter.
        field: &'static str,
        /// Its range.
        expected: &'static str,
        /// What was asked for.
        got: String,
    },
    /// An option of a runner cannot be honoured.
    #[error(transparent)]
    Option(#[from] OptionError),
    /// A batch does not fit what the runner was built for.
    #[error("batch: {field}: expected {expected}, got {got}")]
    Batch {
        /// The property.
        field: &'static str,
        /// Its bound.
        expected: String,
        /// What was asked for.
        got: String,
    },
    /// The KV cache has too few free pages.
    #[error("KV cache is full: {wanted} page(s) wanted, {free} of {total} free")]
    OutOfPages {
        /// Pages asked for.
        wanted: usize,
        /// Pages free now.
        free: usize,
        /// Pages in the pool.
        total: usize,
    },
    /// Every state slot of a model with state-space layers is taken.
    #[error("all {total} state slots are taken; raise max_running_requests, or wait until a sequence ends")]
    OutOfStates {
        /// Sequences that can have a state.
        total: usize,
    },
    /// The runtime or the device failed.
    #[error(transparent)]
    Runtime(#[from] bcg_runtime::Error),
}

impl Error {
    pub(crate) fn format(file: &Path, what: impl std::fmt::Display) -> Self {
        Self::Format { file: file.to_path_buf(), what: what.to_string() }
    }

    pub(crate) fn batch(field: &'static str, expected: impl std::fmt::Display, got: impl std::fmt::Display) -> Self {
        Self::Batch { field, expected: expected.to_string(), got: got.to_string() }
    }
}

/// The first names of a list, and how many more there are.
fn listed(names: &[String]) -> String {
    const SHOWN: usize = 8;
    let shown = names.iter().take(SHOWN).map(|name| format!("`{name}`")).collect::<Vec<_>>().join(", ");
    match names.len().saturating_sub(SHOWN) {
        0 => shown,
        more => format!("{shown} and {more} more"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::error::Error as _;

    #[test]
    fn a_cause_stands_in_the_chain_and_not_in_the_message_too() {
        let error = crate::checkpoint::read(Path::new("/nonexistent/config.json"), 1).expect_err("no such file");
        let cause = error.source().expect("a cause").to_string();
        assert_eq!(error.to_string(), "/nonexistent/config.json: cannot be read");
        assert!(!cause.is_empty() && !error.to_string().contains(&cause));
    }
}
