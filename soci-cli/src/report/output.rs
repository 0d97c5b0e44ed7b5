//! Output on the terminal and for scripts: tables, sizes, JSON, bars. Nothing else prints to standard output.

use std::borrow::Cow;
use std::fmt::Write as _;
use std::io::{IsTerminal, Write};
use std::path::Path;

use anyhow::Context;
use serde::Serialize;

/// A text that may have parts from outside, for one line of a terminal: control characters are written as `\u{1b}`.
#[must_use]
pub fn clean(text: &str) -> Cow<'_, str> {
    without(text, char::is_control)
}

/// The same for several lines of ours: ends of lines stay.
fn clean_lines(text: &str) -> Cow<'_, str> {
    without(text, |letter| letter.is_control() && letter != '\n')
}

fn without(text: &str, is_bad: impl Fn(char) -> bool) -> Cow<'_, str> {
    if !text.contains(&is_bad) {
        return text.into();
    }
    let mut clean = String::with_capacity(text.len() + 16);
    for letter in text.chars() {
        if is_bad(letter) { clean.extend(letter.escape_default()) } else { clean.push(letter) }
    }
    clean.into()
}

/// Writes a line to standard output, without control characters. A reader that went away (`| head`) is no failure.
pub fn line(text: impl AsRef<str>) -> anyhow::Result<()> {
    bytes(format!("{}\n", clean_lines(text.as_ref())).as_bytes())
}

/// Writes a line about `file`, which was written just now: to standard error if the file itself went to standard
/// output.
///
/// # Errors
/// When it cannot be written.
pub fn line_beside(file: &Path, text: impl AsRef<str>) -> anyhow::Result<()> {
    if !soci_index::image::output::is_standard_output(file) {
        return line(text);
    }
    writeln!(std::io::stderr(), "{}", clean_lines(text.as_ref())).context("writing to standard error")
}

/// Writes bytes to standard output.
pub fn bytes(bytes: &[u8]) -> anyhow::Result<()> {
    let mut out = std::io::stdout().lock();
    match out.write_all(bytes).and_then(|()| out.flush()) {
        Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => std::process::exit(0),
        result => result.context("writing to standard output"),
    }
}

/// Prints a document, indented by two spaces.
pub fn json(value: &impl Serialize) -> anyhow::Result<()> {
    line(json_for_terminals(&serde_json::to_string_pretty(value).context("writing JSON")?))
}

/// Prints a document about `file`, which was written just now: to standard error if the file itself went to standard
/// output.
///
/// # Errors
/// When it cannot be written.
pub fn json_beside(file: &Path, value: &impl Serialize) -> anyhow::Result<()> {
    line_beside(file, json_for_terminals(&serde_json::to_string_pretty(value).context("writing JSON")?))
}

/// Prints a document as one line, for commands that print one after another.
///
/// # Errors
/// When it cannot be written.
pub fn json_line(value: &impl Serialize) -> anyhow::Result<()> {
    line(json_for_terminals(&serde_json::to_string(value).context("writing JSON")?))
}

/// A JSON document in which the control characters that JSON need not escape (DEL and C1) are escaped, too.
#[must_use]
pub fn json_for_terminals(document: &str) -> String {
    let mut clean = String::with_capacity(document.len());
    for letter in document.chars() {
        if matches!(letter, '\u{7f}'..='\u{9f}') {
            // A String takes all that is written to it.
            let _ = write!(clean, "\\u{:04x}", u32::from(letter));
        } else {
            clean.push(letter);
        }
    }
    clean
}

/// Prints rows under a header in the form of AWS's tool: cells at least eight wide, four spaces after each.
pub fn table(header: &[&str], rows: &[Vec<String>]) -> anyhow::Result<()> {
    line(format_table(header, rows))
}

