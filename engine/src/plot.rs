//! Plots as SVG, to be put into a page: lines over layers or rows, and bars; the pages' style.
//!
//! Colours come from the page's style sheet by the classes `s0` to `s3`; every line has a dash
//! pattern of its own beside its colour, and every point a title.

use std::fmt::Write as _;

/// Style sheet of a page with plots.
pub(crate) const STYLE: &str = include_str!("plot.css");

const WIDTH: f64 = 480.0;
const HEIGHT: f64 = 250.0;
const LEFT: f64 = 58.0;
const RIGHT: f64 = 12.0;
const TOP: f64 = 44.0;
const BOTTOM: f64 = 38.0;
const BAR_HEIGHT: f64 = 26.0;
/// Labels along an axis, at most.
const NUM_TICKS_MAX: usize = 12;

/// How numbers lie along the vertical axis.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Scale {
    /// From 0.
    Linear,
    /// Numbers that are not positive are left out.
    Log,
}

/// One line of a plot.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Line {
    pub name: String,
    /// Layer or row count, and value.
    pub points: Vec<(usize, f64)>,
}

/// A named stretch of the horizontal axis, behind the lines.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Band {
    /// From the end of the band before to here; `None`: to the end of the axis.
    pub last: Option<usize>,
    /// A letter or two.
    pub name: String,
    pub title: String,
}

/// Lines over layers or row counts.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct LinePlot {
    /// Distinct within the page.
    pub id: String,
    pub title: String,
    pub description: String,
    pub unit: &'static str,
    pub scale: Scale,
    /// What the horizontal axis counts: from 0 on a linear one, from 1 on a logarithmic one.
    pub x_name: &'static str,
    pub x_scale: Scale,
    /// At most four.
    pub lines: Vec<Line>,
    /// Ascending; may be none.
    pub bands: Vec<Band>,
}

/// Where the values of an axis lie.
struct Axis {
    scale: Scale,
    min: f64,
    max: f64,
}

impl LinePlot {
    pub(crate) fn svg(&self) -> String {
        let points = || self.lines.iter().flat_map(|line| &line.points);
        let axis = Axis::around(self.scale, points().map(|point| point.1));
        let x_max = points().map(|point| point.0).max().unwrap_or(0).max(1);
        let between = |value: f64| {
            let share = match self.x_scale {
                Scale::Linear => value / x_max as f64,
                Scale::Log => value.max(1.0).ln() / (x_max.max(2) as f64).ln(),
            };
            LEFT + share.min(1.0) * (WIDTH - LEFT - RIGHT)
        };
        let x = |value: usize| between(value as f64);
        let mut svg = start(&self.id, &self.title, &self.description, HEIGHT);
        self.write_legend(&mut svg);
        self.write_bands(&mut svg, &between);
        for tick in axis.ticks() {
            let y = axis.y(tick);
            let _ = write!(
                svg,
                "<line class=\"grid\" x1=\"{LEFT}\" x2=\"{}\" y1=\"{y:.1}\" y2=\"{y:.1}\"/>\
                 <text class=\"tick\" x=\"{}\" y=\"{:.1}\" text-anchor=\"end\">{}</text>",
                WIDTH - RIGHT,
                LEFT - 6.0,
                y + 4.0,
                number(tick),
            );
        }
        self.write_x_axis(&mut svg, x_max, &x);
        for (idx, line) in self.lines.iter().enumerate() {
            self.write_line(&mut svg, idx, line, &axis, &x);
        }
        svg.push_str("</svg>");
        svg
    }

    fn write_bands(&self, svg: &mut String, x: &dyn Fn(f64) -> f64) {
        let mut left = LEFT;
        for (idx, band) in self.bands.iter().enumerate() {
            let right = band.last.map_or(WIDTH - RIGHT, |last| x(last as f64 + 0.5));
            let width = (right - left).max(0.0);
            let _ = write!(
                svg,
                "<g><title>{}</title><rect class=\"band b{}\" x=\"{left:.1}\" y=\"{TOP}\" \
                 width=\"{width:.1}\" height=\"{:.1}\"/><text class=\"tick\" x=\"{:.1}\" \
                 y=\"{:.1}\" text-anchor=\"middle\">{}</text></g>",
                escape(&band.title),
                idx % 2,
                HEIGHT - TOP - BOTTOM,
                left + width / 2.0,
                TOP + 12.0,
                escape(&band.name),
            );
            left = right;
        }
    }

