//! Stop strings: text is held back until no stop string can begin in it.
//!
//! Invariant: nothing that was emitted is part of a stop string, however the text was cut into tokens.

/// The most stop strings of one request, as in the OpenAI API.
pub const STOP_STRINGS_MAX: usize = 4;

/// Watches one sequence's text for its stop strings.
#[derive(Debug, Clone, Default)]
pub struct StopWatch {
    stops: Vec<String>,
    held: String,
    stopped: bool,
}

impl StopWatch {
    /// Watches for `stops`; empty strings are ignored.
    pub fn new(stops: &[String]) -> Self {
        let stops = stops.iter().filter(|stop| !stop.is_empty()).cloned().collect();
        Self { stops, held: String::new(), stopped: false }
    }

    /// Takes the next piece of text and returns what may be shown now.
    ///
    /// After a stop string was found ([`StopWatch::is_stopped`]) everything before it has been returned
    /// and everything later is dropped.
    pub fn push(&mut self, text: &str) -> String {
        if self.stopped {
            return String::new();
        }
        self.held.push_str(text);
        let first = self.stops.iter().filter_map(|stop| self.held.find(stop.as_str())).min();
        if let Some(at) = first {
            self.stopped = true;
            self.held.truncate(at);
            return std::mem::take(&mut self.held);
        }
        let keep = self.stops.iter().map(|stop| overlap(&self.held, stop)).max().unwrap_or(0);
        let rest = self.held.split_off(self.held.len() - keep);
        std::mem::replace(&mut self.held, rest)
    }

    /// Returns what was held back, once the sequence ended for another reason.
    pub fn finish(&mut self) -> String {
        std::mem::take(&mut self.held)
    }

    /// Whether a stop string was found.
    pub fn is_stopped(&self) -> bool {
        self.stopped
    }
}

/// Bytes at the end of `text` that are a proper beginning of `stop`.
fn overlap(text: &str, stop: &str) -> usize {
    stop.char_indices().map(|(at, _)| at).filter(|&at| at > 0 && text.ends_with(&stop[..at])).max().unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(stops: &[&str], pieces: &[&str]) -> (String, bool) {
        let stops: Vec<String> = stops.iter().map(|&stop| stop.to_owned()).collect();
        let mut watch = StopWatch::new(&stops);
        let mut out = String::new();
        for piece in pieces {
            out += &watch.push(piece);
            for stop in &stops {
                for (at, _) in stop.char_indices().filter(|&(at, _)| at > 0) {
                    let cut = out.ends_with(&stop[..at]);
                    assert!(!cut || !watch.held.is_empty() || watch.stopped, "{out:?} ends in a part of {stop:?}");
                }
            }
        }
        out += &watch.finish();
        (out, watch.is_stopped())
    }

    #[test]
    fn text_without_stops_passes_at_once() {
        let mut watch = StopWatch::new(&[]);
        assert_eq!(watch.push("abc"), "abc");
        assert_eq!(watch.finish(), "");
    }

    #[test]
    fn no_part_of_a_stop_string_is_emitted_however_it_is_cut() {
        let text = "one two END three";
        for a in 0..=text.len() {
            for b in a..=text.len() {
                let (out, stopped) = run(&["END"], &[&text[..a], &text[a..b], &text[b..]]);
                assert_eq!((out.as_str(), stopped), ("one two ", true), "cut at {a} and {b}");
            }
        }
    }

    #[test]
    fn a_false_start_is_given_back() {
        let mut watch = StopWatch::new(&["\n\n".to_owned()]);
        assert_eq!(watch.push("a\n"), "a");
        assert_eq!(watch.push("b\n"), "\nb");
        assert_eq!(watch.finish(), "\n");
        assert!(!watch.is_stopped());
    }

    #[test]
    fn the_earliest_stop_string_wins() {
        assert_eq!(run(&["cd", "b"], &["abcd"]), ("a".to_owned(), true));
    }

    #[test]
    fn stops_of_several_bytes_are_cut_at_characters() {
        assert_eq!(run(&["→é"], &["x→", "y→", "é!"]), ("x→y".to_owned(), true));
    }

    #[test]
    fn text_after_a_stop_is_dropped() {
        let mut watch = StopWatch::new(&["!".to_owned()]);
        assert_eq!(watch.push("a!b"), "a");
        assert_eq!(watch.push("c"), "");
        assert_eq!(watch.finish(), "");
    }
}
