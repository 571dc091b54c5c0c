//! The one way in which files of a checkpoint are opened and read.
//!
//! A checkpoint is somebody else's folder: a name may lead to a FIFO, a device that never ends, or a file of any size.
//! - Only regular files are read. A file is opened without waiting, and what was opened is asked for its type, so
//!   nobody can put another file in its place in between.
//! - Each kind of file has a limit, and no more than that is ever read.

use std::fs::{File, OpenOptions};
use std::io::{ErrorKind, Read};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::Path;

use crate::error::{Error, Result};

/// The largest `config.json`, `generation_config.json` or `tokenizer_config.json`, in bytes; a larger one is an error.
pub const CONFIG_BYTES_MAX: u64 = 16 << 20;
/// The largest `tokenizer.json`, in bytes; a larger one is an error.
pub const TOKENIZER_BYTES_MAX: u64 = 256 << 20;
/// The largest chat template, in bytes; a larger one is an error.
pub const TEMPLATE_BYTES_MAX: u64 = 1 << 20;
/// The largest `model.safetensors.index.json`, in bytes; a larger one is an error.
pub const INDEX_BYTES_MAX: u64 = 64 << 20;

/// Opens a regular file.
///
/// # Errors
/// [`Error::File`] if it cannot be opened; [`Error::Format`] if it is no regular file.
pub(crate) fn open(file: &Path) -> Result<File> {
    let refuse = |source| Error::File { file: file.to_path_buf(), source };
    let opened = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(file).map_err(refuse)?;
    let kind = opened.metadata().map_err(refuse)?.file_type();
    let is = match () {
        () if kind.is_file() => return Ok(opened),
        () if kind.is_dir() => "a folder",
        () if kind.is_fifo() => "a pipe",
        () if kind.is_socket() => "a socket",
        () => "a device",
    };
    Err(Error::format(file, format!("is {is}; a checkpoint's files are regular files, so put the real one there")))
}

/// Reads a regular file of at most `bytes_max` bytes.
///
/// # Errors
/// Those of [`open`]; [`Error::File`] if it cannot be read; [`Error::Format`] if it is larger.
pub(crate) fn read(file: &Path, bytes_max: u64) -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    let read = open(file)?.take(bytes_max + 1).read_to_end(&mut bytes);
    read.map_err(|source| Error::File { file: file.to_path_buf(), source })?;
    if bytes.len() as u64 > bytes_max {
        let limit = bytes_max >> 20;
        return Err(Error::format(file, format!("is larger than {limit} MiB, which no such file needs; check it")));
    }
    Ok(bytes)
}

/// [`read`], for a file that a checkpoint may lack. A link that leads nowhere is an error and not a lack.
///
/// # Errors
/// Those of [`read`].
pub(crate) fn read_optional(file: &Path, bytes_max: u64) -> Result<Option<Vec<u8>>> {
    match file.symlink_metadata() {
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
        _ => read(file, bytes_max).map(Some),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;
    use std::os::unix::net::UnixListener;

    use super::*;
    use crate::testing::TempDir;
    use crate::weights::{Shard, Weights};
    use crate::{ChatTemplate, ModelConfig, Tokenizer};

    #[test]
    fn what_is_no_regular_file_is_refused_at_once_by_every_reader() {
        let dir = TempDir::new("irregular");
        let (model, device) = (crate::testing::tiny_qwen3(), bcg_runtime::Device::host());
        let load = |dir: &Path| -> Result<()> {
            let config = ModelConfig::load(dir)?;
            Tokenizer::load(dir)?;
            ChatTemplate::load(dir)?;
            Weights::open(dir, &device, config.dtype, Shard::WHOLE).map(drop)
        };
        let names = ["config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"];
        let rest = ["chat_template.jinja", "model.safetensors", "model.safetensors.index.json"];
        for name in names {
            std::fs::copy(model.join(name), dir.path().join(name)).expect("a copy");
        }
        symlink(model.join(rest[1]), dir.path().join(rest[1])).expect("a link");
        load(dir.path()).expect("a checkpoint, by a link too");
        let _socket = UnixListener::bind(dir.path().join("socket")).expect("a socket");
        std::fs::create_dir(dir.path().join("folder")).expect("a folder");
        let pipe = std::process::Command::new("mkfifo").arg(dir.path().join("pipe")).status().expect("mkfifo");
        assert!(pipe.success());
        let kinds = [
            ("pipe", "is a pipe"),
            ("socket", "cannot be read"),
            ("folder", "is a folder"),
            ("/dev/zero", "is a device"),
            ("loop", "cannot be read"),
            ("nowhere", "cannot be read"),
        ];
        symlink("loop", dir.path().join("loop")).expect("a link");
        for name in names.into_iter().chain(rest) {
            let (file, kept) = (dir.path().join(name), dir.path().join("kept"));
            let is_there = std::fs::rename(&file, &kept).is_ok();
            for (target, reason) in kinds {
                symlink(dir.path().join(target), &file).expect("a link");
                let error = load(dir.path()).expect_err(target).to_string();
                assert!(error.starts_with(&format!("{}: {reason}", file.display())), "{target}: {error}");
                std::fs::remove_file(&file).expect("removed");
            }
            if is_there {
                std::fs::rename(&kept, &file).expect("back");
            }
        }
    }

    #[test]
    fn no_more_than_the_limit_is_read() {
        let dir = TempDir::new("limit");
        dir.write("file", &[b' '; (1 << 20) + 1]);
        let file = dir.path().join("file");
        assert_eq!(read(&file, (1 << 20) + 1).expect("within the limit").len(), (1 << 20) + 1);
        let error = read(&file, 1 << 20).expect_err("too large").to_string();
        assert!(error.starts_with(&format!("{}: is larger than 1 MiB", file.display())), "{error}");
    }

    #[test]
    fn a_file_that_may_be_absent_may_be() {
        assert!(read_optional(Path::new("/nonexistent/config.json"), 1).expect("absent").is_none());
    }
}
