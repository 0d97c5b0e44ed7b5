//! Tables that are right, tables that are wrong, and which of them counts.

use super::*;

fn read(text: &str) -> Result<Vec<MirrorTable>, HostsError> {
    parse(text, Path::new("/etc/containers/registries.conf"))
}

/// Every host that is asked for `repository` of `registry`, with the name it has there; what follows a space is
/// how it is treated.
fn asked(text: &str, registry: &str, repository: &str) -> Vec<String> {
    let hosts = hosts(&read(text).unwrap_or_else(|error| panic!("{error}")), registry).unwrap().unwrap_or_default();
    if hosts.blocked.iter().any(|blocked| blocked.repositories.contains(repository)) {
        return vec!["blocked".to_owned()];
    }
    let own = Host { url: file::url(registry, false).unwrap(), plain: None, rules: hosts.rules };
    let here = |host: &Host| host.rules.repositories.as_ref().is_none_or(|some| some.contains(repository));
    hosts.before.into_iter().chain([own]).filter(here).map(|host| shown(&host, repository)).collect()
}

fn shown(host: &Host, repository: &str) -> String {
    let rules = &host.rules;
    let name = rules.repositories.as_ref().map_or_else(|| repository.to_owned(), |some| some.rename(repository));
    let mut shown = format!("{}/{name}", host.url);
    for (is, word) in [
        (host.plain.is_some(), " perhaps plain"),
        (rules.skip_verify, " unchecked"),
        (!rules.capabilities.push, " reading"),
        (!rules.capabilities.resolve, " by digest"),
    ] {
        shown.push_str(if is { word } else { "" });
    }
    shown
}

#[test]
fn a_whole_file() {
    let text = r#"
unqualified-search-registries = ["docker.io"]
short-name-mode = "enforcing"
credential-helpers = ["secretservice"]

[aliases]
"alpine" = "docker.io/library/alpine"

[[registry]]
prefix = "docker.io"
location = "docker.io"

[[registry.mirror]]
location = "harbor.example/proxy"

[[registry.mirror]]
location = "localhost:5000"
pull-from-mirror = "digest-only"

[[registry]]
location = "registry.lan:5000"
insecure = true

[[registry]]
prefix = "docker.io/banned"
blocked = true
"#;
    let app = "https://docker.io/v2/library/app";
    let mirrors = [
        "https://harbor.example/v2/proxy/library/app reading",
        "https://localhost:5000/v2/library/app perhaps plain reading by digest",
        app,
    ];
    assert_eq!(asked(text, "docker.io", "library/app"), mirrors);
    assert_eq!(asked(text, "docker.io", "banned"), ["blocked"]);
    assert_eq!(asked(text, "docker.io", "banned/app"), ["blocked"]);
    assert_eq!(asked(text, "docker.io", "banned-not"), mirrors.map(|url| url.replace("library/app", "banned-not")));
    assert_eq!(asked(text, "registry.lan:5000", "a"), ["https://registry.lan:5000/v2/a unchecked"]);
    assert_eq!(hosts(&read(text).unwrap(), "quay.io"), Ok(None));
}

#[test]
fn the_longest_prefix_decides() {
    let text = "
[[registry]]
prefix = 'q.example'
[[registry.mirror]]
location = 'all.example'
[[registry]]
prefix = 'q.example/team'
[[registry.mirror]]
location = 'team.example/x'
[[registry]]
prefix = 'q.example/team/moved'
location = 'new.example/here/now'
[[registry]]
prefix = 'q.example/team/app'
[[registry.mirror]]
location = 'app.example'
";
    for (repository, expected) in [
        ("other", &["https://all.example/v2/other reading", "https://q.example/v2/other"][..]),
        ("teams", &["https://all.example/v2/teams reading", "https://q.example/v2/teams"]),
        ("team", &["https://team.example/v2/x reading", "https://q.example/v2/team"]),
        ("team/a/b", &["https://team.example/v2/x/a/b reading", "https://q.example/v2/team/a/b"]),
        // The registry itself is not asked for what is elsewhere.
        ("team/moved/a", &["https://new.example/v2/here/now/a"]),
        ("team/app/a", &["https://app.example/v2/a reading", "https://q.example/v2/team/app/a"]),
    ] {
        assert_eq!(asked(text, "q.example", repository), expected, "{repository}");
    }
}

