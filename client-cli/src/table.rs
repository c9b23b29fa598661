//! Tables as `docker ps` and `kubectl get` print them: capital headings, columns three spaces apart, no lines.

/// Rows under headings, each column as wide as its widest cell, ending with a line end.
pub(crate) fn table(headings: &[&str], rows: &[Vec<String>]) -> String {
    let width = |column: usize| {
        let cells = rows.iter().filter_map(|row| row.get(column)).map(|cell| cell.chars().count());
        cells.chain([headings[column].chars().count()]).max().unwrap_or(0)
    };
    let widths: Vec<usize> = (0..headings.len()).map(width).collect();
    let mut text = String::new();
    let heading = headings.iter().map(|heading| (*heading).to_owned()).collect();
    for row in std::iter::once(&heading).chain(rows) {
        let cells = row.iter().zip(&widths).map(|(cell, width)| format!("{cell:<width$}"));
        text.push_str(cells.collect::<Vec<_>>().join("   ").trim_end());
        text.push('\n');
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_stand_under_each_other() {
        let rows = [vec!["pi-4".into(), "2/4".into()], vec!["größer".into(), "".into()]];
        assert_eq!(table(&["NAME", "SLOTS"], &rows), "NAME     SLOTS\npi-4     2/4\ngrößer\n");
        assert_eq!(table(&["NAME"], &[]), "NAME\n");
    }
}
