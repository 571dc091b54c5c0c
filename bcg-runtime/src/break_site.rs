//! Where a break stands in the source.

use std::fmt;

/// The place of an annotated function; shown as ``break `name` (file:line)``.
#[derive(Debug)]
pub struct BreakSite {
    /// The function's name.
    pub name: &'static str,
    /// The file that the function is in.
    pub file: &'static str,
    /// The line of the function.
    pub line: u32,
    /// The body waits for other ranks, which come to it together.
    pub is_rank_coupled: bool,
}

impl fmt::Display for BreakSite {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "break `{}` ({}:{})", self.name, self.file, self.line)
    }
}
