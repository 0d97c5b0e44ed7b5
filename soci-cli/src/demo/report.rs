//! The demonstration's result, as text and as JSON.

use std::time::Duration;

use crate::demo::measure::Way;
use crate::report::output;

/// What was measured.
#[derive(Debug, serde::Serialize)]
pub struct Report {
    pub image: String,
    /// The command line.
    pub command: Vec<String>,
    /// Compressed bytes of all layers.
    pub image_bytes: u64,
    /// Layers, and how many of them have a span index.
    pub layers: usize,
    /// Layers with a span index.
    pub indexed_layers: usize,
    /// Files of the image.
    pub files: usize,
    /// How long building and publishing the index took; `None` when there was one.
    pub index_seconds: Option<f64>,
    /// Spans of the image.
    pub spans: u64,
    pub inflated_spans: u64,
    /// Pull everything, then run. `None` when it could not be measured.
    pub pull: Option<Way>,
    /// Mount, then run.
    pub lazy: Way,
    /// Of the bytes fetched lazily, how many were the index.
    pub index_bytes: u64,
    /// The same start by AWS's form of the index, where the image has both.
    pub lazy_aws: Option<Way>,
    /// Of the bytes fetched by that one, how many were the index.
    pub aws_index_bytes: Option<u64>,
    /// Run again.
    pub again_seconds: f64,
    /// Whether the files went through a mount; else they were read through the library.
    pub mounted: bool,
}

const BAR: usize = 44;

/// The row of the lazy start by AWS's form of the index.
const BY_AWS: &str = "by AWS's index";

impl Report {
    /// Prints tables and bars.
    ///
    /// # Errors
    /// When standard output is closed.
    pub fn print(&self) -> anyhow::Result<()> {
        let time = |seconds: f64| output::time(Duration::from_secs_f64(seconds));
        output::line(format!(
            "{}: {} layers ({} indexed), {} files, {} compressed",
            self.image,
            self.layers,
            self.indexed_layers,
            self.files,
            output::size(self.image_bytes),
        ))?;
        if let Some(seconds) = self.index_seconds {
            output::line(format!("index built and published in {}", time(seconds)))?;
        }
        output::line(format!("program: {}\n", self.command.join(" ")))?;
        let share = |bytes: u64| format!("{:.1} %", 100.0 * bytes as f64 / self.image_bytes.max(1) as f64);
        let row = |name: &str, way: &Way| {
            let total = way.prepare_seconds + way.run_seconds;
            let (prepare, run) = (time(way.prepare_seconds), time(way.run_seconds));
            let (fetched, requests) = (output::size(way.fetched_bytes), way.requests.to_string());
            vec![name.to_owned(), prepare, run, time(total), fetched, share(way.fetched_bytes), requests]
        };
        let mut rows: Vec<Vec<String>> = self.pull.iter().map(|pull| row("pull everything", pull)).collect();
        let lazy = if self.mounted { "mount lazily" } else { "read lazily" };
        rows.push(row(lazy, &self.lazy));
        let again = Way { run_seconds: self.again_seconds, ..Way::default() };
        rows.push(row("once more", &again));
        rows.extend(self.lazy_aws.iter().map(|way| row(BY_AWS, way)));
        output::table(&["", "PREPARE", "RUN", "TOTAL", "FETCHED", "OF IMAGE", "REQUESTS"], &rows)?;
        output::line("")?;
        self.bars(lazy)?;
        let index = output::size(self.index_bytes);
        let aws = self.aws_index_bytes.map(|bytes| format!(" ({} by AWS's form of it)", output::size(bytes)));
        output::line(format!(
            "\nspans inflated: {} of {}; {index} of the bytes were the index{}",
            self.inflated_spans,
            self.spans,
            aws.unwrap_or_default()
        ))
    }

    fn bars(&self, lazy: &str) -> anyhow::Result<()> {
        let total = |way: &Way| way.prepare_seconds + way.run_seconds;
        let pull = self.pull.iter().map(|pull| ("pull everything", pull));
        let aws = self.lazy_aws.iter().map(|way| (BY_AWS, way));
        let ways: Vec<(&str, &Way)> = pull.chain([(lazy, &self.lazy)]).chain(aws).collect();
        let most = ways.iter().map(|(_, way)| total(way)).fold(0.0, f64::max);
        for (name, way) in &ways {
            let (bar, time) = (output::bar(total(way), most, BAR), output::time(Duration::from_secs_f64(total(way))));
            output::line(format!("time    {name:16} {bar} {time}"))?;
        }
        for (name, way) in &ways {
            let bar = output::bar(way.fetched_bytes as f64, self.image_bytes as f64, BAR);
            output::line(format!("bytes   {name:16} {bar} {}", output::size(way.fetched_bytes)))?;
        }
        Ok(())
    }
}