    fn write_x_axis(&self, svg: &mut String, x_max: usize, x: &dyn Fn(usize) -> f64) {
        let step = (x_max + 1).div_ceil(NUM_TICKS_MAX);
        let ticks: Vec<usize> = match self.x_scale {
            Scale::Linear => (0..=x_max).step_by(step).collect(),
            Scale::Log => {
                (0..usize::BITS).map(|bit| 1 << bit).take_while(|t| *t <= x_max).collect()
            }
        };
        for tick in ticks {
            let _ = write!(
                svg,
                "<text class=\"tick\" x=\"{:.1}\" y=\"{}\" text-anchor=\"middle\">{tick}</text>",
                x(tick),
                HEIGHT - BOTTOM + 16.0,
            );
        }
        let _ = write!(
            svg,
            "<text class=\"tick\" x=\"{}\" y=\"{}\" text-anchor=\"middle\">{}</text>",
            (LEFT + WIDTH - RIGHT) / 2.0,
            HEIGHT - 6.0,
            self.x_name,
        );
    }

    fn write_legend(&self, svg: &mut String) {
        let width = (WIDTH - LEFT - RIGHT) / self.lines.len().max(1) as f64;
        for (idx, line) in self.lines.iter().enumerate() {
            let left = LEFT + idx as f64 * width;
            let _ = write!(
                svg,
                "<line class=\"line s{idx}\" x1=\"{left:.1}\" x2=\"{:.1}\" y1=\"30\" y2=\"30\"/>\
                 <text class=\"tick\" x=\"{:.1}\" y=\"34\">{}</text>",
                left + 22.0,
                left + 27.0,
                escape(&line.name),
            );
        }
    }

    fn write_line(
        &self,
        svg: &mut String,
        idx: usize,
        line: &Line,
        axis: &Axis,
        x: &dyn Fn(usize) -> f64,
    ) {
        let shown: Vec<(usize, f64)> =
            line.points.iter().copied().filter(|point| axis.holds(point.1)).collect();
        let path: Vec<String> =
            shown.iter().map(|(l, value)| format!("{:.1},{:.1}", x(*l), axis.y(*value))).collect();
        let _ = write!(svg, "<polyline class=\"line s{idx}\" points=\"{}\"/>", path.join(" "));
        for (layer, value) in shown {
            let _ = write!(
                svg,
                "<circle class=\"dot s{idx}\" cx=\"{:.1}\" cy=\"{:.1}\" r=\"2.5\"><title>{} \
                 {layer}, {}: {}{}</title></circle>",
                x(layer),
                axis.y(value),
                self.x_name,
                escape(&line.name),
                number(value),
                self.unit,
            );
        }
    }
}

/// Horizontal bars from 0, each with its name and its number.
pub(crate) fn bars(id: &str, title: &str, description: &str, values: &[(&str, f64)]) -> String {
    let max = values.iter().map(|bar| bar.1).fold(f64::MIN_POSITIVE, f64::max);
    let name_width = 110.0;
    let room = WIDTH - name_width - 80.0;
    let height = 30.0 + values.len() as f64 * (BAR_HEIGHT + 8.0);
    let mut svg = start(id, title, description, height);
    for (idx, (name, value)) in values.iter().enumerate() {
        let y = 28.0 + idx as f64 * (BAR_HEIGHT + 8.0);
        let width = (value / max * room).max(1.0);
        let _ = write!(
            svg,
            "<text class=\"tick\" x=\"{}\" y=\"{:.1}\" text-anchor=\"end\">{}</text>\
             <rect class=\"bar s{idx}\" x=\"{name_width}\" y=\"{y:.1}\" width=\"{width:.1}\" \
             height=\"{BAR_HEIGHT}\" rx=\"3\"/>\
             <text class=\"value\" x=\"{:.1}\" y=\"{:.1}\">{value:.2}</text>",
            name_width - 8.0,
            y + 18.0,
            escape(name),
            name_width + width + 8.0,
            y + 18.0,
        );
    }
    svg.push_str("</svg>");
    svg
}

