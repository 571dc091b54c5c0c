//! What is worth keeping between processes, on disk: cubins, and the runtime's choices of algorithms.
//!
//! - An entry is complete or absent: it is written beside its place and renamed.
//! - An entry carries a checksum; a damaged one is ignored with a warning and written again.
//! - What is loaded runs on the GPU, so whoever can write here can run code. A folder or an entry that belongs to another
//!   user than this process's or root, or that others may write to, is not used.
//! - Nothing here is an error: without a usable folder everything is made again, once per process.

use std::fs;
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Once;
use std::sync::atomic::{AtomicU64, Ordering};

const MAGIC: &[u8; 8] = b"BCGCUB01";
const HEADER_BYTES: usize = MAGIC.len() + 16;
/// The size of the largest file that is read.
const FILE_BYTES_MAX: u64 = 256 << 20;

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

    /// Returns an entry, or `None` if it is absent, damaged, or could have been written by another user.
    pub(crate) fn load(&self, entry: &str) -> Option<Vec<u8>> {
        let path = self.dir.join(entry);
        let bytes = match self.is_trusted().and_then(|is_trusted| is_trusted.then(|| read(&path)).transpose()) {
            Ok(Some(bytes)) => bytes,
            Ok(None) => return None,
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
        fs::DirBuilder::new().recursive(true).mode(0o700).create(&self.dir)?;
        if !self.is_trusted()? {
            return Ok(());
        }
        let unique = WRITES.fetch_add(1, Ordering::Relaxed);
        let partial = path.with_extension(format!("partial-{}-{unique}", std::process::id()));
        let mut bytes = Vec::with_capacity(HEADER_BYTES + contents.len());
        bytes.extend_from_slice(MAGIC);
        bytes.extend_from_slice(&checksum(contents));
        bytes.extend_from_slice(contents);
        let file = fs::OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&partial);
        let written = file.and_then(|mut file| file.write_all(&bytes)).and_then(|()| fs::rename(&partial, path));
        if written.is_err() {
            let _ = fs::remove_file(&partial); // the first error is the one to report
        }
        written
    }

    /// Tells whether only this user and root can write to the folder; says once in a process that it is not so.
    fn is_trusted(&self) -> io::Result<bool> {
        static WARNED: Once = Once::new();
        let Some(reason) = distrust(&fs::metadata(&self.dir)?) else { return Ok(true) };
        WARNED.call_once(|| {
            tracing::warn!(
                folder = %self.dir.display(),
                reason,
                "the cache folder is not used, since what others write there would run on the GPU, so kernels are compiled \
                 at each start: give the folder to this user and `chmod 700` it, or name another one in BCG_CACHE_DIR"
            );
        });
        Ok(false)
    }
}

/// Reads a regular file that only this user or root can have written.
fn read(path: &Path) -> io::Result<Vec<u8>> {
    let metadata = fs::symlink_metadata(path)?;
    if !metadata.is_file() {
        return Err(io::Error::other("it is no regular file; remove it"));
    }
    if let Some(reason) = distrust(&metadata) {
        return Err(io::Error::other(format!("it {reason}; remove it")));
    }
    let mut bytes = Vec::new();
    fs::File::open(path)?.take(FILE_BYTES_MAX).read_to_end(&mut bytes)?;
    Ok(bytes)
}

/// Returns why a file or folder may hold what another user wrote, if it may.
fn distrust(metadata: &fs::Metadata) -> Option<String> {
    let user = rustix::process::geteuid().as_raw();
    reason(metadata.uid(), metadata.mode(), user)
}

fn reason(owner: u32, mode: u32, user: u32) -> Option<String> {
    if owner != user && owner != 0 {
        return Some(format!("belongs to user {owner}, and this process runs as user {user}"));
    }
    (mode & 0o022 != 0).then(|| format!("can be written by others (mode {:o})", mode & 0o7777))
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
    use std::os::unix::fs::PermissionsExt;

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

    fn chmod(path: &Path, mode: u32) {
        fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
    }

    fn mode(path: &Path) -> u32 {
        fs::metadata(path).unwrap().mode() & 0o7777
    }

    #[test]
    fn a_folder_that_others_can_write_to_is_neither_read_nor_written() {
        let cache = cache("writable");
        cache.store("a.cubin", b"cubin");
        assert_eq!((mode(&cache.dir), mode(&cache.dir.join("a.cubin"))), (0o700, 0o600), "as it is made");
        for (allowed, is_used) in [(0o777, false), (0o770, false), (0o702, false), (0o1777, false), (0o755, true)] {
            chmod(&cache.dir, allowed);
            assert_eq!(cache.load("a.cubin").is_some(), is_used, "mode {allowed:o}");
            cache.store("b.cubin", b"cubin");
            assert_eq!(cache.dir.join("b.cubin").exists(), is_used, "mode {allowed:o}");
        }
        fs::remove_dir_all(&cache.dir).unwrap();
    }

    #[test]
    fn only_what_this_user_or_root_alone_can_write_is_trusted() {
        assert_eq!(
            [(1000, 0o700), (0, 0o755), (1000, 0o040_555)].map(|(owner, mode)| reason(owner, mode, 1000)),
            [None, None, None]
        );
        let foreign = reason(1001, 0o700, 1000).unwrap();
        assert_eq!(foreign, "belongs to user 1001, and this process runs as user 1000");
        assert!(reason(1000, 0o700, 0).is_some(), "root does not run what a user wrote");
        assert_eq!(reason(1000, 0o041_777, 1000).unwrap(), "can be written by others (mode 1777)");
    }

    #[test]
    fn only_regular_files_that_others_cannot_write_are_entries() {
        let cache = cache("entries");
        cache.store("a.cubin", b"cubin");
        let path = |entry: &str| cache.dir.join(entry);
        std::os::unix::fs::symlink(path("a.cubin"), path("link.cubin")).unwrap();
        fs::create_dir(path("folder.cubin")).unwrap();
        assert!(std::process::Command::new("mkfifo").arg(path("pipe.cubin")).status().unwrap().success());
        for entry in ["link.cubin", "folder.cubin", "pipe.cubin"] {
            assert_eq!(cache.load(entry), None, "{entry}");
        }
        chmod(&path("a.cubin"), 0o666);
        assert_eq!(cache.load("a.cubin"), None, "others can write it");
        cache.store("a.cubin", b"cubin");
        assert_eq!(cache.load("a.cubin").as_deref(), Some(&b"cubin"[..]), "it is made again in its place");
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
