//! The person at the terminal: prints for them, and reads their answers.

use std::io::{self, IsTerminal as _, Write as _};
use std::sync::mpsc::Sender;

use async_trait::async_trait;
use tokio::sync::oneshot;

use crate::commands::Person;
use crate::progress::Progress;
use crate::report::AnyReport;

/// Texts for stdout, in this order.
pub(crate) enum Printed {
    Report(Box<dyn AnyReport>),
    /// A text, and where to send the result of printing it.
    Text(String, oneshot::Sender<io::Result<()>>),
}

/// stdin and stderr, if they are a terminal.
pub(crate) struct Terminal {
    pub(crate) printer: Sender<Printed>,
    pub(crate) progress: Progress,
}

#[async_trait]
impl Person for Terminal {
    async fn show(&self, text: &str) -> io::Result<()> {
        let (shown, wait) = oneshot::channel();
        let _ = self.printer.send(Printed::Text(text.to_owned(), shown));
        wait.await.unwrap_or(Ok(()))
    }

    async fn confirm(&self, question: &str) -> io::Result<Option<bool>> {
        if !io::stdin().is_terminal() || !io::stderr().is_terminal() {
            return Ok(None);
        }
        // Bars would draw over the question.
        self.progress.end();
        let mut stderr = io::stderr();
        write!(stderr, "{question} [y/N] ").and_then(|()| stderr.flush())?;
        // A signal ends the run while this waits.
        let read = tokio::task::spawn_blocking(|| {
            let mut answer = String::new();
            io::stdin().read_line(&mut answer).map(|_| answer)
        });
        let answer = read.await.map_err(io::Error::other)??;
        let answer = answer.trim().to_lowercase();
        Ok(Some(matches!(answer.as_str(), "y" | "yes")))
    }
}