fn format_table(header: &[&str], rows: &[Vec<String>]) -> String {
    let header: Vec<String> = header.iter().map(|cell| (*cell).to_owned()).collect();
    let rows: Vec<Vec<String>> =
        rows.iter().map(|row| row.iter().map(|cell| clean(cell).into_owned()).collect()).collect();
    let all: Vec<&Vec<String>> = std::iter::once(&header).chain(&rows).collect();
    let width = |column: usize| {
        let cells = all.iter().filter_map(|row| row.get(column)).map(|cell| cell.chars().count());
        cells.max().unwrap_or(0).max(8) + 4
    };
    let widths: Vec<usize> = (0..header.len()).map(width).collect();
    let lines = all.iter().map(|row| row.iter().zip(&widths).map(|(cell, width)| format!("{cell:width$}")).collect());
    lines.collect::<Vec<String>>().join("\n")
}

/// A human-readable size: `17.8 MB`, powers of 1000.
#[must_use]
pub fn size(bytes: u64) -> String {
    let units = ["B", "kB", "MB", "GB", "TB", "PB"];
    let (mut value, mut unit) = (bytes as f64, 0);
    while value >= 999.95 && unit + 1 < units.len() {
        value /= 1000.0;
        unit += 1;
    }
    if unit == 0 { format!("{bytes} B") } else { format!("{value:.1} {}", units[unit]) }
}

/// A human-readable time: `3.4 ms`, `1.25 s`.
#[must_use]
pub fn time(time: std::time::Duration) -> String {
    let seconds = time.as_secs_f64();
    if seconds < 0.0995 { format!("{:.1} ms", seconds * 1000.0) } else { format!("{seconds:.2} s") }
}

/// A bar of `value` parts out of `most`, in `width` cells, eighths drawn.
#[must_use]
pub fn bar(value: f64, most: f64, width: usize) -> String {
    const EIGHTHS: [&str; 8] = ["", "▏", "▎", "▍", "▌", "▋", "▊", "▉"];
    let eighths = if most > 0.0 { (value / most * width as f64 * 8.0).round().max(0.0) as usize } else { 0 };
    let eighths = eighths.min(width * 8);
    // What is more than nothing shows.
    let eighths = if value > 0.0 { eighths.max(1) } else { eighths };
    format!("{}{}", "█".repeat(eighths / 8), EIGHTHS[eighths % 8])
}

/// Whether standard error is interactive.
#[must_use]
pub fn interactive() -> bool {
    std::io::stderr().is_terminal() && std::env::var_os("CI").is_none()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn numbers_for_people() {
        for (bytes, text) in
            [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (17_800_000, "17.8 MB"), (999_950, "1.0 MB")]
        {
            assert_eq!(size(bytes), text);
        }
        assert_eq!(time(Duration::from_micros(3400)), "3.4 ms");
        assert_eq!(time(Duration::from_millis(1250)), "1.25 s");
        assert_eq!(bar(5.0, 10.0, 10), "█████");
        assert_eq!(bar(0.0001, 10.0, 10), "▏");
        assert_eq!(bar(0.0, 0.0, 10), "");
        assert_eq!(bar(20.0, 10.0, 4), "████");
    }

    /// What others have written cannot move the cursor, change a title, or add a row.
    #[test]
    fn outside_texts_are_cleaned() {
        let hostile = "a\u{1b}]0;title\u{7}\nb\u{9b}2J\rc\u{7f}";
        assert_eq!(clean(hostile), r"a\u{1b}]0;title\u{7}\nb\u{9b}2J\rc\u{7f}");
        assert_eq!(clean_lines("a\n\u{1b}b"), "a\n\\u{1b}b");
        assert!(matches!(clean("naïve ▏ 日本"), Cow::Borrowed("naïve ▏ 日本")));
        let table = format_table(&["COMMAND"], &[vec![hostile.to_owned()]]);
        assert_eq!(table.lines().count(), 2, "{table}");
        assert!(!table.replace('\n', "").contains(char::is_control), "{table:?}");
        let document = json_for_terminals(&serde_json::json!({ "text": hostile }).to_string());
        assert!(!document.contains(char::is_control), "{document:?}");
        assert_eq!(serde_json::from_str::<serde_json::Value>(&document).unwrap()["text"], hostile);
    }

    #[test]
    fn tables_have_the_form_of_the_peer() {
        let text = format_table(&["DIGEST", "SIZE"], &[vec!["sha256:00".to_owned(), "7".to_owned()]]);
        assert_eq!(text, "DIGEST       SIZE        \nsha256:00    7           ");
    }
}
