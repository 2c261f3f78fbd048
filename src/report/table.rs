//! Tables for people. On a terminal they are fitted to its width; in a file or a pipe nothing is
//! cut.

use console::{Term, measure_text_width, truncate_str};

use crate::quote::printable;

/// Between two columns.
const GAP: &str = "  ";

/// A column that is cut keeps at least this many characters.
const LEAST: usize = 12;

/// Rows under titles.
#[derive(Debug, Clone, Default)]
pub struct Table {
    columns: Vec<Column>,
    rows: Vec<Vec<String>>,
}

#[derive(Debug, Clone)]
pub struct Column {
    title: &'static str,
    right: bool,
    room: Room,
}

/// What gives way where the terminal is too narrow.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Room {
    /// Nothing.
    Needed,
    /// Its texts are cut.
    Cut,
    /// The column is left out; the last such column first.
    LeftOut,
}

impl Column {
    /// Text begins at the left.
    pub fn left(title: &'static str) -> Self {
        Column {
            title,
            right: false,
            room: Room::Needed,
        }
    }

    /// Numbers end at the right.
    pub fn right(title: &'static str) -> Self {
        Column {
            right: true,
            ..Column::left(title)
        }
    }

    /// Where the terminal is too narrow, its texts are cut.
    pub fn cut(self) -> Self {
        let room = Room::Cut;
        Column { room, ..self }
    }

    /// Where the terminal is too narrow, the column is left out.
    pub fn left_out(self) -> Self {
        let room = Room::LeftOut;
        Column { room, ..self }
    }
}

impl Table {
    pub fn new(columns: impl IntoIterator<Item = Column>) -> Self {
        Table {
            columns: columns.into_iter().collect(),
            rows: Vec::new(),
        }
    }

    /// Adds a row, one cell per column. Control characters are escaped.
    pub fn row(&mut self, cells: impl IntoIterator<Item = String>) {
        let cells = cells.into_iter().map(|cell| printable(&cell).into_owned());
        self.rows.push(cells.collect());
    }

    pub fn is_empty(&self) -> bool {
        self.rows.is_empty()
    }

    /// The lines, for stdout: the last without a line end.
    pub fn text(&self) -> String {
        self.within(columns_of_stdout())
    }

    /// The lines, each of at most `width` columns if it is given.
    fn within(&self, width: Option<usize>) -> String {
        let mut widths: Vec<Option<usize>> = (0..self.columns.len())
            .map(|at| Some(self.natural_width(at)))
            .collect();
        if let Some(width) = width {
            self.narrow(&mut widths, width);
        }
        let titles = self.columns.iter().map(|column| column.title.to_owned());
        let titles: Vec<String> = titles.collect();
        let rows = std::iter::once(&titles).chain(&self.rows);
        let lines = rows.map(|row| self.line(row, &widths));
        lines.collect::<Vec<_>>().join("\n")
    }

    fn natural_width(&self, column: usize) -> usize {
        let cells = self.rows.iter().filter_map(|row| row.get(column));
        let widest = cells.map(|cell| measure_text_width(cell)).max();
        let title = measure_text_width(self.columns[column].title);
        widest.unwrap_or_default().max(title)
    }

    /// Leaves out and cuts columns until a line fits into `width`, if that is possible. `None` is a
    /// column that is left out.
    fn narrow(&self, widths: &mut [Option<usize>], width: usize) {
        let excess = |widths: &[Option<usize>]| {
            let shown = widths.iter().flatten();
            let gaps = shown.clone().count().saturating_sub(1) * GAP.len();
            (shown.sum::<usize>() + gaps).saturating_sub(width)
        };
        let can_shrink = |widths: &[Option<usize>]| -> usize {
            let cut = self.columns.iter().zip(widths);
            let cut = cut.filter(|(column, _)| column.room == Room::Cut);
            cut.map(|(_, width)| width.unwrap_or_default().saturating_sub(LEAST))
                .sum()
        };
        for at in (0..self.columns.len()).rev() {
            if self.columns[at].room == Room::LeftOut && excess(widths) > can_shrink(widths) {
                widths[at] = None;
            }
        }
        for at in 0..self.columns.len() {
            let excess = excess(widths);
            if let Some(width) = &mut widths[at]
                && self.columns[at].room == Room::Cut
            {
                *width = width.saturating_sub(excess).max(LEAST.min(*width));
            }
        }
    }

    fn line(&self, cells: &[String], widths: &[Option<usize>]) -> String {
        let mut line = String::new();
        let mut first = true;
        for ((column, cell), width) in self.columns.iter().zip(cells).zip(widths) {
            let Some(width) = *width else { continue };
            if !std::mem::take(&mut first) {
                line.push_str(GAP);
            }
            let cell = truncate_str(cell, width, "…");
            let padding = " ".repeat(width.saturating_sub(measure_text_width(&cell)));
            let (before, after) = match column.right {
                true => (&*padding, ""),
                false => ("", &*padding),
            };
            line.extend([before, &cell, after]);
        }
        line.truncate(line.trim_end().len());
        line
    }
}

/// The width of the terminal on stdout. `None`: stdout is not a terminal.
fn columns_of_stdout() -> Option<usize> {
    let stdout = Term::stdout();
    if !stdout.is_term() {
        return None;
    }
    let (_, columns) = stdout.size_checked()?;
    Some(usize::from(columns)).filter(|columns| *columns > 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn table() -> Table {
        let mut table = Table::new([
            Column::left("name").cut(),
            Column::right("layers").left_out(),
            Column::right("size"),
            Column::left("note").left_out(),
        ]);
        let rows = [
            ["main", "7", "1.20 MiB", ""],
            ["feature/a-long-name", "12", "159 B", "two words"],
        ];
        for row in rows {
            table.row(row.map(str::to_owned));
        }
        table
    }

    #[test]
    fn columns_are_as_wide_as_what_is_in_them() {
        assert_eq!(
            table().within(None),
            "name                 layers      size  note\n\
             main                      7  1.20 MiB\n\
             feature/a-long-name      12     159 B  two words"
        );
    }

    #[test]
    fn a_narrow_terminal_cuts_texts_then_leaves_out_columns() {
        assert_eq!(
            table().within(Some(43)),
            "name            layers      size  note\n\
             main                 7  1.20 MiB\n\
             feature/a-lon…      12     159 B  two words"
        );
        assert_eq!(
            table().within(Some(30)),
            "name          layers      size\n\
             main               7  1.20 MiB\n\
             feature/a-l…      12     159 B"
        );
        assert_eq!(
            table().within(Some(10)),
            "name              size\n\
             main          1.20 MiB\n\
             feature/a-l…     159 B"
        );
    }

    #[test]
    fn wide_and_dangerous_characters_keep_the_columns_straight() {
        let mut table = Table::new([Column::left("name").cut(), Column::right("n")]);
        for name in ["日本語の枝の名前", "a\x1b[31m", "é"] {
            table.row([name.to_owned(), "1".to_owned()]);
        }
        assert_eq!(
            table.within(Some(15)),
            "name          n\n\
             日本語の枝…   1\n\
             a\\u{1b}[31m   1\n\
             é             1"
        );
    }
}
