//! Files that are right, files that are wrong, every key.

use std::time::Duration;

use super::*;

fn read(text: &str) -> Result<HostsFile, HostsError> {
    parse(text, Path::new("/certs.d/r.example/hosts.toml"))
}

/// The rules of the registry itself under these keys.
fn rules(keys: &str) -> HostRules {
    read(keys).unwrap_or_else(|error| panic!("{error}")).hosts.rules
}

#[test]
fn a_whole_file() {
    let text = r#"
server = "https://origin.example"

[host."https://z.example:8443/cache"]
  capabilities = ["pull", "resolve"]
  ca = "z.pem"
  [host."https://z.example:8443/cache".header]
    x-one = "1"
    x-many = ["2", "3"]

[host."a.example"]
  skip_verify = true

[host."http://m.example/custom/root"]
  override_path = true
"#;
    let HostsFile { hosts, unknown } = read(text).unwrap();
    assert_eq!(unknown, []);
    let urls: Vec<&str> = hosts.before.iter().map(|host| host.url.as_str()).collect();
    assert_eq!(urls, ["https://z.example:8443/cache/v2", "https://a.example/v2", "http://m.example/custom/root"]);
    assert_eq!(hosts.server.as_ref().map(Url::as_str), Some("https://origin.example/v2"));
    assert_eq!(hosts.rules, HostRules::default());
    let first = &hosts.before[0].rules;
    assert_eq!(first.capabilities, Capabilities { pull: true, resolve: true, ..Capabilities::NONE });
    assert_eq!(first.ca_files, [PathBuf::from("/certs.d/r.example/z.pem")]);
    let headers: Vec<_> = first.headers.iter().map(|(name, value)| (name.as_str(), value.expose())).collect();
    assert_eq!(headers, [("x-many", "2"), ("x-many", "3"), ("x-one", "1")]);
    assert!(hosts.before[1].rules.skip_verify && !first.skip_verify);
    assert!(!format!("{:?}", first.headers).contains('2'));
}

#[test]
fn the_top_is_about_the_last_host() {
    let HostsFile { hosts, .. } = read("ca = '/ca.pem'\n[host.'m']\n").unwrap();
    assert_eq!((hosts.server, hosts.rules.ca_files), (None, vec![PathBuf::from("/ca.pem")]));
    assert_eq!(hosts.before[0].rules, HostRules::default());
    // An empty server is none; an empty file says nothing.
    assert_eq!(read("server = ''").unwrap().hosts, Hosts::default());
    assert_eq!(read("# nothing\n").unwrap().hosts, Hosts::default());
    let whole = read("server = 'h/x'\noverride_path = true\n").unwrap().hosts.server;
    assert_eq!(whole.as_ref().map(Url::as_str), Some("https://h/x"));
}

#[test]
fn order_is_that_of_the_text() {
    let text = "[host]\n[host.b]\n[host.c.header]\nx = '1'\n[host.a]\n";
    let urls: Vec<String> = read(text).unwrap().hosts.before.into_iter().map(|host| host.url.into()).collect();
    assert_eq!(urls, ["https://b/v2", "https://c/v2", "https://a/v2"]);
}

#[test]
fn addresses() {
    for (text, path_is_whole, expected) in [
        ("h", false, Ok("https://h/v2")),
        ("h:5000", false, Ok("https://h:5000/v2")),
        ("http://h", false, Ok("http://h/v2")),
        ("https://h/", false, Ok("https://h/v2")),
        ("https://h/v2/", false, Ok("https://h/v2")),
        ("https://h/a/v2", false, Ok("https://h/a/v2")),
        ("https://h/a/../b", false, Ok("https://h/b/v2")),
        ("https://h/a/", true, Ok("https://h/a")),
        ("https://h", true, Ok("https://h/")),
        ("[::1]:5000", false, Ok("https://[::1]:5000/v2")),
        ("httpd.example", false, Ok("https://httpd.example/v2")),
        ("", false, Err(UrlFault::Malformed)),
        ("https://", false, Err(UrlFault::Malformed)),
        ("h:port", false, Err(UrlFault::Malformed)),
        ("unix:///socket", false, Err(UrlFault::Scheme)),
        ("https://u:p@h", false, Err(UrlFault::More)),
        ("https://h/?x=1", false, Err(UrlFault::More)),
        ("https://h/#x", false, Err(UrlFault::More)),
    ] {
        assert_eq!(url(text, path_is_whole).as_ref().map(Url::as_str).map_err(|fault| *fault), expected, "{text}");
    }
}

#[test]
fn durations() {
    assert_eq!(rules("dial_timeout = '5s'").dial_timeout, Some(Duration::from_secs(5)));
    assert_eq!(rules("dial_timeout = '0s'").dial_timeout, None);
}