#[test]
fn registries_elsewhere_and_wildcards() {
    let text = "
[[registry]]
prefix = '*.example.com'
[[registry.mirror]]
location = 'mirror.lan'
insecure = true
[[registry]]
prefix = '*.b.example.com'
blocked = true
[[registry]]
prefix = 'c.b.example.com'
location = 'moved.lan/c'
insecure = true
";
    let expected =
        ["https://mirror.lan/v2/r unchecked reading", "http://mirror.lan/v2/r reading", "https://a.example.com/v2/r"];
    assert_eq!(asked(text, "a.example.com", "r"), expected);
    assert_eq!(asked(text, "x.b.example.com", "r"), ["blocked"]);
    assert_eq!(asked(text, "c.b.example.com", "r"), ["https://moved.lan/v2/c/r unchecked"]);
    assert_eq!(hosts(&read(text).unwrap(), "example.com"), Ok(None));
    assert_eq!(hosts(&read(text).unwrap(), ".example.com"), Ok(None));
}

#[test]
fn what_a_mirror_is_asked_for() {
    for (keys, mirror_keys, expected) in [
        ("", "", &["https://m/v2/r reading", "https://h/v2/r"][..]),
        ("", "pull-from-mirror = 'all'", &["https://m/v2/r reading", "https://h/v2/r"]),
        ("", "pull-from-mirror = 'digest-only'", &["https://m/v2/r reading by digest", "https://h/v2/r"]),
        ("", "pull-from-mirror = 'tag-only'", &["https://h/v2/r"]),
        ("mirror-by-digest-only = true", "", &["https://m/v2/r reading by digest", "https://h/v2/r"]),
    ] {
        let text = format!("[[registry]]\nprefix = 'h'\n{keys}\n[[registry.mirror]]\nlocation = 'm'\n{mirror_keys}\n");
        assert_eq!(asked(&text, "h", "r"), expected, "{text}");
    }
}

#[test]
fn a_later_table_replaces_an_earlier_one() {
    let text = "[[registry]]\nprefix = 'h'\nblocked = true\n[[registry]]\nprefix = 'h'\ninsecure = true\n";
    assert_eq!(asked(text, "h", "r"), ["https://h/v2/r unchecked"]);
}

#[test]
fn mistakes_name_file_line_and_key() {
    let kind = |expected| ValueFault::Kind { expected };
    for (text, line, key, fault) in [
        ("[[registry]]\nblocked = 'yes'", 2, "blocked", kind("true or false")),
        ("[[registry]]\nprefix = 1", 2, "prefix", kind("a text")),
        ("[[registry]]\nprefix = 'https://h'", 2, "prefix", UrlFault::Scheme.into()),
        ("[[registry]]\nlocation = 'h/../x'", 2, "location", UrlFault::Malformed.into()),
        ("[[registry]]\nlocation = 'h/a?b'", 2, "location", UrlFault::Malformed.into()),
        ("[[registry]]\nlocation = '*.h'", 2, "location", UrlFault::Malformed.into()),
        ("[[registry]]\nprefix = '*.h/x'", 2, "prefix", UrlFault::Malformed.into()),
        ("[[registry]]\nprefix = 'u:p@h'", 2, "prefix", UrlFault::More.into()),
        ("\n[[registry]]\ninsecure = true", 2, "registry", ValueFault::Missing { key: "prefix or location" }),
        ("registry = 1", 1, "registry", kind("tables in double brackets")),
        ("[registries.search]\nregistries = ['h']", 1, "registries", ValueFault::Version),
        (
            "[[registry]]\nprefix = 'h'\n[[registry.mirror]]\nlocation = 'm'\npull-from-mirror = 'never'",
            5,
            "pull-from-mirror",
            kind("all, digest-only or tag-only"),
        ),
        ("[[registry]]\nprefix = 'h'\nmirror = 1", 3, "mirror", kind("tables in double brackets")),
    ] {
        let file = PathBuf::from("/etc/containers/registries.conf");
        assert_eq!(read(text), Err(HostsError::Value { file, line, key: key.to_owned(), fault }), "{text}");
    }
    assert!(matches!(read("registry = [["), Err(HostsError::Syntax { .. })));
}
