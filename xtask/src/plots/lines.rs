//! Lines and dots on two logarithmic axes.

use super::svg::{Anchor, COLOURS, Svg};

const WIDTH: f64 = 880.0;
const HEIGHT: f64 = 520.0;
const LEFT: f64 = 70.0;
const RIGHT: f64 = 200.0;
const TOP: f64 = 60.0;
const BOTTOM: f64 = 60.0;

/// Points of one contestant.
pub(super) struct Series {
    name: &'static str,
    points: Vec<(f64, f64)>,
    is_dots: bool,
}

impl Series {
    /// Joined points: measured here.
    pub(super) fn line(name: &'static str, points: Vec<(f64, f64)>) -> Self {
        Self { name, points, is_dots: false }
    }

    /// Single rings: figures of somebody else.
    pub(super) fn dots(name: &'static str, points: Vec<(f64, f64)>) -> Self {
        Self { name, points, is_dots: true }
    }
}

/// A chart; series without points are left out.
pub(super) struct LineChart {
    pub(super) title: String,
    pub(super) subtitle: String,
    pub(super) x: &'static str,
    pub(super) y: &'static str,
    pub(super) series: Vec<Series>,
}

/// A logarithmic axis between two pixels.
struct Axis {
    first: f64,
    last: f64,
    pixels: [f64; 2],
}

impl Axis {
    fn at(&self, value: f64) -> f64 {
        let part = (value / self.first).ln() / (self.last / self.first).ln();
        self.pixels[0] + part * (self.pixels[1] - self.pixels[0])
    }

    /// Powers of `base` between the ends, times each of `steps`.
    fn ticks(&self, base: f64, steps: &[f64]) -> Vec<f64> {
        let (from, to) = (self.first.log(base).floor() as i32, self.last.log(base).ceil() as i32);
        let all = (from..=to).flat_map(|power| steps.iter().map(move |step| step * base.powi(power)));
        all.filter(|tick| (self.first * 0.999..=self.last * 1.001).contains(tick)).collect()
    }
}

impl LineChart {
    /// Returns the picture.
    pub(super) fn draw(&self) -> String {
        let mut svg = Svg::new(WIDTH, HEIGHT, &self.title, &self.subtitle);
        let points = || self.series.iter().flat_map(|series| &series.points);
        let range = |values: &mut dyn Iterator<Item = f64>| {
            values.fold((f64::INFINITY, 0.0_f64), |(least, most), value| (least.min(value), most.max(value)))
        };
        let (left, right) = range(&mut points().map(|point| point.0));
        let (low, high) = range(&mut points().map(|point| point.1));
        let x = Axis { first: left / 1.15, last: right * 1.15, pixels: [LEFT, WIDTH - RIGHT] };
        let y = Axis { first: low / 1.3, last: high * 1.3, pixels: [HEIGHT - BOTTOM, TOP] };
        self.grid(&mut svg, &x, &y);
        let shown = self.series.iter().zip(COLOURS).filter(|(series, _)| !series.points.is_empty());
        for (index, (series, colour)) in shown.enumerate() {
            let pixels: Vec<[f64; 2]> = series.points.iter().map(|point| [x.at(point.0), y.at(point.1)]).collect();
            if !series.is_dots {
                svg.polyline("series", &pixels, colour);
            }
            pixels.iter().for_each(|point| svg.dot("point", *point, colour, series.is_dots));
            let at = [WIDTH - RIGHT + 22.0, TOP + 12.0 + 22.0 * index as f64];
            if !series.is_dots {
                svg.polyline("legend", &[[at[0] - 10.0, at[1] - 4.0], [at[0] + 10.0, at[1] - 4.0]], colour);
            }
            svg.dot("legend", [at[0], at[1] - 4.0], colour, series.is_dots);
            svg.text([at[0] + 18.0, at[1]], Anchor::Start, series.name);
        }
        svg.finish()
    }

    fn grid(&self, svg: &mut Svg, x: &Axis, y: &Axis) {
        let [bottom, top] = y.pixels;
        let [left, right] = x.pixels;
        for tick in x.ticks(2.0, &[1.0]) {
            svg.rule([x.at(tick), top], [x.at(tick), bottom]);
            svg.text([x.at(tick), bottom + 18.0], Anchor::Middle, &tick.to_string());
        }
        for tick in y.ticks(10.0, &[1.0, 2.0, 5.0]) {
            svg.rule([left, y.at(tick)], [right, y.at(tick)]);
            svg.text([left - 8.0, y.at(tick) + 4.0], Anchor::End, &short(tick));
        }
        svg.text([f64::midpoint(left, right), HEIGHT - 16.0], Anchor::Middle, self.x);
        svg.upright([18.0, f64::midpoint(bottom, top)], self.y);
    }
}

/// A tick without the noise of powers of ten.
fn short(tick: f64) -> String {
    if tick >= 1.0 { format!("{tick:.0}") } else { format!("{tick:.3}").trim_end_matches('0').to_owned() }
}
