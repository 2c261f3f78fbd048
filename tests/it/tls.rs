//! Stores reached over https or through a proxy.

use std::net::{Ipv4Addr, SocketAddr};
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use expect_test::expect;
use rcgen::{Certificate, KeyPair};
use tokio::io::{AsyncBufReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::TlsAcceptor;

use crate::credentials::assumed;
use crate::program::{Program, files, fixture, s3_manifest};
use crate::scripted::Scripted;
use crate::server::authority::{acceptor, self_signed};
use crate::server::{ACCESS_KEY, Authority, SECRET_KEY, Server};

/// A listener with its own runtime; dropping it ends both.
struct Front {
    port: u16,
    runtime: Option<tokio::runtime::Runtime>,
}

impl Front {
    fn start<F>(serve: impl Fn(TcpStream) -> F + Send + 'static) -> Front
    where
        F: Future<Output = ()> + Send + 'static,
    {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .expect("a runtime");
        let listener = runtime
            .block_on(TcpListener::bind((Ipv4Addr::LOCALHOST, 0)))
            .expect("bind a port of 127.0.0.1");
        let port = listener.local_addr().expect("the listener's port").port();
        runtime.spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                tokio::spawn(serve(stream));
            }
        });
        Front {
            port,
            runtime: Some(runtime),
        }
    }
}

impl Drop for Front {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_timeout(Duration::from_secs(5));
        }
    }
}

/// TLS with a certificate of `authority` for `names`, before the listener at `to`.
fn front(authority: &Authority, names: &[&str], to: SocketAddr) -> Front {
    tls_front(authority.acceptor(names), to)
}

fn tls_front(acceptor: TlsAcceptor, to: SocketAddr) -> Front {
    Front::start(move |stream| {
        let acceptor = acceptor.clone();
        async move {
            let Ok(mut outer) = acceptor.accept(stream).await else {
                return;
            };
            if let Ok(mut inner) = TcpStream::connect(to).await {
                let _ = tokio::io::copy_bidirectional(&mut outer, &mut inner).await;
            }
        }
    })
}

fn spec(endpoint: &str, bucket: &str, extra: &str) -> String {
    format!(
        "type=s3,region=us-east-1,bucket={bucket},endpoint_url={endpoint},access_key_id={ACCESS_KEY},\
         secret_access_key={SECRET_KEY},mode=max{extra}"
    )
}

fn export(spec: &str) -> Program {
    Program::export(spec, &fixture("local-max")).arg("--quiet")
}

/// An export to `bucket` through `front`, addressed as `host`, that trusts `authority`.
fn export_over_tls(host: &str, front: &Front, bucket: &str, authority: &Authority) -> Program {
    let endpoint = format!("https://{host}:{}", front.port);
    export(&spec(&endpoint, bucket, "")).env("AWS_CA_BUNDLE", authority.bundle())
}

#[test]
fn a_store_whose_certificate_aws_ca_bundle_vouches_for_is_used_both_ways() {
    let authority = Authority::new();
    let server = Server::builder().tls(&authority).start();
    let spec = spec(&server.url(), "cache", "");
    export(&spec)
        .env("AWS_CA_BUNDLE", authority.bundle())
        .run()
        .succeeds();
    let directory = tempfile::tempdir().expect("a temporary directory");
    Program::import(&spec.replace(",mode=max", ""), directory.path())
        .env("AWS_CA_BUNDLE", authority.bundle())
        .run()
        .succeeds();
    assert_eq!(files(directory.path()), files(&fixture("local-max")));
}

