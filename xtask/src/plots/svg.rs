//! The few elements of a picture. Dark on white, so that it reads on any page.

use std::fmt::Write;

/// Colours that differ in hue and in brightness.
pub(super) const COLOURS: [&str; 7] = ["#1f6feb", "#54aeff", "#d1570b", "#2da44e", "#8250df", "#bf3989", "#57606a"];

/// Where a text's position is in the text.
#[derive(Clone, Copy)]
pub(super) enum Anchor {
    Start,
    Middle,
    End,
}

/// A picture that grows by elements.
pub(super) struct Svg {
    text: String,
}

impl Svg {
    /// Begins a white picture with a title and, below it, where its figures come from.
    pub(super) fn new(width: f64, height: f64, title: &str, subtitle: &str) -> Self {
        let mut text = String::new();
        let _ = writeln!(
            text,
            r##"<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}" font-family="Helvetica, Arial, sans-serif" font-size="12" fill="#24292f">"##
        );
        let _ = writeln!(text, r##"<rect width="{width}" height="{height}" fill="#ffffff"/>"##);
        let _ = writeln!(text, r#"<text x="16" y="24" font-size="16" font-weight="bold">{}</text>"#, escaped(title));
        let _ = writeln!(text, r##"<text x="16" y="42" font-size="11" fill="#57606a">{}</text>"##, escaped(subtitle));
        Self { text }
    }

    pub(super) fn text(&mut self, [x, y]: [f64; 2], anchor: Anchor, text: &str) {
        let anchor = match anchor {
            Anchor::Start => "start",
            Anchor::Middle => "middle",
            Anchor::End => "end",
        };
        let _ = writeln!(self.text, r#"<text x="{x:.1}" y="{y:.1}" text-anchor="{anchor}">{}</text>"#, escaped(text));
    }

    /// A text that is read from bottom to top.
    pub(super) fn upright(&mut self, [x, y]: [f64; 2], text: &str) {
        let _ = writeln!(
            self.text,
            r#"<text transform="translate({x:.1} {y:.1}) rotate(-90)" text-anchor="middle">{}</text>"#,
            escaped(text)
        );
    }

    /// A thin grey line.
    pub(super) fn rule(&mut self, from: [f64; 2], to: [f64; 2]) {
        let _ = writeln!(
            self.text,
            r##"<line x1="{:.1}" y1="{:.1}" x2="{:.1}" y2="{:.1}" stroke="#d0d7de" stroke-width="1"/>"##,
            from[0], from[1], to[0], to[1]
        );
    }

    pub(super) fn polyline(&mut self, class: &str, points: &[[f64; 2]], colour: &str) {
        let points: Vec<String> = points.iter().map(|[x, y]| format!("{x:.1},{y:.1}")).collect();
        let _ = writeln!(
            self.text,
            r#"<polyline class="{class}" points="{}" fill="none" stroke="{colour}" stroke-width="2"/>"#,
            points.join(" ")
        );
    }

    /// A dot; a ring if it is hollow.
    pub(super) fn dot(&mut self, class: &str, [x, y]: [f64; 2], colour: &str, is_hollow: bool) {
        let (radius, fill) = if is_hollow { (4.5, "#ffffff") } else { (3.0, colour) };
        let _ = writeln!(
            self.text,
            r#"<circle class="{class}" cx="{x:.1}" cy="{y:.1}" r="{radius}" fill="{fill}" stroke="{colour}" stroke-width="2"/>"#
        );
    }

    pub(super) fn bar(&mut self, class: &str, [x, y]: [f64; 2], [width, height]: [f64; 2], colour: &str) {
        let _ = writeln!(
            self.text,
            r#"<rect class="{class}" x="{x:.1}" y="{y:.1}" width="{width:.1}" height="{height:.1}" fill="{colour}"/>"#
        );
    }

    /// Ends the picture and returns its text.
    pub(super) fn finish(mut self) -> String {
        self.text.push_str("</svg>\n");
        self.text
    }
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}
