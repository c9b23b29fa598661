//! The broker's part of the census. Owns nothing.

use super::Broker;
use crate::Census;

impl Broker {
    /// Counts the entries of all tables.
    pub fn census(&self, census: &mut Census<'_>) {
        let Self {
            config,
            workers,
            worker_looks,
            twins,
            tasks,
            queue,
            paces,
            slos,
            turned_away,
            preloads,
            savings,
            outgrown,
            errors,
            last_chosen: _,
            clock: _,
            last_handled: _,
            store_ok: _,
            counters: _,
            actions,
        } = self;
        workers.census(config.workers_max, tasks.live(), census);
        worker_looks.census("looks at workers", workers.len(), census);
        twins.census(workers.len(), census);
        tasks.census(config, census);
        queue.census(tasks.live(), census);
        paces.iter().for_each(|pace| pace.census(census));
        slos.census(|id| workers.get(id).is_some(), census);
        turned_away.census(census);
        preloads.census(census);
        savings.census(census);
        outgrown.census(census);
        errors.census(census);
        census.passing("actions", actions.len(), 0);
    }
}
