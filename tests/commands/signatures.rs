//! Signatures made by openssl in the forms of cosign and notation: good ones count, all others do not.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde_json::{Value, json};
use soci_cli::demo::registry::DemoRegistry;
use soci_index::format::digest::Digest;
use soci_index::format::model::{Descriptor, media_type};
use soci_index::trust::fetch::{Verdict, search};
use soci_index::trust::{
    Certificate, PublicKey, Signature, SignatureError, Signer as SignedBy, Trust, TrustError, verify,
};
use soci_tests::image::{Image, tar};
use soci_tests::registry::client;
use soci_tests::signer::{Kind, Signer, push_referrer};

const SIGN: &str = "https://sigstore.dev/cosign/sign/v1";
const DAY: u64 = 86_400;
const AUTHORITY: &str = "basicConstraints=critical,CA:TRUE\nkeyUsage=keyCertSign";
const LEAF: &str = "basicConstraints=CA:FALSE\nkeyUsage=digitalSignature\nextendedKeyUsage=codeSigning";

fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs()
}

fn subject() -> Digest {
    Digest::of(b"an index")
}

fn by_key(signer: &Signer) -> Trust {
    Trust { keys: PublicKey::from_pem(&signer.public_pem()).unwrap(), ..Trust::default() }
}

fn by_certificate(signer: &Signer) -> Trust {
    Trust { certificates: Certificate::from_pem(&signer.certificate_pem()).unwrap(), ..Trust::default() }
}

fn simple(signer: &Signer, subject: &Digest) -> Signature {
    let (payload, signature) = signer.simple(subject);
    Signature::Simple { payload: payload.into(), signature, is_keyless: false }
}

fn bundle(value: &Value) -> Signature {
    Signature::Bundle(value.to_string().into())
}

fn jws(value: &Value) -> Signature {
    Signature::Jws(value.to_string().into())
}

#[test]
fn keys_of_every_kind() {
    for kind in [Kind::P256, Kind::P384, Kind::Ed25519, Kind::Rsa] {
        let (Some(signer), Some(other)) = (Signer::new(kind), Signer::new(kind)) else { return };
        let trust = by_key(&signer);
        let good = Ok(SignedBy::Key(trust.keys[0].fingerprint()));
        for signature in [simple(&signer, &subject()), bundle(&signer.bundle(&subject(), SIGN))] {
            assert_eq!(verify(&signature, &subject(), &trust, 0), good, "{kind:?}");
            let both = Trust { keys: [by_key(&other).keys, trust.keys.clone()].concat(), ..Trust::default() };
            assert_eq!(verify(&signature, &subject(), &both, 0), good, "{kind:?}, the second key");
            assert_eq!(verify(&signature, &subject(), &by_key(&other), 0), Err(SignatureError::WrongKey), "{kind:?}");
            let untrusted = verify(&signature, &subject(), &Trust::default(), 0);
            assert_eq!(untrusted, Err(SignatureError::NobodyTrusted { kind: "key" }));
            let error = verify(&signature, &Digest::of(b"another"), &trust, 0).unwrap_err();
            assert!(matches!(error, SignatureError::OtherSubject { .. }), "{error}");
        }
    }
}

#[test]
fn tampered_simple_signatures() {
    let Some(signer) = Signer::new(Kind::P256) else { return };
    let trust = by_key(&signer);
    let (payload, signature) = signer.simple(&subject());
    let other = signer.simple(&Digest::of(b"another"));
    let check = |payload: &[u8], signature: &str, is_keyless| {
        let signature =
            Signature::Simple { payload: payload.to_vec().into(), signature: signature.to_owned(), is_keyless };
        verify(&signature, &subject(), &trust, 0).unwrap_err()
    };
    assert_eq!(check(&payload, &other.1, false), SignatureError::WrongKey, "the signature of another payload");
    assert_eq!(check(&other.0, &signature, false), SignatureError::WrongKey, "the payload of another signature");
    assert_eq!(check(&payload, "", false), SignatureError::WrongKey);
    assert_eq!(check(&other.0, &signature, true), SignatureError::Keyless);
    assert!(matches!(check(&payload, "!", false), SignatureError::Malformed { what: "signature", .. }));
    // Signed, and yet not what cosign signs.
    for (payload, expected) in [
        (json!({}), "payload cannot be read"),
        (json!({ "critical": { "image": { "docker-manifest-digest": subject() }, "type": "other" } }), "type other"),
        (
            json!({ "critical": { "image": { "docker-manifest-digest": "x" }, "type": "cosign container image signature" } }),
            "it signs x",
        ),
    ] {
        use base64::Engine as _;
        let payload = payload.to_string();
        let signature = signer.sign(payload.as_bytes(), "sha256", false);
        let error = check(payload.as_bytes(), &base64::engine::general_purpose::STANDARD.encode(signature), false);
        assert!(error.to_string().contains(expected), "{expected}: {error}");
    }
}

