//! A picture of series: one stacked bar for each, dark the pull, medium the creation, light the run; SVG, by hand.
//!
//! Lengths are medians. All bars of a picture have one scale; each image and workload has a heading, and each bar's end
//! says seconds in all and bytes from the network.

use std::fmt::Write as _;

use super::series::{Sample, Series};

const WIDTH: f64 = 960.0;
/// Where bars begin and where the longest ends.
const BARS: (f64, f64) = (190.0, 800.0);
const ROW: f64 = 24.0;
const BAR: f64 = 16.0;
/// Of pull, create and run.
const PHASES: [(&str, &str); 3] = [("pull", "#1b3a5c"), ("create", "#3f7fb5"), ("run", "#a9cce3")];

/// Draws the series in their order.
#[must_use]
pub fn svg(title: &str, series: &[Series]) -> String {
    let longest = series.iter().map(|series| series.spread(Sample::total).median).fold(0.0, f64::max);
    let scale = if longest > 0.0 { (BARS.1 - BARS.0) / longest } else { 0.0 };
    let (mut body, mut y, mut heading) = (String::new(), 64.0, String::new());
    for series in series {
        let above = format!("{}, {}", series.image, series.workload);
        if above != heading {
            y += 12.0;
            text(&mut body, 12.0, y + 12.0, "font-weight=\"bold\"", &above);
            y += ROW;
            heading = above;
        }
        let name = format!("{}{}", series.snapshotter, if series.warm { " (warm)" } else { "" });
        text(&mut body, BARS.0 - 8.0, y + 12.0, "text-anchor=\"end\"", &name);
        let mut x = BARS.0;
        let of: [fn(&Sample) -> f64; 3] = [|sample| sample.pull, |sample| sample.create, |sample| sample.run];
        for ((phase, colour), of) in PHASES.iter().zip(of) {
            let seconds = series.spread(of).median;
            let width = seconds * scale;
            let _ = writeln!(
                body,
                "<rect x=\"{x:.1}\" y=\"{y:.1}\" width=\"{width:.1}\" height=\"{BAR}\" fill=\"{colour}\">\
                 <title>{phase} {seconds:.3} s</title></rect>"
            );
            x += width;
        }
        let bytes = series.spread(|sample| sample.bytes as f64).median / 1e6;
        let end = format!("{:.2} s, {bytes:.1} MB", series.spread(Sample::total).median);
        text(&mut body, x + 8.0, y + 12.0, "", &end);
        y += ROW;
    }
    let mut head = String::new();
    text(&mut head, 12.0, 24.0, "font-size=\"16\"", title);
    let mut x = BARS.0;
    for (phase, colour) in PHASES {
        let _ = writeln!(head, "<rect x=\"{x}\" y=\"40\" width=\"12\" height=\"12\" fill=\"{colour}\"/>");
        text(&mut head, x + 18.0, 50.0, "", phase);
        x += 90.0;
    }
    let height = y + 12.0;
    format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{WIDTH}\" height=\"{height}\" viewBox=\"0 0 {WIDTH} {height}\" \
         font-family=\"sans-serif\" font-size=\"13\">\n<rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n{head}{body}</svg>\n"
    )
}

fn text(into: &mut String, x: f64, y: f64, attributes: &str, text: &str) {
    let space = if attributes.is_empty() { "" } else { " " };
    let _ = writeln!(into, "<text x=\"{x:.1}\" y=\"{y:.1}\"{space}{attributes}>{}</text>", escaped(text));
}

/// Names come from command lines: they are text, never markup.
fn escaped(text: &str) -> String {
    let allowed = |letter: &char| !letter.is_control();
    let mut escaped = String::new();
    for letter in text.chars().filter(allowed) {
        match letter {
            '&' => escaped.push_str("&amp;"),
            '<' => escaped.push_str("&lt;"),
            '>' => escaped.push_str("&gt;"),
            other => escaped.push(other),
        }
    }
    escaped
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_picture_of_two_bars() {
        let series = |snapshotter: &str, pull: f64| Series {
            image: "py".to_owned(),
            snapshotter: snapshotter.to_owned(),
            workload: "a<b".to_owned(),
            warm: false,
            samples: vec![Sample { pull, create: 0.5, run: 1.0, pull_bytes: 0, bytes: 2_500_000 }],
        };
        let drawn = svg("two & more", &[series("soci", 0.5), series("overlayfs", 4.6)]);
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
        assert!(svg("nothing", &[]).ends_with("</svg>\n"));
    }
}