/// Text as HTML shows it.
pub(crate) fn escape(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => escaped.push_str("&amp;"),
            '<' => escaped.push_str("&lt;"),
            '>' => escaped.push_str("&gt;"),
            '"' => escaped.push_str("&quot;"),
            '\'' => escaped.push_str("&#39;"),
            c => escaped.push(c),
        }
    }
    escaped
}

/// Three digits that count, without an exponent where that is short.
pub(crate) fn number(value: f64) -> String {
    if value == 0.0 || !value.is_finite() {
        return value.to_string();
    }
    let exponent = value.abs().log10().floor();
    if !(-5.0..6.0).contains(&exponent) {
        return format!("{value:.2e}");
    }
    let digits = (2.0 - exponent).max(0.0) as usize;
    let text = format!("{value:.digits$}");
    match text.contains('.') {
        true => text.trim_end_matches('0').trim_end_matches('.').to_owned(),
        false => text,
    }
}

fn start(id: &str, title: &str, description: &str, height: f64) -> String {
    let (title, description) = (escape(title), escape(description));
    format!(
        "<svg role=\"img\" viewBox=\"0 0 {WIDTH} {height}\" aria-labelledby=\"{id}-t {id}-d\">\
         <title id=\"{id}-t\">{title}</title><desc id=\"{id}-d\">{description}</desc>\
         <text class=\"title\" x=\"{LEFT}\" y=\"16\">{title}</text>"
    )
}

impl Axis {
    /// An axis with room for all of `values`.
    fn around(scale: Scale, values: impl Iterator<Item = f64>) -> Axis {
        let shown = values.filter(|value| value.is_finite());
        let shown = shown.filter(|value| scale == Scale::Linear || *value > 0.0);
        let (min, max) = shown.fold((f64::INFINITY, f64::NEG_INFINITY), |(min, max), value| {
            (min.min(value), max.max(value))
        });
        match scale {
            Scale::Linear => {
                Axis { scale, min: 0.0, max: if max > 0.0 { max * 1.05 } else { 1.0 } }
            }
            Scale::Log if min > max => Axis { scale, min: 0.1, max: 10.0 },
            Scale::Log => {
                // A decade at least, so that there are ticks to compare with.
                let middle = min.sqrt() * max.sqrt();
                let (min, max) = (min / 1.3, max * 1.3);
                let half = 10f64.sqrt();
                Axis { scale, min: min.min(middle / half), max: max.max(middle * half) }
            }
        }
    }

    fn holds(&self, value: f64) -> bool {
        (self.min..=self.max).contains(&value)
    }