#[test]
fn tampered_bundles() {
    let Some(signer) = Signer::new(Kind::P256) else { return };
    let trust = by_key(&signer);
    let good = signer.bundle(&subject(), SIGN);
    let other = signer.bundle(&Digest::of(b"another"), SIGN);
    let with = |pointer: &str, value: Value| {
        let mut bundle = good.clone();
        let (above, name) = pointer.rsplit_once('/').unwrap();
        match bundle.pointer_mut(pointer) {
            Some(place) => *place = value,
            None => bundle.pointer_mut(above).unwrap()[name] = value,
        }
        bundle
    };
    let many = vec![good["dsseEnvelope"]["signatures"][0].clone(); 17];
    for (bundle, expected) in [
        (with("/dsseEnvelope/payload", other["dsseEnvelope"]["payload"].clone()), "none of the trusted keys"),
        (with("/dsseEnvelope/payloadType", json!("text/plain")), "none of the trusted keys"),
        (with("/dsseEnvelope/signatures", json!([])), "0 signatures"),
        (with("/dsseEnvelope/signatures", json!(many)), "17 signatures"),
        (with("/dsseEnvelope", Value::Null), "without an envelope"),
        (with("/mediaType", json!("application/vnd.dev.sigstore.bundle.v0.9+json")), "is not supported"),
        (with("/verificationMaterial/certificate", json!({ "rawBytes": "" })), "keyless signatures are not checked"),
        (signer.bundle(&subject(), "https://slsa.dev/provenance/v1"), "provenance"),
        (json!([]), "bundle cannot be read"),
    ] {
        let error = verify(&self::bundle(&bundle), &subject(), &trust, 0).unwrap_err().to_string();
        assert!(error.contains(expected), "{expected}: {error}");
    }
}

/// A signer whose certificate an authority has issued, and the authority.
fn certified(kind: Kind) -> Option<(Signer, Signer)> {
    let (authority, signer) = (Signer::new(Kind::P256)?, Signer::new(kind)?);
    authority.certify("authority", None, AUTHORITY);
    signer.certify("signer", Some(&authority), LEAF);
    Some((signer, authority))
}

#[test]
fn certificates_of_every_kind() {
    for kind in [Kind::P256, Kind::P384, Kind::Rsa] {
        let Some((signer, authority)) = certified(kind) else { return };
        let chain = [signer.certificate(), authority.certificate()];
        let signature = jws(&signer.jws(&subject(), &json!({}), &chain));
        let (by_authority, by_signer) = (by_certificate(&authority), by_certificate(&signer));
        let good = Ok(SignedBy::Certificate(by_signer.certificates[0].fingerprint()));
        assert_eq!(verify(&signature, &subject(), &by_authority, now()), good, "{kind:?}");
        assert_eq!(verify(&signature, &subject(), &by_signer, now()), good, "{kind:?}, the signer's own");
        let later = verify(&signature, &subject(), &by_authority, now() + 20 * DAY).unwrap_err().to_string();
        assert!(later.contains("not trusted") && later.contains("Expired"), "{kind:?}: {later}");
        let later = verify(&signature, &subject(), &by_signer, now() + 20 * DAY);
        assert!(matches!(later, Err(SignatureError::Chain { .. })), "{kind:?}, the signer's own: {later:?}");
        let error = verify(&signature, &Digest::of(b"another"), &by_authority, now()).unwrap_err();
        assert!(matches!(error, SignatureError::OtherSubject { .. }), "{error}");
    }
    // One that vouches for itself, as notation makes for trying out.
    let Some(signer) = Signer::new(Kind::P256) else { return };
    signer.certify("alone", None, LEAF);
    let signature = jws(&signer.jws(&subject(), &json!({}), &[signer.certificate()]));
    assert!(verify(&signature, &subject(), &by_certificate(&signer), now()).is_ok());
}

