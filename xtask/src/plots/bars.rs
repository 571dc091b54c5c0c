//! Horizontal bars in groups: one's own figure and a peer's.

use super::svg::{Anchor, COLOURS, Svg};

const WIDTH: f64 = 880.0;
const LEFT: f64 = 300.0;
const RIGHT: f64 = 60.0;
const TOP: f64 = 96.0;
const BAR: f64 = 9.0;
const ROW: f64 = 25.0;

/// One op at one shape, in percent.
pub(super) struct Bar {
    pub(super) group: String,
    pub(super) label: String,
    pub(super) own: f64,
    pub(super) peer: Option<f64>,
}

/// Returns the picture; groups keep the order in which they first appear.
pub(super) fn draw(title: &str, subtitle: &str, bars: &[Bar]) -> String {
    let mut groups: Vec<&str> = Vec::new();
    for bar in bars {
        if !groups.contains(&bar.group.as_str()) {
            groups.push(&bar.group);
        }
    }
    let height = TOP + ROW * bars.len() as f64 + 40.0;
    let mut svg = Svg::new(WIDTH, height, title, subtitle);
    // A peer may be above the ceiling where a cache helps it.
    let most = bars.iter().flat_map(|bar| [Some(bar.own), bar.peer]).flatten().fold(100.0, f64::max).min(130.0);
    let at = |percent: f64| LEFT + percent.min(most) / most * (WIDTH - LEFT - RIGHT);
    for tick in [0.0, 20.0, 40.0, 60.0, 80.0, 100.0] {
        svg.rule([at(tick), TOP - 6.0], [at(tick), height - 30.0]);
        svg.text([at(tick), height - 14.0], Anchor::Middle, &format!("{tick} %"));
    }
    for (index, (name, colour)) in [("bcg", COLOURS[0]), ("PyTorch", COLOURS[2])].into_iter().enumerate() {
        let x = LEFT + 90.0 * index as f64;
        svg.bar("legend", [x, 62.0], [14.0, 10.0], colour);
        svg.text([x + 20.0, 71.0], Anchor::Start, name);
    }
    let mut y = TOP;
    for group in groups {
        svg.text([16.0, y + 13.0], Anchor::Start, group);
        svg.rule([16.0, y - 3.0], [WIDTH - RIGHT, y - 3.0]);
        for bar in bars.iter().filter(|bar| bar.group == group) {
            svg.text([LEFT - 8.0, y + 13.0], Anchor::End, &bar.label);
            svg.bar("own", [LEFT, y], [at(bar.own) - LEFT, BAR], COLOURS[0]);
            svg.text([at(bar.own) + 4.0, y + 9.0], Anchor::Start, &format!("{:.0}", bar.own));
            if let Some(peer) = bar.peer {
                svg.bar("peer", [LEFT, y + BAR + 1.0], [at(peer) - LEFT, BAR], COLOURS[2]);
                svg.text([at(peer) + 4.0, y + BAR + 10.0], Anchor::Start, &format!("{peer:.0}"));
            }
            y += ROW;
        }
    }
    svg.finish()
}
