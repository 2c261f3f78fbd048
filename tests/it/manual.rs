//! The man pages, and that they, the help and the completions offer the same commands.

use expect_test::expect;

use crate::program::Program;

#[test]
fn examples_in_a_man_page_keep_their_lines() {
    let directory = tempfile::tempdir().unwrap();
    let man = Program::new().arg("man").arg(directory.path());
    man.run().succeeds().prints(expect![[""]], expect![[""]]);
    let page = std::fs::read_to_string(directory.path().join("layercache-serve.1")).unwrap();
    let (_, notes) = page.split_once("GLOBAL OPTIONS").expect("options");
    let (_, notes) = notes.split_once(".SH NOTES\n").expect("notes");
    expect![[r#"
        SPEC is buildx\*(Aqs: type=s3 with region, bucket, name, prefix, endpoint_url and so on.
        Leave credentials to the environment: the AWS default chain finds them.
        COMMAND gets LAYERCACHE_FROM and LAYERCACHE_TO in its environment: values for \-\-cache\-from and
        \-\-cache\-to (one per line if there are several). LAYERCACHE_GHA_FROM and LAYERCACHE_GHA_TO are the
        same for type=gha. Without \-\-cache\-to, builders cannot write.
        The exit status is COMMAND\*(Aqs.
        .SH EXAMPLES
        .nf
        layercache serve \-\-cache\-from type=s3,region=eu\-west\-1,bucket=ci\-cache,name=app \\
          \-\- sh \-c \*(Aqdocker buildx build \-\-cache\-from "$LAYERCACHE_FROM" .\*(Aq
        .fi
    "#]].assert_eq(notes);
}

#[test]
fn the_help_the_man_pages_and_the_completions_offer_the_same_commands() {
    let run = |words: &[&str]| Program::new().args(words).run().succeeds().stdout;
    let help = run(&["--help"]);
    let (_, listed) = help.split_once("Commands:\n").expect("commands");
    let listed = listed
        .lines()
        .map_while(|line| line.split_whitespace().next());
    let mut listed: Vec<_> = listed.filter(|name| *name != "help").collect();
    listed.sort_unstable();

    let directory = tempfile::tempdir().unwrap();
    run(&["man", directory.path().to_str().unwrap()]);
    let pages = std::fs::read_dir(directory.path()).unwrap();
    let pages = pages.map(|page| page.unwrap().file_name().into_string().unwrap());
    let mut pages: Vec<_> = pages
        .filter_map(|page| {
            let name = page.strip_prefix("layercache-")?.strip_suffix(".1")?;
            Some(name.to_owned())
        })
        .collect();
    pages.sort_unstable();
    assert_eq!(listed, pages);

    let script = run(&["completion", "fish"]);
    let mut completed: Vec<_> = script
        .lines()
        .filter_map(|line| {
            line.split_once("needs_command\" -f -a \"")?
                .1
                .split('"')
                .next()
        })
        .filter(|name| *name != "help")
        .collect();
    completed.sort_unstable();
    assert_eq!(listed, completed);
}