#[test]
fn certificates_that_do_not_count() {
    let Some((signer, authority)) = certified(Kind::P256) else { return };
    let Some((other, other_authority)) = certified(Kind::P256) else { return };
    let trust = by_certificate(&authority);
    let chain = [signer.certificate(), authority.certificate()];
    let error = |envelope: &Value| verify(&jws(envelope), &subject(), &trust, now()).unwrap_err();
    let foreign = [other.certificate(), other_authority.certificate()];
    assert!(matches!(error(&other.jws(&subject(), &json!({}), &foreign)), SignatureError::Chain { .. }));
    assert!(matches!(
        error(&other.jws(&subject(), &json!({}), &[other.certificate(), authority.certificate()])),
        SignatureError::Chain { .. }
    ));
    // A good certificate beside another signer's signature.
    assert_eq!(error(&other.jws(&subject(), &json!({}), &chain)), SignatureError::NotByCertificate);
    // A certificate for another purpose, and one that an ordinary signer has issued.
    let server = Signer::new(Kind::P256).unwrap();
    server.certify("server", Some(&authority), "basicConstraints=CA:FALSE\nextendedKeyUsage=serverAuth");
    let chain = [server.certificate(), authority.certificate()];
    assert!(matches!(error(&server.jws(&subject(), &json!({}), &chain)), SignatureError::Chain { .. }));
    server.certify("below", Some(&signer), LEAF);
    let chain = [server.certificate(), signer.certificate(), authority.certificate()];
    assert!(matches!(error(&server.jws(&subject(), &json!({}), &chain)), SignatureError::Chain { .. }));
    let unnamed = jws(&signer.jws(&subject(), &json!({}), &[signer.certificate()]));
    let unnamed = verify(&unnamed, &subject(), &by_key(&signer), now());
    assert_eq!(unnamed, Err(SignatureError::NobodyTrusted { kind: "certificate" }));
}

#[test]
fn tampered_envelopes() {
    let Some((signer, authority)) = certified(Kind::P256) else { return };
    let trust = by_certificate(&authority);
    let chain = [signer.certificate(), authority.certificate()];
    let made = |protected: Value| signer.jws(&subject(), &protected, &chain);
    let with = |key: &str, value: Value| {
        let mut envelope = made(json!({}));
        envelope[key] = value;
        envelope
    };
    let other = signer.jws(&Digest::of(b"another"), &json!({}), &chain);
    for (envelope, expected) in [
        (with("payload", other["payload"].clone()), "not made with the key"),
        (with("protected", made(json!({ "x": 1 }))["protected"].clone()), "not made with the key"),
        (with("signature", json!("")), "has 0 bytes, not 64"),
        (with("signature", json!("A".repeat(86))), "not made with the key"),
        (with("signature", json!("=")), "signature cannot be read"),
        (with("header", json!({ "x5c": [] })), "0 certificates"),
        (with("header", json!({ "x5c": vec![chain[0].clone(); 17] })), "17 certificates"),
        (with("header", json!({ "x5c": ["AAAA"] })), "is not trusted"),
        (with("protected", json!("e30")), "missing field `alg`"),
        (made(json!({ "alg": "none" })), "algorithm \"none\" is not accepted"),
        (made(json!({ "alg": "HS256" })), "algorithm \"HS256\" is not accepted"),
        (made(json!({ "alg": "ES384" })), "has 64 bytes, not 96"),
        (made(json!({ "alg": "PS256" })), "not made with the key"),
        (made(json!({ "crit": ["exp"] })), "critical header field exp"),
        (made(json!({ "io.cncf.notary.signingScheme": "notary.x509.signingAuthority" })), "signing scheme"),
        (made(json!({ "cty": "text/plain" })), "content of type"),
        (made(json!({ "io.cncf.notary.expiry": "2020-01-01T00:00:00Z" })), "expired at 2020-01-01"),
        (made(json!({ "io.cncf.notary.expiry": "soon" })), "expiry cannot be read"),
        (json!("x"), "envelope cannot be read"),
    ] {
        let error = verify(&jws(&envelope), &subject(), &trust, now()).unwrap_err().to_string();
        assert!(error.contains(expected), "{expected}: {error}");
    }
    let later = made(json!({ "io.cncf.notary.expiry": "2099-01-01T00:00:00Z", "crit": ["io.cncf.notary.expiry"] }));
    assert!(verify(&jws(&later), &subject(), &trust, now()).is_ok());
    // Whatever is cut off or changed, it does not count, and nothing panics. Only what leads on from a certificate that
    // is trusted already plays no part.
    let text = made(json!({})).to_string();
    let surplus = text.find(&chain[1]).unwrap()..text.find(&chain[1]).unwrap() + chain[1].len();
    for at in (0..text.len()).step_by(7) {
        let mut changed = text.clone().into_bytes();
        changed[at] ^= 2;
        for (bytes, matters) in [(changed, !surplus.contains(&at)), (text.as_bytes()[..at].to_vec(), true)] {
            let result = verify(&Signature::Jws(bytes.clone().into()), &subject(), &trust, now());
            assert!(result.is_err() || !matters, "{}", String::from_utf8_lossy(&bytes));
        }
    }
}

