//! When to fetch what was not asked for, and when to prove it. Decides, and does nothing: time and the state of the
//! layers are arguments.
//!
//! 1. Programs that wait go first: while one does, nothing is done here.
//! 2. A claim that is not proven and is in use is a promise without a guarantee: once its start has quietened it is fetched
//!    and proven, before everything else and without a pause. Where the store has no room it is proven by the blob alone.
//! 3. Everything else waits until no layer was added for a while, and takes its time.
//!
//! A claim that cannot be proven because its source fails is suspended when the failures have lasted too long in all: a
//! source that withholds what would expose it must not keep a lie in service. Time in which the source delivers does
//! not count, so an outage that ends costs nothing.

use std::collections::BTreeMap;
use std::time::Duration;

use tokio::time::Instant;

/// How long a layer rests after its first failure; twice as long after each further one.
const REST_FIRST: Duration = Duration::from_secs(60);
/// No rest is longer.
const REST_LONGEST: Duration = Duration::from_secs(3600);
/// The same of a claim that is not proven.
const REST_UNPROVEN: Duration = Duration::from_secs(300);

/// When to be quiet.
#[derive(Debug, Clone, Copy)]
pub struct Pace {
    /// After a layer was added: programs are starting, and the line is theirs.
    pub silence: Duration,
    /// Between two fetches.
    pub period: Duration,
    /// After the last read that waited, before a claim in use is proven: the end of its start.
    pub quiet: Duration,
    /// How long in all the source of a claim may fail before the claim is suspended; `None` means no limit.
    pub withheld: Option<Duration>,
}

/// What is known of a layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Layer {
    pub(super) slot: u16,
    /// All of it is here.
    pub(super) is_complete: bool,
    /// It was compared with the image's own digest.
    pub(super) is_proven: bool,
    /// Its claim is condemned: there is nothing more to do.
    pub(super) is_condemned: bool,
    /// It is out of service until it is proven.
    pub(super) is_suspended: bool,
    /// Something of it was read.
    pub(super) is_used: bool,
    /// Something is being fetched from it.
    pub(super) is_busy: bool,
    /// A read of it waits, or waited recently: see [`Pace::quiet`].
    pub(super) is_awaited: bool,
}

impl Layer {
    const fn is_settled(&self) -> bool {
        self.is_proven && self.is_complete || self.is_condemned
    }

    const fn is_urgent(&self) -> bool {
        !self.is_proven && !self.is_condemned && self.is_used
    }
}

/// What to do next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Step {
    /// Nothing, for so long.
    Wait(Duration),
    /// Fetch some of the layer in this slot.
    Fetch(u16),
    /// The same, and go on at once.
    FetchOn(u16),
    /// Prove the layer in this slot.
    Prove(u16),
    /// Prove it without storing what is lacking.
    ProveBySource(u16),
    /// Take the layer in this slot out of service until it is proven.
    Suspend(u16),
}

/// The decisions so far.
#[derive(Debug)]
pub(super) struct Machine {
    pace: Pace,
    /// Layers that were ever added, and when that number changed last.
    added: (u64, Option<Instant>),
    last: u16,
    failing: BTreeMap<u16, Failing>,
}

/// A layer whose last step failed, or one before.
#[derive(Debug, Clone, Copy, Default)]
struct Failing {
    /// Until when it rests, and how long that is.
    rest: Option<(Instant, Duration)>,
    /// How long its source has failed, in failures that ended.
    withheld: Duration,
    /// When the present failure began.
    since: Option<Instant>,
}

impl Failing {
    fn withheld(&self, now: Instant) -> Duration {
        self.withheld + self.since.map_or(Duration::ZERO, |since| now.saturating_duration_since(since))
    }
}

impl Machine {
    pub(super) const fn new(pace: Pace) -> Self {
        Self { pace, added: (0, None), last: 0, failing: BTreeMap::new() }
    }

    /// The next step. `added` counts layers that were ever added; `has_room` is whether the store may grow.
    pub(super) fn step(&mut self, now: Instant, added: u64, has_room: bool, layers: &[Layer]) -> Step {
        if added != self.added.0 {
            self.added = (added, Some(now));
        }
        self.failing.retain(|slot, _| layers.iter().any(|layer| layer.slot == *slot && !layer.is_condemned));
        if let Some(slot) = self.withheld(now, layers) {
            return Step::Suspend(slot);
        }
        // Programs that wait go first, whichever layer they wait for.
        if layers.iter().any(|layer| layer.is_busy || layer.is_awaited) {
            return Step::Wait(self.pace.period);
        }
        if let Some(layer) = self.next(now, layers, |layer| layer.is_urgent()) {
            return match (layer.is_complete, has_room) {
                (true, _) => Step::Prove(layer.slot),
                (false, true) => Step::FetchOn(layer.slot),
                (false, false) => Step::ProveBySource(layer.slot),
            };
        }
        let quiet_until = self.added.1.map(|since| since + self.pace.silence);
        if let Some(left) =
            quiet_until.and_then(|until| until.checked_duration_since(now)).filter(|left| !left.is_zero())
        {
            // An unproven claim may come into use meanwhile.
            return Step::Wait(left.min(self.pace.quiet).max(Duration::from_millis(1)));
        }
        match self.next(now, layers, |layer| layer.is_complete || has_room) {
            Some(layer) if layer.is_complete => Step::Prove(layer.slot),
            Some(layer) => Step::Fetch(layer.slot),
            None => Step::Wait(self.pace.period),
        }
    }

