//! Connections to one server, which are kept from request to request, and the least of HTTP.

use std::io::{BufRead as _, BufReader, Read, Write};
use std::net::TcpStream;
use std::path::Path;
use std::sync::{Arc, Mutex};

use anyhow::{Context, Result, ensure};
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, ServerName};
use rustls::{ClientConfig, ClientConnection, RootCertStore, StreamOwned};

/// A connection, whatever it is encrypted with.
pub trait Stream: Read + Write + Send {}

impl<S: Read + Write + Send> Stream for S {}

pub type Connection = BufReader<Box<dyn Stream>>;

pub struct Wire<'a> {
    host: &'a str,
    pub bucket: &'a str,
    /// With TLS.
    tls: Option<Arc<ClientConfig>>,
    idle: Mutex<Vec<Connection>>,
}

impl<'a> Wire<'a> {
    /// `authority` is a file with the certificates to trust.
    pub fn new(url: &'a str, authority: Option<&Path>) -> Result<Self> {
        let (_, address) = url.split_once("://").context("no scheme")?;
        let (host, bucket) = address.split_once('/').context("no bucket")?;
        Ok(Wire {
            host,
            bucket,
            tls: authority.map(config).transpose()?.map(Arc::new),
            idle: Mutex::default(),
        })
    }

    /// Lists what begins with `prefix`, as a round trip that comes before all others.
    pub fn list(&self, prefix: &str) -> Result<()> {
        let line = format!("GET /{}?list-type=2&prefix={prefix}", self.bucket);
        self.call(&line, "").map(drop)
    }

    /// The path of a blob.
    pub fn blob(&self, name: &str) -> String {
        format!("/{}/blobs/{name}", self.bucket)
    }

    pub fn connection(&self) -> Result<Connection> {
        match self.idle.lock().expect("no panic").pop() {
            Some(connection) => Ok(connection),
            None => self.dial(),
        }
    }

    pub fn keep(&self, connection: Connection) {
        self.idle.lock().expect("no panic").push(connection);
    }

    fn dial(&self) -> Result<Connection> {
        let tcp = TcpStream::connect(self.host)?;
        tcp.set_nodelay(true)?;
        let stream: Box<dyn Stream> = match &self.tls {
            None => Box::new(tcp),
            Some(config) => {
                let (name, _) = self.host.rsplit_once(':').context("no port")?;
                let name = ServerName::try_from(name.to_owned())?;
                let tls = ClientConnection::new(Arc::clone(config), name)?;
                Box::new(StreamOwned::new(tls, tcp))
            }
        };
        Ok(BufReader::with_capacity(4 << 10, stream))
    }

    /// Sends a request's head. `line` is its first line, without the version.
    pub fn ask(&self, connection: &mut Connection, line: &str, headers: &str) -> Result<()> {
        let host = self.host;
        let head = format!("{line} HTTP/1.1\r\nhost: {host}\r\n{headers}\r\n");
        Ok(connection.get_mut().write_all(head.as_bytes())?)
    }

    /// One request whose response is read whole: its head and its body.
    pub fn call(&self, line: &str, body: &str) -> Result<(String, String)> {
        let mut connection = self.connection()?;
        let length = format!("content-length: {}\r\n", body.len());
        self.ask(&mut connection, line, &length)?;
        connection.get_mut().write_all(body.as_bytes())?;
        let answer = read_whole(&mut connection)?;
        self.keep(connection);
        Ok(answer)
    }
}

fn config(authority: &Path) -> Result<ClientConfig> {
    let mut roots = RootCertStore::empty();
    for certificate in CertificateDer::pem_file_iter(authority)? {
        roots.add(certificate?)?;
    }
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = ClientConfig::builder_with_provider(provider);
    let config = config.with_safe_default_protocol_versions()?;
    Ok(config.with_root_certificates(roots).with_no_client_auth())
}

/// Reads the head of a response that is a success.
pub fn read_head(connection: &mut Connection) -> Result<String> {
    let mut head = String::new();
    while connection.read_line(&mut head)? > 2 {}
    ensure!(head.starts_with("HTTP/1.1 2"), "{head}");
    Ok(head)
}

/// Reads a response that says how long it is.
pub fn read_whole(connection: &mut Connection) -> Result<(String, String)> {
    let head = read_head(connection)?;
    let length = header(&head, "content-length").unwrap_or("0");
    let mut body = vec![0; length.parse()?];
    connection.read_exact(&mut body)?;
    Ok((head, String::from_utf8(body)?))
}

/// A header of a response's head.
pub fn header<'h>(head: &'h str, name: &str) -> Option<&'h str> {
    let mut headers = head.lines().filter_map(|line| line.split_once(": "));
    let found = headers.find(|(this, _)| this.eq_ignore_ascii_case(name));
    found.map(|(_, value)| value)
}
