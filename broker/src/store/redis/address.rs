//! The address of Redis as a URL: one server, the sentinels that know the current one, or a cluster.
//!
//! Owns the form of `--redis` and the part of it that logs show (never a password).

use std::{fmt, str::FromStr};

use redis::{
    ConnectionInfo, IntoConnectionInfo, RedisError, RedisResult, TlsCertificates, TlsMode,
    cluster::ClusterClient,
    sentinel::{SentinelClient, SentinelClientBuilder, SentinelServerType},
};

/// Ports for URLs that name none.
const SENTINEL_PORT: u16 = 26_379;
const SERVER_PORT: u16 = 6_379;

/// A parsed `--redis`.
#[derive(Clone)]
pub struct RedisAddress {
    shown: String,
    kind: Kind,
}

#[derive(Clone, Debug)]
enum Kind {
    Server(Box<ConnectionInfo>),
    Cluster(Vec<ConnectionInfo>),
    Sentinels { sentinels: Vec<ConnectionInfo>, master: String, server: Box<ConnectionInfo> },
}

/// The client library's client for each kind of address.
pub(super) enum Client {
    Server(redis::Client),
    Cluster(ClusterClient),
    Sentinels(Box<SentinelClient>),
}

/// Why a text is not a Redis address.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
#[error(
    "{reason}: write redis://[user:password@]host[:port][/db], rediss:// for TLS, redis+cluster://host[:port],host… or redis+sentinel://host[:port],host…/master[/db]"
)]
pub struct RedisAddressError {
    reason: String,
}

impl RedisAddress {
    /// The address without user and password.
    pub fn shown(&self) -> &str {
        &self.shown
    }

    pub(super) fn client(&self, root_cert: Option<Vec<u8>>) -> RedisResult<Client> {
        let certificates = root_cert.map(|pem| TlsCertificates { client_tls: None, root_cert: Some(pem) });
        match &self.kind {
            Kind::Server(server) => match certificates {
                Some(certificates) => redis::Client::build_with_tls((**server).clone(), certificates),
                None => redis::Client::open((**server).clone()),
            }
            .map(Client::Server),
            Kind::Cluster(nodes) => {
                let mut builder = ClusterClient::builder(nodes.clone());
                if let Some(certificates) = certificates {
                    builder = builder.certs(certificates);
                }
                builder.connection_timeout(super::CONNECT_MAX).response_timeout(super::ANSWER_MAX).build()
            }
            .map(Client::Cluster),
            Kind::Sentinels { sentinels, master, server } => sentinel_client(sentinels, master, server, certificates)
                .map(|client| Client::Sentinels(Box::new(client))),
        }
    }
}

fn sentinel_client(
    sentinels: &[ConnectionInfo],
    master: &str,
    server: &ConnectionInfo,
    certificates: Option<TlsCertificates>,
) -> RedisResult<SentinelClient> {
    let addresses = sentinels.iter().map(|sentinel| sentinel.addr().clone());
    let mut builder = SentinelClientBuilder::new(addresses, master, SentinelServerType::Master)?;
    builder = builder.set_client_to_redis_db(server.redis_settings().db());
    if let Some(user) = server.redis_settings().username() {
        builder = builder.set_client_to_redis_username(user);
    }
    if let Some(password) = server.redis_settings().password() {
        builder = builder.set_client_to_redis_password(password);
    }
    let sentinel = sentinels.first().map(ConnectionInfo::redis_settings);
    if let Some(user) = sentinel.and_then(|settings| settings.username()) {
        builder = builder.set_client_to_sentinel_username(user);
    }
    if let Some(password) = sentinel.and_then(|settings| settings.password()) {
        builder = builder.set_client_to_sentinel_password(password);
    }
    if matches!(server.addr(), redis::ConnectionAddr::TcpTls { .. }) {
        builder = builder.set_client_to_redis_tls_mode(TlsMode::Secure);
        if let Some(certificates) = certificates {
            builder = builder
                .set_client_to_redis_certificates(certificates.clone())
                .set_client_to_sentinel_certificates(certificates);
        }
    }
    builder.build()
}

impl FromStr for RedisAddress {
    type Err = RedisAddressError;