#[test]
fn capabilities() {
    for (keys, expected) in [
        ("", Capabilities::ALL),
        ("capabilities = []", Capabilities::ALL),
        ("capabilities = ['pull', 'resolve', 'referrers']", Capabilities::READ),
        ("capabilities = ['push']", Capabilities { push: true, ..Capabilities::NONE }),
        ("capabilities = ['referrers', 'referrers']", Capabilities { referrers: true, ..Capabilities::NONE }),
    ] {
        assert_eq!(rules(keys).capabilities, expected, "{keys}");
    }
}

#[test]
fn certificates() {
    let here = |name: &str| PathBuf::from("/certs.d/r.example").join(name);
    assert_eq!(
        rules("ca = ['a.pem', '/b.pem', '../c.pem']").ca_files,
        [here("a.pem"), "/b.pem".into(), here("../c.pem")]
    );
    let one =
        |certificate: &str, key: Option<&str>| ClientCertificate { certificate: here(certificate), key: key.map(here) };
    for (keys, expected) in [
        ("client = 'a.pem'", vec![one("a.pem", None)]),
        ("client = ['a.pem', '/b.pem']", vec![one("a.pem", None), one("/b.pem", None)]),
        ("client = [['a.cert', 'a.key'], ['b.pem', '']]", vec![one("a.cert", Some("a.key")), one("b.pem", None)]),
        ("client = ['a.pem', ['b.cert', '/b.key']]", vec![one("a.pem", None), one("b.cert", Some("/b.key"))]),
    ] {
        assert_eq!(rules(keys).client_certificates, expected, "{keys}");
    }
}

#[test]
fn mistakes_name_file_line_and_key() {
    let kind = |expected| ValueFault::Kind { expected };
    let pairs = "a file, a list of files, or a list of pairs of certificate and key";
    for (text, line, key, fault) in [
        ("\ncapabilities = ['pull', 'fly']", 2, "capabilities", ValueFault::Capability { name: "fly".into() }),
        (
            "[host.h]\ncapabilities = [\n'pull',\n'Push']",
            4,
            "capabilities",
            ValueFault::Capability { name: "Push".into() },
        ),
        ("capabilities = 'pull'", 1, "capabilities", kind("a list of capabilities")),
        ("capabilities = [1]", 1, "capabilities", kind("a text")),
        ("server = 1", 1, "server", kind("a text")),
        ("\n\nserver = 'ftp://h'", 3, "server", UrlFault::Scheme.into()),
        ("[host.'h?x']", 1, "h?x", UrlFault::More.into()),
        ("\nhost = 'h'", 2, "host", kind("tables")),
        ("\nhost.h = 1", 2, "h", kind("a table")),
        ("[[host]]", 1, "host", kind("tables")),
        ("ca = 1", 1, "ca", kind("a text or a list of texts")),
        ("ca = ['a', 1]", 1, "ca", kind("a text or a list of texts")),
        ("client = [['a']]", 1, "client", kind(pairs)),
        ("client = [['a', 1]]", 1, "client", kind(pairs)),
        ("client = {}", 1, "client", kind(pairs)),
        ("skip_verify = 'yes'", 1, "skip_verify", kind("true or false")),
        ("override_path = 1", 1, "override_path", kind("true or false")),
        ("header = 'x'", 1, "header", kind("a table of headers")),
        ("[header]\nx = 1", 2, "x", kind("a text or a list of texts")),
        ("dial_timeout = 5", 1, "dial_timeout", kind("a text")),
        ("dial_timeout = '-1s'", 1, "dial_timeout", ValueFault::Duration { text: "-1s".into() }),
    ] {
        let file = PathBuf::from("/certs.d/r.example/hosts.toml");
        let shown = format!("/certs.d/r.example/hosts.toml:{line}: {key}: {fault}");
        let expected = HostsError::Value { file, line, key: key.to_owned(), fault };
        let found = read(text).unwrap_err();
        assert_eq!((found.to_string(), found), (shown, expected), "{text}");
    }
    for (text, line) in [("a = = 1", 1), ("\nserver = 'a'\nserver = 'b'", 3), ("[host.'h'\n", 1)] {
        assert!(matches!(read(text), Err(HostsError::Syntax { line: found, .. }) if found == line), "{text}");
    }
}

#[test]
fn unknown_keys_are_reported() {
    let found = read("server = 'h'\nfuture = 1\n[host.m]\nserver = 'x'\n").unwrap();
    assert_eq!(found.unknown, [(2, "future".to_owned()), (4, "server".to_owned())]);
    assert_eq!(found.hosts.before.len(), 1);
}
