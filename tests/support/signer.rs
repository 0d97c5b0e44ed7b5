//! A signer that shares no code with the product: the `openssl` program.

use std::fs;
use std::path::PathBuf;
use std::process::Command;

use base64::Engine as _;
use base64::engine::general_purpose::{STANDARD, URL_SAFE_NO_PAD};
use serde_json::{Value, json};
use soci_index::format::digest::Digest;
use soci_index::format::model::{Descriptor, media_type};
use soci_index::format::reference::ManifestName;
use soci_index::registry::{Body, Repository};
use tempfile::TempDir;

use crate::stdout;

/// A kind of key.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// ECDSA on P-256, what cosign makes.
    P256,
    /// ECDSA on P-384.
    P384,
    /// ECDSA on P-521.
    P521,
    Ed25519,
    /// RSA of 2048 bits.
    Rsa,
}

/// A key, with a certificate of its own if it was asked for one.
#[derive(Debug)]
pub struct Signer {
    kind: Kind,
    directory: TempDir,
}

fn openssl(words: &str) -> Command {
    let mut command = Command::new("openssl");
    command.args(words.split(' '));
    command
}

impl Signer {
    /// Makes a key; `None`, with a word on standard error, where there is no openssl.
    ///
    /// # Panics
    /// When there is and it does not work.
    #[must_use]
    pub fn new(kind: Kind) -> Option<Self> {
        if openssl("version").output().is_err() {
            eprintln!("SKIPPED: signing needs openssl");
            return None;
        }
        let signer = Self { kind, directory: tempfile::tempdir().expect("a directory") };
        let words = match kind {
            Kind::P256 => "genpkey -algorithm EC -pkeyopt ec_paramgen_curve:P-256",
            Kind::P384 => "genpkey -algorithm EC -pkeyopt ec_paramgen_curve:P-384",
            Kind::P521 => "genpkey -algorithm EC -pkeyopt ec_paramgen_curve:P-521",
            Kind::Ed25519 => "genpkey -algorithm ED25519",
            Kind::Rsa => "genpkey -algorithm RSA -pkeyopt rsa_keygen_bits:2048",
        };
        drop(stdout(openssl(words).arg("-out").arg(signer.path("key.pem"))));
        drop(stdout(openssl("pkey -pubout -in").arg(signer.path("key.pem")).arg("-out").arg(signer.path("pub.pem"))));
        Some(signer)
    }

    /// A file of this signer: `pub.pem`, `cert.pem`.
    #[must_use]
    pub fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// The public key.
    ///
    /// # Panics
    /// Never: it was made with the signer.
    #[must_use]
    pub fn public_pem(&self) -> Vec<u8> {
        fs::read(self.path("pub.pem")).expect("a file of ours")
    }

    /// Makes a certificate that is valid for ten days, by `issuer` or else by itself. `extensions` is a list for
    /// openssl.
    ///
    /// # Panics
    /// When openssl refuses.
    pub fn certify(&self, name: &str, issuer: Option<&Self>, extensions: &str) {
        fs::write(self.path("ext"), extensions).expect("a file");
        let subject = format!("/CN={name}");
        drop(stdout(
            openssl("req -new -key").arg(self.path("key.pem")).args(["-subj", &subject, "-out"]).arg(self.path("csr")),
        ));
        let mut command = openssl("x509 -req -days 10 -set_serial 7 -in");
        command.arg(self.path("csr")).arg("-extfile").arg(self.path("ext")).arg("-out").arg(self.path("cert.pem"));
        match issuer {
            Some(issuer) => {
                command.arg("-CA").arg(issuer.path("cert.pem")).arg("-CAkey").arg(issuer.path("key.pem"));
            }
            None => {
                command.arg("-signkey").arg(self.path("key.pem"));
            }
        }
        drop(stdout(&mut command));
    }

    /// The certificate in PEM.
    ///
    /// # Panics
    /// When there is none.
    #[must_use]
    pub fn certificate_pem(&self) -> Vec<u8> {
        fs::read(self.path("cert.pem")).expect("a certificate")
    }

    /// The certificate in DER, as base64.
    #[must_use]
    pub fn certificate(&self) -> String {
        let der = self.path("cert.der");
        drop(stdout(openssl("x509 -outform DER -in").arg(self.path("cert.pem")).arg("-out").arg(&der)));
        STANDARD.encode(fs::read(der).expect("a file"))
    }

    /// Signs with `hash`, `sha256` say, as the key does it by default; with `pss` as RSA-PSS.
    ///
    /// # Panics
    /// When openssl refuses.
    #[must_use]
    pub fn sign(&self, message: &[u8], hash: &str, pss: bool) -> Vec<u8> {
        let (input, output) = (self.path("message"), self.path("signature"));
        fs::write(&input, message).expect("a file");
        let mut command = match self.kind {
            Kind::Ed25519 => openssl("pkeyutl -sign -rawin -inkey"),
            _ => openssl(&format!("dgst -{hash} -sign")),
        };
        command.arg(self.path("key.pem"));
        if pss {
            command.args(["-sigopt", "rsa_padding_mode:pss", "-sigopt", "rsa_pss_saltlen:digest"]);
        }
        command.arg("-out").arg(&output);
        if self.kind == Kind::Ed25519 {
            command.arg("-in");
        }
        drop(stdout(command.arg(&input)));
        fs::read(output).expect("a file")
    }