    fn from_str(text: &str) -> Result<Self, RedisAddressError> {
        let fail = |reason: &str| RedisAddressError { reason: reason.to_owned() };
        let (scheme, rest) = text.split_once("://").ok_or_else(|| fail("no scheme"))?;
        let (login, place) = rest.rsplit_once('@').map_or(("", rest), |(login, place)| (login, place));
        let (place, query) = place.split_once('?').unwrap_or((place, ""));
        let shown = format!("{scheme}://{place}");
        let (base, many) = scheme.split_once('+').unwrap_or((scheme, ""));
        let kind = match (base, many) {
            ("redis" | "rediss" | "valkey" | "valkeys" | "unix", "") => {
                Kind::Server(Box::new(text.into_connection_info().map_err(parse_error)?))
            }
            ("redis" | "rediss", "cluster") => {
                if place.contains('/') {
                    return Err(fail("a cluster has no database numbers"));
                }
                Kind::Cluster(nodes(base, login, place, SERVER_PORT)?)
            }
            ("redis" | "rediss", "sentinel") => {
                let (hosts, path) = place.split_once('/').ok_or_else(|| fail("no master's name"))?;
                let (master, db) = path.split_once('/').unwrap_or((path, "0"));
                if master.is_empty() {
                    return Err(fail("no master's name"));
                }
                let server = format!("{base}://{}localhost/{db}", at(login));
                Kind::Sentinels {
                    sentinels: nodes(base, query.strip_prefix("sentinel=").unwrap_or(""), hosts, SENTINEL_PORT)?,
                    master: master.to_owned(),
                    server: Box::new(server.into_connection_info().map_err(parse_error)?),
                }
            }
            _ => return Err(fail(&format!("unknown scheme '{scheme}'"))),
        };
        Ok(Self { shown, kind })
    }
}

/// Parses each of `host[:port],host[:port]`.
fn nodes(base: &str, login: &str, hosts: &str, port: u16) -> Result<Vec<ConnectionInfo>, RedisAddressError> {
    let node = |host: &str| {
        let has_port = host.rsplit_once(':').is_some_and(|(_, port)| port.parse::<u16>().is_ok());
        let port = if has_port { String::new() } else { format!(":{port}") };
        format!("{base}://{}{host}{port}", at(login)).into_connection_info().map_err(parse_error)
    };
    hosts.split(',').map(node).collect()
}

fn at(login: &str) -> String {
    if login.is_empty() { String::new() } else { format!("{login}@") }
}

/// The client library does not repeat the URL in its errors, so they contain no password.
fn parse_error(error: RedisError) -> RedisAddressError {
    RedisAddressError { reason: error.to_string() }
}

impl fmt::Debug for RedisAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "RedisAddress({})", self.shown)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(text: &str) -> RedisAddress {
        text.parse().unwrap_or_else(|error| panic!("{text}: {error}"))
    }

    #[test]
    fn all_four_forms_are_understood() {
        assert!(matches!(parsed("redis://localhost").kind, Kind::Server(_)));
        assert!(matches!(parsed("rediss://cache.example:6380/2").kind, Kind::Server(_)));
        assert!(matches!(&parsed("redis+cluster://a,b:7001,c").kind, Kind::Cluster(nodes) if nodes.len() == 3));
        let Kind::Sentinels { sentinels, master, server } =
            parsed("redis+sentinel://user:pw@a,b:26380/mymaster/3?sentinel=watch:secret").kind
        else {
            panic!("a sentinel address")
        };
        assert_eq!(master, "mymaster");
        let ports: Vec<String> = sentinels.iter().map(|sentinel| sentinel.addr().to_string()).collect();
        assert_eq!(ports, ["a:26379", "b:26380"]);
        assert_eq!(sentinels[0].redis_settings().password(), Some("secret"));
        assert_eq!(server.redis_settings().username(), Some("user"));
        assert_eq!(server.redis_settings().db(), 3);
    }

    #[test]
    fn no_form_shows_its_password() {
        for text in [
            "redis://user:hunter2@localhost/1",
            "redis+cluster://user:hunter2@a,b",
            "redis+sentinel://user:hunter2@a,b/m?sentinel=watch:hunter2",
        ] {
            let address = parsed(text);
            assert!(!format!("{address:?} {}", address.shown()).contains("hunter2"), "{address:?}");
        }
        for text in ["redis://user:hunter2@", "redis://user:hunter2@host:port/1", "tcp://user:hunter2@host"] {
            let error = text.parse::<RedisAddress>().unwrap_err().to_string();
            assert!(!error.contains("hunter2"), "{error}");
        }
    }

    #[test]
    fn what_is_wrong_is_said_with_what_to_write_instead() {
        for (text, reason) in [
            ("localhost:6379", "no scheme"),
            ("http://localhost", "unknown scheme 'http'"),
            ("redis+sentinel://a,b", "no master's name"),
            ("redis+cluster://a/1", "a cluster has no database numbers"),
        ] {
            let error = text.parse::<RedisAddress>().unwrap_err().to_string();
            assert!(error.starts_with(reason) && error.contains("write redis://"), "{error}");
        }
    }
}
