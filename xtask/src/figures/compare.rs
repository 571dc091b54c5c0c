//! What moved from the accepted run to a new one.
//!
//! The rule. A figure's *cost* is its median, or 1 / median of a rate, so that more is always slower. Of a row that
//! both runs have, `ratio` is the new cost divided by the accepted one. Machines differ, so the same ratio is taken of
//! each ceiling that the row follows (copy and product for the device, bare driver calls for the host). The row may
//! have moved as any of these did, or not at all, which gives a band from `low` to `high` around 1. Rounds scatter, so
//! the band is widened by `noise`: half the spread from p10 to p90 as a part of the median, of the row in both runs
//! together, plus the same of the ceiling that is the edge of the band, and at least [`NOISE_MIN`].
//!
//! - slower: `ratio > high * (1 + noise)`
//! - faster: `ratio < low / (1 + noise)`
//! - not moved: anything between.
//!
//! A slower machine is therefore no regression, and neither is a faster machine on which a row stays as it was. What is
//! missed: a row that got slower by less than the noise, or by less than its machine got slower.

use std::fmt::Write;

use super::{Figure, Figures};

/// Two runs of one commit differ by as much although their own rounds do not.
const NOISE_MIN: f64 = 0.03;

/// What happened to a row.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Move {
    /// Costs this many times as much, beyond what machine and noise explain.
    Slower { name: String, ratio: f64, explained: f64 },
    /// Costs this part of it, beyond what machine and noise explain.
    Faster { name: String, ratio: f64, explained: f64 },
    /// Only the new run has it.
    New { name: String },
    /// Only the accepted run has it.
    Missing { name: String },
}

impl Move {
    pub(super) fn is_slower(&self) -> bool {
        matches!(self, Self::Slower { .. })
    }
}

/// Returns the rows that moved, in the order of the accepted run, and then those that are new.
pub(super) fn moves(accepted: &Figures, new: &Figures) -> Vec<Move> {
    let mut moves = Vec::new();
    for old_row in &accepted.rows {
        match Figures::find(&new.rows, &old_row.name) {
            Some(new_row) => moves.extend(moved(accepted, new, old_row, new_row)),
            None => moves.push(Move::Missing { name: old_row.name.clone() }),
        }
    }
    let is_new = |row: &&Figure| Figures::find(&accepted.rows, &row.name).is_none();
    moves.extend(new.rows.iter().filter(is_new).map(|row| Move::New { name: row.name.clone() }));
    moves
}

fn moved(accepted: &Figures, new: &Figures, old_row: &Figure, new_row: &Figure) -> Option<Move> {
    let name = old_row.name.clone();
    let ratio = ratio(old_row, new_row);
    let (mut low, mut high) = ((1.0, 0.0), (1.0, 0.0));
    for ceiling in &new_row.follows {
        let pair = (Figures::find(&accepted.ceilings, ceiling), Figures::find(&new.ceilings, ceiling));
        let (Some(old), Some(new)) = pair else { continue };
        let edge = (self::ratio(old, new), old.noise() + new.noise());
        if edge.0 < low.0 {
            low = edge;
        }
        if edge.0 > high.0 {
            high = edge;
        }
    }
    let widened = |edge_noise: f64| 1.0 + (old_row.noise() + new_row.noise() + edge_noise).max(NOISE_MIN);
    let (low, high) = (low.0 / widened(low.1), high.0 * widened(high.1));
    if ratio > high {
        return Some(Move::Slower { name, ratio, explained: high });
    }
    (ratio < low).then_some(Move::Faster { name, ratio, explained: low })
}

/// The new cost by the old one.
fn ratio(old: &Figure, new: &Figure) -> f64 {
    if old.is_rate() { old.median / new.median } else { new.median / old.median }
}

