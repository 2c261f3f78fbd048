//! Trusted certificates: the system's, and in addition those of AWS_CA_BUNDLE.
//!
//! The AWS CLI trusts the bundle alone; here it adds to the system's certificates, so that a bundle for a
//! private store does not break AWS's sign-in endpoints.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, Result, ensure};
use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::server::ParsedCertificate;
use rustls::{CertificateError, DigitallySignedStruct, OtherError, RootCertStore, SignatureScheme};
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, ServerName, UnixTime};

pub(super) const NO_CERTIFICATES: &str =
    "this system has no CA certificates (install ca-certificates, or set AWS_CA_BUNDLE)";

/// The file that AWS_CA_BUNDLE names. It is not read before an https connection needs it.
#[derive(Debug, Clone, Default)]
pub(super) struct Trust {
    bundle: Option<PathBuf>,
}

impl Trust {
    pub(super) fn new(bundle: Option<PathBuf>) -> Self {
        Trust { bundle }
    }

    /// For an endpoint that is not https.
    pub(super) fn nobody() -> Result<rustls::ClientConfig> {
        client(RootCertStore::empty(), Vec::new())
    }

    /// For an endpoint that is https.
    pub(super) fn client(&self) -> Result<rustls::ClientConfig> {
        self.client_if_any()?.context(NO_CERTIFICATES)
    }

    /// The same. `None`: there are no certificates to trust.
    pub(super) fn client_if_any(&self) -> Result<Option<rustls::ClientConfig>> {
        let mut roots = system();
        let bundle = match &self.bundle {
            Some(path) => add(&mut roots, &read(path)?, path)?,
            None => Vec::new(),
        };
        match roots.is_empty() {
            true => Ok(None),
            false => client(roots, bundle).map(Some),
        }
    }
}

/// The system's certificates, except those that cannot be parsed.
fn system() -> RootCertStore {
    let mut roots = RootCertStore::empty();
    roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
    roots
}

/// `pinned`: the certificates that a server may also present as its own.
fn client(
    roots: RootCertStore,
    pinned: Vec<CertificateDer<'static>>,
) -> Result<rustls::ClientConfig> {
    // Named, because the process's default depends on who sets it first.
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let mut config = rustls::ClientConfig::builder_with_provider(provider.clone())
        .with_safe_default_protocol_versions()
        .context("cannot set TLS up")?
        .with_root_certificates(roots.clone())
        .with_no_client_auth();
    if !pinned.is_empty() {
        let webpki = WebPkiServerVerifier::builder_with_provider(Arc::new(roots), provider)
            .build()
            .context("cannot set TLS up")?;
        config
            .dangerous()
            .set_certificate_verifier(Arc::new(SelfSigned { webpki, pinned }));
    }
    Ok(config)
}

/// Accepts a server certificate that is in AWS_CA_BUNDLE itself, even if it is marked as a CA's, as
/// `openssl req -x509` makes them: OpenSSL's clients do the same. webpki has checked the dates before it
/// objects to the mark; the name is checked here.
#[derive(Debug)]
struct SelfSigned {
    webpki: Arc<WebPkiServerVerifier>,
    pinned: Vec<CertificateDer<'static>>,
}

impl ServerCertVerifier for SelfSigned {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        let verified = self.webpki.verify_server_cert(
            end_entity,
            intermediates,
            server_name,
            ocsp_response,
            now,
        );
        match &verified {
            Err(rustls::Error::InvalidCertificate(CertificateError::Other(why)))
                if is_ca(why) && self.pinned.iter().any(|pinned| pinned == end_entity) =>
            {
                let certificate = ParsedCertificate::try_from(end_entity)?;
                rustls::client::verify_server_name(&certificate, server_name)?;
                Ok(ServerCertVerified::assertion())
            }
            _ => verified,
        }
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.webpki.verify_tls12_signature(message, cert, dss)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.webpki.verify_tls13_signature(message, cert, dss)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.webpki.supported_verify_schemes()
    }
}

fn is_ca(why: &OtherError) -> bool {
    let why = why.0.downcast_ref::<webpki::Error>();
    matches!(why, Some(webpki::Error::CaUsedAsEndEntity))
}

fn read(path: &Path) -> Result<Vec<u8>> {
    std::fs::read(path).with_context(|| format!("cannot read AWS_CA_BUNDLE {}", path.display()))
}

/// Adds the certificates of `pem`, and returns them.
fn add(roots: &mut RootCertStore, pem: &[u8], path: &Path) -> Result<Vec<CertificateDer<'static>>> {
    let mut certificates = Vec::new();
    for certificate in CertificateDer::pem_slice_iter(pem) {
        let certificate = certificate
            .map_err(anyhow::Error::from)
            .and_then(|certificate| {
                roots.add(certificate.clone())?;
                Ok(certificate)
            })
            .with_context(|| format!("AWS_CA_BUNDLE {} is damaged", path.display()))?;
        certificates.push(certificate);
    }
    ensure!(
        !certificates.is_empty(),
        "AWS_CA_BUNDLE {} holds no PEM certificate",
        path.display()
    );
    Ok(certificates)
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
        let complaint = format!("{:#}", trust.client_if_any().unwrap_err());
        complaint.replace(path.to_str().unwrap(), "PATH")
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
