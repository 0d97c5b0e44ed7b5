//! A program that reads by a log, over a line with a round trip and a rate, with a policy that reads ahead for it.
//!
//! The line carries one answer after another: what is read ahead is in the way of what is waited for, which is the worst
//! that can be. Neighbouring spans that are asked for at the same moment share a request. Each span is decoded when it
//! has come; the program computes for a while between two reads.

use std::collections::HashMap;
use std::ops::Range;
use std::time::Duration;

use crate::log::{Log, Read};
use crate::policies::Policy;

/// Between two reads, while everything is at hand.
const THINK: Duration = Duration::from_micros(400);
/// To inflate and check a span of 256 KiB.
const DECODE: Duration = Duration::from_micros(900);

/// How the line is.
#[derive(Debug, Clone, Copy)]
pub struct Network {
    /// From a request to the first byte of its answer, on an idle line.
    pub round_trip: Duration,
    /// Bytes in a second.
    pub rate: u64,
}

/// How a replay went.
#[derive(Debug, Clone, Copy, Default)]
pub struct Outcome {
    /// Different spans that were read.
    pub read_spans: u32,
    /// Of these, the ones that had been asked for before.
    pub hits: u32,
    /// Spans that were fetched and never read.
    pub unread_spans: u32,
    /// Compressed bytes of the spans that were read.
    pub read_bytes: u64,
    /// Compressed bytes that were fetched and never read.
    pub unread_bytes: u64,
    /// Requests.
    pub requests: u32,
    /// How long the program waited.
    pub stalled: Duration,
}

struct Replay<'a> {
    log: &'a Log,
    network: Network,
    now: Duration,
    line_is_free: Duration,
    /// When each span that was asked for is there, and whether it was read.
    spans: HashMap<(usize, u32), (Duration, bool)>,
    outcome: Outcome,
}

/// Replays a log.
pub fn replay(log: &Log, network: Network, policy: &mut dyn Policy) -> Outcome {
    let (spans, outcome) = (HashMap::new(), Outcome::default());
    let mut replay = Replay { log, network, now: Duration::ZERO, line_is_free: Duration::ZERO, spans, outcome };
    for read in &log.reads {
        replay.now += THINK;
        replay.read(read, policy);
    }
    for ((layer, span), (_, is_read)) in &replay.spans {
        let bytes = log.layers[*layer][*span as usize].0;
        let sum = if *is_read { &mut replay.outcome.read_bytes } else { &mut replay.outcome.unread_bytes };
        *sum += bytes;
        replay.outcome.unread_spans += u32::from(!*is_read);
    }
    replay.outcome
}

impl Replay<'_> {
    fn read(&mut self, read: &Read, policy: &mut dyn Policy) {
        let is_miss = read.spans.clone().any(|span| !self.spans.contains_key(&(read.layer, span)));
        let ahead = policy.note(read, is_miss);
        let known: Vec<bool> = read.spans.clone().map(|span| self.spans.contains_key(&(read.layer, span))).collect();
        self.fetch(read.layer, std::iter::once(read.spans.clone()).chain(ahead));
        let mut ready = self.now;
        for (span, was_known) in read.spans.clone().zip(known) {
            let Some((arrival, is_read)) = self.spans.get_mut(&(read.layer, span)) else { continue };
            ready = ready.max(*arrival);
            if !*is_read {
                *is_read = true;
                self.outcome.read_spans += 1;
                self.outcome.hits += u32::from(was_known);
            }
        }
        self.outcome.stalled += ready - self.now;
        self.now = ready;
    }

    /// Asks for those of the spans that nobody has asked for.
    fn fetch(&mut self, layer: usize, ranges: impl Iterator<Item = Range<u32>>) {
        let mut before = None;
        let mut at = self.now;
        for span in ranges.flatten() {
            if self.spans.contains_key(&(layer, span)) {
                continue;
            }
            if before.is_none_or(|before| before + 1 != span) {
                self.outcome.requests += 1;
                at = (self.now + self.network.round_trip).max(self.line_is_free);
            }
            before = Some(span);
            let bytes = self.log.layers[layer][span as usize].0;
            at += Duration::from_secs_f64(bytes as f64 / self.network.rate as f64);
            self.line_is_free = at;
            self.spans.insert((layer, span), (at + DECODE, false));
        }
    }
}
