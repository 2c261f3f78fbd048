use super::*;

const OTHERS: &str = "<Rule><ID>x</ID><Filter><And><Prefix>a&amp;b</Prefix>\
     <ObjectSizeGreaterThan>7</ObjectSizeGreaterThan></And></Filter><Status>Enabled</Status>\
     <FromTheFuture kind=\"new\"><Days>1</Days></FromTheFuture></Rule>";

fn document(rules: &str) -> String {
    format!(
        "<LifecycleConfiguration xmlns=\"http://s3.amazonaws.com/doc/2006-03-01/\">{rules}\
         </LifecycleConfiguration>"
    )
}

fn ours() -> Vec<Fitting> {
    vec![
        Fitting::expiring("blobs", "c/sha256:".into(), 9),
        Fitting::new("uploads", "c/sha256:".into(), Action::Abort(2)),
    ]
}

#[test]
fn what_is_not_understood_of_the_rules_of_others_is_written_as_it_was() {
    let found = Document::parse(&document(OTHERS)).unwrap();
    assert_eq!((&*found.rules[0].id, &*found.rules[0].prefix), ("x", "a&b"));
    let merged = found.merged(&ours()).unwrap();
    let added = "<Rule><ID>layercache-blobs-c398be07</ID><Filter><Prefix>c/sha256:</Prefix></Filter>\
        <Status>Enabled</Status><Expiration><Days>9</Days></Expiration>\
        <NoncurrentVersionExpiration><NoncurrentDays>1</NoncurrentDays>\
        </NoncurrentVersionExpiration></Rule>\
        <Rule><ID>layercache-uploads-c398be07</ID><Filter><Prefix>c/sha256:</Prefix></Filter>\
        <Status>Enabled</Status><AbortIncompleteMultipartUpload><DaysAfterInitiation>2\
        </DaysAfterInitiation></AbortIncompleteMultipartUpload></Rule>";
    assert_eq!(merged, document(&format!("{OTHERS}{added}")));
    let again = Document::parse(&merged).unwrap();
    assert!(again.holds(&ours()) && !found.holds(&ours()));
    assert_eq!(again.merged(&ours()).unwrap(), merged);
    assert_eq!(again.others(&ours()).count(), 1);
}

#[test]
fn beside_rules_of_the_old_form_ours_have_it_too() {
    let old = "<Rule><ID>y</ID><Prefix>logs/</Prefix><Status>Enabled</Status>\
               <Expiration><Days>3</Days></Expiration></Rule>";
    let found = Document::parse(&document(old)).unwrap();
    let merged = found.merged(&ours()[..1]).unwrap();
    assert!(
        merged.contains("</ID><Prefix>c/sha256:</Prefix><Status>"),
        "{merged}"
    );
}

#[test]
fn other_documents_are_refused() {
    let error = Document::parse("<Error><Code>x</Code></Error>").unwrap_err();
    assert!(format!("{error:#}").contains("LifecycleConfiguration"));
    assert!(Document::parse("<LifecycleConfiguration><Rule>").is_err());
}
