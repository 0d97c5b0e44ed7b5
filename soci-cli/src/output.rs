//! What people and programs see: tables, sizes, JSON, bars. Nothing else prints to standard output.

use std::io::{IsTerminal, Write};
use std::path::Path;

use anyhow::Context;
use serde::Serialize;

/// Writes a line to standard output. A reader that went away (`| head`) is no failure.
pub fn line(text: impl AsRef<str>) -> anyhow::Result<()> {
    bytes(format!("{}\n", text.as_ref()).as_bytes())
}

/// Writes a line about `file`, which was written just now: to standard error if the file itself went to standard output.
///
/// # Errors
/// When it cannot be written.
pub fn line_beside(file: &Path, text: impl AsRef<str>) -> anyhow::Result<()> {
    if !soci_index::output::is_standard_output(file) {
        return line(text);
    }
    writeln!(std::io::stderr(), "{}", text.as_ref()).context("writing to standard error")
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
    line(serde_json::to_string_pretty(value).context("writing JSON")?)
}

/// Prints rows under a header in the form of AWS's tool: cells at least eight wide, four spaces after each.
pub fn table(header: &[&str], rows: &[Vec<String>]) -> anyhow::Result<()> {
    line(format_table(header, rows))
}

fn format_table(header: &[&str], rows: &[Vec<String>]) -> String {
    let header: Vec<String> = header.iter().map(|cell| (*cell).to_owned()).collect();
    let all: Vec<&Vec<String>> = std::iter::once(&header).chain(rows).collect();
    let width = |column: usize| {
        let cells = all.iter().filter_map(|row| row.get(column)).map(|cell| cell.chars().count());
        cells.max().unwrap_or(0).max(8) + 4
    };
    let widths: Vec<usize> = (0..header.len()).map(width).collect();
    let lines = all.iter().map(|row| row.iter().zip(&widths).map(|(cell, width)| format!("{cell:width$}")).collect());
    lines.collect::<Vec<String>>().join("\n")
}

/// A size for people: `17.8 MB`, powers of 1000.
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

/// A time for people: `3.4 ms`, `1.25 s`.
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

/// Whether a person is likely to look at standard error now.
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

    #[test]
    fn tables_have_the_form_of_the_peer() {
        let text = format_table(&["DIGEST", "SIZE"], &[vec!["sha256:00".to_owned(), "7".to_owned()]]);
        assert_eq!(text, "DIGEST       SIZE        \nsha256:00    7           ");
    }
}
