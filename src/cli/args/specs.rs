//! The specs among the arguments: typed, or taken from the environment.

use std::fmt;
use std::path::Path;

use anyhow::Result;

use crate::cli::args::usage;
use crate::cli::spec::{self, Env, Parsed};
use crate::config::{ExportConfig, S3Config};

/// A spec as it was typed. It can hold credentials, so `Debug` does not show it.
#[derive(Clone)]
pub struct SpecText(String);

impl fmt::Debug for SpecText {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("SpecText(redacted)")
    }
}

impl std::str::FromStr for SpecText {
    type Err = std::convert::Infallible;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        Ok(SpecText(text.to_owned()))
    }
}

/// Parses the specs of a command line, and collects what their author should know about them.
pub struct Specs<'a> {
    env: Env<'a>,
    warnings: Vec<String>,
}

/// A flag that takes specs, and the variable that stands in for it.
struct Flag {
    name: &'static str,
    variable: &'static str,
}

const CACHE_TO: Flag = Flag {
    name: "--cache-to",
    variable: "LAYERCACHE_CACHE_TO",
};
const CACHE_FROM: Flag = Flag {
    name: "--cache-from",
    variable: "LAYERCACHE_CACHE_FROM",
};

/// No variable stands in for it: it may be absent.
const ALSO: Flag = Flag {
    name: "--also",
    variable: "",
};

impl<'a> Specs<'a> {
    pub fn new(env: Env<'a>) -> Self {
        Specs {
            env,
            warnings: Vec::new(),
        }
    }

    /// A variable of the environment; an empty one counts as none.
    pub fn variable(&self, name: &str) -> Option<String> {
        (self.env)(name).filter(|value| !value.is_empty())
    }

    pub fn into_warnings(self) -> Vec<String> {
        self.warnings
    }

    /// The values of `--cache-to`, at least one, none twice.
    pub fn cache_to(&mut self, typed: Vec<SpecText>) -> Result<Vec<ExportConfig>> {
        self.parse(&CACHE_TO, typed, spec::cache_to)
    }

    /// The values of a copy's `--cache-to`, at least one, none twice.
    pub fn copy_to(&mut self, typed: Vec<SpecText>) -> Result<Vec<ExportConfig>> {
        self.parse(&CACHE_TO, typed, spec::copy_to)
    }

    /// The values of `--cache-from`, at least one, none twice.
    pub fn cache_from(&mut self, typed: Vec<SpecText>) -> Result<Vec<S3Config>> {
        self.parse(&CACHE_FROM, typed, spec::cache_from)
    }

    /// The values of both flags for a command that can do with either. The variables stand in only
    /// where neither flag was typed: a variable must not make writable what was typed as read-only.
    pub fn either(
        &mut self,
        from: Vec<SpecText>,
        to: Vec<SpecText>,
    ) -> Result<(Vec<S3Config>, Vec<ExportConfig>)> {
        let typed = !from.is_empty() || !to.is_empty();
        let stands_in = |flag: &Flag| {
            let value = (self.env)(flag.variable).unwrap_or_default();
            !typed && !spec::specs_from_env(&value).is_empty()
        };
        let (any_from, any_to) = (stands_in(&CACHE_FROM), stands_in(&CACHE_TO));
        if !typed && !any_from && !any_to {
            return Err(usage(format!(
                "no cache is given (use {} or {} type=s3,region=...,bucket=..., or set {} or {})",
                CACHE_FROM.name, CACHE_TO.name, CACHE_FROM.variable, CACHE_TO.variable
            )));
        }
        let sources = match !from.is_empty() || any_from {
            true => self.cache_from(from)?,
            false => Vec::new(),
        };
        let targets = match !to.is_empty() || any_to {
            true => self.cache_to(to)?,
            false => Vec::new(),
        };
        Ok((sources, targets))
    }

    /// The values of `--cache-from` for a command that looks at all caches of a place: each place once,
    /// whatever names the specs have.
    pub fn places_from(&mut self, typed: Vec<SpecText>) -> Result<Vec<S3Config>> {
        let mut places: Vec<S3Config> = Vec::new();
        for source in self.cache_from(typed)? {
            let is_known = |known: &S3Config| is_same_place(known, &source);
            if !places.iter().any(is_known) {
                places.push(source);
            }
        }
        Ok(places)
    }

    /// The values of `--also`, none twice.
    pub fn also(&mut self, typed: Vec<SpecText>) -> Result<Vec<S3Config>> {
        match typed.is_empty() {
            true => Ok(Vec::new()),
            false => self.parse(&ALSO, typed, spec::cache_from),
        }
    }

    fn parse<T: PartialEq>(
        &mut self,
        flag: &Flag,
        typed: Vec<SpecText>,
        parse: fn(&str, Env) -> Result<Parsed<T>>,
    ) -> Result<Vec<T>> {
        let (source, specs) = if typed.is_empty() {
            let value = (self.env)(flag.variable).unwrap_or_default();
            (flag.variable, spec::specs_from_env(&value))
        } else {
            let typed = typed.into_iter().map(|spec| spec.0);
            (flag.name, typed.collect())
        };
        let several = specs.len() > 1;
        let mut configs = Vec::with_capacity(specs.len());
        for (index, spec) in specs.iter().enumerate() {
            let label = if several {
                format!("{source} #{}", index + 1)
            } else {
                source.to_owned()
            };
            // buildx passes over a flag whose variable was empty.
            if spec.is_empty() {
                self.warnings
                    .push(format!("{label}: the spec is empty, and ignored"));
                continue;
            }
            let parsed =
                parse(spec, self.env).map_err(|error| usage(format!("{label}: {error:#}")))?;
            self.warnings.extend(
                parsed
                    .warnings
                    .iter()
                    .map(|warning| format!("{label}: {warning}")),
            );
            if configs.contains(&parsed.config) {
                self.warnings
                    .push(format!("{label}: the same as an earlier one, and ignored"));
            } else {
                configs.push(parsed.config);
            }
        }
        if configs.is_empty() {
            return Err(usage(format!(
                "no cache is given (use {flag} type=s3,region=...,bucket=..., or set {variable} to \
                 one spec per line)",
                flag = flag.name,
                variable = flag.variable,
            )));
        }
        Ok(configs)
    }
}

/// Whether two specs differ in their names at most.
pub fn is_same_place(one: &S3Config, other: &S3Config) -> bool {
    let names = other.names.clone();
    let renamed = S3Config {
        names,
        ..one.clone()
    };
    renamed == *other
}

/// A forgotten flag makes a spec the layout, and later errors would show it as a path.
pub fn check_layout(layout: &Path, flag: &str) -> Result<()> {
    if spec::is_spec(&layout.to_string_lossy()) {
        return Err(usage(format!(
            "LAYOUT looks like a spec (put {flag} before the spec, and the directory last)"
        )));
    }
    Ok(())
}
