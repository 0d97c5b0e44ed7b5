//! A picture as PNG: pixels, and letters that are part of the program.
//!
//! The letters are `embedded-graphics`', of 10 by 20 pixels or bold of 9 by 18, so that one and a half pixels for each unit
//! of the layout give them the size that the layout thinks of: 13 units, about 7 wide. There are Latin, Greek and Cyrillic
//! ones; any other is a box, as browsers show what they have no font for.
//! What reaches beyond an edge is cut off there, as it is in SVG.

use embedded_graphics::draw_target::DrawTarget;
use embedded_graphics::geometry::{OriginDimensions, Point, Size};
use embedded_graphics::mono_font::mapping::{self, StrGlyphMapping};
use embedded_graphics::mono_font::{
    MonoFont, MonoTextStyle, iso_8859_1, iso_8859_2, iso_8859_3, iso_8859_4, iso_8859_5, iso_8859_7, iso_8859_9,
    iso_8859_10, iso_8859_13, iso_8859_14, iso_8859_15, iso_8859_16,
};
use embedded_graphics::pixelcolor::{Rgb888, RgbColor};
use embedded_graphics::primitives::{Primitive as _, PrimitiveStyleBuilder, Rectangle, StrokeAlignment};
use embedded_graphics::text::{Baseline, Text};
use embedded_graphics::{Drawable as _, Pixel};

use super::{BAR, Colour, KEY, Picture, Shape, Style, WIDTH};

/// Pixels for each unit of the layout.
const SCALE: f64 = 1.5;
const BYTES_PER_PIXEL: usize = 3;

/// Letters of an alphabet, plain and bold.
struct Font {
    alphabet: &'static StrGlyphMapping<'static>,
    plain: &'static MonoFont<'static>,
    bold: &'static MonoFont<'static>,
}

macro_rules! font {
    ($alphabet:ident, $letters:ident) => {
        Font { alphabet: &mapping::$alphabet, plain: &$letters::FONT_10X20, bold: &$letters::FONT_9X18_BOLD }
    };
}

/// A letter is taken from the first that has it.
const FONTS: [Font; 12] = [
    font!(ISO_8859_1, iso_8859_1),
    font!(ISO_8859_2, iso_8859_2),
    font!(ISO_8859_3, iso_8859_3),
    font!(ISO_8859_4, iso_8859_4),
    font!(ISO_8859_5, iso_8859_5),
    font!(ISO_8859_7, iso_8859_7),
    font!(ISO_8859_9, iso_8859_9),
    font!(ISO_8859_10, iso_8859_10),
    font!(ISO_8859_13, iso_8859_13),
    font!(ISO_8859_14, iso_8859_14),
    font!(ISO_8859_15, iso_8859_15),
    font!(ISO_8859_16, iso_8859_16),
];

/// Why there is no picture.
#[derive(Debug, thiserror::Error)]
pub enum PictureError {
    /// It could not be written as PNG, whose sides are shorter than 2^31 pixels.
    #[error("a picture of {width} by {height} pixels could not be written as PNG; draw it as .svg, or draw less")]
    Encode {
        /// Pixels from left to right.
        width: u32,
        /// Pixels from top to bottom.
        height: u32,
        /// What the encoder says.
        #[source]
        source: png::EncodingError,
    },
}

/// The file.
pub(super) fn draw(picture: &Picture) -> Result<Vec<u8>, PictureError> {
    let mut canvas = Canvas::white(Size::new(scaled(WIDTH).unsigned_abs(), scaled(picture.height).unsigned_abs()));
    for shape in &picture.shapes {
        let Ok(()) = draw_shape(&mut canvas, shape);
    }
    let Size { width, height } = canvas.size;
    canvas.encoded().map_err(|source| PictureError::Encode { width, height, source })
}

