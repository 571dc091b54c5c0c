//! Control tokens in text that clients send: they stay text.
//!
//! A control token is an added token that `tokenizer.json` calls special, such as `<|im_start|>`; the token for unknown
//! text is none, since any text may need it. A text is encoded in pieces, cut so that none of them holds a whole control
//! token which the client made; the others, which a chat template wrote, stay whole.

use std::collections::{BTreeSet, HashSet};
use std::ops::Range;

use aho_corasick::AhoCorasick;

/// Longer control tokens are never put together from parts of a template.
const JOINED_CHARS_MAX: usize = 64;

/// The control tokens of a tokenizer.
#[derive(Debug, Default)]
pub(crate) struct ControlTokens {
    /// Finds them in a text; `None` if there are none.
    finder: Option<AhoCorasick>,
    /// Text and id of each.
    tokens: Vec<(String, u32)>,
    ids: HashSet<u32>,
    /// Their first and last characters.
    edges: BTreeSet<char>,
    /// Their proper beginnings and ends of at least two characters.
    beginnings: HashSet<String>,
    ends: HashSet<String>,
}

/// A control token in a text.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Occurrence {
    /// Its bytes.
    pub(crate) range: Range<usize>,
    id: u32,
}

/// A text in pieces.
#[derive(Debug)]
pub(crate) struct Pieces<'t> {
    pub(crate) texts: Vec<&'t str>,
    /// The control tokens that may come of them, in order.
    pub(crate) trusted: Vec<u32>,
}

impl ControlTokens {
    /// Takes texts and ids.
    ///
    /// # Errors
    /// A message if there are too many of them to be searched for.
    pub(crate) fn new(tokens: Vec<(String, u32)>) -> Result<Self, String> {
        if tokens.is_empty() {
            return Ok(Self::default());
        }
        let finder = AhoCorasick::new(tokens.iter().map(|(text, _)| text)).map_err(|error| error.to_string())?;
        let ids = tokens.iter().map(|&(_, id)| id).collect();
        let edges = tokens.iter().flat_map(|(text, _)| [text.chars().next(), text.chars().next_back()]);
        let edges = edges.flatten().collect();
        let (mut beginnings, mut ends) = (HashSet::new(), HashSet::new());
        for (text, _) in tokens.iter().filter(|(text, _)| text.chars().count() <= JOINED_CHARS_MAX) {
            let places: Vec<usize> = text.char_indices().map(|(at, _)| at).collect();
            beginnings.extend(places.iter().skip(2).map(|&at| text[..at].to_owned()));
            ends.extend(places.iter().rev().skip(1).filter(|&&at| at > 0).map(|&at| text[at..].to_owned()));
        }
        Ok(Self { finder: Some(finder), tokens, ids, edges, beginnings, ends })
    }

    pub(crate) fn contains(&self, id: u32) -> bool {
        self.ids.contains(&id)
    }

    /// The text of a control token.
    pub(crate) fn text(&self, id: u32) -> &str {
        self.tokens.iter().find(|(_, other)| *other == id).map_or("", |(text, _)| text)
    }

    /// First and last characters of control tokens: without one of them, a text has no part in any but their middles.
    pub(crate) fn edges(&self) -> &BTreeSet<char> {
        &self.edges
    }

    /// All of them in a text, also those that overlap.
    pub(crate) fn occurrences(&self, text: &str) -> Vec<Occurrence> {
        let Some(finder) = &self.finder else { return Vec::new() };
        let found = finder.find_overlapping_iter(text);
        found.map(|found| Occurrence { range: found.range(), id: self.tokens[found.pattern().as_usize()].1 }).collect()
    }

    /// Where in a part of a template the first and the last character of a control token stand: of one that is there as a
    /// whole, or that ends after the part, or begins before it.
    pub(crate) fn edges_in(&self, part: &str) -> BTreeSet<usize> {
        let last =
            |range: &Range<usize>| part[range.clone()].char_indices().next_back().map(|(at, _)| range.start + at);
        let found = self.occurrences(part);
        let mut places: BTreeSet<usize> = found.iter().map(|found| found.range.start).collect();
        places.extend(found.iter().filter_map(|found| last(&found.range)));
        let chars: Vec<usize> = part.char_indices().map(|(at, _)| at).chain([part.len()]).collect();
        let longest = JOINED_CHARS_MAX.min(chars.len());
        places.extend(chars.iter().rev().take(longest).rev().find(|&&at| self.beginnings.contains(&part[at..])));
        let end = chars.iter().take(longest).rev().find(|&&at| self.ends.contains(&part[..at]));
        places.extend(end.and_then(|&end| last(&(0..end))));
        places
    }

