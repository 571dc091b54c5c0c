//! Where the tokens lie that the latest steps chose, for steps that take them before the host has read them.

/// A token that an earlier step chooses, and that the host need not know yet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ChosenToken {
    /// How many steps were launched after that one: 0 means the step launched last.
    pub steps_since: usize,
    /// The row of that step that chooses it.
    pub row: usize,
}

impl ChosenToken {
    /// The token that a row of the step launched last chooses.
    pub fn of_last(row: usize) -> Self {
        Self { steps_since: 0, row }
    }
}

/// The slots of the tokens that the latest steps chose: one for each stage of a pipeline, which take turns.
///
/// A step's tokens stay until as many others were launched as there are slots. With one slot, a step reads the tokens of
/// the one before it, and then overwrites them.
#[derive(Debug)]
pub struct ChosenSlots {
    /// The sequences of the step whose tokens each slot has.
    rows: Vec<usize>,
    /// Sequences that a slot has room for.
    capacity: usize,
    num_launched: usize,
}

impl ChosenSlots {
    /// Makes `num_slots` slots for up to `capacity` sequences each.
    pub(super) fn new(num_slots: usize, capacity: usize) -> Self {
        Self { rows: vec![0; num_slots], capacity, num_launched: 0 }
    }

    /// The slot of the step that is put together now.
    pub fn next(&self) -> usize {
        self.num_launched % self.rows.len()
    }

    /// The slot that has a token, if its step is one of the latest and has such a row.
    pub fn slot_of(&self, token: ChosenToken) -> Option<usize> {
        let step = self.num_launched.checked_sub(token.steps_since + 1)?;
        let slot = step % self.rows.len();
        (token.steps_since < self.rows.len() && token.row < self.rows[slot]).then_some(slot)
    }

    /// Where a token lies among those of all slots, as `unpack_inputs` reads it; 0 for one that is nowhere.
    pub(super) fn index_of(&self, token: ChosenToken) -> usize {
        self.slot_of(token).map_or(0, |slot| slot * self.capacity + token.row)
    }

    /// Notes that a step of so many sequences was launched.
    pub fn launched(&mut self, num_sequences: usize) {
        let slot = self.next();
        self.rows[slot] = num_sequences;
        self.num_launched += 1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_is_found_until_its_slot_has_another_turn() {
        let mut slots = ChosenSlots::new(2, 8);
        let token = |steps_since, row| ChosenToken { steps_since, row };
        assert_eq!((slots.next(), slots.slot_of(token(0, 0))), (0, None), "nothing was launched");
        slots.launched(3);
        assert_eq!((slots.next(), slots.index_of(ChosenToken::of_last(2))), (1, 2));
        assert_eq!(slots.slot_of(token(0, 3)), None, "that step has three rows");
        slots.launched(5);
        assert_eq!((slots.index_of(token(1, 2)), slots.index_of(token(0, 4))), (2, 8 + 4));
        slots.launched(1);
        assert_eq!((slots.slot_of(token(2, 0)), slots.index_of(token(1, 4))), (None, 8 + 4));
        assert_eq!(slots.slot_of(token(0, 0)), Some(0));
    }
}
