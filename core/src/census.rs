//! A census of a machine: the entries of each of its tables, beside the limit that holds whatever its peers do.
//!
//! Each table is counted where it is kept, in a function that takes its struct apart field by field: a new field does
//! not compile until somebody has said how large it gets. Lists inside of messages are not counted: their limits are
//! those of `proto_msgs::limits`, checked on arrival.
//!
//! Owns the form. Never a number; nothing but tests asks for one.

use std::fmt;

/// One table of a machine.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Table {
    /// What it holds. Tables that every worker, task or attempt has share a name.
    pub name: &'static str,
    /// Entries now.
    pub entries: usize,
    /// Most entries there may be.
    pub limit: usize,
    /// Most entries once nothing is going on.
    pub at_rest: usize,
}

/// Passes on the tables of a machine, one after the other.
pub struct Census<'a> {
    see: &'a mut dyn FnMut(Table),
}

impl fmt::Debug for Census<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Census").finish_non_exhaustive()
    }
}

impl<'a> Census<'a> {
    /// A census that shows each table to `see`.
    pub fn new(see: &'a mut dyn FnMut(Table)) -> Self {
        Self { see }
    }

    /// A table about what is going on: it is empty when nothing is.
    pub(crate) fn passing(&mut self, name: &'static str, entries: usize, limit: usize) {
        (self.see)(Table { name, entries, limit, at_rest: 0 });
    }

    /// A table about what stays: the peers that are there, or what was learned of earlier ones.
    pub(crate) fn lasting(&mut self, name: &'static str, entries: usize, limit: usize) {
        (self.see)(Table { name, entries, limit, at_rest: limit });
    }
}
