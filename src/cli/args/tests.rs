use super::*;
use crate::cache::digest::Digest;
use crate::cli::spec::tests::{env_of, no_env};
use crate::config::Selection;
use crate::config::{ExportTask, ImportTask, Missing, Resend};

const SPEC: &str = "type=s3,region=us-east-1,bucket=cache";

fn typed(words: &[&str]) -> Args {
    match parse([&["layercache"], words].concat()) {
        Ok(Asked::Work(args)) => args,
        Ok(Asked::Manual(manual)) => panic!("{manual:?} works on no cache"),
        Err(error) => panic!("{error}"),
    }
}

fn refused(words: &[&str]) -> clap::Error {
    parse([&["layercache"], words].concat()).expect_err("the command line was accepted")
}

fn export(words: &[&str]) -> (ExportTask, Vec<String>) {
    match resolve(typed(&[&["export"], words].concat()), &no_env).unwrap() {
        (Task::Export(task), warnings) => (task, warnings),
        (task, _) => panic!("export became {task:?}"),
    }
}

fn import(words: &[&str]) -> (ImportTask, Vec<String>) {
    match resolve(typed(&[&["import"], words].concat()), &no_env).unwrap() {
        (Task::Import(task), warnings) => (task, warnings),
        (task, _) => panic!("import became {task:?}"),
    }
}

fn usage_error(words: &[&str], env: Env) -> String {
    let error = resolve(typed(words), env).expect_err("the command line was accepted");
    assert!(error.is::<UsageError>(), "{error:?}");
    format!("{error:#}")
}

fn spec_of(bucket: &str) -> String {
    format!("type=s3,region=us-east-1,bucket={bucket}")
}

#[test]
fn the_definition_is_sound() {
    definition().debug_assert();
}

#[test]
fn an_export_has_its_defaults() {
    let (task, warnings) = export(&["--cache-to", SPEC, "dir"]);
    assert_eq!(
        task,
        ExportTask {
            targets: vec![spec::cache_to(SPEC, &no_env).unwrap().config],
            layout: PathBuf::from("dir"),
            selection: Selection::Default,
            resend: Resend::None,
            dry_run: false,
        }
    );
    assert_eq!(warnings, Vec::<String>::new());
}

#[test]
fn an_import_has_its_defaults() {
    let (task, warnings) = import(&["--cache-from", SPEC, "dir"]);
    assert_eq!(
        task,
        ImportTask {
            sources: vec![spec::cache_from(SPEC, &no_env).unwrap().config],
            layout: PathBuf::from("dir"),
            tag: None,
            require: false,
            missing: Missing::Drop,
            verify: false,
            refresh: None,
            dry_run: false,
        }
    );
    assert_eq!(warnings, Vec::<String>::new());
}

#[test]
fn every_flag_of_an_export_takes_effect() {
    let (task, _) = export(&["--cache-to", SPEC, "--tag", "v1", "--dry-run", "dir"]);
    assert_eq!(task.selection, Selection::Tag("v1".to_owned()));
    assert!(task.dry_run);
    let digest = Digest::of(b"manifest");
    let (task, _) = export(&["--cache-to", SPEC, "--digest", &digest.to_string(), "dir"]);
    assert_eq!(task.selection, Selection::Digest(digest));
}

#[test]
fn every_flag_of_an_import_takes_effect() {
    let (task, _) = import(&[
        "dir",
        "--cache-from",
        SPEC,
        "--tag=v1",
        "--require",
        "--missing=error",
        "--verify",
        "--dry-run",
    ]);
    assert_eq!(
        (task.tag.as_deref(), task.missing),
        (Some("v1"), Missing::Error)
    );
    assert!(task.require && task.verify && task.dry_run);
    let (task, _) = import(&["--cache-from", SPEC, "--missing", "drop", "dir"]);
    assert_eq!(task.missing, Missing::Drop);
}

#[test]
fn global_flags_stand_before_or_after_the_subcommand() {
    let globals = [
        "--progress",
        "rawjson",
        "--metadata-file",
        "meta.json",
        "-vv",
    ];
    let rest = ["export", "--cache-to", SPEC, "dir"];
    let expected = Global {
        progress: Some(Display::Rawjson),
        quiet: false,
        metadata_file: Some(PathBuf::from("meta.json")),
        verbose: 2,
    };
    assert_eq!(typed(&[&globals[..], &rest].concat()).global, expected);
    assert_eq!(typed(&[&rest[..], &globals].concat()).global, expected);
}

