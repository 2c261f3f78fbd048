//! Whom https connections trust: the system's certificates, and those of AWS_CA_BUNDLE in addition.
//!
//! aws-config does not read AWS_CA_BUNDLE (aws-sdk-rust#1362), so its client is given the same. The
//! AWS CLI trusts the bundle alone; here it adds, so that a bundle of one private store does not
//! break the sign-in endpoints of AWS.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, Result, ensure};
use aws_smithy_http_client::tls::{TlsContext, TrustStore};
use rustls::RootCertStore;
use rustls_pki_types::CertificateDer;
use rustls_pki_types::pem::PemObject;

/// The file that AWS_CA_BUNDLE names. It is not read before an https connection needs it.
#[derive(Debug, Clone, Default)]
pub(super) struct Trust {
    bundle: Option<PathBuf>,
}

impl Trust {
    pub(super) fn from_env() -> Self {
        let bundle = std::env::var_os("AWS_CA_BUNDLE").filter(|path| !path.is_empty());
        Trust {
            bundle: bundle.map(PathBuf::from),
        }
    }

    /// For an endpoint that is not https, and so trusts nobody.
    pub(super) fn nobody() -> Result<rustls::ClientConfig> {
        client(RootCertStore::empty())
    }

    /// For our own connections.
    pub(super) fn client(&self) -> Result<rustls::ClientConfig> {
        let mut roots = system();
        if let Some(path) = &self.bundle {
            add(&mut roots, &read(path)?, path)?;
        }
        ensure!(
            !roots.is_empty(),
            "this system has no CA certificates (install ca-certificates, or set AWS_CA_BUNDLE)"
        );
        client(roots)
    }

    /// For aws-config's connections.
    pub(super) fn context(&self) -> Result<TlsContext> {
        // Asking for the system's certificates where there are none would be a panic.
        let mut store = TrustStore::empty().with_native_roots(!system().is_empty());
        if let Some(path) = &self.bundle {
            let pem = read(path)?;
            add(&mut RootCertStore::empty(), &pem, path)?;
            store = store.with_pem_certificate(pem);
        }
        TlsContext::builder()
            .with_trust_store(store)
            .build()
            .context("cannot set TLS up")
    }
}

/// The system's certificates. Some systems carry a few that no one can read: the others do.
fn system() -> RootCertStore {
    let mut roots = RootCertStore::empty();
    roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
    roots
}

fn client(roots: RootCertStore) -> Result<rustls::ClientConfig> {
    // The provider is named: which one is the process's default depends on who asked first.
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    Ok(rustls::ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .context("cannot set TLS up")?
        .with_root_certificates(roots)
        .with_no_client_auth())
}

fn read(path: &Path) -> Result<Vec<u8>> {
    std::fs::read(path).with_context(|| format!("cannot read AWS_CA_BUNDLE {}", path.display()))
}

fn add(roots: &mut RootCertStore, pem: &[u8], path: &Path) -> Result<()> {
    let mut certificates = 0;
    for certificate in CertificateDer::pem_slice_iter(pem) {
        certificate
            .map_err(anyhow::Error::from)
            .and_then(|certificate| Ok(roots.add(certificate)?))
            .with_context(|| format!("AWS_CA_BUNDLE {} is damaged", path.display()))?;
        certificates += 1;
    }
    ensure!(
        certificates > 0,
        "AWS_CA_BUNDLE {} holds no PEM certificate",
        path.display()
    );
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn complaint(content: Option<&str>) -> String {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("ca.pem");
        if let Some(content) = content {
            std::fs::write(&path, content).unwrap();
        }
        let trust = Trust {
            bundle: Some(path.clone()),
        };
        let ours = format!("{:#}", trust.client().unwrap_err());
        let theirs = format!("{:#}", trust.context().unwrap_err());
        assert_eq!(ours, theirs);
        ours.replace(path.to_str().unwrap(), "PATH")
    }

    #[test]
    fn a_bundle_that_is_missing_empty_or_damaged_is_named() {
        assert_eq!(
            complaint(None),
            "cannot read AWS_CA_BUNDLE PATH: No such file or directory (os error 2)"
        );
        assert_eq!(
            complaint(Some("nothing here")),
            "AWS_CA_BUNDLE PATH holds no PEM certificate"
        );
        let damaged = complaint(Some(
            "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n",
        ));
        assert!(
            damaged.starts_with("AWS_CA_BUNDLE PATH is damaged: "),
            "{damaged}"
        );
    }
}
