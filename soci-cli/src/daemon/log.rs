//! The daemon's log: one JSON object per line on standard error, with the keys that AWS's daemon uses (`level`, `msg`,
//! `time`), because existing log pipelines expect these.

use std::fmt;
use std::io::Write as _;

use serde_json::{Map, Value};
use soci_index::clock;
use soci_index::format::ztoc::rfc3339;
use tracing::field::{Field, Visit};
use tracing::{Event, Subscriber};
use tracing_subscriber::Layer as _;
use tracing_subscriber::filter::{LevelFilter, Targets};
use tracing_subscriber::fmt::format::Writer;
use tracing_subscriber::fmt::{FmtContext, FormatEvent, FormatFields};
use tracing_subscriber::layer::SubscriberExt as _;
use tracing_subscriber::registry::LookupSpan;
use tracing_subscriber::util::SubscriberInitExt as _;

use crate::daemon::args::Level;
use crate::report::output::json_for_terminals;

/// Begins logging our own lines from `level` on, and others' warnings.
pub fn start(level: Level) {
    let ours = match level {
        Level::Trace => LevelFilter::TRACE,
        Level::Debug => LevelFilter::DEBUG,
        Level::Info => LevelFilter::INFO,
        Level::Warn => LevelFilter::WARN,
        Level::Error => LevelFilter::ERROR,
        Level::Fatal | Level::Panic => LevelFilter::OFF,
    };
    let others = ours.min(LevelFilter::WARN);
    let filter = Targets::new()
        .with_default(others)
        // It warns of every question that it answers with "not implemented", though that is the right answer.
        .with_target("fuser", ours.min(LevelFilter::ERROR))
        .with_targets(["soci_index", "soci_fs", "soci_cli"].map(|target| (target, ours)));
    let lines = tracing_subscriber::fmt::layer().event_format(Lines).with_writer(std::io::stderr);
    // A second start in one process (tests) changes nothing.
    let _ = tracing_subscriber::registry().with(lines.with_filter(filter)).try_init();
}

/// Writes the line of a failure that ends the program; no level keeps it back.
pub fn fatal(error: &anyhow::Error) {
    let line = line("fatal", Map::from_iter([("msg".to_owned(), crate::report::exit::message(error).into())]));
    // With standard error closed the message has no destination.
    let _ = writeln!(std::io::stderr(), "{}", json_for_terminals(&line.to_string()));
}

struct Lines;

impl<S, N> FormatEvent<S, N> for Lines
where
    S: Subscriber + for<'s> LookupSpan<'s>,
    N: for<'w> FormatFields<'w> + 'static,
{
    fn format_event(&self, _: &FmtContext<'_, S, N>, mut writer: Writer<'_>, event: &Event<'_>) -> fmt::Result {
        let level = match *event.metadata().level() {
            tracing::Level::TRACE => "trace",
            tracing::Level::DEBUG => "debug",
            tracing::Level::INFO => "info",
            tracing::Level::WARN => "warning",
            tracing::Level::ERROR => "error",
        };
        let mut fields = Fields(Map::new());
        event.record(&mut fields);
        writeln!(writer, "{}", json_for_terminals(&line(level, fields.0).to_string()))
    }
}

fn line(level: &str, mut fields: Map<String, Value>) -> Value {
    let time = rfc3339::format(clock::timestamp(clock::since_epoch()));
    fields.insert("level".to_owned(), level.into());
    fields.insert("time".to_owned(), time.into());
    Value::Object(fields)
}

struct Fields(Map<String, Value>);

impl Fields {
    fn put(&mut self, field: &Field, value: Value) {
        let key = match field.name() {
            "message" => "msg",
            name => name,
        };
        self.0.insert(key.to_owned(), value);
    }
}

impl Visit for Fields {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        self.put(field, format!("{value:?}").into());
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        self.put(field, value.into());
    }

    fn record_u64(&mut self, field: &Field, value: u64) {
        self.put(field, value.into());
    }

    fn record_i64(&mut self, field: &Field, value: i64) {
        self.put(field, value.into());
    }

    fn record_bool(&mut self, field: &Field, value: bool) {
        self.put(field, value.into());
    }
}