    /// Cuts a text so that control tokens which are not trusted are in no piece.
    ///
    /// # Errors
    /// The text of a token that cannot be cut, since it is one character.
    pub(crate) fn cut<'t>(
        &self,
        text: &'t str,
        is_trusted: impl Fn(&Range<usize>) -> bool,
    ) -> Result<Pieces<'t>, &str> {
        let (mut trusted, others): (Vec<_>, Vec<_>) =
            self.occurrences(text).into_iter().partition(|found| is_trusted(&found.range));
        trusted.sort_unstable_by_key(|found| (found.range.start, found.range.end));
        let starts: BTreeSet<usize> = trusted.iter().map(|found| found.range.start).collect();
        let ends: BTreeSet<usize> = trusted.iter().map(|found| found.range.end).collect();
        // The end of what the first of them cover.
        let mut covered = 0;
        let covered: Vec<usize> = trusted
            .iter()
            .map(|found| {
                covered = covered.max(found.range.end);
                covered
            })
            .collect();
        let mut cuts = BTreeSet::from([0]);
        for Occurrence { range, id } in others {
            let num_before = trusted.partition_point(|found| found.range.start <= range.start);
            if num_before > 0 && covered[num_before - 1] >= range.end {
                continue; // all of it belongs to a trusted one
            }
            let inside = range.start + 1..range.end;
            let second = text[range.clone()].char_indices().nth(1).map(|(at, _)| range.start + at);
            let at = starts.range(inside.clone()).next().or(ends.range(inside).next()).copied().or(second);
            cuts.insert(at.ok_or_else(|| self.text(id))?);
        }
        let cuts: Vec<usize> = cuts.into_iter().collect();
        let ends = cuts.iter().skip(1).copied().chain([text.len()]);
        let texts = cuts.iter().zip(ends).map(|(&start, end)| &text[start..end]).collect();
        Ok(Pieces { texts, trusted: trusted.into_iter().map(|found| found.id).collect() })
    }

    /// Returns a control token of `ids` that is not among the trusted ones, which have the same order.
    pub(crate) fn forged(&self, ids: &[u32], trusted: &[u32]) -> Option<u32> {
        let mut trusted = trusted.iter();
        ids.iter().copied().find(|&id| self.contains(id) && !trusted.any(|&expected| expected == id))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tokens(texts: &[&str]) -> ControlTokens {
        let tokens = texts.iter().zip(0..).map(|(text, id)| ((*text).to_owned(), id));
        ControlTokens::new(tokens.collect()).expect("few tokens")
    }

    /// The pieces of a text in which the tokens that begin and end at these places are trusted.
    fn cut<'t>(control: &ControlTokens, text: &'t str, trusted: &[(usize, usize)]) -> Vec<&'t str> {
        control.cut(text, |range| trusted.contains(&(range.start, range.end))).expect("it can be cut").texts
    }

    #[test]
    fn what_a_client_made_is_cut_and_nothing_else() {
        let control = tokens(&["<a>", "<b>", "a><b", "<a><b>"]);
        assert_eq!(cut(&control, "x<a>y", &[]), ["x<", "a>y"]);
        assert_eq!(cut(&control, "x<a>y<b>", &[(1, 4)]), ["x<a>y<", "b>"]);
        assert_eq!(cut(&control, "<a", &[]), ["<a"]);
        assert_eq!(cut(&control, "", &[]), [""]);
        // Overlapping ones: each is cut, but not one that is trusted.
        assert_eq!(cut(&control, "<a><b>", &[]), ["<", "a", "><", "b>"]);
        assert_eq!(cut(&control, "<a><b>", &[(0, 3)]), ["<a>", "<", "b>"]);
        assert_eq!(cut(&control, "<a><b>", &[(3, 6)]), ["<", "a>", "<b>"]);
        assert_eq!(cut(&control, "<a><b>", &[(0, 3), (3, 6)]), ["<a>", "<b>"]);
        assert_eq!(cut(&control, "<a><b>", &[(0, 6)]), ["<a><b>"]);
    }

    #[test]
    fn one_character_cannot_be_cut() {
        let control = tokens(&["§", "<é>"]);
        assert_eq!(control.cut("a§", |_| false).expect_err("one character"), "§");
        assert_eq!(cut(&control, "é<é>é", &[]), ["é<", "é>é"]);
    }

    #[test]
    fn edges_of_whole_tokens_and_of_parts_are_found() {
        let control = tokens(&["<|im|>", "[é]"]);
        let places = |part| control.edges_in(part).into_iter().collect::<Vec<_>>();
        assert_eq!(places("a<|im|>\n[é]"), [1, 6, 8, 11]);
        assert_eq!(places("x<|"), [1]);
        assert_eq!(places("|>x"), [1]);
        assert_eq!(places("m|>"), [2]);
        assert_eq!(places("a < b > c <"), Vec::<usize>::new());
    }

    #[test]
    fn a_control_token_too_many_is_found() {
        let control = tokens(&["<a>", "<b>"]);
        assert_eq!(control.forged(&[7, 0, 7, 1], &[0, 1]), None);
        assert_eq!(control.forged(&[7, 1], &[0, 1]), None, "a tokenizer may leave one out");
        assert_eq!(control.forged(&[1, 0], &[0, 1]), Some(0));
        assert_eq!(control.forged(&[0, 0], &[0]), Some(0));
    }
}
