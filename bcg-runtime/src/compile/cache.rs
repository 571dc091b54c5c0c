//! What is worth keeping between processes, on disk: cubins, and the runtime's choices of algorithms.
//!
//! - An entry is complete or absent: it is written beside its place and renamed.
//! - An entry carries a checksum; a damaged one is ignored with a warning and written again.
//! - Nothing here is an error: without a usable folder everything is made again, once per process.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

const MAGIC: &[u8; 8] = b"BCGCUB01";
const HEADER_BYTES: usize = MAGIC.len() + 16;

/// A folder of entries, each a file: the user's cache.
#[derive(Clone, Debug)]
pub(crate) struct Cache {
    dir: PathBuf,
}

impl Cache {
    /// Makes a cache in a folder, which is made when it is first written to.
    pub(crate) fn new(dir: impl Into<PathBuf>) -> Self {
        Self { dir: dir.into() }
    }

    /// Returns the user's cache, if the environment names one: `BCG_CACHE_DIR`, else `$XDG_CACHE_HOME/bcg`, else
    /// `~/.cache/bcg`.
    pub(crate) fn of_user() -> Option<Self> {
        let named = |variable: &str| std::env::var_os(variable).filter(|value| !value.is_empty()).map(PathBuf::from);
        let dir = named("BCG_CACHE_DIR")
            .or_else(|| named("XDG_CACHE_HOME").map(|dir| dir.join("bcg")))
            .or_else(|| named("HOME").map(|dir| dir.join(".cache").join("bcg")))?;
        Some(Self::new(dir))
    }

    /// Returns an entry, or `None` if it is absent or damaged.
    pub(crate) fn load(&self, entry: &str) -> Option<Vec<u8>> {
        let path = self.dir.join(entry);
        let bytes = match fs::read(&path) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return None,
            Err(error) => {
                tracing::warn!(path = %path.display(), %error, "cache: cannot read an entry, making it again");
                return None;
            }
        };
        let contents = verified(&bytes);
        if contents.is_none() {
            tracing::warn!(path = %path.display(), "cache: damaged entry, making it again");
        }
        contents.map(<[u8]>::to_vec)
    }

    /// Writes an entry; a failure is a warning.
    pub(crate) fn store(&self, entry: &str, contents: &[u8]) {
        let path = self.dir.join(entry);
        if let Err(error) = self.write(&path, contents) {
            tracing::warn!(path = %path.display(), %error, "cache: cannot write");
        }
    }

    fn write(&self, path: &Path, contents: &[u8]) -> io::Result<()> {
        static WRITES: AtomicU64 = AtomicU64::new(0);
        fs::create_dir_all(&self.dir)?;
        let unique = WRITES.fetch_add(1, Ordering::Relaxed);
        let partial = path.with_extension(format!("partial-{}-{unique}", std::process::id()));
        let mut bytes = Vec::with_capacity(HEADER_BYTES + contents.len());
        bytes.extend_from_slice(MAGIC);
        bytes.extend_from_slice(&checksum(contents));
        bytes.extend_from_slice(contents);
        let written = fs::write(&partial, bytes).and_then(|()| fs::rename(&partial, path));
        if written.is_err() {
            let _ = fs::remove_file(&partial); // the first error is the one to report
        }
        written
    }
}

fn verified(bytes: &[u8]) -> Option<&[u8]> {
    let (header, contents) = bytes.split_at_checked(HEADER_BYTES)?;
    let sound = header[..MAGIC.len()] == *MAGIC && header[MAGIC.len()..] == checksum(contents) && !contents.is_empty();
    sound.then_some(contents)
}

fn checksum(bytes: &[u8]) -> [u8; 16] {
    let mut hash = Fnv128::new();
    hash.add(bytes);
    hash.0.to_le_bytes()
}

/// What an entry depends on, hashed: part of its name.
#[derive(Clone, Debug)]
pub(crate) struct Key(Fnv128);

impl Key {
    /// Hashes parts, in their order.
    pub(crate) fn of(parts: &[&[u8]]) -> Self {
        let mut key = Self(Fnv128::new());
        parts.iter().for_each(|part| key.add(part));
        key
    }

    /// Adds one more part; its length is hashed too, so that parts cannot run into each other.
    pub(crate) fn add(&mut self, part: &[u8]) {
        self.0.add(&(part.len() as u64).to_le_bytes());
        self.0.add(part);
    }

    /// Returns the key in hexadecimal.
    pub(crate) fn finish(&self) -> String {
        format!("{:032x}", self.0.0)
    }
}

/// FNV-1a of 128 bits: stable across Rust versions, and wide enough that names never meet by chance.
#[derive(Clone, Debug)]
struct Fnv128(u128);

impl Fnv128 {
    const fn new() -> Self {
        Self(0x6c62_272e_07bb_0142_62b8_2175_6295_c58d)
    }

    fn add(&mut self, bytes: &[u8]) {
        const PRIME: u128 = 0x0000_0000_0100_0000_0000_0000_0000_013b;
        for byte in bytes {
            self.0 = (self.0 ^ u128::from(*byte)).wrapping_mul(PRIME);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cache(name: &str) -> Cache {
        let dir = std::env::temp_dir().join(format!("bcg-cache-{name}-{}", std::process::id()));
        let _ = fs::remove_dir_all(&dir);
        Cache { dir }
    }

    #[test]
    fn an_entry_reads_back_as_written() {
        let cache = cache("round-trip");
        assert_eq!(cache.load("a.cubin"), None);
        cache.store("a.cubin", b"cubin");
        assert_eq!(cache.load("a.cubin").as_deref(), Some(&b"cubin"[..]));
        assert_eq!(fs::read_dir(&cache.dir).unwrap().count(), 1, "no partial file stays behind");
        fs::remove_dir_all(&cache.dir).unwrap();
    }

    #[test]
    fn a_damaged_entry_is_ignored() {
        let cache = cache("damaged");
        cache.store("a.cubin", b"cubin");
        let path = cache.dir.join("a.cubin");
        let mut bytes = fs::read(&path).unwrap();
        for len in 0..bytes.len() {
            fs::write(&path, &bytes[..len]).unwrap();
            assert_eq!(cache.load("a.cubin"), None, "cut to {len} bytes");
        }
        *bytes.last_mut().unwrap() ^= 1;
        fs::write(&path, &bytes).unwrap();
        assert_eq!(cache.load("a.cubin"), None, "one bit flipped");
        fs::remove_dir_all(&cache.dir).unwrap();
    }

    #[test]
    fn an_unusable_folder_costs_nothing_but_the_cache() {
        let cache = Cache { dir: PathBuf::from("/dev/null/bcg") };
        cache.store("a.cubin", b"cubin");
        assert_eq!(cache.load("a.cubin"), None);
    }

    #[test]
    fn the_parts_of_a_key_do_not_run_into_each_other() {
        assert_ne!(Key::of(&[b"ab", b"c"]).finish(), Key::of(&[b"a", b"bc"]).finish());
    }
}