    fn y(&self, value: f64) -> f64 {
        let share = match self.scale {
            Scale::Linear => (value - self.min) / (self.max - self.min),
            Scale::Log => (value / self.min).ln() / (self.max / self.min).ln(),
        };
        HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM)
    }

    /// Round numbers within the axis.
    fn ticks(&self) -> Vec<f64> {
        match self.scale {
            Scale::Linear => {
                let rough = self.max / 5.0;
                let decade = 10f64.powf(rough.log10().floor());
                let steps = [1.0, 2.0, 5.0, 10.0];
                let step = steps.iter().find(|step| **step * decade >= rough).unwrap_or(&10.0);
                let count = (self.max / (step * decade)).floor() as usize;
                (0..=count.min(NUM_TICKS_MAX)).map(|i| i as f64 * step * decade).collect()
            }
            Scale::Log => {
                let (low, high) = (self.min.log10().floor() as i32, self.max.log10().ceil() as i32);
                let in_decade: &[f64] = if high - low > 3 { &[1.0] } else { &[1.0, 2.0, 5.0] };
                let stride = ((high - low) as usize).div_ceil(NUM_TICKS_MAX).max(1);
                let decades = (low..=high).step_by(stride);
                let ticks = decades.flat_map(|decade| {
                    in_decade.iter().map(move |digit| digit * 10f64.powi(decade))
                });
                ticks.filter(|tick| self.holds(*tick)).collect()
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plot(scale: Scale, values: &[f64]) -> String {
        let points = values.iter().copied().enumerate().collect();
        let line = Line { name: "a < b".to_owned(), points };
        LinePlot {
            id: "p".to_owned(),
            title: "q & k".to_owned(),
            description: "of \"q\"".to_owned(),
            unit: "",
            scale,
            x_name: "layer",
            x_scale: scale,
            lines: vec![line],
            bands: vec![
                Band { last: Some(1), name: "A".to_owned(), title: "<of A>".to_owned() },
                Band { last: None, name: "B".to_owned(), title: "of B".to_owned() },
            ],
        }
        .svg()
    }

    #[test]
    fn all_that_is_drawn_lies_within() {
        let cases: [&[f64]; 6] =
            [&[1e-9, 1e9], &[1.0], &[], &[0.0, -1.0, 2.0], &[f64::NAN, 3.0], &[1.0, 1.0 + 1e-12]];
        for values in cases {
            for scale in [Scale::Linear, Scale::Log] {
                let svg = plot(scale, values);
                assert!(!svg.contains("NaN") && !svg.contains("inf"), "{svg}");
                let coordinates = svg.split("cy=\"").skip(1);
                for y in coordinates.filter_map(|rest| rest.split('"').next()?.parse::<f64>().ok())
                {
                    assert!((TOP..=HEIGHT - BOTTOM).contains(&y), "{y} in {svg}");
                }
            }
        }
    }

    #[test]
    fn names_are_escaped() {
        let svg = plot(Scale::Log, &[0.01, 0.02]);
        assert!(svg.contains("a &lt; b") && svg.contains("q &amp; k"), "{svg}");
        assert!(svg.contains("of &quot;q&quot;") && !svg.contains("a < b"), "{svg}");
        assert!(svg.contains("&lt;of A&gt;") && !svg.contains("<of A>"), "{svg}");
        let bars = bars("b", "t", "d", &[("<x>", 17.604), ("y", 0.0)]);
        assert!(bars.contains("&lt;x&gt;") && bars.contains(">17.60<"), "{bars}");
    }

    #[test]
    fn bands_share_the_axis_out() {
        let band = |last| Band { last, name: String::new(), title: String::new() };
        let plot = LinePlot {
            id: String::new(),
            title: String::new(),
            description: String::new(),
            unit: "",
            scale: Scale::Linear,
            x_name: "rows",
            x_scale: Scale::Log,
            lines: vec![Line { name: String::new(), points: vec![(1, 1.0), (64, 2.0)] }],
            bands: vec![band(Some(1)), band(Some(8)), band(Some(500)), band(None)],
        };
        let svg = plot.svg();
        let widths = svg.split("<rect").skip(1).filter_map(|rect| {
            rect.split("width=\"").nth(1)?.split('"').next()?.parse::<f64>().ok()
        });
        let widths: Vec<f64> = widths.collect();
        assert_eq!(widths.len(), 4);
        assert!((widths.iter().sum::<f64>() - (WIDTH - LEFT - RIGHT)).abs() < 0.5, "{widths:?}");
        assert!(widths[..3].iter().all(|width| *width > 10.0) && widths[3] == 0.0, "{widths:?}");
    }

    #[test]
    fn numbers_are_short() {
        let cases = [(0.0, "0"), (17.604, "17.6"), (0.00123456, "0.00123"), (1.0, "1")];
        for (value, text) in cases {
            assert_eq!(number(value), text);
        }
        assert_eq!(number(1.5e-9), "1.50e-9");
        assert_eq!(number(123_456.0), "123456");
    }

    #[test]
    fn ticks_are_round_and_few() {
        let axis = Axis { scale: Scale::Log, min: 0.004, max: 0.3 };
        assert_eq!(axis.ticks().len(), 6);
        let axis = Axis { scale: Scale::Log, min: 1e-30, max: 1e30 };
        assert!(axis.ticks().len() <= NUM_TICKS_MAX + 1);
        let axis = Axis { scale: Scale::Linear, min: 0.0, max: 1.0 };
        assert_eq!(axis.ticks().len(), 6);
    }
}
