//! docs/reliability.md names tests, docs/architecture.md the source files and what they import, and
//! docs/dependencies.md the crates. What they name must be there.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;

fn page(name: &str) -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(name);
    fs::read_to_string(path).expect("the page")
}

/// The tests of the project: the module and the name of each.
fn tests() -> Vec<(String, String)> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let (mut directories, mut tests) = (vec![root.join("src"), root.join("tests")], Vec::new());
    while let Some(directory) = directories.pop() {
        for entry in fs::read_dir(directory).expect("a directory") {
            let path = entry.expect("an entry").path();
            if path.is_dir() {
                directories.push(path);
                continue;
            }
            if path.extension().is_none_or(|end| end != "rs") {
                continue;
            }
            let stem = path.file_stem().expect("a name").to_string_lossy();
            // The module that a file of tests is about gives them their name.
            let module = match &*stem {
                "tests" => path.parent().and_then(Path::file_name),
                _ => path.file_stem(),
            };
            let module = module.expect("a name").to_string_lossy().into_owned();
            let text = fs::read_to_string(&path).expect("source text");
            let mut is_test = false;
            for line in text.lines() {
                let line = line.trim_start();
                is_test |= line.starts_with("#[test]") || line.starts_with("#[tokio::test");
                let line = line.strip_prefix("async ").unwrap_or(line);
                let Some(name) = line.strip_prefix("fn ") else {
                    continue;
                };
                if is_test && let Some(name) = name.split('(').next() {
                    tests.push((module.clone(), name.to_owned()));
                }
                is_test = false;
            }
        }
    }
    tests
}

/// Whether `name` is what `claim` says, in which `…` stands for anything.
fn matches(claim: &str, name: &str) -> bool {
    let mut rest = name;
    for (index, piece) in claim.split('…').enumerate() {
        let Some(at) = rest.find(piece) else {
            return false;
        };
        if index == 0 && at > 0 {
            return false;
        }
        rest = &rest[at + piece.len()..];
    }
    claim.ends_with('…') || rest.is_empty()
}

#[test]
fn each_test_that_the_page_on_reliability_names_is_there() {
    let page = page("docs/reliability.md");
    let tests = tests();
    let mut claims = 0;
    for claim in page.split('`').skip(1).step_by(2) {
        let (module, name) = claim.rsplit_once("::").unwrap_or(("…", claim));
        // Of a path of modules, the last one is the file.
        let module = module.rsplit("::").next().unwrap_or(module);
        let is_name = |c: char| c.is_ascii_alphanumeric() || "_…*".contains(c);
        // Flags, paths and attributes are no tests. A test's name has at least three words.
        if !claim.contains("::") && name.matches('_').count() < 3 || !name.chars().all(is_name) {
            continue;
        }
        claims += 1;
        let name = name.replace('*', "…");
        assert!(
            tests
                .iter()
                .any(|(of, test)| (module == "…" || module == of) && matches(&name, test)),
            "there is no test {claim}"
        );
    }
    assert!(claims > 80, "only {claims} were recognized");
}

/// The program's source files, without those that hold tests alone: the path below `src`, and the text.
fn sources() -> Vec<(String, String)> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let (mut folders, mut sources) = (vec![root.clone()], Vec::new());
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder).expect("a folder") {
            let path = entry.expect("an entry").path();
            let name = path.file_name().expect("a name");
            let name = name.to_string_lossy().into_owned();
            // hyper-tls is a crate of its own.
            if ["tests", "tests.rs", "fuzz.rs", "hyper-tls"].contains(&&*name) {
                continue;
            }
            if path.is_dir() {
                folders.push(path);
            } else if name.ends_with(".rs") {
                let text = fs::read_to_string(&path).expect("source text");
                let path = path.strip_prefix(&root).expect("it is below src");
                sources.push((path.to_string_lossy().into_owned(), text));
            }
        }
    }
    sources
}

