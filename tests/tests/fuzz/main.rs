//! Whatever comes from outside gets an answer or a refusal: request bodies, chats, safetensors files, configurations.
//!
//! A target starts from valid inputs, changes their structure and then their bytes ([`document`]), and asks the code that
//! serves users; [`campaign`] goes on until the time is up. No input may make it panic, hang, or take absurd memory. Each
//! target runs for a few seconds under `cargo test`, and as long as one likes by `cargo xtask fuzz`. What is found becomes a
//! test by name in the code that was wrong.

mod campaign;
mod chat;
mod config;
mod document;
mod http;
mod safetensors;

use std::fs;
use std::path::{Path, PathBuf};

use serde_json::Value;

/// The checkpoints of the repository.
const CHECKPOINTS: [&str; 4] = ["tiny-qwen3", "tiny-qwen3-moe", "tiny-nemotron-h", "tiny-deepseek-v3"];

fn models() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../models")
}

/// Reads a file of JSON; the infinities that Python writes become texts between [marks](document::MARK).
fn read_json(file: &Path) -> Value {
    let text = fs::read_to_string(file).unwrap_or_else(|error| panic!("{}: {error}", file.display()));
    let marked = serde_json::json!(format!("{0}Infinity{0}", document::MARK)).to_string();
    serde_json::from_str(&text.replace(" Infinity", &marked)).expect("JSON")
}

/// A folder that is removed at the end.
struct Folder(PathBuf);

impl Folder {
    fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("bcg-fuzz-{name}-{}", std::process::id()));
        fs::create_dir_all(&path).expect("a writable temporary folder");
        Self(path)
    }

    /// Writes a file, or removes it.
    fn set(&self, file: &str, bytes: Option<&[u8]>) {
        let path = self.0.join(file);
        match bytes {
            Some(bytes) => fs::write(path, bytes).expect("a writable temporary folder"),
            None => drop(fs::remove_file(path)),
        }
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}
