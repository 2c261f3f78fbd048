//! Limits on the process (`ulimit`).

use std::os::unix::process::CommandExt as _;
use std::process::Command;

use expect_test::expect;
use rustix::process::{Resource, Rlimit, setrlimit};

use crate::aftermath::{assert_layout_is_sound, assert_store_is_sound, layout_of, put_cache};
use crate::program::{Program, Run};
use crate::server::Server;

const MIB: usize = 1 << 20;

/// Runs the program under a limit that it cannot raise.
fn run_within(resource: Resource, limit: u64, program: Program) -> Run {
    let mut command: Command = program.into();
    let limit = Rlimit {
        current: Some(limit),
        maximum: Some(limit),
    };
    // SAFETY: setrlimit is async-signal-safe.
    unsafe {
        command.pre_exec(move || Ok(setrlimit(resource, limit)?));
    }
    command.output().expect("the program starts").into()
}

#[test]
fn a_limit_on_the_size_of_files_fails_the_import_and_the_next_one_finishes() {
    let server = Server::start();
    for (name, size) in [("small", 70_000), ("large", 9 * MIB)] {
        put_cache(&server, name, &[size, 300]);
        let spec = server.spec(&format!("name={name}"));
        let layout = tempfile::tempdir().expect("a temporary directory");
        let import = || Program::import(&spec, layout.path());
        run_within(Resource::Fsize, 64 << 10, import())
            .ends_with(1)
            .says("writing blob sha256:")
            .says("File too large");
        assert_layout_is_sound(layout.path(), name);
        assert!(!layout.path().join("index.json").exists());
        import().run().succeeds();
        assert_layout_is_sound(layout.path(), name);
        assert!(!layout.path().join(".layercache").exists());
    }
}

#[test]
fn too_few_open_files_are_an_error_before_any_request() {
    let server = Server::start();
    let layout = layout_of(&[100]);
    let export = Program::export(&server.spec("mode=max"), layout.path());
    run_within(Resource::Nofile, 63, export).ends_with(1).prints(
        expect![""],
        expect![[r#"
            error: only 63 open files are allowed, and at least 64 are needed: raise the limit (ulimit -n)
        "#]],
    );
    assert_eq!(server.log().len(), 0);
}

#[test]
fn few_open_files_make_an_export_and_an_import_slower_but_do_not_fail_them() {
    let server = Server::start();
    let mut sizes = vec![1_000; 150];
    sizes.extend([9 * MIB; 3]);
    let layout = layout_of(&sizes);
    let spec = server.spec("mode=max,upload_parallelism=200");
    let export = Program::export(&spec, layout.path());
    run_within(Resource::Nofile, 64, export).succeeds();
    assert_store_is_sound(&server, "after the export");
    let imported = tempfile::tempdir().expect("a temporary directory");
    let import = Program::import(&server.spec(""), imported.path());
    run_within(Resource::Nofile, 64, import).succeeds();
    assert_layout_is_sound(imported.path(), "after the import");
}
