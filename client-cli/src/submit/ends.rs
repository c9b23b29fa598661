//! The ends of a submit's items, in any order. Owns that each is printed and written at once, and that no more of it is
//! kept than the end of the command shows. Never: how an item came to its end.

use std::io;

use super::Shared;
use crate::{
    exit::{self, Failed},
    report::{Kept, Report},
};

/// The items that have ended so far.
pub(super) struct Ends<'a> {
    shared: &'a Shared,
    /// Reports by item index.
    reports: Vec<Option<Report>>,
    failed: usize,
    /// The items' parts of the document, if one is wanted.
    kept: Option<Kept>,
    /// The first error of writing.
    fault: Option<io::Error>,
}

impl<'a> Ends<'a> {
    pub(super) fn new(shared: &'a Shared, items: usize) -> Self {
        let kept = shared.wants_document.then(|| Kept::new(items));
        Self { shared, reports: (0..items).map(|_| None).collect(), failed: 0, kept, fault: None }
    }

    /// Handles the end of an item.
    pub(super) fn take(&mut self, (index, mut report): (usize, Report)) {
        self.failed += usize::from(report.end.is_err());
        self.shared.progress().item_done(self.failed);
        if self.shared.json_lines {
            self.shared.progress().aside(|| report.print_line());
        }
        let written = self.write_down(index, &report);
        // A failed write does not end the job: the other items' outputs still count.
        self.fault = self.fault.take().or(written.err());
        if !self.shared.shows_outputs {
            report.forget_outputs();
        }
        self.reports[index] = Some(report);
    }

    fn write_down(&mut self, index: usize, report: &Report) -> io::Result<()> {
        let document = report.to_json();
        if let Some(folder) = self.shared.folder(&report.item) {
            report.save(&folder)?;
        }
        self.kept.as_mut().map_or(Ok(()), |kept| kept.keep(index, &document))
    }

    /// The reports in the order of the items, and the items' parts of the document.
    pub(super) fn all(self, names: Vec<String>) -> Result<(Vec<Report>, Option<Kept>), io::Error> {
        // An item without a report is a bug, which has been printed.
        let lost = || Failed::new(exit::INTERNAL, "INTERNAL", "the program lost track of this item");
        let report = |(report, item): (Option<Report>, String)| {
            report.unwrap_or_else(|| Report { item, task: None, failed_at: None, end: Err(lost()) })
        };
        let reports = self.reports.into_iter().zip(names).map(report).collect();
        self.fault.map_or(Ok((reports, self.kept)), Err)
    }
}