#[test]
fn files_without_a_key_or_certificate() {
    for text in [&b""[..], b"no PEM", b"-----BEGIN PUBLIC KEY-----\n-----END CERTIFICATE-----"] {
        assert!(PublicKey::from_pem(text).is_err() && Certificate::from_pem(text).is_err());
    }
    let empty = "-----BEGIN PUBLIC KEY-----\nAAAA\n-----END PUBLIC KEY-----\n";
    assert!(matches!(PublicKey::from_pem(empty.as_bytes()), Err(TrustError::Malformed { .. })));
    let Some(signer) = Signer::new(Kind::P521) else { return };
    assert_eq!(PublicKey::from_pem(&signer.public_pem()), Err(TrustError::Kind));
    assert!(matches!(Certificate::from_pem(&signer.public_pem()), Err(TrustError::Nothing { .. })));
}

#[tokio::test(flavor = "multi_thread")]
async fn signatures_are_found_beside_the_manifest() {
    let Some(cosign) = Signer::new(Kind::P256) else { return };
    let Some((notation, authority)) = certified(Kind::Rsa) else { return };
    let registry = DemoRegistry::start(Duration::ZERO).await.unwrap();
    let repository = client(&registry.host()).repository("team/app");
    let image = Image::gzip(vec![tar(&[("a", b"b".to_vec())])]);
    image.push(&repository, "v1").await;
    let subject = Descriptor::of(media_type::MANIFEST, &image.manifest);
    let nothing = search(&repository, &subject.digest, &by_key(&cosign), now()).await;
    assert_eq!(nothing.to_string(), "it has no signature");

    let bundle_type = "application/vnd.dev.sigstore.bundle.v0.3+json";
    let provenance = cosign.bundle(&subject.digest, "https://slsa.dev/provenance/v1").to_string();
    push_referrer(&repository, &subject, bundle_type, bundle_type, provenance.as_bytes()).await;
    let notary = "application/vnd.cncf.notary.signature";
    push_referrer(&repository, &subject, notary, "application/cose", b"cose").await;
    let verdict = search(&repository, &subject.digest, &by_key(&cosign), now()).await;
    let Verdict::None(refused) = &verdict else { panic!("{verdict}") };
    assert_eq!(refused.len(), 2, "{verdict}");
    let said = verdict.to_string();
    assert!(said.contains("provenance") && said.contains("application/cose"), "{said}");

    let chain = [notation.certificate(), authority.certificate()];
    let envelope = notation.jws(&subject.digest, &json!({}), &chain).to_string();
    push_referrer(&repository, &subject, notary, "application/jose+json", envelope.as_bytes()).await;
    let verdict = search(&repository, &subject.digest, &by_certificate(&authority), now()).await;
    assert!(matches!(verdict, Verdict::Good(SignedBy::Certificate(_))), "{verdict}");
    let verdict = search(&repository, &subject.digest, &by_key(&cosign), now()).await;
    assert!(matches!(verdict, Verdict::None(_)), "{verdict}");

    let signed = cosign.bundle(&subject.digest, SIGN).to_string();
    push_referrer(&repository, &subject, bundle_type, bundle_type, signed.as_bytes()).await;
    let verdict = search(&repository, &subject.digest, &by_key(&cosign), now()).await;
    assert!(matches!(verdict, Verdict::Good(SignedBy::Key(_))), "{verdict}");

    let other = Signer::new(Kind::Ed25519).unwrap();
    assert!(matches!(search(&repository, &subject.digest, &by_key(&other), now()).await, Verdict::None(_)));
    other.push_simple(&repository, &subject.digest).await;
    assert!(matches!(
        search(&repository, &subject.digest, &by_key(&other), now()).await,
        Verdict::Good(SignedBy::Key(_))
    ));
}
