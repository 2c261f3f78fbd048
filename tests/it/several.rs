//! Runs over several specs, some of which fail: the others are tried, and told of.

use std::path::Path;

use serde_json::Value;

use crate::program::{Program, files, fixture, s3_manifest};
use crate::server::{Fault, Server};

fn results(file: &Path) -> Vec<Value> {
    let bytes = std::fs::read(file).expect("the metadata file is there");
    let metadata: Value = serde_json::from_slice(&bytes).expect("JSON");
    metadata["results"].as_array().expect("results").clone()
}

/// The tags of a layout, in the order of its index.
fn tags(layout: &Path) -> Vec<String> {
    let index = std::fs::read(layout.join("index.json")).expect("the index");
    let index: Value = serde_json::from_slice(&index).expect("JSON");
    let entries = index["manifests"].as_array().expect("entries");
    entries
        .iter()
        .filter_map(|entry| entry["annotations"]["org.opencontainers.image.ref.name"].as_str())
        .map(str::to_owned)
        .collect()
}

fn in_bucket(spec: &str, bucket: &str) -> String {
    spec.replace("bucket=cache", &format!("bucket={bucket}"))
}

#[test]
fn a_target_that_fails_keeps_no_other_from_being_written_or_reported() {
    let server = Server::start();
    let folder = tempfile::tempdir().expect("a temporary directory");
    let file = folder.path().join("metadata.json");
    std::fs::write(&file, "of an earlier run").expect("a file can be written");
    let run = Program::new()
        .arg("export")
        .args(["--cache-to", &server.spec("mode=max,name=a")])
        .args(["--cache-to", &in_bucket(&server.spec("name=b"), "absent")])
        .args(["--cache-to", &server.spec("name=c")])
        .arg(fixture("local-max"))
        .arg("--metadata-file")
        .arg(&file)
        .run()
        .ends_with(1);
    assert_eq!(server.objects()["manifests/a"], s3_manifest("max.json"));
    assert_eq!(server.objects()["manifests/c"], s3_manifest("min.json"));
    let told: Vec<&str> = run.stdout.lines().collect();
    assert_eq!(told.len(), 2, "{}", run.stdout);
    assert!(told[0].starts_with("exported 10 blobs to s3://cache/manifests/a"));
    assert!(told[1].contains("s3://cache/manifests/c"), "{}", run.stdout);
    let errors: Vec<&str> = run
        .stderr
        .lines()
        .filter(|line| line.starts_with("error: "))
        .collect();
    assert_eq!(errors.len(), 1, "{}", run.stderr);
    assert!(errors[0].starts_with("error: exporting to s3://absent/manifests/b: "));

    let results = results(&file);
    let of = |key: &str| -> Vec<Value> { results.iter().map(|r| r[key].clone()).collect() };
    assert_eq!(of("bucket"), ["cache", "absent", "cache"]);
    assert_eq!(of("transferred")[..2], [10, 0]);
    assert_eq!(results[0].get("error"), None);
    assert_eq!(results[2].get("error"), None);
    let failed = &results[1];
    assert!(
        failed["error"]
            .as_str()
            .is_some_and(|e| e.contains("absent")),
        "{failed}"
    );
    assert_eq!(failed.get("errorIgnored"), None);
    assert_eq!(failed["names"][0], "b");
    assert_eq!(failed["layout"], fixture("local-max").display().to_string());
    assert!(
        failed["requests"].as_u64().is_some_and(|n| n > 0),
        "{failed}"
    );
    assert!(
        failed["seconds"].as_f64().is_some_and(|s| s > 0.0),
        "{failed}"
    );
}

#[test]
fn a_failure_that_is_ignored_says_what_it_took() {
    let server = Server::start();
    let folder = tempfile::tempdir().expect("a temporary directory");
    let file = folder.path().join("metadata.json");
    let spec = in_bucket(&server.spec("ignore-error=true"), "absent");
    let run = Program::export(&spec, &fixture("local-max"))
        .arg("--metadata-file")
        .arg(&file)
        .run()
        .succeeds()
        .says("failed, which is ignored");
    assert!(!run.stdout.contains("; 0 requests"), "{}", run.stdout);
    let result = &results(&file)[0];
    assert_eq!(result["requests"], server.log().len());
    assert_eq!(result["layout"], fixture("local-max").display().to_string());
    assert_eq!(result["errorIgnored"], true);
}

