//! Which server certificates are believed.
//!
//! Those that lead to a trusted one, by the rules of the web's PKI; and, beyond them, a certificate that *is* a trusted
//! one. What `openssl req -x509` makes, and many guides of registries with it, is a certificate for a server that calls
//! itself an authority: it is put among the trusted ones and shown by the server itself. The rules refuse it in that
//! role, while OpenSSL, Go and curl take it. Its name and its dates count as any other's.

use std::path::Path;
use std::sync::Arc;

use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::{CertificateError, ClientConfig, DigitallySignedStruct, Error, RootCertStore, SignatureScheme};

/// How TLS is spoken to hosts whose certificate must be good. `extra` are trusted beside the system's; the error is a
/// reason in words.
pub(super) fn client_config(
    extra: &[CertificateDer<'static>],
    identity: Option<(Vec<CertificateDer<'static>>, PrivateKeyDer<'static>)>,
) -> Result<ClientConfig, String> {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let verifier = Arc::new(Verifier::new(extra, &provider)?);
    let builder = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(|error| error.to_string())?
        .dangerous()
        .with_custom_certificate_verifier(verifier);
    let mut config = match identity {
        Some((chain, key)) => builder.with_client_auth_cert(chain, key).map_err(|error| error.to_string())?,
        None => builder.with_no_client_auth(),
    };
    config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    Ok(config)
}

/// The first message of a TLS connection to `host`, which is a name or an address; `None` when it is neither.
pub(super) fn client_hello(host: &str) -> Option<Vec<u8>> {
    let name = ServerName::try_from(host.trim_start_matches('[').trim_end_matches(']').to_owned()).ok()?;
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions().ok()?;
    let config = config.with_root_certificates(RootCertStore::empty()).with_no_client_auth();
    let mut connection = rustls::ClientConnection::new(Arc::new(config), name).ok()?;
    let mut hello = Vec::new();
    connection.write_tls(&mut hello).ok()?;
    Some(hello)
}

/// The rules, and what goes beyond them.
#[derive(Debug)]
struct Verifier {
    /// None where nothing is trusted.
    rules: Option<Arc<WebPkiServerVerifier>>,
    trusted: Vec<CertificateDer<'static>>,
    algorithms: rustls::crypto::WebPkiSupportedAlgorithms,
}

impl Verifier {
    fn new(extra: &[CertificateDer<'static>], provider: &Arc<rustls::crypto::CryptoProvider>) -> Result<Self, String> {
        let system = rustls_native_certs::load_native_certs();
        if system.certs.is_empty() {
            let error = system.errors.first().map_or_else(|| "there are none".to_owned(), ToString::to_string);
            tracing::warn!(error, "no system certificates");
        }
        let trusted: Vec<CertificateDer<'static>> = system.certs.into_iter().chain(extra.iter().cloned()).collect();
        let mut roots = RootCertStore::empty();
        roots.add_parsable_certificates(trusted.iter().cloned());
        let algorithms = provider.signature_verification_algorithms;
        let rules = match roots.is_empty() {
            true => None,
            false => {
                let rules = WebPkiServerVerifier::builder_with_provider(roots.into(), Arc::clone(provider)).build();
                Some(rules.map_err(|error| error.to_string())?)
            }
        };
        Ok(Self { rules, trusted, algorithms })
    }
}

impl ServerCertVerifier for Verifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        name: &ServerName<'_>,
        ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        let Some(rules) = &self.rules else { return Err(CertificateError::UnknownIssuer.into()) };
        let verified = rules.verify_server_cert(end_entity, intermediates, name, ocsp_response, now);
        match verified {
            // The dates were looked at before the role, which the tests hold the library to; the name was not.
            Err(error) if is_about_role(&error) && self.trusted.iter().any(|trusted| trusted == end_entity) => {
                let certificate = rustls::server::ParsedCertificate::try_from(end_entity)?;
                rustls::client::verify_server_name(&certificate, name)?;
                Ok(ServerCertVerified::assertion())
            }
            other => other,
        }
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        rustls::crypto::verify_tls12_signature(message, certificate, signature, &self.algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        rustls::crypto::verify_tls13_signature(message, certificate, signature, &self.algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.algorithms.supported_schemes()
    }
}

/// Whether a certificate was refused only because it is marked as a CA.
fn is_about_role(error: &Error) -> bool {
    let Error::InvalidCertificate(CertificateError::Other(other)) = error else { return false };
    matches!(other.0.downcast_ref::<webpki::Error>(), Some(webpki::Error::CaUsedAsEndEntity))
}

/// What is wrong with a certificate or a handshake, and what to do about it.
pub(super) fn advice(error: &Error) -> String {
    match error {
        error if is_about_role(error) => {
            "it shows a certificate of its own making that is not trusted here: name that with --tls-ca-cert, or in \
             hosts.toml"
                .to_owned()
        }
        Error::InvalidCertificate(CertificateError::UnknownIssuer) => {
            "its certificate is by an authority that is not trusted here: name that one's certificate with --tls-ca-cert, \
             or in hosts.toml"
                .to_owned()
        }
        Error::InvalidMessage(_) => {
            "it speaks no TLS on this port; if it speaks HTTP, and that is meant: --plain-http".to_owned()
        }
        other => other.to_string(),
    }
}

/// The certificates of a PEM file.
pub(super) fn chain(file: &Path, pem: &[u8]) -> Result<Vec<CertificateDer<'static>>, String> {
    let found: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(pem).collect();
    match found {
        Ok(found) if found.is_empty() => Err(format!("{}: there is no certificate in it", file.display())),
        found => found.map_err(|error| format!("{}: {error}", file.display())),
    }
}
