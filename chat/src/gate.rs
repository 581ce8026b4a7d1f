//! Keeps the sends of a slot in order on their way: those that are under way are counted, and are all under way to one shard.

use crate::ring::Slot;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// The gates of all slots; a clone is one more reference.
#[derive(Clone)]
pub struct Gates {
    gates: Arc<Vec<Gate>>,
}

impl Default for Gates {
    fn default() -> Self {
        Self {
            gates: Arc::new(Slot::all().map(|_| Gate::default()).collect()),
        }
    }
}

impl Gates {
    /// The gate of a slot.
    #[must_use]
    pub fn of(&self, slot: Slot) -> &Gate {
        &self.gates[slot.index()]
    }

    /// For one that has entered: leaves when it is dropped.
    #[must_use]
    pub fn hold(&self, slot: Slot) -> Hold {
        Hold {
            gates: self.clone(),
            slot,
        }
    }
}

/// One send that is under way.
pub struct Hold {
    gates: Gates,
    slot: Slot,
}

impl Drop for Hold {
    fn drop(&mut self) {
        self.gates
            .of(self.slot)
            .state
            .fetch_sub(1, Ordering::AcqRel);
    }
}

/// The gate of one slot.
#[derive(Default)]
pub struct Gate {
    /// Bit 63: closed. Bits 32 to 47: where to. Bits 0 to 31: how many are under way.
    state: AtomicU64,
    tickets: AtomicU64,
}

const CLOSED: u64 = 1 << 63;

impl Gate {
    /// The next place in the order of this slot.
    pub fn ticket(&self) -> u64 {
        self.tickets.fetch_add(1, Ordering::Relaxed)
    }

    /// One more is under way to `shard`; `false` if it must wait: the gate is closed, or others are under way elsewhere.
    pub fn enter(&self, shard: u16) -> bool {
        let entered = self
            .state
            .fetch_update(Ordering::AcqRel, Ordering::Acquire, |state| {
                let (to, count) = ((state >> 32) as u16, state as u32);
                let open = state & CLOSED == 0 && (count == 0 || to == shard);
                open.then(|| (u64::from(shard) << 32) | u64::from(count + 1))
            });
        entered.is_ok()
    }

    /// How many are under way.
    #[must_use]
    pub fn under_way(&self) -> u32 {
        self.state.load(Ordering::Acquire) as u32
    }

    /// Nobody enters any more; `true` if the gate was open.
    pub fn close(&self) -> bool {
        self.state.fetch_or(CLOSED, Ordering::AcqRel) & CLOSED == 0
    }

    /// Lets so many in that go to `shard`, while it stays closed to all others; only when none is under way.
    pub fn admit(&self, shard: u16, count: usize) {
        let state = CLOSED | (u64::from(shard) << 32) | count as u64;
        self.state.store(state, Ordering::Release);
    }

    /// Opens: whoever comes now is behind those who were let in.
    pub fn open(&self) {
        self.state.fetch_and(!CLOSED, Ordering::AcqRel);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_under_way_goes_to_one_shard_and_a_closed_gate_lets_nobody_in() {
        let gates = Gates::default();
        let slot = Slot::new(7).unwrap();
        let gate = gates.of(slot);
        assert!(gate.enter(3) && gate.enter(3));
        assert!(!gate.enter(4), "others are under way to 3");
        drop((gates.hold(slot), gates.hold(slot)));
        assert!(gate.enter(4), "nobody is any more");
        assert!(gate.close() && !gate.close());
        assert!(!gate.enter(4));
        drop(gates.hold(slot));
        assert_eq!(gate.under_way(), 0);
        gate.admit(5, 2);
        assert!(!gate.enter(5), "nobody overtakes those who were let in");
        gate.open();
        assert!(gate.enter(5) && !gate.enter(4));
        assert_eq!(gate.under_way(), 3);
        assert!(gate.ticket() < gate.ticket());
    }
}
