//! A picture as SVG: text that scales, with the reader's own letters.

use std::fmt::Write as _;

use crate::bench::picture::{BAR, Colour, KEY, Picture, Shape, Style, WIDTH};

/// The document.
pub(super) fn draw(picture: &Picture) -> String {
    let height = picture.height;
    let mut body = String::new();
    for shape in &picture.shapes {
        draw_shape(&mut body, shape);
    }
    format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{WIDTH}\" height=\"{height}\" viewBox=\"0 0 {WIDTH} {height}\" \
         font-family=\"sans-serif\" font-size=\"13\">\n<rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n{body}</svg>\n"
    )
}

fn draw_shape(into: &mut String, shape: &Shape) {
    let _ = match shape {
        Shape::Key { x, y, colour } => {
            let fill = hexadecimal(*colour);
            writeln!(into, "<rect x=\"{x}\" y=\"{y}\" width=\"{KEY}\" height=\"{KEY}\" fill=\"{fill}\"/>")
        }
        Shape::Bar { x, y, width, colour, says } => {
            let (fill, says) = (hexadecimal(*colour), escaped(says));
            writeln!(
                into,
                "<rect x=\"{x:.1}\" y=\"{y:.1}\" width=\"{width:.1}\" height=\"{BAR}\" fill=\"{fill}\">\
                 <title>{says}</title></rect>"
            )
        }
        Shape::Text { x, y, style, text } => {
            let attributes = match style {
                Style::Plain => "",
                Style::Title => " font-size=\"16\"",
                Style::Heading => " font-weight=\"bold\"",
                Style::Label => " text-anchor=\"end\"",
            };
            writeln!(into, "<text x=\"{x:.1}\" y=\"{y:.1}\"{attributes}>{}</text>", escaped(text))
        }
    };
}

fn hexadecimal(Colour(red, green, blue): Colour) -> String {
    format!("#{red:02x}{green:02x}{blue:02x}")
}

/// What stands in a picture is text, never markup.
fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}
