//! `layercache lifecycle`.

use std::path::Path;

use expect_test::expect;
use s3s::dto::{
    ExpirationStatus, LifecycleExpiration, LifecycleRule, LifecycleRuleFilter, Tag, Transition,
    TransitionStorageClass,
};

use crate::program::{Program, Run};
use crate::server::{Fault, Server};

fn lifecycle(server: &Server, extra: &str, flags: &[&str]) -> Run {
    Program::new()
        .args(["lifecycle", "--cache-to", &server.spec(extra)])
        .args(flags)
        .run()
}

fn expire(id: &str, prefix: &str, days: i32) -> LifecycleRule {
    LifecycleRule {
        abort_incomplete_multipart_upload: None,
        expiration: Some(LifecycleExpiration {
            days: Some(days),
            ..LifecycleExpiration::default()
        }),
        filter: Some(LifecycleRuleFilter {
            prefix: Some(prefix.to_owned()),
            ..LifecycleRuleFilter::default()
        }),
        id: Some(id.to_owned()),
        noncurrent_version_expiration: None,
        noncurrent_version_transitions: None,
        prefix: None,
        status: ExpirationStatus::from_static(ExpirationStatus::ENABLED),
        transitions: None,
    }
}

fn archive(id: &str, prefix: &str) -> LifecycleRule {
    LifecycleRule {
        expiration: None,
        transitions: Some(vec![Transition {
            days: Some(1),
            storage_class: Some(TransitionStorageClass::from_static(
                TransitionStorageClass::GLACIER,
            )),
            ..Transition::default()
        }]),
        ..expire(id, prefix, 1)
    }
}

