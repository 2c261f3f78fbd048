//! docs/reliability.md names tests. Each of them must be there.

use std::fs;
use std::path::Path;

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
            let names = text.lines().filter_map(|line| {
                let line = line.trim_start();
                let line = line.strip_prefix("async ").unwrap_or(line);
                line.strip_prefix("fn ")?.split('(').next()
            });
            tests.extend(names.map(|name| (module.clone(), name.to_owned())));
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
    let page = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/reliability.md");
    let page = fs::read_to_string(page).expect("the page");
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