/// Returns both runs' ceilings and what moved, as text.
pub(super) fn text(accepted: &Figures, new: &Figures, moves: &[Move]) -> String {
    let mut text = format!("new       {}\naccepted  {}\n", new.provenance(), accepted.provenance());
    let median = |list: &[Figure], name: &str| Figures::find(list, name).map_or("-".to_owned(), Figure::text);
    for Figure { name, .. } in &new.ceilings {
        let (old, new) = (median(&accepted.ceilings, name), median(&new.ceilings, name));
        let _ = writeln!(text, "ceiling   {name}: {old} -> {new}");
    }
    for change in moves {
        let (word, name, times) = match change {
            Move::Slower { name, ratio, explained } => {
                ("SLOWER", name, format!(", {ratio:.2} times the cost; machine and noise explain up to {explained:.2}"))
            }
            Move::Faster { name, ratio, explained } => (
                "faster",
                name,
                format!(", {ratio:.2} times the cost; machine and noise explain down to {explained:.2}"),
            ),
            Move::New { name } => ("new", name, String::new()),
            Move::Missing { name } => ("missing", name, String::new()),
        };
        let (old, new) = (median(&accepted.rows, name), median(&new.rows, name));
        let _ = writeln!(text, "{word:<9} {name}: {old} -> {new}{times}");
    }
    let compared = accepted.rows.iter().filter(|row| Figures::find(&new.rows, &row.name).is_some()).count();
    let moved = moves.iter().filter(|change| matches!(change, Move::Slower { .. } | Move::Faster { .. })).count();
    let _ = writeln!(text, "{moved} of the {compared} figures that both runs have moved beyond the noise");
    text
}

#[cfg(test)]
mod tests {
    use super::super::tests::figures;
    use super::*;

    fn scale(figure: &mut Figure, cost: f64) {
        let factor = if figure.is_rate() { 1.0 / cost } else { cost };
        for number in [&mut figure.median, &mut figure.p10, &mut figure.p90] {
            *number *= factor;
        }
    }

    #[test]
    fn nothing_moves_within_one_run() {
        assert_eq!(moves(&figures(), &figures()), []);
    }

    #[test]
    fn a_row_that_costs_twice_as_much_is_slower_and_one_that_costs_half_is_faster() {
        for index in 0..3 {
            let mut new = figures();
            scale(&mut new.rows[index], 2.0);
            let [Move::Slower { name, ratio, .. }] = &moves(&figures(), &new)[..] else { panic!("one row is slower") };
            assert_eq!((name, format!("{ratio:.3}").as_str()), (&new.rows[index].name, "2.000"));
            let [Move::Faster { name, .. }] = &moves(&new, &figures())[..] else { panic!("one row is faster") };
            assert_eq!(name, &new.rows[index].name);
        }
    }

    #[test]
    fn a_machine_that_is_slower_in_everything_moves_nothing() {
        for cost in [1.4, 0.7] {
            let mut new = figures();
            new.rows.iter_mut().chain(&mut new.ceilings).for_each(|figure| scale(figure, cost));
            assert_eq!(moves(&figures(), &new), []);
        }
    }

    #[test]
    fn a_row_is_not_excused_by_a_ceiling_that_it_does_not_follow() {
        let mut new = figures();
        scale(&mut new.ceilings[0], 1.4); // copy
        scale(&mut new.rows[0], 1.4); // follows copy
        scale(&mut new.rows[1], 1.4); // follows the driver calls alone
        let [Move::Slower { name, .. }] = &moves(&figures(), &new)[..] else { panic!("one row is slower") };
        assert_eq!(name, "healed/qwen3-8b/256");
    }

    #[test]
    fn a_move_counts_only_beyond_the_scatter_of_both_runs() {
        let mut new = figures();
        scale(&mut new.rows[0], 1.06);
        assert_eq!(moves(&figures(), &new).len(), 1, "6 % of rows that scatter by 1 % each");
        new.rows[0].p90 = new.rows[0].median * 1.2;
        assert_eq!(moves(&figures(), &new), [], "6 % of a row that scatters by 10 %");
        let mut close = figures();
        scale(&mut close.rows[0], 1.025);
        assert_eq!(moves(&figures(), &close), [], "2.5 % is below the least noise");
    }

    #[test]
    fn rows_of_one_run_alone_are_listed_and_are_no_regression() {
        let mut new = figures();
        new.rows[0].name = "prefill/qwen3-8b/512".to_owned();
        let moves = moves(&figures(), &new);
        let (missing, added) = ("prefill/qwen3-8b/256".to_owned(), "prefill/qwen3-8b/512".to_owned());
        assert_eq!(moves, [Move::Missing { name: missing }, Move::New { name: added }]);
        assert!(!moves.iter().any(Move::is_slower));
        let text = text(&figures(), &new, &moves);
        assert!(text.contains("missing   prefill/qwen3-8b/256: 7.66 ms -> -\n"), "{text}");
        assert!(text.contains("ceiling   copy: 4,256 GB/s -> 4,256 GB/s\n"), "{text}");
    }
}