#[test]
fn without_a_flag_it_prints_the_rules_as_aws_takes_them_and_sends_nothing() {
    let server = Server::start();
    let run = lifecycle(&server, "prefix=ci/", &[]);
    run.succeeds().prints(
        expect![[r#"
            {
              "Rules": [
                {
                  "ID": "layercache-manifests-dc291ef0",
                  "Filter": {
                    "Prefix": "ci/manifests/"
                  },
                  "Status": "Enabled",
                  "Expiration": {
                    "Days": 14
                  },
                  "NoncurrentVersionExpiration": {
                    "NoncurrentDays": 1
                  }
                },
                {
                  "ID": "layercache-blobs-fa035e5f",
                  "Filter": {
                    "Prefix": "ci/blobs/sha256:"
                  },
                  "Status": "Enabled",
                  "Expiration": {
                    "Days": 16
                  },
                  "NoncurrentVersionExpiration": {
                    "NoncurrentDays": 1
                  }
                },
                {
                  "ID": "layercache-uploads-fa035e5f",
                  "Filter": {
                    "Prefix": "ci/blobs/sha256:"
                  },
                  "Status": "Enabled",
                  "AbortIncompleteMultipartUpload": {
                    "DaysAfterInitiation": 2
                  }
                }
              ]
            }
        "#]],
        expect![[""]],
    );
    assert_eq!(server.log().len(), 0);
    let run = lifecycle(
        &server,
        "prefix=ci/,touch_refresh=36h",
        &["--expire-after", "30d"],
    );
    run.succeeds().prints(
        expect![[r#"
            {
              "Rules": [
                {
                  "ID": "layercache-manifests-dc291ef0",
                  "Filter": {
                    "Prefix": "ci/manifests/"
                  },
                  "Status": "Enabled",
                  "Expiration": {
                    "Days": 30
                  },
                  "NoncurrentVersionExpiration": {
                    "NoncurrentDays": 1
                  }
                },
                {
                  "ID": "layercache-blobs-fa035e5f",
                  "Filter": {
                    "Prefix": "ci/blobs/sha256:"
                  },
                  "Status": "Enabled",
                  "Expiration": {
                    "Days": 33
                  },
                  "NoncurrentVersionExpiration": {
                    "NoncurrentDays": 1
                  }
                },
                {
                  "ID": "layercache-uploads-fa035e5f",
                  "Filter": {
                    "Prefix": "ci/blobs/sha256:"
                  },
                  "Status": "Enabled",
                  "AbortIncompleteMultipartUpload": {
                    "DaysAfterInitiation": 2
                  }
                }
              ]
            }
        "#]],
        expect![[""]],
    );
}

#[test]
fn where_manifests_share_the_blobs_prefix_only_the_named_caches_expire() {
    let server = Server::start();
    let spec = "blobs_prefix=c/,manifests_prefix=c/,name=app;main";
    lifecycle(&server, spec, &[]).succeeds().prints(expect![[r#"
        {
          "Rules": [
            {
              "ID": "layercache-manifests-a86d04c3",
              "Filter": {
                "Prefix": "c/app"
              },
              "Status": "Enabled",
              "Expiration": {
                "Days": 14
              },
              "NoncurrentVersionExpiration": {
                "NoncurrentDays": 1
              }
            },
            {
              "ID": "layercache-manifests-ae111478",
              "Filter": {
                "Prefix": "c/main"
              },
              "Status": "Enabled",
              "Expiration": {
                "Days": 14
              },
              "NoncurrentVersionExpiration": {
                "NoncurrentDays": 1
              }
            },
            {
              "ID": "layercache-blobs-c398be07",
              "Filter": {
                "Prefix": "c/sha256:"
              },
              "Status": "Enabled",
              "Expiration": {
                "Days": 16
              },
              "NoncurrentVersionExpiration": {
                "NoncurrentDays": 1
              }
            },
            {
              "ID": "layercache-uploads-c398be07",
              "Filter": {
                "Prefix": "c/sha256:"
              },
              "Status": "Enabled",
              "AbortIncompleteMultipartUpload": {
                "DaysAfterInitiation": 2
              }
            }
          ]
        }
    "#]], expect![[r#"
        warning: manifests share the prefix of the blobs, so only 'app', 'main' can expire: other caches would outlive their blobs
    "#]]);
}

#[test]
fn the_check_says_of_each_rule_what_it_does_to_the_caches() {
    let server = Server::start();
    lifecycle(&server, "", &["--check"]).succeeds().prints(
        expect![[r#"
            s3://cache at http://127.0.0.1:PORT has 0 lifecycle rules; 1 request in N s
            no rule expires these caches: --apply writes rules that do
        "#]],
        expect![[""]],
    );

    let disabled = LifecycleRule {
        status: ExpirationStatus::from_static(ExpirationStatus::DISABLED),
        ..expire("off", "", 1)
    };
    let tagged = LifecycleRule {
        filter: Some(LifecycleRuleFilter {
            tag: Some(Tag {
                key: Some("tmp".into()),
                value: Some("1".into()),
            }),
            ..LifecycleRuleFilter::default()
        }),
        ..expire("tagged", "", 1)
    };
    server.set_lifecycle(vec![
        disabled,
        tagged,
        expire("logs", "logs/", 3),
        expire("all", "", 30),
    ]);
    lifecycle(&server, "", &["--check"]).succeeds().prints(expect![[r#"
        s3://cache at http://127.0.0.1:PORT has 4 lifecycle rules; 1 request in N s
          ok      off (prefix "")
                  it is disabled
          ok      tagged (prefix "")
                  it is about tagged objects, and caches have no tags
          ok      logs (prefix "logs/")
                  it is about other objects
          ok      all (prefix "")
                  deletes blobs and manifests 30 d after they were written or refreshed; a cache that is not exported for 29 d loses blobs up to 24 h before its manifest
    "#]], expect![[""]]);

    server.set_lifecycle(vec![expire("too-soon", "", 1), archive("cold", "blobs/")]);
    lifecycle(&server, "", &["--check"]).ends_with(1).prints(expect![[r#"
        s3://cache at http://127.0.0.1:PORT has 2 lifecycle rules; 1 request in N s
          BREAKS  too-soon (prefix "")
                  deletes blobs 1 d after they were written, but exports rely on those younger than touch_refresh (24 h)
          BREAKS  cold (prefix "blobs/")
                  moves blobs to GLACIER, where a build cannot read them
    "#]], expect![[r#"
            error: 2 lifecycle rules of s3://cache at http://127.0.0.1:PORT can break builds
        "#]]);

    server.set_lifecycle(vec![expire("blobs", "blobs/", 30)]);
    lifecycle(&server, "", &["--check"]).ends_with(1).prints(expect![[r#"
        s3://cache at http://127.0.0.1:PORT has 1 lifecycle rule; 1 request in N s
          BREAKS  blobs (prefix "blobs/")
                  deletes blobs after 30 d, but no rule deletes manifests: a cache that is not exported for 29 d names blobs that are gone
    "#]], expect![[r#"
            error: 1 lifecycle rule of s3://cache at http://127.0.0.1:PORT can break builds
        "#]]);

    server.set_lifecycle(vec![expire("manifests", "manifests/", 30)]);
    lifecycle(&server, "", &["--check"]).ends_with(1).prints(expect![[r#"
        s3://cache at http://127.0.0.1:PORT has 1 lifecycle rule; 1 request in N s
          BREAKS  manifests (prefix "manifests/")
                  deletes manifests 30 d after the last export, but no rule deletes their blobs: builds lose the cache, and its space is not freed
    "#]], expect![[r#"
            error: 1 lifecycle rule of s3://cache at http://127.0.0.1:PORT can break builds
        "#]]);

    server.set_lifecycle(vec![
        expire("blobs", "blobs/", 10),
        expire("manifests", "manifests/", 30),
    ]);
    lifecycle(&server, "", &["--check"]).ends_with(1).prints(expect![[r#"
        s3://cache at http://127.0.0.1:PORT has 2 lifecycle rules; 1 request in N s
          BREAKS  blobs (prefix "blobs/")
                  deletes blobs after 10 d, but manifests only after 30 d: a cache that is not exported for 9 d names blobs that are gone
          ok      manifests (prefix "manifests/")
                  deletes manifests 30 d after the last export
    "#]], expect![[r#"
            error: 1 lifecycle rule of s3://cache at http://127.0.0.1:PORT can break builds
        "#]]);
}

#[test]
fn the_rules_are_written_beside_those_of_others_once_and_pass_the_check() {
    let server = Server::start();
    let logs = expire("logs", "logs/", 3);
    server.set_lifecycle(vec![logs.clone()]);
    lifecycle(&server, "", &["--apply"]).succeeds().prints(expect![[r#"
        wrote 3 lifecycle rules to s3://cache at http://127.0.0.1:PORT, and kept 1 rule of others; 2 requests in N s
          ok      logs (prefix "logs/")
                  it is about other objects
          ok      layercache-manifests-4085145e (prefix "manifests/")
                  deletes manifests 14 d after the last export
                  deletes versions 1 d after they were replaced
          ok      layercache-blobs-80771c33 (prefix "blobs/sha256:")
                  deletes blobs 16 d after they were written or refreshed
                  deletes versions 1 d after they were replaced
          ok      layercache-uploads-80771c33 (prefix "blobs/sha256:")
                  aborts multipart uploads 2 d after they began
    "#]], expect![[""]]);
    let rules = server.lifecycle();
    assert_eq!((rules.len(), &rules[0]), (4, &logs));
    lifecycle(&server, "", &["--apply"]).succeeds().prints(
        expect![[r#"
            s3://cache at http://127.0.0.1:PORT has these 3 lifecycle rules already; 1 request in N s
              ok      logs (prefix "logs/")
                      it is about other objects
              ok      layercache-manifests-4085145e (prefix "manifests/")
                      deletes manifests 14 d after the last export
                      deletes versions 1 d after they were replaced
              ok      layercache-blobs-80771c33 (prefix "blobs/sha256:")
                      deletes blobs 16 d after they were written or refreshed
                      deletes versions 1 d after they were replaced
              ok      layercache-uploads-80771c33 (prefix "blobs/sha256:")
                      aborts multipart uploads 2 d after they began
        "#]],
        expect![[""]],
    );
    assert_eq!(server.count("PutBucketLifecycleConfiguration"), 1);
    lifecycle(&server, "", &["--check"]).succeeds().prints(
        expect![[r#"
            s3://cache at http://127.0.0.1:PORT has 4 lifecycle rules; 1 request in N s
              ok      logs (prefix "logs/")
                      it is about other objects
              ok      layercache-manifests-4085145e (prefix "manifests/")
                      deletes manifests 14 d after the last export
                      deletes versions 1 d after they were replaced
              ok      layercache-blobs-80771c33 (prefix "blobs/sha256:")
                      deletes blobs 16 d after they were written or refreshed
                      deletes versions 1 d after they were replaced
              ok      layercache-uploads-80771c33 (prefix "blobs/sha256:")
                      aborts multipart uploads 2 d after they began
        "#]],
        expect![[""]],
    );

    // Other days replace ours, another prefix stands beside it.
    lifecycle(&server, "", &["--apply", "--expire-after", "7d"]).succeeds();
    assert_eq!(server.lifecycle().len(), 4);
    lifecycle(&server, "prefix=ci/", &["--apply"]).succeeds();
    assert_eq!(server.lifecycle().len(), 7);
}

#[test]
fn writing_rules_warns_of_a_rule_of_others_that_breaks_builds() {
    let server = Server::start();
    server.set_lifecycle(vec![archive("cold", "")]);
    lifecycle(&server, "", &["--apply"]).succeeds().prints(expect![[r#"
        wrote 3 lifecycle rules to s3://cache at http://127.0.0.1:PORT, and kept 1 rule of others; 2 requests in N s
          BREAKS  cold (prefix "")
                  moves blobs and manifests to GLACIER, where a build cannot read them
          ok      layercache-manifests-4085145e (prefix "manifests/")
                  deletes manifests 14 d after the last export
                  deletes versions 1 d after they were replaced
          ok      layercache-blobs-80771c33 (prefix "blobs/sha256:")
                  deletes blobs 16 d after they were written or refreshed
                  deletes versions 1 d after they were replaced
          ok      layercache-uploads-80771c33 (prefix "blobs/sha256:")
                  aborts multipart uploads 2 d after they began
    "#]], expect![[r#"
            warning: the rule "cold" moves blobs and manifests to GLACIER, where a build cannot read them
        "#]]);
}

#[test]
fn if_the_rules_cannot_be_read_none_are_written() {
    let server = Server::builder()
        .refuse("GetBucketLifecycleConfiguration", 403, "AccessDenied")
        .start();
    let run = lifecycle(&server, "", &["--apply"]);
    run.fails_with(expect![[r#"
        error: http://127.0.0.1:PORT answered 403 AccessDenied (The test server was built to refuse this.), reading the lifecycle rules of s3://cache; s3:GetLifecycleConfiguration and s3:PutLifecycleConfiguration are needed
    "#]]);
    assert_eq!(server.count("PutBucketLifecycleConfiguration"), 0);
    lifecycle(&server, "", &["--check"]).fails_with(expect![[r#"
        error: http://127.0.0.1:PORT answered 403 AccessDenied (The test server was built to refuse this.), reading the lifecycle rules of s3://cache; s3:GetLifecycleConfiguration is needed
    "#]]);
    let server = Server::builder()
        .refuse("PutBucketLifecycleConfiguration", 403, "AccessDenied")
        .start();
    lifecycle(&server, "", &["--apply"]).fails_with(expect![[r#"
        error: the bucket keeps the rules that it had: http://127.0.0.1:PORT answered 403 AccessDenied (The test server was built to refuse this.), writing the lifecycle rules of s3://cache; s3:GetLifecycleConfiguration and s3:PutLifecycleConfiguration are needed
    "#]]);
}

#[test]
fn a_store_that_refuses_rules_about_versions_gets_the_others() {
    let server = Server::start();
    let put = "PutBucketLifecycleConfiguration";
    server.fail_first(1, put, Fault::Status(400, "MalformedXML"));
    lifecycle(&server, "", &["--apply"]).succeeds();
    assert_eq!(server.count(put), 2);
    let rules = server.lifecycle();
    assert_eq!(rules.len(), 3);
    let about_versions = |rule: &LifecycleRule| rule.noncurrent_version_expiration.is_some();
    assert!(!rules.iter().any(about_versions), "{rules:?}");
    server.fail_all(put, Fault::Status(400, "MalformedXML"));
    lifecycle(&server, "", &["--apply"]).fails_with(expect![[r#"
        error: the bucket keeps the rules that it had: http://127.0.0.1:PORT answered 400 MalformedXML (The test server was told to answer MalformedXML.), writing the lifecycle rules of s3://cache
    "#]]);
}

#[test]
fn what_was_checked_or_written_is_also_json() {
    let server = Server::start();
    server.set_lifecycle(vec![expire("all", "", 30)]);
    let run = lifecycle(&server, "", &["--check", "--format=json"]);
    run.succeeds().prints(expect![[r#"
        {
          "version": 1,
          "command": "lifecycle",
          "endpoint": "http://127.0.0.1:PORT",
          "bucket": "cache",
          "action": "check",
          "rules": [
            {
              "id": "all",
              "prefix": "",
              "breaks": false,
              "expires": true,
              "effects": [
                "deletes blobs and manifests 30 d after they were written or refreshed; a cache that is not exported for 29 d loses blobs up to 24 h before its manifest"
              ]
            }
          ]
        }
    "#]], expect![[""]]);
    let run = lifecycle(&server, "", &["--apply", "--format=json"]).succeeds();
    let document: serde_json::Value = serde_json::from_str(&run.stdout).expect("JSON");
    assert_eq!(document["kept"], 1);
    // Without a flag, it is the document that aws takes in any case.
    let printed = lifecycle(&server, "", &[]).succeeds().stdout;
    let asked = lifecycle(&server, "", &["--format=json"]).succeeds().stdout;
    assert_eq!(printed, asked);
}

#[test]
fn the_metadata_file_holds_the_judgement() {
    let server = Server::start();
    server.set_lifecycle(vec![expire("blobs", "blobs/", 30)]);
    let directory = tempfile::tempdir().expect("a temporary directory");
    let file = directory.path().join("metadata.json");
    let path = file.to_str().expect("UTF-8");
    lifecycle(&server, "", &["--check", "--metadata-file", path]).ends_with(1);
    let mut document = json_of(&file);
    document["results"][0]["seconds"] = 0.into();
    document["results"][0]["endpoint"] = "URL".into();
    expect![[r#"
        {
          "version": 1,
          "results": [
            {
              "command": "lifecycle",
              "endpoint": "URL",
              "bucket": "cache",
              "action": "check",
              "rules": [
                {
                  "id": "blobs",
                  "prefix": "blobs/",
                  "breaks": true,
                  "expires": true,
                  "effects": [
                    "deletes blobs after 30 d, but no rule deletes manifests: a cache that is not exported for 29 d names blobs that are gone"
                  ]
                }
              ],
              "requests": 1,
              "seconds": 0
            }
          ]
        }"#]].assert_eq(&format!("{document:#}"));
}

fn json_of(file: &Path) -> serde_json::Value {
    let bytes = std::fs::read(file).expect("the file is there");
    serde_json::from_slice(&bytes).expect("JSON")
}

#[test]
fn days_are_whole_days() {
    let server = Server::start();
    for wrong in ["0d", "36h", "7", "1.5d"] {
        let run = lifecycle(&server, "", &["--expire-after", wrong]).ends_with(2);
        assert_eq!(run.stdout, "");
        assert_eq!(
            run.stderr,
            format!(
                "error: invalid value '{wrong}' for '--expire-after <DAYS>': accepted: whole days from 1d to 36500d\n\n\
                 For more information, try '--help'.\n"
            )
        );
    }
}
