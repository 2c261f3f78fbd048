//! A certificate authority for tests. Its certificate is a PEM file, which other tools can be told
//! to trust as well.

use std::path::PathBuf;
use std::sync::Arc;

use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, KeyPair, KeyUsagePurpose};
use rustls_pki_types::PrivateKeyDer;
use tempfile::TempDir;
use tokio_rustls::TlsAcceptor;

pub struct Authority {
    key: KeyPair,
    certificate: rcgen::Certificate,
    folder: TempDir,
}

impl Authority {
    pub fn new() -> Self {
        let mut params = CertificateParams::new([]).expect("no names");
        params
            .distinguished_name
            .push(DnType::CommonName, "layercache's tests");
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
        let key = KeyPair::generate().expect("a key");
        let certificate = params.self_signed(&key).expect("a certificate");
        let folder = tempfile::tempdir().expect("a temporary directory");
        std::fs::write(folder.path().join("ca.pem"), certificate.pem())
            .expect("a file can be written");
        Self {
            key,
            certificate,
            folder,
        }
    }

    /// The PEM file with the authority's certificate. It is removed with the authority.
    pub fn bundle(&self) -> PathBuf {
        self.folder.path().join("ca.pem")
    }

    /// The server side of TLS, with a certificate for `names`.
    pub fn acceptor(&self, names: &[&str]) -> TlsAcceptor {
        let names: Vec<String> = names.iter().map(|name| (*name).to_owned()).collect();
        let key = KeyPair::generate().expect("a key");
        let certificate = CertificateParams::new(names)
            .expect("names")
            .signed_by(&key, &self.certificate, &self.key)
            .expect("a certificate");
        acceptor(&certificate, &key)
    }
}

/// A certificate that has signed itself, and calls itself a CA's: what `openssl req -x509` makes.
pub fn self_signed(name: &str, valid_for: time::Duration) -> (rcgen::Certificate, KeyPair) {
    let mut params = CertificateParams::new([name.to_owned()]).expect("a name");
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.not_after = time::OffsetDateTime::now_utc() + valid_for;
    let key = KeyPair::generate().expect("a key");
    let certificate = params.self_signed(&key).expect("a certificate");
    (certificate, key)
}

/// The server side of TLS with this certificate.
pub fn acceptor(certificate: &rcgen::Certificate, key: &KeyPair) -> TlsAcceptor {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = rustls::ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .expect("versions")
        .with_no_client_auth()
        .with_single_cert(
            vec![certificate.der().clone()],
            PrivateKeyDer::try_from(key.serialize_der()).expect("a key"),
        )
        .expect("the key fits");
    TlsAcceptor::from(Arc::new(config))
}
