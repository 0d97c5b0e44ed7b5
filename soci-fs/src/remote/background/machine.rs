//! When to fetch what nobody has asked for. Decides, and does nothing: time and the state of the layers are arguments.

use std::collections::BTreeMap;
use std::time::Duration;

use tokio::time::Instant;

/// How long a layer rests after its first failure; twice as long after each further one.
const REST_FIRST: Duration = Duration::from_secs(60);
/// No rest is longer.
const REST_LONGEST: Duration = Duration::from_secs(3600);

/// When to be quiet.
#[derive(Debug, Clone, Copy)]
pub struct Pace {
    /// After a layer was added: programs are starting, and the line is theirs.
    pub silence: Duration,
    /// Between two fetches.
    pub period: Duration,
}

/// What is known of a layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Layer {
    pub(super) slot: u16,
    /// All of it is here.
    pub(super) is_complete: bool,
    /// It was compared with the image's own digest, or found wrong: there is nothing more to do.
    pub(super) is_settled: bool,
    /// Somebody is fetching from it.
    pub(super) is_busy: bool,
}

/// What to do next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Step {
    /// Nothing, for so long.
    Wait(Duration),
    /// Fetch some of the layer in this slot.
    Fetch(u16),
    /// Prove the layer in this slot.
    Prove(u16),
}

/// The decisions so far.
#[derive(Debug)]
pub(super) struct Machine {
    pace: Pace,
    /// Layers that were ever added, and when that number changed last.
    added: (u64, Option<Instant>),
    last: u16,
    resting: BTreeMap<u16, Rest>,
}

#[derive(Debug, Clone, Copy)]
struct Rest {
    until: Instant,
    length: Duration,
}

impl Machine {
    pub(super) const fn new(pace: Pace) -> Self {
        Self { pace, added: (0, None), last: 0, resting: BTreeMap::new() }
    }

    /// The next step. `added` counts layers that were ever added; `has_room` is whether the store may grow.
    pub(super) fn step(&mut self, now: Instant, added: u64, has_room: bool, layers: &[Layer]) -> Step {
        if added != self.added.0 {
            self.added = (added, Some(now));
        }
        let quiet_until = self.added.1.map(|since| since + self.pace.silence);
        if let Some(left) =
            quiet_until.and_then(|until| until.checked_duration_since(now)).filter(|left| !left.is_zero())
        {
            return Step::Wait(left);
        }
        self.resting.retain(|slot, _| layers.iter().any(|layer| layer.slot == *slot));
        // Programs that wait go first, whichever layer they wait for.
        if layers.iter().any(|layer| layer.is_busy) {
            return Step::Wait(self.pace.period);
        }
        let is_due = |layer: &&Layer| {
            let rests = self.resting.get(&layer.slot).is_some_and(|rest| now < rest.until);
            !rests && !layer.is_settled && (layer.is_complete || has_room)
        };
        // Round robin, so that one large layer does not hold up all others.
        let after = layers.iter().filter(|layer| layer.slot > self.last).find(is_due);
        let Some(layer) = after.or_else(|| layers.iter().find(is_due)).copied() else {
            return Step::Wait(self.pace.period);
        };
        self.last = layer.slot;
        if layer.is_complete { Step::Prove(layer.slot) } else { Step::Fetch(layer.slot) }
    }

    /// Notes how a step ended.
    pub(super) fn ended(&mut self, now: Instant, slot: u16, is_good: bool) {
        if is_good {
            self.resting.remove(&slot);
            return;
        }
        let length = self.resting.get(&slot).map_or(REST_FIRST, |rest| (rest.length * 2).min(REST_LONGEST));
        self.resting.insert(slot, Rest { until: now + length, length });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PACE: Pace = Pace { silence: Duration::from_secs(30), period: Duration::from_millis(500) };
    const WAIT: Step = Step::Wait(PACE.period);

    fn layer(slot: u16) -> Layer {
        Layer { slot, is_complete: false, is_settled: false, is_busy: false }
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
        layers[1].is_settled = true;
        assert_eq!(steps(&layers, 2), [Step::Fetch(7), Step::Fetch(1)]);
        for layer in &mut layers {
            layer.is_settled = true;
        }
        assert_eq!(steps(&layers, 1), [WAIT]);
        assert_eq!(steps(&[], 1), [WAIT]);
    }

    #[test]
    fn silence_after_a_new_layer() {
        let (mut machine, start) = (Machine::new(PACE), Instant::now());
        let at = |seconds| start + Duration::from_secs(seconds);
        let layers = [layer(1)];
        assert_eq!(machine.step(at(0), 1, true, &layers), Step::Wait(Duration::from_secs(30)));
        assert_eq!(machine.step(at(20), 1, true, &layers), Step::Wait(Duration::from_secs(10)));
        assert_eq!(machine.step(at(20), 2, true, &layers), Step::Wait(Duration::from_secs(30)));
        assert_eq!(machine.step(at(50), 2, true, &layers), Step::Fetch(1));
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
        machine.ended(at(0), 1, false);
        assert_eq!(machine.step(at(59), 0, true, &layers), WAIT);
        assert_eq!(machine.step(at(60), 0, true, &layers), Step::Fetch(1));
        machine.ended(at(60), 1, false);
        assert_eq!(machine.step(at(179), 0, true, &layers), WAIT);
        assert_eq!(machine.step(at(180), 0, true, &layers), Step::Fetch(1));
        machine.ended(at(180), 1, true);
        assert_eq!(machine.step(at(180), 0, true, &layers), Step::Fetch(1));
        machine.ended(at(180), 1, false);
        // Another layer in the same slot starts afresh.
        assert_eq!(machine.step(at(181), 0, true, &[]), WAIT);
        assert_eq!(machine.step(at(181), 0, true, &layers), Step::Fetch(1));
    }
}
