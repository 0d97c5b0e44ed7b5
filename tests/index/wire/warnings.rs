//! `Warning` headers reach the log once.

use std::sync::{Arc, Mutex};

use soci_index::format::reference::ManifestName;
use tracing::field::{Field, Visit};
use tracing::span::{Attributes, Id, Record};
use tracing::{Event, Metadata, Subscriber};

use crate::wire::server::{Server, reply};

/// Collects the fields called `warning`.
#[derive(Clone, Default)]
struct Collector(Arc<Mutex<Vec<String>>>);

impl Visit for Collector {
    fn record_debug(&mut self, _: &Field, _: &dyn std::fmt::Debug) {}

    fn record_str(&mut self, field: &Field, value: &str) {
        if field.name() == "warning" {
            self.0.lock().unwrap().push(value.to_owned());
        }
    }
}

impl Subscriber for Collector {
    fn enabled(&self, _: &Metadata<'_>) -> bool {
        true
    }

    fn new_span(&self, _: &Attributes<'_>) -> Id {
        Id::from_u64(1)
    }

    fn record(&self, _: &Id, _: &Record<'_>) {}

    fn record_follows_from(&self, _: &Id, _: &Id) {}

    fn event(&self, event: &Event<'_>) {
        event.record(&mut self.clone());
    }

    fn enter(&self, _: &Id) {}

    fn exit(&self, _: &Id) {}
}

#[tokio::test]
async fn once_per_text() {
    let collector = Collector::default();
    let _guard = tracing::subscriber::set_default(collector.clone());
    let server = Server::start(|request| {
        let text = if request.target.ends_with("/b") { "299 - \"moving soon\"" } else { "299 - \"nearly full\"" };
        reply(404).header("warning", text)
    })
    .await;
    let repository = server.repository();
    for tag in ["a", "a", "b", "a"] {
        repository.manifest(&ManifestName::Tag(tag.into())).await.unwrap();
    }
    assert_eq!(*collector.0.lock().unwrap(), ["nearly full", "moving soon"]);
}