#[test]
fn quiet_is_short_for_progress_quiet_and_the_last_of_the_two_wins() {
    let shown = |words: &[&str]| typed(words).global.progress(&no_env).unwrap();
    for words in [
        &["export", "-q", "dir"][..],
        &["-q", "export", "dir"],
        &["export", "--progress=plain", "--quiet", "dir"],
    ] {
        assert_eq!(shown(words), Display::Quiet, "{words:?}");
    }
    for words in [
        &["export", "-q", "--progress=plain", "dir"][..],
        &["export", "--progress=tty", "--progress=plain", "dir"],
        &["--progress=tty", "export", "--progress=plain", "dir"],
    ] {
        assert_eq!(shown(words), Display::Plain, "{words:?}");
    }
    let verbose = |words: &[&str]| typed(words).global.verbose;
    assert_eq!(verbose(&["export", "-v", "-q", "dir"]), 0);
    assert_eq!(verbose(&["export", "-q", "-v", "dir"]), 1);
}

#[test]
fn of_a_repeated_flag_the_last_one_wins() {
    let (task, _) = import(&[
        "--cache-from",
        SPEC,
        "--tag=a",
        "--require",
        "--missing=error",
        "--tag=b",
        "--require",
        "--missing=drop",
        "dir",
    ]);
    assert_eq!(
        (task.tag.as_deref(), task.require, task.missing),
        (Some("b"), true, Missing::Drop)
    );
}

#[test]
fn progress_is_the_flags_then_the_environments_then_auto() {
    let flag = typed(&["--progress", "tty", "export", "dir"]).global;
    let none = typed(&["export", "dir"]).global;
    let plain = env_of(&[("BUILDKIT_PROGRESS", "plain")]);
    assert_eq!(flag.progress(&plain).unwrap(), Display::Tty);
    assert_eq!(none.progress(&plain).unwrap(), Display::Plain);
    assert_eq!(none.progress(&no_env).unwrap(), Display::Auto);
    let empty = env_of(&[("BUILDKIT_PROGRESS", "")]);
    assert_eq!(none.progress(&empty).unwrap(), Display::Auto);
    let buildx = env_of(&[("BUILDKIT_PROGRESS", "none")]);
    assert_eq!(none.progress(&buildx).unwrap(), Display::Quiet);
    let flag = typed(&["--progress=none", "export", "dir"]).global;
    assert_eq!(flag.progress(&no_env).unwrap(), Display::Quiet);
    let error = none
        .progress(&env_of(&[("BUILDKIT_PROGRESS", "fancy")]))
        .unwrap_err();
    assert!(error.is::<UsageError>());
    assert_eq!(
        error.to_string(),
        "BUILDKIT_PROGRESS: \"fancy\" is not a mode (accepted: auto, plain, tty, quiet, rawjson)"
    );
}

#[test]
fn specs_repeat_and_keep_their_order() {
    let (task, _) = export(&[
        "--cache-to",
        &spec_of("one"),
        "--cache-to",
        &spec_of("two"),
        "dir",
    ]);
    let buckets: Vec<_> = task.targets.iter().map(|to| &*to.s3.bucket).collect();
    assert_eq!(buckets, ["one", "two"]);
}

#[test]
fn the_variable_holds_one_spec_a_line_and_yields_to_the_flag() {
    let env = env_of(&[
        (
            "LAYERCACHE_CACHE_TO",
            "# the shared one\ntype=s3,region=a,bucket=one\n\n  #type=gha\n type=s3,region=a,bucket=two\n",
        ),
        ("LAYERCACHE_CACHE_FROM", "type=s3,region=a,bucket=three"),
    ]);
    let (Task::Export(task), _) = resolve(typed(&["export", "dir"]), &env).unwrap() else {
        panic!("export became import");
    };
    let buckets: Vec<_> = task.targets.iter().map(|to| &*to.s3.bucket).collect();
    assert_eq!(buckets, ["one", "two"]);
    let (Task::Import(task), _) = resolve(typed(&["import", "dir"]), &env).unwrap() else {
        panic!("import became export");
    };
    assert_eq!(task.sources[0].bucket, "three");
    let flagged = typed(&["import", "--cache-from", SPEC, "dir"]);
    let (Task::Import(task), _) = resolve(flagged, &env).unwrap() else {
        panic!("import became export");
    };
    assert_eq!(task.sources.len(), 1);
    assert_eq!(task.sources[0].bucket, "cache");
}

#[test]
fn no_spec_at_all_is_a_usage_error_that_names_flag_and_variable() {
    assert_eq!(
        usage_error(&["export", "dir"], &no_env),
        "no cache is given (use --cache-to type=s3,region=...,bucket=..., or set \
         LAYERCACHE_CACHE_TO to one spec per line)"
    );
    let blank = env_of(&[("LAYERCACHE_CACHE_FROM", " \n")]);
    let expected = "no cache is given (use --cache-from type=s3,region=...,bucket=..., or set \
         LAYERCACHE_CACHE_FROM to one spec per line)";
    assert_eq!(usage_error(&["import", "dir"], &blank), expected);
    assert_eq!(
        usage_error(&["import", "--cache-from", "", "dir"], &no_env),
        expected
    );
}

