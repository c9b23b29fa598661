//! A task as people name it: by its id, or by a part of it. Owns what a part may look like, and which task it means.
//! Never asks.

use std::str::FromStr;

use mesh_sdk::TaskId;

use crate::exit::{self, Failed};

/// Shortest part of an id: fewer characters are in too many of them.
const PART_CHARS_MIN: usize = 4;

/// Ids listed in an error.
const LISTED_MAX: usize = 5;

/// The newest tasks, among which a part of an id is looked for.
pub(crate) const LOOK_MAX: usize = 2_000;

/// A task on the command line.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) enum TaskName {
    Id(TaskId),
    /// Some characters of the id: its beginning is the time of the submit, its end differs from task to task.
    Part(String),
}

impl FromStr for TaskName {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        if let Ok(id) = text.parse() {
            return Ok(Self::Id(id));
        }
        let part = text.to_ascii_lowercase();
        let is_of_an_id = part.bytes().all(|byte| byte.is_ascii_hexdigit() || byte == b'-');
        if is_of_an_id && part.len() >= PART_CHARS_MIN {
            return Ok(Self::Part(part));
        }
        Err(
            "a task's id looks like 0198d3a1-5b2c-7e4f-8a90-1b2c3d4e5f60, and four characters of it are enough if no other \
             task has them; `mesh-client tasks` lists yours",
        )
    }
}

impl TaskName {
    /// The task of this name among `tasks`.
    ///
    /// # Errors
    /// If no task has this part in its id, or several have.
    pub(crate) fn among(&self, tasks: &[TaskId]) -> Result<TaskId, Failed> {
        let part = match self {
            Self::Id(id) => return Ok(*id),
            Self::Part(part) => part,
        };
        let ids = || tasks.iter().map(TaskId::to_string).filter(|id| id.contains(part.as_str()));
        let found: Vec<&TaskId> = tasks.iter().filter(|task| task.to_string().contains(part.as_str())).collect();
        match found[..] {
            [only] => Ok(*only),
            [] => {
                let text = format!("none of this client's newest {LOOK_MAX} tasks has '{part}' in its id");
                Err(Failed::new(exit::NOT_FOUND, "NOT_FOUND", text))
            }
            _ => {
                let listed = ids().take(LISTED_MAX).collect::<Vec<_>>().join(", ");
                let more = if found.len() > LISTED_MAX { ", …" } else { "" };
                let text = format!("'{part}' is in the ids of {} tasks: give more of it ({listed}{more})", found.len());
                Err(Failed::new(exit::USAGE, "USAGE", text))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ids() -> [TaskId; 3] {
        [
            "0198d3a1-5b2c-7e4f-8a90-1b2c3d4e5f60",
            "0198d3a1-5b2c-7e4f-8a90-1b2c3d4e5f61",
            "0198d3a2-0000-7000-8000-abcdef000001",
        ]
        .map(|id| id.parse().unwrap())
    }

    #[test]
    fn a_part_of_an_id_means_the_one_task_that_has_it() {
        let named = |name: &str| name.parse::<TaskName>().unwrap().among(&ids());
        assert_eq!(named("0198d3a2").unwrap(), ids()[2]);
        assert_eq!(named("5F61").unwrap(), ids()[1]);
        assert_eq!(named("8000-abcd").unwrap(), ids()[2]);
        // A whole id needs no list: the broker may know tasks that are not in it.
        assert_eq!(named("0198d3a9-5b2c-7e4f-8a90-1b2c3d4e5f60").unwrap().to_string()[..8], *"0198d3a9");
        let (several, none) = (named("0198d3a1").unwrap_err(), named("9999").unwrap_err());
        assert!(several.exit == exit::USAGE && several.text.contains("5f60, 0198d3a1-"), "{several:?}");
        assert_eq!((none.exit, none.code), (exit::NOT_FOUND, "NOT_FOUND"));
    }

    #[test]
    fn what_cannot_be_in_an_id_is_refused_at_once() {
        for text in ["", "019", "model", "0198d3a1 5b2c", "--"] {
            assert!(text.parse::<TaskName>().is_err(), "{text}");
        }
    }
}
