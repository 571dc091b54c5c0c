//! Stop strings: text is held back until no stop string can begin in it.
//!
//! [`StopStrings`] are prepared once for a request; each of its answers has a [`StopWatch`].
//!
//! Invariants:
//! - nothing that was emitted is part of a stop string, however the text was cut into tokens;
//! - a byte of text costs the same on average, whatever is held back and however long the stop strings are.
//!
//! For each stop string a watch knows how many of its bytes the text ends with (Knuth, Morris and Pratt). What is held back
//! is therefore the beginning of a stop string, and needs no buffer of its own. The crate `aho-corasick` does not tell how
//! far a match has come, which is what must be held back.

use std::sync::Arc;

/// The most stop strings of one request, as in the OpenAI API.
pub const STOP_STRINGS_MAX: usize = 4;

/// Bytes of one stop string at most.
pub const STOP_BYTES_MAX: usize = 1 << 10;

/// The stop strings of one request; copies share them.
#[derive(Debug, Clone, Default)]
pub struct StopStrings(Arc<[StopString]>);

#[derive(Debug)]
struct StopString {
    text: String,
    /// `borders[i]`: bytes of the longest proper beginning of `text[..=i]` that is also its end.
    borders: Vec<usize>,
}

impl StopStrings {
    /// Prepares `stops`; empty strings are ignored.
    ///
    /// # Errors
    /// What the client should know: more strings than [`STOP_STRINGS_MAX`], or one longer than [`STOP_BYTES_MAX`].
    pub fn new(stops: &[String]) -> Result<Self, String> {
        if stops.len() > STOP_STRINGS_MAX {
            return Err(format!("A request may have {STOP_STRINGS_MAX} stop strings; this one has {}.", stops.len()));
        }
        if let Some(long) = stops.iter().find(|stop| stop.len() > STOP_BYTES_MAX) {
            let bytes = long.len();
            return Err(format!("A stop string may have {STOP_BYTES_MAX} bytes; one has {bytes}. Give a shorter one."));
        }
        Ok(Self(stops.iter().filter(|stop| !stop.is_empty()).map(|stop| StopString::new(stop)).collect()))
    }
}

impl StopString {
    fn new(text: &str) -> Self {
        let mut stop = Self { text: text.to_owned(), borders: Vec::with_capacity(text.len()) };
        let mut matched = 0;
        for (at, &byte) in text.as_bytes().iter().enumerate() {
            if at > 0 {
                matched = stop.step(matched, byte);
            }
            stop.borders.push(matched);
        }
        stop
    }

    /// Returns how many bytes of the string a text ends with after one more byte, if it ended with `matched` before.
    ///
    /// Each turn of the loop gives up matched bytes, and a step adds one at most: so the loop turns at most once a byte on
    /// average.
    fn step(&self, mut matched: usize, byte: u8) -> usize {
        let text = self.text.as_bytes();
        while matched > 0 && text.get(matched) != Some(&byte) {
            matched = self.borders[matched - 1];
        }
        matched + usize::from(text[matched] == byte)
    }
}

/// Watches one answer's text for its stop strings.
#[derive(Debug, Clone, Default)]
pub struct StopWatch {
    stops: StopStrings,
    /// Bytes of each stop string that the text ends with.
    matched: [usize; STOP_STRINGS_MAX],
    is_stopped: bool,
}

impl StopWatch {
    /// Watches for `stops`.
    pub fn new(stops: StopStrings) -> Self {
        Self { stops, ..Self::default() }
    }

    /// Takes the next piece of text and returns what may be shown now.
    ///
    /// The stop string that begins first ends the text. After it was found ([`StopWatch::is_stopped`]) everything before
    /// it has been returned and everything later is dropped.
    pub fn push(&mut self, text: &str) -> String {
        if self.is_stopped {
            return String::new();
        }
        let (stops, before) = (self.stops.clone(), self.held());
        let held = &stops.0.get(before.0).map_or("", |stop| &stop.text)[..before.1];
        let mut begin: Option<usize> = None;
        for (stop, matched) in stops.0.iter().zip(&mut self.matched) {
            for (at, &byte) in text.as_bytes().iter().enumerate() {
                *matched = stop.step(*matched, byte);
                if *matched == stop.text.len() {
                    let found = held.len() + at + 1 - *matched;
                    begin = Some(begin.map_or(found, |begin| begin.min(found)));
                    break; // later ones begin later
                }
            }
        }
        self.is_stopped = begin.is_some();
        let shown = begin.unwrap_or_else(|| held.len() + text.len() - self.held().1);
        let (old, new) = (shown.min(held.len()), shown.saturating_sub(held.len()));
        [&held[..old], &text[..new]].concat()
    }

    /// Returns what was held back, once the answer ended for another reason.
    pub fn finish(&mut self) -> String {
        if self.is_stopped {
            return String::new();
        }
        let (stop, bytes) = self.held();
        self.matched = [0; STOP_STRINGS_MAX];
        self.stops.0.get(stop).map_or_else(String::new, |stop| stop.text[..bytes].to_owned())
    }