#[test]
fn an_error_says_which_of_several_specs_is_wrong() {
    let env = env_of(&[(
        "LAYERCACHE_CACHE_FROM",
        "type=s3,region=a,bucket=one\ntype=gha",
    )]);
    let gha = "type: \"gha\" is not supported (accepted: s3)";
    for (words, expected) in [
        (
            &["export", "--cache-to", SPEC, "--cache-to=type=gha", "dir"][..],
            "--cache-to #2",
        ),
        (&["export", "--cache-to=type=gha", "dir"], "--cache-to"),
        (&["import", "dir"], "LAYERCACHE_CACHE_FROM #2"),
    ] {
        assert_eq!(usage_error(words, &env), format!("{expected}: {gha}"));
    }
}

#[test]
fn warnings_say_which_spec_they_are_about() {
    let (task, warnings) = import(&[
        "--cache-from",
        &spec_of("one"),
        "--cache-from",
        &format!("{},mode=max", spec_of("two")),
        "--cache-from",
        "",
        "--cache-from",
        &spec_of("one"),
        "dir",
    ]);
    assert_eq!(task.sources.len(), 2);
    assert_eq!(
        warnings,
        [
            "--cache-from #2: mode: ignored: it means something on --cache-to only",
            "--cache-from #3: the spec is empty, and ignored",
            "--cache-from #4: the same as an earlier one, and ignored",
        ]
    );
}

#[test]
fn a_wrong_command_line_is_refused_with_status_2() {
    let digest = Digest::of(b"").to_string();
    for (words, kind) in [
        (
            &["export", "--cache-to", SPEC][..],
            ErrorKind::MissingRequiredArgument,
        ),
        (
            &["export", "--tag", "a", "--digest", &digest, "dir"],
            ErrorKind::ArgumentConflict,
        ),
        (
            &["export", "--digest", "sha256:12", "dir"],
            ErrorKind::ValueValidation,
        ),
        (&["export", "--tag", "", "dir"], ErrorKind::ValueValidation),
        (
            &["import", "--tag", "a b", "dir"],
            ErrorKind::ValueValidation,
        ),
        (
            &["import", "--tag", "a\u{7}", "dir"],
            ErrorKind::ValueValidation,
        ),
        (
            &["import", "--missing", "keep", "dir"],
            ErrorKind::InvalidValue,
        ),
        (
            &["import", "--progress", "fancy", "dir"],
            ErrorKind::InvalidValue,
        ),
        (
            &["import", "--cache-to", SPEC, "dir"],
            ErrorKind::UnknownArgument,
        ),
        (&["export", "--require", "dir"], ErrorKind::UnknownArgument),
        (&[], ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand),
    ] {
        let error = refused(words);
        assert_eq!((error.kind(), error.exit_code()), (kind, 2), "{words:?}");
    }
}

#[test]
fn help_and_version_are_no_failures() {
    for words in [
        &["--help"][..],
        &["-h"],
        &["export", "--help"],
        &["import", "--help"],
        &["--version"],
    ] {
        assert_eq!(refused(words).exit_code(), 0, "{words:?}");
    }
    assert_eq!(
        refused(&["--version"]).to_string(),
        format!("layercache {}\n", env!("CARGO_PKG_VERSION"))
    );
    let help = refused(&["export", "--help"]).to_string();
    assert!(help.contains("LAYERCACHE_CACHE_TO"), "{help}");
    assert!(help.contains("Example:"), "{help}");
}

#[test]
fn a_directory_with_an_odd_name_is_no_spec() {
    for layout in [
        "./cache-key=1",
        "/var/jenkins/job@2//cache",
        "/data/type=local/token=1",
        "out,key=2",
        "prototype=3",
    ] {
        let (task, _) = export(&["--cache-to", SPEC, layout]);
        assert_eq!(task.layout, PathBuf::from(layout));
    }
}

#[test]
fn no_message_shows_a_spec_that_stands_in_the_wrong_place() {
    let spec = format!("{SPEC},access_key_id=a,secret_access_key=hidden");
    for words in [
        &["export", "dir", &spec][..],
        &["export", "--progress", &spec, "dir"],
        &["export", "--tag", &format!("{spec} "), "dir"],
        &["export", "--digest", &spec, "dir"],
        &[&spec],
        &["import", "--missing", &spec, "dir"],
    ] {
        let error = refused(words);
        assert_eq!(error.exit_code(), 2);
        assert!(!error.to_string().contains("hidden"), "{error}");
    }
    for spec in [
        &*spec,
        "Bucket=cache",
        "a b, type=s3",
        "region=a;secret_access_key=hidden",
        "./session_token=hidden",
        "http://me:hidden@host/",
    ] {
        assert_eq!(
            usage_error(&["export", spec], &no_env),
            "LAYOUT looks like a spec (put --cache-to before the spec, and the directory last)"
        );
    }
    let args = typed(&["export", "--cache-to", &spec, "dir"]);
    assert!(!format!("{args:?}").contains("hidden"));
}