#[test]
fn a_layout_that_cannot_be_read_is_one_error_and_in_every_result() {
    let server = Server::start();
    let folder = tempfile::tempdir().expect("a temporary directory");
    let file = folder.path().join("metadata.json");
    let run = Program::new()
        .arg("export")
        .args(["--cache-to", &server.spec("name=a")])
        .args(["--cache-to", &server.spec("name=b,ignore-error=true")])
        .arg(folder.path().join("absent"))
        .arg("--metadata-file")
        .arg(&file)
        .run()
        .ends_with(1);
    let errors = run.stderr.lines().filter(|l| l.starts_with("error: "));
    assert_eq!(errors.count(), 1, "{}", run.stderr);
    let results = results(&file);
    assert_eq!(results.len(), 2);
    assert_eq!(results[0]["error"], results[1]["error"]);
    assert_eq!(results[0].get("errorIgnored"), None);
    assert_eq!(results[1]["errorIgnored"], true);
}

#[test]
fn a_branch_s_cache_that_fails_does_not_keep_main_s_from_being_imported() {
    let server = Server::start();
    Program::export(&server.spec("mode=max,name=main"), &fixture("local-max"))
        .run()
        .succeeds();
    server.put("manifests/damaged", "no JSON");
    server.put("manifests/denied", s3_manifest("max.json"));
    server.fail(|asked| {
        (asked.key == "manifests/denied").then_some(Fault::Status(403, "AccessDenied"))
    });
    for branch in ["damaged", "denied"] {
        let folder = tempfile::tempdir().expect("a temporary directory");
        let (layout, file) = (folder.path().join("layout"), folder.path().join("file"));
        let run = Program::new()
            .arg("import")
            .args(["--cache-from", &server.spec(&format!("name={branch}"))])
            .args(["--cache-from", &server.spec("name=main")])
            .arg(&layout)
            .arg("--metadata-file")
            .arg(&file)
            .run()
            .ends_with(1)
            .says(&format!(
                "error: importing from s3://cache/manifests/{branch}: "
            ));
        assert!(run.stdout.starts_with("imported 'main'"), "{}", run.stdout);
        assert_eq!(tags(&layout), ["latest"]);
        assert_eq!(files(&layout), files(&fixture("local-max")));
        let results = results(&file);
        assert!(results[0]["error"].is_string(), "{}", results[0]);
        assert_eq!(results[1]["tag"], "latest");
        assert_eq!(results[1]["transferred"], 10);
    }
}

#[test]
fn require_wants_one_of_the_sources_to_be_there() {
    let server = Server::start();
    Program::export(&server.spec("mode=max,name=main"), &fixture("local-max"))
        .run()
        .succeeds();
    let import = |names: [&str; 2], folder: &Path| {
        Program::new()
            .args(["import", "--require"])
            .args(["--cache-from", &server.spec(&format!("name={}", names[0]))])
            .args(["--cache-from", &server.spec(&format!("name={}", names[1]))])
            .arg(folder.join("layout"))
            .arg("--metadata-file")
            .arg(folder.join("file"))
            .run()
    };
    for names in [["pr-7", "main"], ["main", "pr-7"]] {
        let folder = tempfile::tempdir().expect("a temporary directory");
        import(names, folder.path())
            .succeeds()
            .says("warning: there is no manifest manifests/pr-7")
            .says("imported 'main'");
        assert_eq!(tags(&folder.path().join("layout")), ["latest"]);
    }
    let folder = tempfile::tempdir().expect("a temporary directory");
    let run = import(["pr-7", "pr-8"], folder.path())
        .ends_with(1)
        .says("error: importing from s3://cache/manifests/pr-7: there is no manifest")
        .says("error: importing from s3://cache/manifests/pr-8: there is no manifest");
    assert_eq!(run.stdout, "");
    for result in results(&folder.path().join("file")) {
        assert_eq!(result["notFound"], true);
        assert!(result["error"].is_string(), "{result}");
    }
}
