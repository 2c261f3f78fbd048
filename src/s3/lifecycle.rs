//! The bucket's lifecycle rules, as XML: rusoto's types would lose unknown elements.

use rusoto_s3::{
    GetBucketLifecycleConfigurationRequest, PutBucketLifecycleConfigurationRequest, S3,
};

use super::S3Store;
use super::call::{Call, Expect};
use crate::store::StoreResult;

const ROOT: &str = "LifecycleConfiguration";

impl S3Store {
    pub(super) async fn get_lifecycle(&self) -> StoreResult<Option<String>> {
        const DOING: &str = "reading the lifecycle rules of";
        let request = GetBucketLifecycleConfigurationRequest {
            bucket: self.bucket(),
            ..Default::default()
        };
        let kept = std::sync::Arc::default();
        let call = Call::new(DOING, None, Expect::Listing(ROOT)).keeping(&kept);
        let sent = self.run(call, |client| async move {
            client.get_bucket_lifecycle_configuration(request).await
        });
        match sent.await {
            Ok(_) => {
                let bytes = kept.lock().clone();
                // It has been parsed, and so is UTF-8.
                Ok(Some(String::from_utf8_lossy(&bytes).into_owned()))
            }
            Err(e) if e.code.as_deref() == Some("NoSuchLifecycleConfiguration") => Ok(None),
            Err(e) => Err(e),
        }
    }

    pub(super) async fn put_lifecycle(&self, xml: &str) -> StoreResult<()> {
        let request = PutBucketLifecycleConfigurationRequest {
            bucket: self.bucket(),
            ..Default::default()
        };
        let call = Call::new("writing the lifecycle rules of", None, Expect::Nothing)
            .with_payload(xml.to_owned());
        let sent = self.run(call, |client| async move {
            client.put_bucket_lifecycle_configuration(request).await
        });
        sent.await
    }
}
