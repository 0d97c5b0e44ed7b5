//! What the configuration says about registries, as the client takes it.
//!
//! Timeouts and retries of `[http]` count only where they differ from AWS's defaults: ours are tuned to our way of
//! reading, and a file that spells the defaults out asks for nothing. What `[blob]` says of the same goes before it:
//! nearly all requests of a node are for blobs, so one client serves both. Mirrors of `[resolver]` come before those of
//! `hosts.toml`, and serve indexes and layers alike. Pure; the directories are read when a registry is first spoken to.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::Context as _;
use soci_index::registry::hosts::Host;
use soci_index::registry::{ClientOptions, HostSource};

use crate::daemon::config::{Blob, DaemonConfig, Http, Mirror};

/// How registries are reached.
///
/// # Errors
/// When a mirror is no host.
pub(super) fn client_options(config: &DaemonConfig) -> anyhow::Result<ClientOptions> {
    let (http, usual) = (&config.http, Http::default());
    let mut options = ClientOptions { hosts: hosts(config)?, ..ClientOptions::default() };
    let milliseconds = |value, usual| changed(value, usual).map(Duration::from_millis);
    if limits_retries(config) {
        // A number of retries is a time only together with the time of each.
        options.connect = Duration::from_millis(usual.dial_timeout_msec.unsigned_abs());
        options.head = Duration::from_millis(usual.response_header_timeout_msec.unsigned_abs());
    }
    let wanted = [
        (milliseconds(http.dial_timeout_msec, usual.dial_timeout_msec), &mut options.connect),
        (milliseconds(http.response_header_timeout_msec, usual.response_header_timeout_msec), &mut options.head),
        (milliseconds(http.request_timeout_msec, usual.request_timeout_msec), &mut options.deadline),
        (milliseconds(http.min_wait_msec, usual.min_wait_msec), &mut options.backoff.first),
        (milliseconds(http.max_wait_msec, usual.max_wait_msec), &mut options.backoff.longest),
    ];
    for (wanted, option) in wanted {
        *option = wanted.unwrap_or(*option);
    }
    let (blob, usual) = (&config.blob, Blob::default());
    let seconds = changed(blob.fetching_timeout_sec, usual.fetching_timeout_sec).map(Duration::from_secs);
    let wanted = [
        (seconds, &mut options.deadline),
        (milliseconds(blob.min_wait_msec, usual.min_wait_msec), &mut options.backoff.first),
        (milliseconds(blob.max_wait_msec, usual.max_wait_msec), &mut options.backoff.longest),
    ];
    for (wanted, option) in wanted {
        *option = wanted.unwrap_or(*option);
    }
    options.backoff.retries_max = retries(config).unwrap_or(options.backoff.retries_max);
    Ok(options)
}

/// Whether the configuration says how often a request is retried: then a read fails when that is exhausted.
pub(super) fn limits_retries(config: &DaemonConfig) -> bool {
    retries(config).is_some()
}

/// How often a request is retried, if that is configured. A negative number means never.
fn retries(config: &DaemonConfig) -> Option<u32> {
    let given = |given: i64, usual: i64| {
        (given != 0 && given != usual).then(|| u32::try_from(given.max(0)).unwrap_or(u32::MAX))
    };
    given(config.blob.max_retries, Blob::default().max_retries)
        .or_else(|| given(config.http.max_retries, Http::default().max_retries))
}

/// A value that asks for something else than the default. Zero and less mean the default, too.
fn changed(value: i64, usual: i64) -> Option<u64> {
    u64::try_from(value).ok().filter(|positive| *positive > 0 && value != usual)
}

fn hosts(config: &DaemonConfig) -> anyhow::Result<HostSource> {
    let directories = config.resolver.config_path.split(':').filter(|path| !path.is_empty()).map(PathBuf::from);
    let mut source = HostSource { directories: directories.collect(), ..HostSource::default() };
    for (registry, host) in &config.resolver.host {
        let mirrors: anyhow::Result<Vec<Host>> = host.mirrors.iter().map(mirror).collect();
        source.mirrors.insert(registry.clone(), mirrors.with_context(|| format!("[resolver.host.{registry:?}]"))?);
    }
    Ok(source)
}

fn mirror(given: &Mirror) -> anyhow::Result<Host> {
    let mut host = Host::mirror(&given.host, given.insecure).with_context(|| format!("the mirror {:?}", given.host))?;
    // AWS limits a whole request, and with it the size of what can be fetched. Here it is silence that is limited.
    host.rules.silence = match given.request_timeout_sec {
        0 => None,
        seconds => Some(u64::try_from(seconds).map_or(Duration::MAX, Duration::from_secs)),
    };
    Ok(host)
}

