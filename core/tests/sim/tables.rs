//! The tables of all machines: none outgrows its limit at any event, and none keeps anything once all is quiet.
//!
//! The machines count, because only they know their tables. What each count must stay below is checked here.

use mesh_core::{Census, Table};

use super::mesh::{Mesh, Node};

impl Mesh {
    /// Checks the tables of a machine that has just handled an event.
    pub(super) fn count_tables(&mut self, node: Node) {
        let grown = self.first_table(node, |table| table.entries > table.limit);
        if let Some(Table { name, entries, limit, .. }) = grown {
            self.referee
                .fail("nothing grows without bound", format!("{node} has {entries} {name}, {limit} are allowed"));
        }
    }

    /// What a machine's table still has though nothing is going on.
    pub(super) fn left_in_tables(&self) -> Option<String> {
        let workers = (0..self.workers.len()).map(Node::Worker);
        let clients = (0..self.clients.len()).map(Node::Client);
        [Node::Broker].into_iter().chain(workers).chain(clients).find_map(|node| {
            let Table { name, entries, at_rest, .. } = self.first_table(node, |table| table.entries > table.at_rest)?;
            Some(format!("{node} still has {entries} {name} instead of {at_rest}"))
        })
    }

    fn first_table(&self, node: Node, is_it: impl Fn(&Table) -> bool) -> Option<Table> {
        let mut first = None;
        let mut see = |table| {
            if first.is_none() && is_it(&table) {
                first = Some(table);
            }
        };
        let census = &mut Census::new(&mut see);
        match node {
            Node::Broker => self.broker.machine.as_ref().map(|machine| machine.census(census)),
            Node::Worker(worker) => self.workers[worker].machine.as_ref().map(|machine| machine.census(census)),
            Node::Client(client) => self.clients[client].machine.as_ref().map(|machine| machine.census(census)),
        };
        first
    }
}