#[test]
fn a_certificate_that_nobody_vouches_for_is_an_error_that_names_aws_ca_bundle() {
    let authority = Authority::new();
    let server = Server::builder().tls(&authority).start();
    let spec = spec(&server.url(), "cache", "");
    export(&spec).run().fails_with(expect![[r#"
        error: the certificate of 127.0.0.1:PORT is not trusted (unknown issuer), looking for s3://cache/blobs/sha256:DIGEST; if a CA of your own has signed it, set AWS_CA_BUNDLE to its PEM file
    "#]]);
    assert_eq!(server.log().len(), 0);
}

#[test]
fn a_self_signed_certificate_that_calls_itself_a_ca_s_is_trusted_if_it_is_in_the_bundle() {
    let make = |name: &str, days: i64| self_signed(name, time::Duration::days(days));
    let server = Server::start();
    let folder = tempfile::tempdir().expect("a temporary directory");
    let run = |(presented, key): &(Certificate, KeyPair), bundled: &Certificate| {
        let front = tls_front(acceptor(presented, key), server.addr());
        let bundle = folder.path().join("bundle.pem");
        std::fs::write(&bundle, bundled.pem()).expect("a file can be written");
        let endpoint = format!("https://127.0.0.1:{}", front.port);
        export(&spec(&endpoint, "cache", ""))
            .env("AWS_CA_BUNDLE", bundle)
            .run()
    };
    let good = make("127.0.0.1", 30);
    run(&good, &good.0).succeeds();
    run(&good, &make("127.0.0.1", 30).0).fails_with(expect![[r#"
        error: the certificate of 127.0.0.1:PORT is not trusted (it is a CA's, and not in AWS_CA_BUNDLE), looking for s3://cache/blobs/sha256:DIGEST; if a CA of your own has signed it, set AWS_CA_BUNDLE to its PEM file
    "#]]);
    let other = make("s3.example", 30);
    run(&other, &other.0).fails_with(expect![[r#"
        error: the certificate of 127.0.0.1:PORT is for s3.example, looking for s3://cache/blobs/sha256:DIGEST; check endpoint_url
    "#]]);
    let expired = make("127.0.0.1", -1);
    let mut run = run(&expired, &expired.0);
    let expired = run.stderr.split_once("expired on ");
    let (before, after) = expired.expect("it says when it expired");
    let (time, after) = after.split_once(" UTC").expect("and in which time zone");
    assert_eq!(time.len(), "2026-01-01 00:00".len(), "{time}");
    run.stderr = format!("{before}expired on TIME{after}");
    run.fails_with(expect![[r#"
        error: the certificate of 127.0.0.1:PORT expired on TIME, looking for s3://cache/blobs/sha256:DIGEST; have it renewed, or set the clock of this machine if it is wrong
    "#]]);
}

#[test]
fn an_import_does_not_ask_again_for_what_no_request_can_be_sent_for() {
    let authority = Authority::new();
    let server = Server::builder().tls(&authority).start();
    let spec = spec(&server.url(), "cache", "");
    let spec = spec.replace(",mode=max", "");
    let directory = tempfile::tempdir().expect("a temporary directory");
    let absent = directory.path().join("absent.pem");
    for (bundle, connections, expected) in [
        (
            "",
            1,
            expect![[r#"
                error: the certificate of 127.0.0.1:PORT is not trusted (unknown issuer), reading s3://cache/manifests/buildkit; if a CA of your own has signed it, set AWS_CA_BUNDLE to its PEM file
            "#]],
        ),
        (
            absent.to_str().expect("a path in ASCII"),
            0,
            expect![[r#"
            error: cannot read AWS_CA_BUNDLE TMP/absent.pem: No such file or directory (os error 2) (importing 'buildkit' from s3://cache at https://127.0.0.1:PORT)
        "#]],
        ),
    ] {
        server.clear_log();
        Program::import(&spec, &directory.path().join("layout"))
            .arg("--quiet")
            .env("AWS_CA_BUNDLE", bundle)
            .run()
            .fails_with(expected);
        assert_eq!(server.connections(), connections);
    }
    assert_eq!(server.log().len(), 0);
}

#[test]
fn a_certificate_for_another_host_is_an_error_that_says_which() {
    let (server, authority) = (Server::start(), Authority::new());
    let front = front(&authority, &["s3.example"], server.addr());
    export_over_tls("127.0.0.1", &front, "cache", &authority)
        .run()
        .fails_with(expect![[r#"
            error: the certificate of 127.0.0.1:PORT is for s3.example, looking for s3://cache/blobs/sha256:DIGEST; check endpoint_url
        "#]]);
    assert_eq!(server.log().len(), 0);
}

#[test]
fn a_store_that_has_no_host_name_for_each_bucket_is_told_of_with_the_name_that_failed() {
    // Names below .invalid never resolve.
    let run = |extra: &str| {
        let spec = spec("http://minio.invalid:9000", "cache", extra);
        export(&spec).run().whatever_the_resolver_says()
    };
    run(",retry_max_attempts=1").fails_with(expect![[r#"
        error: use_path_style=true may be missing: cannot connect to cache.minio.invalid:9000 (dns error: failed to lookup address information: REASON), looking for s3://cache/blobs/sha256:DIGEST
    "#]]);
    run(",retry_max_attempts=1,use_path_style=true").fails_with(expect![[r#"
        error: cannot connect to minio.invalid:9000 (dns error: failed to lookup address information: REASON), looking for s3://cache/blobs/sha256:DIGEST
    "#]]);

    let (server, authority) = (Server::start(), Authority::new());
    let front = front(&authority, &["s3.localhost"], server.addr());
    export_over_tls("s3.localhost", &front, "cache", &authority)
        .run()
        .fails_with(expect![[r#"
            error: use_path_style=true may be missing: the certificate of cache.s3.localhost:PORT is for s3.localhost, looking for s3://cache/blobs/sha256:DIGEST; check endpoint_url
        "#]]);
}

#[test]
fn a_bundle_that_cannot_be_used_is_named() {
    let authority = Authority::new();
    let server = Server::builder().tls(&authority).start();
    let spec = spec(&server.url(), "cache", "");
    let keyless = spec.replace(
        &format!(",access_key_id={ACCESS_KEY},secret_access_key={SECRET_KEY}"),
        "",
    );
    let folder = tempfile::tempdir().expect("a temporary directory");
    let garbage = folder.path().join("garbage.pem");
    std::fs::write(&garbage, "\u{0}\u{1}garbage").expect("a file can be written");
    let absent = folder.path().join("absent.pem");
    let by = |bundle: &Path, spec| export(spec).env("AWS_CA_BUNDLE", bundle).run();
    by(&garbage, &spec).fails_with(expect![[r#"
        error: AWS_CA_BUNDLE TMP/garbage.pem holds no PEM certificate (exporting 'buildkit' to s3://cache at https://127.0.0.1:PORT)
    "#]]);
    by(&garbage, &keyless).fails_with(expect![[r#"
        error: cannot look for credentials: AWS_CA_BUNDLE TMP/garbage.pem holds no PEM certificate (exporting 'buildkit' to s3://cache at https://127.0.0.1:PORT)
    "#]]);
    by(&absent, &spec).fails_with(expect![[r#"
        error: cannot read AWS_CA_BUNDLE TMP/absent.pem: No such file or directory (os error 2) (exporting 'buildkit' to s3://cache at https://127.0.0.1:PORT)
    "#]]);
    by(&absent, &keyless).fails_with(expect![[r#"
        error: cannot look for credentials: cannot read AWS_CA_BUNDLE TMP/absent.pem: No such file or directory (os error 2) (exporting 'buildkit' to s3://cache at https://127.0.0.1:PORT)
    "#]]);
}

#[test]
fn a_bucket_s_own_host_name_is_covered_by_a_wildcard() {
    let (server, authority) = (Server::start(), Authority::new());
    // Not *.localhost: a wildcard directly below a top-level domain covers nothing.
    let front = front(&authority, &["*.s3.localhost"], server.addr());
    export_over_tls("s3.localhost", &front, "cache", &authority)
        .run()
        .succeeds();
    assert_eq!(
        server.objects()["manifests/buildkit"],
        s3_manifest("max.json")
    );
    let host = server.log()[0].headers["host"].clone();
    assert_eq!(host, format!("cache.s3.localhost:{}", front.port));
}

#[test]
fn a_bucket_with_dots_is_reached_by_path_as_no_wildcard_covers_it() {
    let server = Server::builder().bucket("ci.cache").start();
    let authority = Authority::new();
    let front = front(
        &authority,
        &["s3.localhost", "*.s3.localhost"],
        server.addr(),
    );
    export_over_tls("s3.localhost", &front, "ci.cache", &authority)
        .run()
        .succeeds();
    let objects = server.objects_in("ci.cache");
    assert_eq!(objects["manifests/buildkit"], s3_manifest("max.json"));
    let host = server.log()[0].headers["host"].clone();
    assert_eq!(host, format!("s3.localhost:{}", front.port));
}

/// The request lines that a proxy got, with their Proxy-Authorization.
type Asked = Arc<Mutex<Vec<(String, Option<String>)>>>;

/// A proxy that connects to `to`, whatever it is asked for.
fn proxy(to: SocketAddr, asked: &Asked) -> Front {
    let asked = asked.clone();
    Front::start(move |stream| {
        let asked = asked.clone();
        async move {
            let mut client = BufReader::new(stream);
            let (mut head, mut authorization) = (String::new(), None);
            let mut line = String::new();
            while client.read_line(&mut line).await.is_ok_and(|read| read > 2) {
                if let Some(value) = line
                    .to_ascii_lowercase()
                    .strip_prefix("proxy-authorization: ")
                {
                    authorization = Some(line[line.len() - value.len()..].trim().to_owned());
                }
                head.push_str(&std::mem::take(&mut line));
            }
            if head.is_empty() {
                return; // Opened in advance, and not needed after all.
            }
            let first = head.lines().next().unwrap_or_default().to_owned();
            let tunnel = first.starts_with("CONNECT ");
            asked
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .push((first, authorization));
            let Ok(mut inner) = TcpStream::connect(to).await else {
                return;
            };
            if tunnel {
                let _ = client.write_all(b"HTTP/1.1 200 OK\r\n\r\n").await;
            } else {
                // The store accepts the absolute form too, and verifies the signature.
                let _ = inner.write_all(format!("{head}\r\n").as_bytes()).await;
            }
            let _ = tokio::io::copy_bidirectional(&mut client, &mut inner).await;
        }
    })
}

fn taken(asked: &Asked) -> Vec<(String, Option<String>)> {
    asked.lock().unwrap_or_else(PoisonError::into_inner).clone()
}

#[test]
fn https_goes_through_a_tunnel_of_https_proxy() {
    let (server, authority) = (Server::start(), Authority::new());
    // Only the proxy knows this host.
    let front = front(&authority, &["s3.example.test"], server.addr());
    let asked = Asked::default();
    let proxy = proxy((Ipv4Addr::LOCALHOST, front.port).into(), &asked);
    export(&spec(
        "https://s3.example.test",
        "cache",
        ",use_path_style=true",
    ))
    .env("AWS_CA_BUNDLE", authority.bundle())
    .env(
        "HTTPS_PROXY",
        format!("http://me:pass@127.0.0.1:{}", proxy.port),
    )
    .run()
    .succeeds();
    assert_eq!(
        server.objects()["manifests/buildkit"],
        s3_manifest("max.json")
    );
    let asked = taken(&asked);
    assert!(!asked.is_empty());
    for (first, authorization) in asked {
        assert_eq!(first, "CONNECT s3.example.test:443 HTTP/1.1");
        assert_eq!(authorization.as_deref(), Some("Basic bWU6cGFzcw=="));
    }
}

#[test]
fn http_is_sent_to_http_proxy_with_the_whole_address() {
    let server = Server::start();
    let asked = Asked::default();
    let proxy = proxy(server.addr(), &asked);
    export(&spec(
        "http://s3.example.test",
        "cache",
        ",use_path_style=true",
    ))
    .env(
        "http_proxy",
        format!("http://me:pass@127.0.0.1:{}", proxy.port),
    )
    .run()
    .succeeds();
    assert_eq!(
        server.objects()["manifests/buildkit"],
        s3_manifest("max.json")
    );
    let asked = taken(&asked);
    assert!(!asked.is_empty());
    for (first, authorization) in asked {
        assert!(first.contains(" http://s3.example.test/cache"), "{first}");
        assert_eq!(authorization.as_deref(), Some("Basic bWU6cGFzcw=="));
    }
}

#[test]
fn no_proxy_and_this_machine_itself_are_reached_directly() {
    let server = Server::start();
    let asked = Asked::default();
    let proxy = proxy(server.addr(), &asked);
    let proxied = |endpoint: &str| {
        export(&spec(endpoint, "cache", ",use_path_style=true"))
            .env("http_proxy", format!("http://127.0.0.1:{}", proxy.port))
    };
    proxied(&server.url()).run().succeeds();
    proxied(&server.localhost_url()).run().succeeds();
    // Also this machine, but not recognisable as loopback.
    let other_name = server.url().replace("127.0.0.1", "0.0.0.0");
    proxied(&other_name)
        .env("NO_PROXY", "example.test,0.0.0.0")
        .run()
        .succeeds();
    assert_eq!(taken(&asked), []);
    proxied(&other_name).run().succeeds();
    assert!(!taken(&asked).is_empty());
}

#[test]
fn a_proxy_s_refusal_is_an_error_that_names_the_proxy_and_not_its_password() {
    let front = Front::start(|mut stream| async move {
        let mut head = [0; 4096];
        let _ = tokio::io::AsyncReadExt::read(&mut stream, &mut head).await;
        let _ = stream
            .write_all(b"HTTP/1.1 407 Proxy Authentication Required\r\ncontent-length: 0\r\n\r\n")
            .await;
    });
    export(&spec(
        "https://s3.example.test",
        "cache",
        ",retry_max_attempts=1",
    ))
    .env(
        "HTTPS_PROXY",
        format!("http://me:secretpass@127.0.0.1:{}", front.port),
    )
    .run()
    .fails_with(expect![[r#"
        error: cannot connect to cache.s3.example.test (proxy 127.0.0.1:PORT: tunnel error: proxy authorization required), looking for s3://cache/blobs/sha256:DIGEST
    "#]]);
}

#[test]
fn a_proxy_that_echoes_its_password_has_it_shown_nowhere() {
    let front = Front::start(|stream| async move {
        let mut client = BufReader::new(stream);
        let (mut head, mut line) = (String::new(), String::new());
        while client.read_line(&mut line).await.is_ok_and(|read| read > 2) {
            head.push_str(&std::mem::take(&mut line));
        }
        let length = head.len();
        let answer = format!("HTTP/1.1 403 Forbidden\r\ncontent-length: {length}\r\n\r\n{head}");
        let _ = client.write_all(answer.as_bytes()).await;
    });
    let spec = spec("http://s3.example.test", "cache", ",retry_max_attempts=1");
    let run = |verbosity| {
        Program::export(&spec, &fixture("local-max"))
            .arg(verbosity)
            .env(
                "HTTP_PROXY",
                format!("http://me:secretpass@127.0.0.1:{}", front.port),
            )
            .run()
    };
    let shown = run("--verbose").stderr;
    // "me:secretpass" in base64.
    for secret in ["secretpass", "bWU6c2VjcmV0cGFzcw"] {
        assert!(!shown.contains(secret), "{shown}");
    }
    run("--quiet").fails_with(expect![[r#"
        error: http://cache.s3.example.test answered 403, looking for s3://cache/blobs/sha256:DIGEST; the keys may be wrong, or s3:GetObject missing, or the object itself: without s3:ListBucket a missing key answers 403 too
    "#]]);
}

#[test]
fn a_proxy_that_is_not_there_is_named_with_its_port_and_the_reason() {
    let nobody = std::net::TcpListener::bind((Ipv4Addr::LOCALHOST, 0))
        .and_then(|listener| listener.local_addr())
        .expect("a port of 127.0.0.1");
    for (scheme, variable, expected) in [
        (
            "https",
            "HTTPS_PROXY",
            expect![[r#"
            error: cannot connect to cache.s3.example.test (proxy 127.0.0.1:PORT: tunnel error: failed to create underlying connection: tcp connect error: Connection refused (os error 111)), looking for s3://cache/blobs/sha256:DIGEST
        "#]],
        ),
        (
            "http",
            "HTTP_PROXY",
            expect![[r#"
            error: cannot connect to cache.s3.example.test (proxy 127.0.0.1:PORT: tcp connect error: Connection refused (os error 111)), looking for s3://cache/blobs/sha256:DIGEST
        "#]],
        ),
    ] {
        export(&spec(
            &format!("{scheme}://s3.example.test"),
            "cache",
            ",retry_max_attempts=1",
        ))
        .env(variable, format!("http://me:secretpass@{nobody}"))
        .run()
        .fails_with(expected);
    }
}

#[test]
fn a_proxy_that_speaks_https_is_spoken_to_in_https() {
    let (server, authority) = (Server::start(), Authority::new());
    let store = front(&authority, &["s3.example.test"], server.addr());
    for (scheme, variable, to, expected) in [
        (
            "https",
            "HTTPS_PROXY",
            (Ipv4Addr::LOCALHOST, store.port).into(),
            expect![[r#"
                error: the certificate of the proxy 127.0.0.1:PORT is not trusted (unknown issuer), looking for s3://cache/blobs/sha256:DIGEST; if a CA of your own has signed it, set AWS_CA_BUNDLE to its PEM file
            "#]],
        ),
        (
            "http",
            "HTTP_PROXY",
            server.addr(),
            expect![[r#"
                error: the certificate of the proxy 127.0.0.1:PORT is not trusted (unknown issuer), looking for s3://cache/blobs/sha256:DIGEST; if a CA of your own has signed it, set AWS_CA_BUNDLE to its PEM file
            "#]],
        ),
    ] {
        let asked = Asked::default();
        let proxy = proxy(to, &asked);
        let front = front(
            &authority,
            &["127.0.0.1"],
            (Ipv4Addr::LOCALHOST, proxy.port).into(),
        );
        let exported = |bundle: &str| {
            export(&spec(
                &format!("{scheme}://s3.example.test"),
                "cache",
                ",use_path_style=true",
            ))
            .env("AWS_CA_BUNDLE", bundle)
            .env(
                variable,
                format!("https://me:secretpass@127.0.0.1:{}", front.port),
            )
            .run()
        };
        exported(authority.bundle().to_str().expect("a path in ASCII")).succeeds();
        let seen = taken(&asked);
        assert!(!seen.is_empty());
        for (_, authorization) in &seen {
            // "me:secretpass"
            assert_eq!(authorization.as_deref(), Some("Basic bWU6c2VjcmV0cGFzcw=="));
        }
        exported("").fails_with(expected);
        assert_eq!(taken(&asked), seen);
    }
}

#[test]
fn a_proxy_that_cannot_be_spoken_to_is_refused_before_it_gets_a_byte() {
    let asked = Asked::default();
    let proxy = proxy((Ipv4Addr::LOCALHOST, 1).into(), &asked);
    for (endpoint, variable, scheme, expected) in [
        (
            "https://s3.example.test",
            "HTTPS_PROXY",
            "socks5",
            expect![[r#"
                error: HTTPS_PROXY names a socks5:// proxy, but only http:// and https:// proxies are supported: set another, or NO_PROXY to reach cache.s3.example.test directly (exporting 'buildkit' to s3://cache at https://s3.example.test)
            "#]],
        ),
        (
            "http://s3.example.test",
            "http_proxy",
            "socks4",
            expect![[r#"
                error: http_proxy names a socks4:// proxy, but only http:// and https:// proxies are supported: set another, or NO_PROXY to reach cache.s3.example.test directly (exporting 'buildkit' to s3://cache at http://s3.example.test)
            "#]],
        ),
        (
            "https://s3.example.test",
            "ALL_PROXY",
            "socks5h",
            expect![[r#"
                error: ALL_PROXY names a socks5h:// proxy, but only http:// and https:// proxies are supported: set another, or NO_PROXY to reach cache.s3.example.test directly (exporting 'buildkit' to s3://cache at https://s3.example.test)
            "#]],
        ),
    ] {
        export(&spec(endpoint, "cache", ""))
            .env(
                variable,
                format!("{scheme}://me:secretpass@127.0.0.1:{}", proxy.port),
            )
            .run()
            .fails_with(expected);
    }
    assert_eq!(taken(&asked), []);
}

/// An export with the credentials of a web identity, for which `sts` is asked.
fn export_with_role(server: &Server, token: &Path, sts: &str) -> Program {
    std::fs::write(token, "header.claims.signature").expect("a file can be written");
    Program::export(&server.keyless_spec("mode=max"), &fixture("local-max"))
        .arg("--quiet")
        .env("AWS_WEB_IDENTITY_TOKEN_FILE", token)
        .env("AWS_ROLE_ARN", "arn:aws:iam::111122223333:role/ci-cache")
        .env("AWS_ENDPOINT_URL_STS", sts)
}

#[test]
fn a_sign_in_endpoint_is_trusted_as_a_store_is() {
    let (certificate, key) = self_signed("127.0.0.1", time::Duration::days(30));
    let (server, sts) = (
        Server::start(),
        Scripted::start(|_, _| assumed("AssumeRoleWithWebIdentity")),
    );
    let front = tls_front(acceptor(&certificate, &key), sts.address());
    let folder = tempfile::tempdir().expect("a temporary directory");
    let bundle = folder.path().join("bundle.pem");
    std::fs::write(&bundle, certificate.pem()).expect("a file can be written");
    let endpoint = format!("https://127.0.0.1:{}", front.port);
    let export = || export_with_role(&server, &folder.path().join("token"), &endpoint);
    export().env("AWS_CA_BUNDLE", &bundle).run().succeeds();
    assert_eq!(sts.requests().len(), 1);
    export().run().fails_with(expect![[r#"
        error: credentials from web identity (AWS_WEB_IDENTITY_TOKEN_FILE TMP/token, AWS_ROLE_ARN arn:aws:iam::111122223333:role/ci-cache) failed (dispatch failure: io error: the certificate of 127.0.0.1:PORT is not trusted (it is a CA's, and not in AWS_CA_BUNDLE); if a CA of your own has signed it, set AWS_CA_BUNDLE to its PEM file); correct these two, or whom the role trusts (exporting 'buildkit' to s3://cache at http://127.0.0.1:PORT)
    "#]]);
}

#[test]
fn a_sign_in_endpoint_is_reached_through_https_proxy() {
    let authority = Authority::new();
    let (server, sts) = (
        Server::start(),
        Scripted::start(|_, _| assumed("AssumeRoleWithWebIdentity")),
    );
    // Only the proxy knows this host.
    let front = front(&authority, &["sts.example.test"], sts.address());
    let asked = Asked::default();
    let proxy = proxy((Ipv4Addr::LOCALHOST, front.port).into(), &asked);
    let folder = tempfile::tempdir().expect("a temporary directory");
    let token = folder.path().join("token");
    export_with_role(&server, &token, "https://sts.example.test")
        .env("AWS_CA_BUNDLE", authority.bundle())
        .env(
            "HTTPS_PROXY",
            format!("http://me:pass@127.0.0.1:{}", proxy.port),
        )
        .run()
        .succeeds();
    assert_eq!(sts.requests().len(), 1);
    let asked = taken(&asked);
    assert_eq!(asked.len(), 1, "{asked:?}");
    assert_eq!(asked[0].0, "CONNECT sts.example.test:443 HTTP/1.1");
    assert!(asked[0].1.is_some(), "{asked:?}");
}