#[cfg(test)]
mod tests {
    use soci_index::registry::hosts::{Capabilities, DIRECTORIES};

    use super::*;

    fn options(text: &str) -> anyhow::Result<ClientOptions> {
        client_options(&toml::from_str(text).unwrap())
    }

    #[test]
    fn defaults_are_ours() {
        let ours = ClientOptions::default();
        let spelt_out = DaemonConfig::default().to_string();
        for text in ["", &spelt_out, "[http]\nDialTimeoutMsec = 0\nMaxRetries = 0\n"] {
            let options = options(text).unwrap();
            assert_eq!((options.connect, options.head, options.deadline), (ours.connect, ours.head, ours.deadline));
            assert_eq!(options.backoff, ours.backoff);
            assert_eq!(options.hosts, HostSource::of_this_system());
        }
    }

    #[test]
    fn retries_that_are_limited_end_in_time() {
        for (text, retries) in [
            ("[blob]\nmax_retries = -1\n", 0),
            ("[http]\nMaxRetries = -1\n", 0),
            ("[blob]\nmax_retries = 2\n[http]\nMaxRetries = -1\n", 2),
            ("[http]\nMaxRetries = 3\n", 3),
        ] {
            assert!(limits_retries(&toml::from_str(text).unwrap()), "{text}");
            let options = options(text).unwrap();
            let seconds = Duration::from_secs(3);
            assert_eq!(
                (options.connect, options.head, options.backoff.retries_max),
                (seconds, seconds, retries),
                "{text}"
            );
        }
        assert!(!limits_retries(&DaemonConfig::default()));
    }

    #[test]
    fn other_values_have_effect() {
        let text = "[http]\nDialTimeoutMsec = 1\nResponseHeaderTimeoutMsec = 2\nRequestTimeoutMsec = 3\n\
                    MaxRetries = 4\nMinWaitMsec = 5\nMaxWaitMsec = 6\n";
        let options = options(text).unwrap();
        let expected = [1, 2, 3, 5, 6].map(Duration::from_millis);
        let backoff = options.backoff;
        assert_eq!([options.connect, options.head, options.deadline, backoff.first, backoff.longest], expected);
        assert_eq!(backoff.retries_max, 4);
    }

    #[test]
    fn what_is_said_of_blobs_goes_first() {
        let text = "[http]\nMaxRetries = 4\nMinWaitMsec = 5\n\
                    [blob]\nmax_retries = 2\nmax_wait_msec = 70\nfetching_timeout_sec = 9\n";
        let options = options(text).unwrap();
        let backoff = options.backoff;
        let expected = (2, Duration::from_millis(5), Duration::from_millis(70), Duration::from_secs(9));
        assert_eq!((backoff.retries_max, backoff.first, backoff.longest, options.deadline), expected);
    }

    #[test]
    fn mirrors_and_directories() {
        let text = "[resolver]\nconfig_path = '/a::/b'\n\
                    [[resolver.host.'docker.io'.mirrors]]\nhost = 'm.example:8443'\nrequest_timeout_sec = 7\n\
                    [[resolver.host.'docker.io'.mirrors]]\nhost = 'n.example'\ninsecure = true\nrequest_timeout_sec = -1\n\
                    [[resolver.host.'docker.io'.mirrors]]\nhost = 'localhost:5000'\n";
        let hosts = options(text).unwrap().hosts;
        assert_eq!(hosts.directories, [PathBuf::from("/a"), PathBuf::from("/b")]);
        let mirrors = &hosts.mirrors["docker.io"];
        let urls: Vec<&str> = mirrors.iter().map(|host| host.url.as_str()).collect();
        assert_eq!(urls, ["https://m.example:8443/v2", "http://n.example/v2", "https://localhost:5000/v2"]);
        let plain: Vec<bool> = mirrors.iter().map(|host| host.plain.is_some()).collect();
        assert_eq!(plain, [false, false, true]);
        let silences: Vec<_> = mirrors.iter().map(|host| host.rules.silence).collect();
        assert_eq!(silences, [Some(Duration::from_secs(7)), Some(Duration::MAX), None]);
        assert!(mirrors.iter().all(|host| host.rules.capabilities == Capabilities::READ));
        assert_eq!(options("[resolver]\nconfig_path = ''\n").unwrap().hosts, HostSource::default());
        let error = options("[[resolver.host.r.mirrors]]\nhost = 'h?x'\n").unwrap_err();
        assert!(format!("{error:#}").contains("\"r\"") && format!("{error:#}").contains("h?x"), "{error:#}");
    }

    #[test]
    fn the_default_path_is_the_usual_one() {
        assert_eq!(DaemonConfig::default().resolver.config_path, DIRECTORIES.join(":"));
    }
}
