//! The client's part of the census. Owns nothing.

use super::Client;
use crate::Census;

impl Client {
    /// Counts the entries of all tables. How many tasks there are is the user's choice.
    pub fn census(&self, census: &mut Census<'_>) {
        let Self { config: _, clock: _, tasks, due, next_alive: _, broker_heard: _, broker_missed: _, actions } = self;
        census.passing("tasks", tasks.len(), usize::MAX);
        due.census("looks at tasks", tasks.len(), census);
        census.passing("actions", actions.len(), 0);
    }
}