    /// The next layer in turn that is not settled, does not rest and is wanted: round robin, so that one large layer
    /// does not hold up all others.
    fn next(&mut self, now: Instant, layers: &[Layer], is_wanted: impl Fn(&Layer) -> bool) -> Option<Layer> {
        let is_due = |layer: &&Layer| {
            let rest = self.failing.get(&layer.slot).and_then(|failing| failing.rest);
            rest.is_none_or(|(until, _)| now >= until) && !layer.is_settled() && is_wanted(layer)
        };
        let after = layers.iter().filter(|layer| layer.slot > self.last).find(is_due);
        let layer = after.or_else(|| layers.iter().find(is_due)).copied()?;
        self.last = layer.slot;
        Some(layer)
    }

    /// A claim in use whose source has failed for too long.
    fn withheld(&self, now: Instant, layers: &[Layer]) -> Option<u16> {
        let limit = self.pace.withheld?;
        let is_over = |layer: &&Layer| {
            let failing = self.failing.get(&layer.slot);
            layer.is_urgent() && !layer.is_suspended && failing.is_some_and(|failing| failing.withheld(now) >= limit)
        };
        layers.iter().find(is_over).map(|layer| layer.slot)
    }

    /// Notes how a step ended; `is_proven` is whether the layer is.
    pub(super) fn ended(&mut self, now: Instant, slot: u16, is_good: bool, is_proven: bool) {
        let failing = self.failing.entry(slot).or_default();
        if is_good {
            failing.withheld = failing.withheld(now);
            (failing.rest, failing.since) = (None, None);
            if is_proven || failing.withheld.is_zero() {
                self.failing.remove(&slot);
            }
            return;
        }
        failing.since.get_or_insert(now);
        let longest = if is_proven { REST_LONGEST } else { REST_UNPROVEN };
        let length = failing.rest.map_or(REST_FIRST, |(_, length)| length * 2).min(longest);
        failing.rest = Some((now + length, length));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PACE: Pace = Pace {
        silence: Duration::from_secs(30),
        period: Duration::from_millis(500),
        quiet: Duration::from_secs(3),
        withheld: Some(Duration::from_secs(1000)),
    };
    const WAIT: Step = Step::Wait(PACE.period);

    fn layer(slot: u16) -> Layer {
        Layer {
            slot,
            is_complete: false,
            is_proven: false,
            is_condemned: false,
            is_suspended: false,
            is_used: false,
            is_busy: false,
            is_awaited: false,
        }
    }

    #[test]
    fn in_turn_until_all_is_proven() {
        let (mut machine, now) = (Machine::new(PACE), Instant::now());
        let mut layers = [layer(1), layer(3), layer(7)];
        let mut steps =
            |layers: &[Layer], count| -> Vec<Step> { (0..count).map(|_| machine.step(now, 0, true, layers)).collect() };
        assert_eq!(steps(&layers, 4), [Step::Fetch(1), Step::Fetch(3), Step::Fetch(7), Step::Fetch(1)]);
        layers[1].is_complete = true;
        assert_eq!(steps(&layers, 3), [Step::Prove(3), Step::Fetch(7), Step::Fetch(1)]);
        layers[1].is_proven = true;
        assert_eq!(steps(&layers, 2), [Step::Fetch(7), Step::Fetch(1)]);
        for layer in &mut layers {
            (layer.is_proven, layer.is_complete) = (true, true);
        }
        assert_eq!(steps(&layers, 1), [WAIT]);
        assert_eq!(steps(&[], 1), [WAIT]);
    }

    #[test]
    fn silence_after_a_new_layer() {
        let (mut machine, start) = (Machine::new(PACE), Instant::now());
        let at = |seconds| start + Duration::from_secs(seconds);
        let layers = [layer(1)];
        assert_eq!(machine.step(at(0), 1, true, &layers), Step::Wait(PACE.quiet));
        assert_eq!(machine.step(at(20), 1, true, &layers), Step::Wait(PACE.quiet));
        assert_eq!(machine.step(at(20), 2, true, &layers), Step::Wait(PACE.quiet));
        assert_eq!(machine.step(at(49), 2, true, &layers), Step::Wait(Duration::from_secs(1)));
        assert_eq!(machine.step(at(50), 2, true, &layers), Step::Fetch(1));
    }

    #[test]
    fn claims_in_use_go_first_and_at_once() {
        let (mut machine, now) = (Machine::new(PACE), Instant::now());
        let used = |slot| Layer { is_used: true, ..layer(slot) };
        let proven = Layer { is_proven: true, ..used(1) };
        let mut layers = [proven, layer(2), used(3), used(4)];
        for expected in [Step::FetchOn(3), Step::FetchOn(4), Step::FetchOn(3)] {
            assert_eq!(machine.step(now, 1, true, &layers), expected, "also within the silence");
        }
        layers[3].is_awaited = true;
        assert_eq!(machine.step(now, 1, true, &layers), WAIT, "its start goes on");
        layers[3].is_awaited = false;
        assert_eq!(machine.step(now, 1, false, &layers), Step::ProveBySource(4));
        layers[2].is_complete = true;
        assert_eq!(machine.step(now, 1, false, &layers), Step::Prove(3));
        layers[2].is_proven = true;
        layers[3].is_condemned = true;
        assert_eq!(machine.step(now, 1, true, &layers), Step::Wait(PACE.quiet), "what is left can wait");
    }

    #[test]
    fn what_is_withheld_for_too_long_is_suspended() {
        let (mut machine, start) = (Machine::new(PACE), Instant::now());
        let at = |seconds| start + Duration::from_secs(seconds);
        let mut layers = [Layer { is_used: true, ..layer(1) }];
        machine.ended(at(0), 1, false, false);
        assert_eq!(machine.step(at(900), 0, true, &layers), Step::FetchOn(1));
        // It delivers a little, and the clock stands still until it fails again.
        machine.ended(at(900), 1, true, false);
        assert_eq!(machine.step(at(5000), 0, true, &layers), Step::FetchOn(1));
        machine.ended(at(5000), 1, false, false);
        assert_eq!(machine.step(at(5099), 0, true, &layers), Step::FetchOn(1));
        assert_eq!(machine.step(at(5100), 0, true, &layers), Step::Suspend(1));
        layers[0].is_suspended = true;
        assert_eq!(machine.step(at(5100), 0, true, &layers), Step::FetchOn(1), "and goes on trying");
        machine.ended(at(5200), 1, true, true);
        assert!(machine.failing.is_empty());
        // One that is proven is never suspended, nor one that is not used.
        for layer in [Layer { is_proven: true, is_used: true, ..layer(1) }, layer(1)] {
            let mut machine = Machine::new(PACE);
            machine.ended(at(0), 1, false, layer.is_proven);
            assert_eq!(machine.step(at(9000), 0, true, &[layer]), Step::Fetch(1));
        }
        let mut machine = Machine::new(Pace { withheld: None, ..PACE });
        machine.ended(at(0), 1, false, false);
        assert_eq!(machine.step(at(1 << 20), 0, true, &[Layer { is_used: true, ..layer(1) }]), Step::FetchOn(1));
    }

    #[test]
    fn programs_go_first_and_a_full_store_is_left_alone() {
        let (mut machine, now) = (Machine::new(PACE), Instant::now());
        let busy = [layer(1), Layer { is_busy: true, ..layer(2) }];
        assert_eq!(machine.step(now, 0, true, &busy), WAIT);
        let complete = [layer(1), Layer { is_complete: true, ..layer(2) }];
        assert_eq!(machine.step(now, 0, false, &complete), Step::Prove(2));
        assert_eq!(machine.step(now, 0, false, &complete[..1]), WAIT);
    }

    #[test]
    fn failures_make_a_layer_rest() {
        let (mut machine, start) = (Machine::new(PACE), Instant::now());
        let at = |seconds| start + Duration::from_secs(seconds);
        let layers = [layer(1)];
        assert_eq!(machine.step(at(0), 0, true, &layers), Step::Fetch(1));
        machine.ended(at(0), 1, false, false);
        assert_eq!(machine.step(at(59), 0, true, &layers), WAIT);
        assert_eq!(machine.step(at(60), 0, true, &layers), Step::Fetch(1));
        machine.ended(at(60), 1, false, false);
        assert_eq!(machine.step(at(179), 0, true, &layers), WAIT);
        assert_eq!(machine.step(at(180), 0, true, &layers), Step::Fetch(1));
        machine.ended(at(180), 1, true, false);
        assert_eq!(machine.step(at(180), 0, true, &layers), Step::Fetch(1));
        machine.ended(at(180), 1, false, false);
        // Another layer in the same slot starts afresh.
        assert_eq!(machine.step(at(181), 0, true, &[]), WAIT);
        assert_eq!(machine.step(at(181), 0, true, &layers), Step::Fetch(1));
    }
}