    /// Whether a stop string was found.
    pub fn is_stopped(&self) -> bool {
        self.is_stopped
    }

    /// What is held back: the first bytes of which stop string. Text ends at a character, so they do as well.
    fn held(&self) -> (usize, usize) {
        let longest = self.matched.iter().enumerate().max_by_key(|(_, matched)| **matched);
        longest.map_or((0, 0), |(stop, &matched)| (stop, matched))
    }
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use rand::rngs::SmallRng;
    use rand::{Rng, SeedableRng};

    use super::*;

    fn watch(stops: &[&str]) -> StopWatch {
        let stops: Vec<String> = stops.iter().map(|&stop| stop.to_owned()).collect();
        StopWatch::new(StopStrings::new(&stops).expect("short stop strings"))
    }

    fn run(stops: &[&str], pieces: &[&str]) -> (String, bool) {
        let mut watch = watch(stops);
        let mut out = String::new();
        for piece in pieces {
            out += &watch.push(piece);
            for stop in stops {
                for (at, _) in stop.char_indices().filter(|&(at, _)| at > 0) {
                    let cut = out.ends_with(&stop[..at]);
                    assert!(!cut || watch.held().1 > 0 || watch.is_stopped, "{out:?} ends in a part of {stop:?}");
                }
            }
        }
        out += &watch.finish();
        (out, watch.is_stopped())
    }

    #[test]
    fn text_without_stops_passes_at_once() {
        let mut watch = watch(&[]);
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
        let mut watch = watch(&["\n\n"]);
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
        let mut watch = watch(&["!"]);
        assert_eq!(watch.push("a!b"), "a");
        assert_eq!(watch.push("c"), "");
        assert_eq!(watch.finish(), "");
    }

    /// What a watch must do, written down as plainly as possible.
    #[derive(Default)]
    struct Plain {
        stops: Vec<String>,
        held: String,
        stopped: bool,
    }

    impl Plain {
        fn push(&mut self, text: &str) -> String {
            if self.stopped {
                return String::new();
            }
            self.held.push_str(text);
            if let Some(at) = self.stops.iter().filter_map(|stop| self.held.find(stop.as_str())).min() {
                self.stopped = true;
                self.held.truncate(at);
                return std::mem::take(&mut self.held);
            }
            let begins = |stop: &String| {
                stop.char_indices().map(|(at, _)| at).filter(|&at| self.held.ends_with(&stop[..at])).max().unwrap_or(0)
            };
            let keep = self.stops.iter().map(begins).max().unwrap_or(0);
            let rest = self.held.split_off(self.held.len() - keep);
            std::mem::replace(&mut self.held, rest)
        }
    }

    #[test]
    fn random_texts_are_shown_as_the_plain_search_shows_them() {
        let mut random = SmallRng::seed_from_u64(7);
        let mut string =
            |len: usize| -> String { (0..len).map(|_| ['a', 'b', 'é'][random.random_range(0..3)]).collect() };
        let mut cuts = SmallRng::seed_from_u64(8);
        let mut found = 0;
        for round in 0..20_000 {
            let stops: Vec<String> = (0..round % 5).map(|_| string(cuts.random_range(1..8))).collect();
            let mut plain = Plain { stops: stops.clone(), ..Plain::default() };
            let mut watch = StopWatch::new(StopStrings::new(&stops).expect("short stop strings"));
            for _ in 0..12 {
                let piece = string(cuts.random_range(0..6));
                assert_eq!(watch.push(&piece), plain.push(&piece), "{stops:?}");
                assert_eq!(watch.is_stopped(), plain.stopped, "{stops:?}");
            }
            let rest = if plain.stopped { String::new() } else { plain.held };
            assert_eq!(watch.finish(), rest, "{stops:?}");
            found += usize::from(plain.stopped);
        }
        assert!((2_000..18_000).contains(&found), "{found} of 20000 texts had a stop string");
    }

    #[test]
    fn long_stop_strings_that_nearly_match_cost_no_more_than_short_ones() {
        let a = "a".repeat(STOP_BYTES_MAX - 1);
        let stops: Vec<String> = ["b", "c", "d", "e"].iter().map(|end| a.clone() + end).collect();
        let mut watch = StopWatch::new(StopStrings::new(&stops).expect("as long as allowed"));
        let began = Instant::now();
        let shown: usize = (0..100_000).map(|_| watch.push("a").len()).sum();
        assert_eq!(shown, 100_000 - (STOP_BYTES_MAX - 1));
        // A search from the start takes minutes.
        assert!(began.elapsed() < Duration::from_secs(5), "{:?}", began.elapsed());
    }

    #[test]
    fn too_many_and_too_long_stop_strings_are_refused() {
        let error = StopStrings::new(&vec!["a".to_owned(); STOP_STRINGS_MAX + 1]).expect_err("too many");
        assert!(error.contains("4 stop strings; this one has 5"), "{error}");
        let error = StopStrings::new(&["a".repeat(STOP_BYTES_MAX + 1)]).expect_err("too long");
        assert!(error.contains("1024 bytes; one has 1025"), "{error}");
    }
}
