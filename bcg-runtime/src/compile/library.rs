//! Finds the libraries of CUDA that are loaded at run time.
//!
//! A library is looked for in the loader's path, then in CUDA's folders; a variable may name it instead. Nothing here
//! keeps a library open: who opens one decides how long it stays.

use std::path::PathBuf;

use libloading::Library;

/// Returns the names and paths to try for a library, in order; the environment's `variable`, if set, is the only one.
pub(crate) fn library_candidates(variable: &str, names: &[&str]) -> Vec<PathBuf> {
    if let Some(path) = std::env::var_os(variable) {
        return vec![path.into()];
    }
    let mut paths: Vec<PathBuf> = names.iter().map(PathBuf::from).collect();
    for root in super::cuda_roots() {
        paths.extend(
            ["lib64", "lib"]
                .iter()
                .flat_map(|dir| names.iter().map(move |name| PathBuf::from(dir).join(name)))
                .map(|path| root.join(path)),
        );
    }
    paths
}

/// Opens the first of `candidates` that can be loaded, and returns it with its path.
///
/// # Errors
/// What was looked for, and why files that exist cannot be loaded.
///
/// # Safety
/// Loading runs a library's initialisers: the candidates are libraries of CUDA, or named as such by the user.
pub(crate) unsafe fn open_library(candidates: &[PathBuf]) -> Result<(Library, PathBuf), String> {
    let mut errors = Vec::new();
    for path in candidates {
        // SAFETY: the initialisers of CUDA's libraries have no precondition; by this function's contract, it is one.
        match unsafe { Library::new(path) } {
            Ok(library) => return Ok((library, path.clone())),
            Err(error) if path.is_absolute() && path.exists() => {
                errors.push(format!("; {}: {}", path.display(), reason(&error)));
            }
            Err(_) => {}
        }
    }
    let names: Vec<String> = candidates.iter().map(|path| path.display().to_string()).collect();
    Err(format!("looked for {}{}", names.join(", "), errors.concat()))
}

/// The loader's own words, which the error keeps as its source.
fn reason(error: &libloading::Error) -> String {
    std::error::Error::source(error).map_or_else(|| error.to_string(), ToString::to_string)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_library_is_an_error_that_names_all_that_was_tried() {
        let candidates = ["libnowhere.so.1", "/nowhere/libnowhere.so"].map(PathBuf::from);
        // SAFETY: there are no such libraries, so no initialiser runs.
        let error = unsafe { open_library(&candidates) }.expect_err("no such library");
        assert_eq!(error, "looked for libnowhere.so.1, /nowhere/libnowhere.so");
    }

    #[test]
    fn a_file_that_is_no_library_is_an_error_that_says_so() {
        let path = std::env::temp_dir().join(format!("bcg-library-{}", std::process::id()));
        std::fs::write(&path, "text").unwrap();
        // SAFETY: text is no library, so no initialiser runs.
        let error = unsafe { open_library(std::slice::from_ref(&path)) }.expect_err("not a library");
        std::fs::remove_file(&path).unwrap();
        let (_, why) = error.split_once("; ").expect("a reason");
        assert!(why.contains("file too short") || why.contains("invalid ELF header"), "{error}");
    }
}
