//! Progress of long work: a bar on a terminal, a line every few seconds elsewhere, nothing for short work.

use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use parking_lot::Mutex;

use crate::report::output;

/// How often a log gets a line.
const LINE_EVERY: Duration = Duration::from_secs(10);

/// The progress of one thing that is counted in bytes.
#[derive(Debug)]
pub struct Progress {
    bar: ProgressBar,
    plain: Option<Mutex<Instant>>,
    what: String,
    total: Option<u64>,
}

impl Progress {
    /// Starts with what is done and how much of it there is.
    #[must_use]
    pub fn bytes(what: &str, total: Option<u64>) -> Self {
        let interactive = output::interactive();
        let target = if interactive { ProgressDrawTarget::stderr_with_hz(10) } else { ProgressDrawTarget::hidden() };
        let bar = ProgressBar::with_draw_target(total, target);
        let form = match total {
            // Powers of 1000, as in all that is said.
            Some(_) => "{msg} {bar:30} {decimal_bytes}/{decimal_total_bytes} {decimal_bytes_per_sec} {eta}",
            None => "{msg} {decimal_bytes} {decimal_bytes_per_sec}",
        };
        if let Ok(style) = ProgressStyle::with_template(form) {
            bar.set_style(style.progress_chars("█▉▊▋▌▍▎▏ "));
        }
        bar.set_message(what.to_owned());
        let plain = (!interactive).then(|| Mutex::new(Instant::now()));
        Self { bar, plain, what: what.to_owned(), total }
    }

    /// So many bytes are done.
    pub fn at(&self, bytes: u64) {
        self.bar.set_position(bytes);
        let Some(last) = &self.plain else { return };
        let mut last = last.lock();
        if last.elapsed() >= LINE_EVERY {
            *last = Instant::now();
            let total = self.total.map(|total| format!(" of {}", output::size(total))).unwrap_or_default();
            tracing::info!("{}: {}{total}", self.what, output::size(bytes));
        }
    }

    /// Done: the bar reaches its end, also for what was here already, and goes away.
    pub fn finish(&self) {
        if let Some(total) = self.total {
            self.bar.set_position(total);
            self.bar.tick();
        }
        self.bar.finish_and_clear();
    }
}