/// The rows of the table in `page` that begins with `head`: the cells of each.
fn table<'a>(page: &'a str, head: &str) -> Vec<Vec<&'a str>> {
    let (_, rest) = page.split_once(head).expect("the table");
    let rows = rest.lines().skip(2);
    let rows = rows.take_while(|line| line.starts_with('|'));
    rows.map(|row| row.trim_matches('|').split('|').map(str::trim).collect())
        .collect()
}

#[test]
fn each_source_file_is_on_the_page_on_architecture_and_each_file_there_is_in_the_sources() {
    let (page, sources) = (page("docs/architecture.md"), sources());
    let rows = table(&page, "| file in `src/` | job |");
    let names: Vec<_> = rows
        .iter()
        .flat_map(|row| row[0].split('`').skip(1).step_by(2))
        .collect();
    let is_named = |path: &str, name: &str| match name.ends_with('/') {
        true => path.starts_with(name),
        false => path == name || path.ends_with(&format!("/{name}")),
    };
    for (path, _) in &sources {
        let named = names.iter().any(|name| is_named(path, name));
        assert!(named, "the page does not say what {path} is for");
    }
    for name in names.iter().filter(|name| **name != "s3/hyper-tls/") {
        let there = sources.iter().any(|(path, _)| is_named(path, name));
        assert!(there, "there is no {name}");
    }
}

/// The modules at the top of the crate that `text` names, outside comments and tests.
fn imports(text: &str) -> BTreeSet<String> {
    let (text, _) = text
        .split_once("#[cfg(test)]\nmod tests {")
        .unwrap_or((text, ""));
    let lines = text
        .lines()
        .filter(|line| !line.trim_start().starts_with("//"));
    let named = lines.flat_map(|line| line.split("crate::").skip(1));
    let is_end = |c: char| !c.is_alphanumeric() && c != '_';
    named
        .filter_map(|rest| rest.split(is_end).next().map(str::to_owned))
        .collect()
}

#[test]
fn modules_import_what_the_page_on_architecture_says_and_only_what_is_below_them() {
    let page = page("docs/architecture.md");
    let (mut order, mut said) = (Vec::new(), BTreeMap::new());
    for row in table(&page, "| module | imports |") {
        let imports = row[1].split(", ").filter(|name| !name.is_empty());
        let imports: BTreeSet<_> = imports.map(str::to_owned).collect();
        for module in row[0].split('`').skip(1).step_by(2) {
            order.push(module);
            said.insert(module.to_owned(), imports.clone());
        }
    }
    let mut found: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    for (path, text) in sources() {
        let (module, _) = path.split_once(['/', '.']).expect("a name");
        if !["lib", "main"].contains(&module) {
            let imported = found.entry(module.to_owned()).or_default();
            imported.extend(imports(&text));
            imported.remove(module);
        }
    }
    assert_eq!(found, said);
    for (at, module) in order.iter().enumerate() {
        for import in &said[*module] {
            assert!(
                order[at..].contains(&&**import),
                "{module} imports {import}"
            );
        }
    }
}

/// The crates in a section of Cargo.toml.
fn crates(section: &str) -> BTreeSet<String> {
    let manifest = page("Cargo.toml");
    let head = format!("\n[{section}]\n");
    let (_, rest) = manifest.split_once(&head).expect("the section");
    let lines = rest.lines().take_while(|line| !line.starts_with('['));
    let names = lines.filter_map(|line| line.split_once(" = "));
    names.map(|(name, _)| name.to_owned()).collect()
}

#[test]
fn the_page_on_dependencies_gives_each_crate_a_reason() {
    let page = page("docs/dependencies.md");
    let rows = table(&page, "| crate | for |");
    let named = rows.iter().flat_map(|row| row[0].split(", "));
    let named: BTreeSet<_> = named.map(str::to_owned).collect();
    assert_eq!(named, crates("dependencies"));
    let (_, rest) = page.split_once("\nFor tests and benchmarks: ").expect("it");
    let (tests, _) = rest.split_once("\n\n").expect("it ends");
    for name in crates("dev-dependencies") {
        assert!(
            tests.contains(&name),
            "the page does not say what {name} is for"
        );
    }
}