fn draw_shape(canvas: &mut Canvas, shape: &Shape) -> Result<(), std::convert::Infallible> {
    match shape {
        Shape::Key { x, y, colour } => fill(canvas, (*x, *y), (KEY, KEY), *colour),
        Shape::Bar { x, y, width, colour, says: _ } => fill(canvas, (*x, *y), (*width, BAR), *colour),
        Shape::Text { x, y, style, text } => {
            let font: fn(&Font) -> &'static MonoFont<'static> = match style {
                Style::Title | Style::Heading => |font| font.bold,
                Style::Plain | Style::Label => |font| font.plain,
            };
            let wide = font(&FONTS[0]).character_size.width.cast_signed();
            let mut at = Point::new(scaled(*x), scaled(*y));
            if *style == Style::Label {
                let letters = i32::try_from(text.chars().count()).unwrap_or(i32::MAX);
                at.x = at.x.saturating_sub(letters.saturating_mul(wide));
            }
            for letter in text.chars() {
                draw_letter(canvas, at, letter, font)?;
                at.x = at.x.saturating_add(wide);
            }
            Ok(())
        }
    }
}

/// Edges are rounded, not sizes, so that neighbours touch.
fn fill(
    canvas: &mut Canvas,
    (x, y): (f64, f64),
    (width, height): (f64, f64),
    Colour(red, green, blue): Colour,
) -> Result<(), std::convert::Infallible> {
    let (from, to) = (Point::new(scaled(x), scaled(y)), Point::new(scaled(x + width), scaled(y + height)));
    let size = Size::new(to.x.abs_diff(from.x), to.y.abs_diff(from.y));
    canvas.fill_solid(&Rectangle::new(from, size), Rgb888::new(red, green, blue))
}

fn draw_letter(
    canvas: &mut Canvas,
    at: Point,
    letter: char,
    font: fn(&Font) -> &'static MonoFont<'static>,
) -> Result<(), std::convert::Infallible> {
    if let Some(found) = FONTS.iter().find(|font| font.alphabet.contains(letter)) {
        let style = MonoTextStyle::new(font(found), Rgb888::BLACK);
        Text::with_baseline(letter.encode_utf8(&mut [0; 4]), at, style, Baseline::Alphabetic).draw(canvas)?;
        return Ok(());
    }
    // As high as capital letters reach, and a pixel from its neighbours.
    let Size { width, height } = font(&FONTS[0]).character_size;
    let (width, height) = (width - 2, height * 13 / 20);
    let top = Point::new(at.x.saturating_add(1), at.y.saturating_add(1).saturating_sub_unsigned(height));
    let style = PrimitiveStyleBuilder::new()
        .stroke_color(Rgb888::BLACK)
        .stroke_width(1)
        .stroke_alignment(StrokeAlignment::Inside)
        .build();
    Rectangle::new(top, Size::new(width, height)).into_styled(style).draw(canvas)
}

/// Casts saturate: what is beyond the edge of the world is beyond the edge of the picture, too.
fn scaled(units: f64) -> i32 {
    (units * SCALE).round() as i32
}

/// Rows of pixels, three bytes each.
struct Canvas {
    size: Size,
    bytes: Vec<u8>,
}

impl Canvas {
    fn white(size: Size) -> Self {
        Self { size, bytes: vec![0xff; size.width as usize * size.height as usize * BYTES_PER_PIXEL] }
    }

    fn encoded(&self) -> Result<Vec<u8>, png::EncodingError> {
        let mut file = Vec::new();
        let mut encoder = png::Encoder::new(&mut file, self.size.width, self.size.height);
        encoder.set_color(png::ColorType::Rgb);
        encoder.set_depth(png::BitDepth::Eight);
        encoder.set_compression(png::Compression::Balanced);
        let mut writer = encoder.write_header()?;
        writer.write_image_data(&self.bytes)?;
        writer.finish()?;
        Ok(file)
    }
}

impl OriginDimensions for Canvas {
    fn size(&self) -> Size {
        self.size
    }
}

impl DrawTarget for Canvas {
    type Color = Rgb888;
    type Error = std::convert::Infallible;

    fn draw_iter<I: IntoIterator<Item = Pixel<Rgb888>>>(&mut self, pixels: I) -> Result<(), Self::Error> {
        for Pixel(Point { x, y }, colour) in pixels {
            let (Ok(x), Ok(y)) = (u32::try_from(x), u32::try_from(y)) else { continue };
            if x >= self.size.width {
                continue;
            }
            let at = (y as usize * self.size.width as usize + x as usize) * BYTES_PER_PIXEL;
            if let Some(pixel) = self.bytes.get_mut(at..at + BYTES_PER_PIXEL) {
                pixel.copy_from_slice(&[colour.r(), colour.g(), colour.b()]);
            }
        }
        Ok(())
    }
}
