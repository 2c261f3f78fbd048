//! Shell completions, man pages and the version, made from the same definition as `--help`.

use std::io::{self, Write as _};
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use clap_complete::Shell;
use roff::{Roff, roman};

use crate::cli::args;

/// What is made from the definition of the command line.
#[derive(Debug, Clone, clap::Subcommand)]
pub enum Manual {
    /// Print a completion script for a shell
    #[command(after_help = "\
Example, for bash:
  layercache completion bash > ~/.local/share/bash-completion/completions/layercache")]
    Completion {
        /// The shell that is to complete commands and options
        #[arg(value_name = "SHELL")]
        shell: Shell,
    },
    /// Write the man pages into a directory
    #[command(after_help = "\
Example:
  layercache man ~/.local/share/man/man1")]
    Man {
        /// Where the pages go; created if it is absent
        #[arg(value_name = "DIRECTORY")]
        directory: PathBuf,
    },
    /// Print the version
    Version,
}

impl Manual {
    /// Prints the completions or the version, or writes the man pages.
    ///
    /// # Errors
    /// The file system's, or stdout's. A reader that has gone away (`| head`) is no error.
    pub fn write(&self) -> Result<()> {
        match self {
            Manual::Completion { shell } => print(&completions(*shell)),
            Manual::Version => print(args::definition().render_version().as_bytes()),
            Manual::Man { directory } => man_pages(directory)
                .with_context(|| format!("cannot write the man pages to {}", directory.display())),
        }
    }
}

fn print(text: &[u8]) -> Result<()> {
    let mut stdout = std::io::stdout().lock();
    match stdout.write_all(text).and_then(|()| stdout.flush()) {
        Err(error) if error.kind() != std::io::ErrorKind::BrokenPipe => {
            Err(error).context("cannot write to stdout")
        }
        _ => Ok(()),
    }
}

fn completions(shell: Shell) -> Vec<u8> {
    // In memory first: clap_complete panics if it cannot write.
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut args::definition(), "layercache", &mut script);
    script
}

fn man_pages(directory: &Path) -> io::Result<()> {
    std::fs::create_dir_all(directory)?;
    let mut program = args::definition().disable_help_subcommand(true);
    program.build();
    let version = program.render_version();
    for command in program.get_subcommands().chain([&program]) {
        let page = clap_mangen::Man::new(command.clone()).source(version.trim_end());
        let mut text = Vec::new();
        page.render_title(&mut text)?;
        page.render_name_section(&mut text)?;
        page.render_synopsis_section(&mut text)?;
        page.render_description_section(&mut text)?;
        page.render_options_section(&mut text)?;
        if command.has_subcommands() {
            page.render_subcommands_section(&mut text)?;
        }
        if let Some(help) = command.get_after_help() {
            after_help(&help.to_string()).to_writer(&mut text)?;
        }
        std::fs::write(directory.join(page.get_filename()), text)?;
    }
    Ok(())
}

/// What stands below the options in `--help`. clap_mangen would fill the examples like prose.
fn after_help(help: &str) -> Roff {
    let mut page = Roff::new();
    for section in help.split("\n\n") {
        let lines = section.lines();
        if section.starts_with("Example") {
            page.control("SH", ["EXAMPLES"]).control("nf", []);
            for line in lines.skip(1) {
                page.text([roman(line.strip_prefix("  ").unwrap_or(line))]);
            }
            page.control("fi", []);
        } else {
            page.control("SH", ["NOTES"]);
            for line in lines {
                page.text([roman(line)]);
            }
        }
    }
    page
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use clap::ValueEnum as _;

    use super::*;

    #[test]
    fn bash_completes_commands_options_and_values() {
        let mut script = completions(Shell::Bash);
        script.extend(
            b"\ncomplete_words() { COMP_WORDS=(\"$@\"); COMP_CWORD=$(($# - 1)); COMPREPLY=()
              _layercache layercache \"${@: -1}\" \"${@: -2:1}\"; echo ${COMPREPLY[@]}; }
              complete_words layercache exp; complete_words layercache export --verify
              complete_words layercache import --missing ''\n",
        );
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("script");
        std::fs::write(&file, script).unwrap();
        let output = Command::new("bash").arg(&file).output().unwrap();
        assert_eq!(
            (
                &*String::from_utf8_lossy(&output.stdout),
                &*String::from_utf8_lossy(&output.stderr)
            ),
            ("export\n--verify-remote\ndrop error\n", "")
        );
    }

    #[test]
    fn the_completions_of_every_shell_know_every_option() {
        for shell in Shell::value_variants() {
            let script = String::from_utf8(completions(*shell)).unwrap();
            for command in args::definition().get_subcommands() {
                let long = command
                    .get_arguments()
                    .filter_map(|option| option.get_long());
                for option in long {
                    assert!(script.contains(option), "{shell}: --{option}");
                }
            }
        }
    }

    #[test]
    fn there_is_a_man_page_for_the_program_and_for_each_command() {
        let directory = tempfile::tempdir().unwrap();
        let pages = directory.path().join("share/man/man1");
        let man = Manual::Man {
            directory: pages.clone(),
        };
        man.write().unwrap();
        let mut names: Vec<_> = std::fs::read_dir(&pages)
            .unwrap()
            .map(|page| page.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        assert_eq!(
            names,
            [
                "layercache-completion.1",
                "layercache-copy.1",
                "layercache-doctor.1",
                "layercache-export.1",
                "layercache-import.1",
                "layercache-inspect.1",
                "layercache-lifecycle.1",
                "layercache-ls.1",
                "layercache-man.1",
                "layercache-prune.1",
                "layercache-serve.1",
                "layercache-verify.1",
                "layercache-version.1",
                "layercache.1"
            ]
        );
        let export = std::fs::read_to_string(pages.join("layercache-export.1")).unwrap();
        assert!(export.contains("verify\\-remote"), "{export}");
    }
}
