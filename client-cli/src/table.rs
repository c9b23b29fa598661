//! Tables in the style of `docker ps` and `kubectl get`: capital headings, columns three spaces apart, no lines. Also
//! filters text for the terminal, since names and reasons come from other machines and models.

/// One line for a terminal: characters that move the cursor, change colours or reverse text become `U+FFFD`.
pub(crate) fn printable(text: &str) -> String {
    text.chars().map(|character| if is_command(character) { char::REPLACEMENT_CHARACTER } else { character }).collect()
}

/// [`printable`] for text of several lines.
pub(crate) fn printable_lines(text: &str) -> String {
    text.split('\n').map(printable).collect::<Vec<_>>().join("\n")
}

/// Whether a character is a control character or changes the direction of text.
fn is_command(character: char) -> bool {
    character.is_control() || matches!(character, '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
}

/// Which columns of a table are shown.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Columns {
    /// All, for scripts and wide terminals.
    All,
    /// Those that fit a terminal of about 100 characters.
    Main,
}

/// The [`table`] with all columns, or with those under the `main` headings.
pub(crate) fn table_of(columns: Columns, main: &[&str], headings: &[&str], rows: &[Vec<String>]) -> String {
    let is_kept = |place: &usize| columns == Columns::All || main.contains(&headings[*place]);
    let kept: Vec<usize> = (0..headings.len()).filter(is_kept).collect();
    let headings: Vec<&str> = kept.iter().map(|place| headings[*place]).collect();
    let cells = |row: &Vec<String>| kept.iter().map(|place| row[*place].clone()).collect();
    table(&headings, &rows.iter().map(cells).collect::<Vec<_>>())
}

/// A table of [`printable`] cells under headings, each column as wide as its widest cell. Ends with a line end.
pub(crate) fn table(headings: &[&str], rows: &[Vec<String>]) -> String {
    let rows: Vec<Vec<String>> = rows.iter().map(|row| row.iter().map(|cell| printable(cell)).collect()).collect();
    let width = |column: usize| {
        let cells = rows.iter().filter_map(|row| row.get(column)).map(|cell| cell.chars().count());
        cells.chain([headings[column].chars().count()]).max().unwrap_or(0)
    };
    let widths: Vec<usize> = (0..headings.len()).map(width).collect();
    let mut text = String::new();
    let heading = headings.iter().map(|heading| (*heading).to_owned()).collect();
    for row in std::iter::once(&heading).chain(&rows) {
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

    #[test]
    fn a_terminal_gets_the_main_columns() {
        let shown = |columns| {
            table_of(
                columns,
                &["NAME", "SEEN"],
                &["NAME", "ID", "SEEN"],
                &[["a", "7", "1 s"].map(str::to_owned).into()],
            )
        };
        assert_eq!(shown(Columns::Main), "NAME   SEEN\na      1 s\n");
        assert_eq!(shown(Columns::All), "NAME   ID   SEEN\na      7    1 s\n");
    }

    #[test]
    fn a_name_cannot_command_the_terminal() {
        let rows = [vec!["ev\x1b[31mil\nx".into(), "1".into()]];
        assert_eq!(table(&["NAME", "SLOTS"], &rows), "NAME          SLOTS\nev\u{fffd}[31mil\u{fffd}x   1\n");
        assert_eq!(printable("a\u{9b}2J\u{202e}b\tc"), "a\u{fffd}2J\u{fffd}b\u{fffd}c");
        assert_eq!(printable_lines("first\nse\rcond\n"), "first\nse\u{fffd}cond\n");
    }
}
