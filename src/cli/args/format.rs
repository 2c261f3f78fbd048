//! `--format`: a result for people, or for programs.

/// Of a command that shows a table.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum TableFormat {
    /// for people
    Table,
    /// for programs; docs/output.md describes the fields
    Json,
}

impl TableFormat {
    pub fn is_json(self) -> bool {
        self == TableFormat::Json
    }
}

/// Of a command that shows lines of text.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum TextFormat {
    /// for people
    Text,
    /// for programs; docs/output.md describes the fields
    Json,
}

impl TextFormat {
    pub fn is_json(self) -> bool {
        self == TextFormat::Json
    }
}

/// Of a command that shows a tree.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum TreeFormat {
    /// for people
    Tree,
    /// for programs; docs/output.md describes the fields
    Json,
}

impl TreeFormat {
    pub fn is_json(self) -> bool {
        self == TreeFormat::Json
    }
}
