//! A gateway that echoes the request, in every place that finds its way into a message.

use super::*;

const TOKEN: &str = "IQoJb3JpZ2luX2VjEHAaCXVzLWVhc3QtMSJHMEUCIQDf+9a/Zk==";

fn guest(server: &Server) -> S3Store {
    server.store_as(|config| {
        config.retry_max_attempts = 1;
        config.credentials = Some(StaticCredentials {
            access_key_id: "AKIAIOSFODNN7EXAMPLE".into(),
            secret_access_key: "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY".into(),
            session_token: Some(TOKEN.into()),
        });
    })
}

#[tokio::test]
async fn whatever_an_answer_echoes_no_secret_is_in_the_error() {
    type Make = fn(&str, &str) -> Vec<u8>;
    let places: [(&str, Make); 7] = [
        ("the message", |text, _| {
            let body = format!("<Error><Code>Odd</Code><Message>{text}</Message></Error>");
            response("400 Bad Request", "", &body)
        }),
        ("the code", |text, _| {
            let body = format!("<Error><Code>{text}</Code></Error>");
            response("400 Bad Request", "", &body)
        }),
        ("the region", |text, _| {
            let headers = format!("x-amz-bucket-region: {text}\r\n");
            response("400 Bad Request", &headers, "")
        }),
        ("a page", |text, _| {
            response("404 Not Found", "", format!("<html>{text}</html>"))
        }),
        ("the range", |text, _| {
            let headers = format!("etag: \"e\"\r\ncontent-range: {text}\r\n");
            response("206 Partial Content", &headers, "x")
        }),
        ("behind the cut", |text, _| {
            let body = format!(
                "<Error><Code>Odd</Code><Message>{} {text}</Message></Error>",
                "x".repeat(170)
            );
            response("400 Bad Request", "", &body)
        }),
        ("malformed XML", |_, text| {
            let body = format!("<Error><Code>Odd</Code><{text}");
            response("400 Bad Request", "", &body)
        }),
    ];
    for (place, make) in places {
        for what in ["authorization", "x-amz-security-token"] {
            for encoded in [false, true] {
                let server = Server::making(move |request| {
                    let mut text = request.header(what).unwrap().to_owned();
                    if encoded {
                        text = super::super::endpoint::encode_query(&text);
                    }
                    make(&text, &text.replace(['=', ' ', ',', '/'], "-"))
                });
                let store = guest(&server);
                let error = store.get("a", Some(0..1), None).await.err().unwrap();
                let said = format!("{error} {error:?}");
                let case = format!("{place}, {what}, {encoded}: {said}");
                assert!(!said.contains("AKIAIOSFOD"), "{case}");
                for start in 0..TOKEN.len() - 16 {
                    assert!(!said.contains(&TOKEN[start..start + 16]), "{case}");
                }
                if let Some((_, signature)) = said.split_once("Signature") {
                    let shown = signature.chars().take(20);
                    assert!(shown.filter(char::is_ascii_hexdigit).count() < 16, "{case}");
                }
            }
        }
    }
}

#[tokio::test]
async fn text_from_outside_is_limited_and_redacted_for_those_who_ask_too() {
    let server = Server::new(Vec::new()).await;
    let store = guest(&server);
    let text = format!("invalid type: string \"{TOKEN}{}\"", "y".repeat(1 << 20));
    let shown = store.outside(&text);
    assert!(
        shown.starts_with("invalid type: string \"***yyy"),
        "{shown}"
    );
    assert_eq!(shown.chars().count(), 201);
}
