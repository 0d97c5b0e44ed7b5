//! A picture of series: one stacked bar for each, dark the pull, medium the creation, light the run.
//!
//! Lengths are medians. All bars of a picture have one scale; each image and workload has a heading, and each bar's end
//! says seconds in all and bytes from the network.
//!
//! `layout` decides what stands where, in units of which the picture is 960 wide; `svg` writes it down.

mod svg;

use crate::bench::series::{Sample, Series};

const WIDTH: f64 = 960.0;
/// Where bars begin and where the longest ends.
const BARS: (f64, f64) = (190.0, 800.0);
const ROW: f64 = 24.0;
const BAR: f64 = 16.0;
/// Of the squares that say what a colour means.
const KEY: f64 = 12.0;
/// Of pull, create and run.
const PHASES: [(&str, Colour); 3] =
    [("pull", Colour(0x1b, 0x3a, 0x5c)), ("create", Colour(0x3f, 0x7f, 0xb5)), ("run", Colour(0xa9, 0xcc, 0xe3))];

/// Draws the series in their order, as an SVG document.
#[must_use]
pub fn draw(title: &str, series: &[Series]) -> String {
    svg::draw(&layout(title, series))
}

/// Red, green and blue.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Colour(u8, u8, u8);

/// What is on a picture, on white.
#[derive(Debug)]
struct Picture {
    height: f64,
    shapes: Vec<Shape>,
}

#[derive(Debug)]
enum Shape {
    /// A square of [`KEY`] that says what a colour means.
    Key { x: f64, y: f64, colour: Colour },
    /// A part of a bar, [`BAR`] high; `says` is its tooltip.
    Bar { x: f64, y: f64, width: f64, colour: Colour, says: String },
    /// A line of black letters, none of them a control character; `y` is what they stand on.
    Text { x: f64, y: f64, style: Style, text: String },
}

/// How a line of letters looks, and which end of it `x` is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Style {
    /// From `x` on.
    Plain,
    /// From `x` on, larger.
    Title,
    /// From `x` on, bold.
    Heading,
    /// Up to `x`.
    Label,
}

fn layout(title: &str, series: &[Series]) -> Picture {
    let mut shapes = vec![text(12.0, 24.0, Style::Title, title)];
    let mut x = BARS.0;
    for (phase, colour) in PHASES {
        shapes.push(Shape::Key { x, y: 40.0, colour });
        shapes.push(text(x + 18.0, 50.0, Style::Plain, phase));
        x += 90.0;
    }
    let longest = series.iter().map(|series| series.spread(Sample::total).median).fold(0.0, f64::max);
    let scale = if longest > 0.0 { (BARS.1 - BARS.0) / longest } else { 0.0 };
    let (mut y, mut heading) = (64.0, String::new());
    for series in series {
        let above = format!("{}, {}", series.image, series.workload);
        if above != heading {
            y += 12.0;
            shapes.push(text(12.0, y + 12.0, Style::Heading, &above));
            y += ROW;
            heading = above;
        }
        row(&mut shapes, y, scale, series);
        y += ROW;
    }
    Picture { height: y + 12.0, shapes }
}

/// A series: its name, its bar, and what the bar comes to.
fn row(shapes: &mut Vec<Shape>, y: f64, scale: f64, series: &Series) {
    let name = format!("{}{}", series.snapshotter, if series.warm { " (warm)" } else { "" });
    shapes.push(text(BARS.0 - 8.0, y + 12.0, Style::Label, &name));
    let mut x = BARS.0;
    let of: [fn(&Sample) -> f64; 3] = [|sample| sample.pull, |sample| sample.create, |sample| sample.run];
    for ((phase, colour), of) in PHASES.into_iter().zip(of) {
        let seconds = series.spread(of).median;
        let width = seconds * scale;
        shapes.push(Shape::Bar { x, y, width, colour, says: format!("{phase} {seconds:.3} s") });
        x += width;
    }
    let bytes = series.spread(|sample| sample.bytes as f64).median / 1e6;
    let end = format!("{:.2} s, {bytes:.1} MB", series.spread(Sample::total).median);
    shapes.push(text(x + 8.0, y + 12.0, Style::Plain, &end));
}

/// Names come from command lines, and could have anything in them.
fn text(x: f64, y: f64, style: Style, text: &str) -> Shape {
    Shape::Text { x, y, style, text: text.chars().filter(|letter| !letter.is_control()).collect() }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn series(snapshotter: &str, pull: f64) -> Series {
        Series {
            image: "py".to_owned(),
            snapshotter: snapshotter.to_owned(),
            workload: "a<b".to_owned(),
            warm: false,
            samples: vec![Sample { pull, create: 0.5, run: 1.0, pull_bytes: 0, bytes: 2_500_000, waits: None }],
        }
    }

    #[test]
    fn a_picture_of_two_bars() {
        let drawn = draw("two & more", &[series("soci", 0.5), series("overlayfs", 4.6)]);
        let expected = "\
<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"960\" height=\"160\" viewBox=\"0 0 960 160\" font-family=\"sans-serif\" font-size=\"13\">
<rect width=\"100%\" height=\"100%\" fill=\"white\"/>
<text x=\"12.0\" y=\"24.0\" font-size=\"16\">two &amp; more</text>
<rect x=\"190\" y=\"40\" width=\"12\" height=\"12\" fill=\"#1b3a5c\"/>
<text x=\"208.0\" y=\"50.0\">pull</text>
<rect x=\"280\" y=\"40\" width=\"12\" height=\"12\" fill=\"#3f7fb5\"/>
<text x=\"298.0\" y=\"50.0\">create</text>
<rect x=\"370\" y=\"40\" width=\"12\" height=\"12\" fill=\"#a9cce3\"/>
<text x=\"388.0\" y=\"50.0\">run</text>
<text x=\"12.0\" y=\"88.0\" font-weight=\"bold\">py, a&lt;b</text>
<text x=\"182.0\" y=\"112.0\" text-anchor=\"end\">soci</text>
<rect x=\"190.0\" y=\"100.0\" width=\"50.0\" height=\"16\" fill=\"#1b3a5c\"><title>pull 0.500 s</title></rect>
<rect x=\"240.0\" y=\"100.0\" width=\"50.0\" height=\"16\" fill=\"#3f7fb5\"><title>create 0.500 s</title></rect>
<rect x=\"290.0\" y=\"100.0\" width=\"100.0\" height=\"16\" fill=\"#a9cce3\"><title>run 1.000 s</title></rect>
<text x=\"398.0\" y=\"112.0\">2.00 s, 2.5 MB</text>
<text x=\"182.0\" y=\"136.0\" text-anchor=\"end\">overlayfs</text>
<rect x=\"190.0\" y=\"124.0\" width=\"460.0\" height=\"16\" fill=\"#1b3a5c\"><title>pull 4.600 s</title></rect>
<rect x=\"650.0\" y=\"124.0\" width=\"50.0\" height=\"16\" fill=\"#3f7fb5\"><title>create 0.500 s</title></rect>
<rect x=\"700.0\" y=\"124.0\" width=\"100.0\" height=\"16\" fill=\"#a9cce3\"><title>run 1.000 s</title></rect>
<text x=\"808.0\" y=\"136.0\">6.10 s, 2.5 MB</text>
</svg>
";
        assert_eq!(drawn, expected);
        assert!(draw("nothing", &[]).ends_with("</svg>\n"));
    }
}