    /// What cosign signs for a manifest, and its signature in base64.
    #[must_use]
    pub fn simple(&self, subject: &Digest) -> (Vec<u8>, String) {
        let payload = json!({ "critical": {
            "identity": { "docker-reference": "h.example/a" },
            "image": { "docker-manifest-digest": subject },
            "type": "cosign container image signature",
        }, "optional": null });
        let payload = payload.to_string().into_bytes();
        let signature = STANDARD.encode(self.sign(&payload, "sha256", false));
        (payload, signature)
    }

    /// A bundle with a statement about a manifest.
    #[must_use]
    pub fn bundle(&self, subject: &Digest, predicate: &str) -> Value {
        let kind = "application/vnd.in-toto+json";
        let statement = json!({ "_type": "https://in-toto.io/Statement/v1", "predicateType": predicate, "predicate": {},
            "subject": [{ "name": "", "digest": { "sha256": subject.hex() } }] });
        let payload = statement.to_string();
        let message = format!("DSSEv1 {} {kind} {} {payload}", kind.len(), payload.len());
        json!({
            "mediaType": "application/vnd.dev.sigstore.bundle.v0.3+json",
            "verificationMaterial": { "publicKey": { "hint": "x" }, "tlogEntries": [] },
            "dsseEnvelope": { "payload": STANDARD.encode(payload), "payloadType": kind,
                "signatures": [{ "sig": STANDARD.encode(self.sign(message.as_bytes(), "sha256", false)) }] },
        })
    }

    /// An envelope of notation; `protected` replaces fields of its header. `chain` is of certificates, as base64.
    ///
    /// # Panics
    /// For a kind of key that notation does not use.
    #[must_use]
    pub fn jws(&self, subject: &Digest, protected: &Value, chain: &[String]) -> Value {
        let (algorithm, hash, half) = match self.kind {
            Kind::P256 => ("ES256", "sha256", Some(32)),
            Kind::P384 => ("ES384", "sha384", Some(48)),
            Kind::Rsa => ("PS256", "sha256", None),
            Kind::P521 | Kind::Ed25519 => panic!("notation does not use this kind here"),
        };
        let mut header = json!({ "alg": algorithm, "cty": "application/vnd.cncf.notary.payload.v1+json",
            "crit": ["io.cncf.notary.signingScheme"], "io.cncf.notary.signingScheme": "notary.x509",
            "io.cncf.notary.signingTime": "2026-01-01T00:00:00Z" });
        for (key, value) in protected.as_object().into_iter().flatten() {
            header[key] = value.clone();
        }
        let target = json!({ "mediaType": media_type::MANIFEST, "digest": subject, "size": 1 });
        let payload = URL_SAFE_NO_PAD.encode(json!({ "targetArtifact": target }).to_string());
        let header = URL_SAFE_NO_PAD.encode(header.to_string());
        let signature = self.sign(format!("{header}.{payload}").as_bytes(), hash, half.is_none());
        let signature = half.map_or_else(|| signature.clone(), |half| numbers(&signature, half));
        json!({ "payload": payload, "protected": header, "header": { "x5c": chain },
            "signature": URL_SAFE_NO_PAD.encode(signature) })
    }

    /// Puts cosign's signature of a manifest beside it, under the tag that cosign makes.
    ///
    /// # Panics
    /// When the registry refuses it.
    pub async fn push_simple(&self, repository: &Repository, subject: &Digest) {
        let (payload, signature) = self.simple(subject);
        let kind = "application/vnd.dev.cosign.simplesigning.v1+json";
        let mut layer = Descriptor::of(kind, &payload);
        layer.annotations.insert("dev.cosignproject.cosign/signature".to_owned(), signature);
        push_blob(repository, &payload).await;
        push_blob(repository, b"{}").await;
        let manifest = json!({ "schemaVersion": 2, "mediaType": media_type::MANIFEST,
            "config": Descriptor::of(media_type::CONFIG, b"{}"), "layers": [layer] });
        let tag = ManifestName::Tag(format!("sha256-{}.sig", subject.hex()));
        let manifest = manifest.to_string().into();
        repository.push_manifest(&tag, media_type::MANIFEST, manifest).await.expect("a manifest");
    }
}

/// Pushes an artifact that refers to a manifest: `content` of `kind`.
///
/// # Panics
/// When the registry refuses it.
pub async fn push_referrer(repository: &Repository, subject: &Descriptor, artifact: &str, kind: &str, content: &[u8]) {
    push_blob(repository, content).await;
    push_blob(repository, b"{}").await;
    let manifest = json!({ "schemaVersion": 2, "mediaType": media_type::MANIFEST, "artifactType": artifact,
        "config": Descriptor::of("application/vnd.oci.empty.v1+json", b"{}"),
        "layers": [Descriptor::of(kind, content)], "subject": subject });
    repository.push_referrer(media_type::MANIFEST, manifest.to_string().into()).await.expect("a referrer");
}

async fn push_blob(repository: &Repository, blob: &[u8]) {
    let body = Body::Bytes(bytes::Bytes::copy_from_slice(blob));
    repository.push_blob(&Digest::of(blob), body, None).await.expect("a blob");
}

/// The two numbers of a signature in DER, each with `half` bytes.
fn numbers(der: &[u8], half: usize) -> Vec<u8> {
    let (mut rest, mut out) = (&der[2..], Vec::new());
    for _ in 0..2 {
        let length = usize::from(rest[1]);
        let number = &rest[2..2 + length];
        let digits = &number[number.len().saturating_sub(half)..];
        out.extend(std::iter::repeat_n(0, half - digits.len()).chain(digits.iter().copied()));
        rest = &rest[2 + length..];
    }
    out
}
