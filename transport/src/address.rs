//! Owns the form of addresses, `tcp://HOST:PORT`, and the choice of this machine's own address for others. libzmq
//! itself accepts addresses that cannot work (port 99999 becomes 34463).

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, ToSocketAddrs, UdpSocket};

/// The error text for an address of another form.
pub(crate) const FORM: &str = "an address looks like tcp://HOST:PORT";

/// What to write for [`advertised`].
pub const ADVERTISED_FORM: &str = "write HOST or HOST:PORT as others can dial it, such as edge7.example.org:7000, \
                                   10.0.0.7 or [2001:db8::7]:7000";

/// The endpoint that people mean: they may leave `tcp://` away.
pub fn completed(text: &str) -> String {
    if text.contains("://") { text.to_owned() } else { format!("tcp://{text}") }
}

/// Whether the endpoint is an address that can be dialled.
pub fn can_be_dialled(endpoint: &str) -> bool {
    parts(endpoint).is_some_and(|(_, port)| port.parse::<u16>().is_ok_and(|port| port > 0))
}

/// Whether the endpoint is an address to listen on. Port `0` and `*` stand for any free port.
pub fn can_be_bound(endpoint: &str) -> bool {
    parts(endpoint).is_some_and(|(_, port)| port == "*" || port.parse::<u16>().is_ok())
}

/// The endpoint without its `tcp://`, for texts that expect `HOST:PORT`.
pub(crate) fn host_and_port(endpoint: &str) -> &str {
    endpoint.strip_prefix("tcp://").unwrap_or(endpoint)
}

/// Host and port of an endpoint; `None` if it does not have the form.
pub fn parts(endpoint: &str) -> Option<(&str, &str)> {
    let (host, port) = endpoint.strip_prefix("tcp://")?.rsplit_once(':')?;
    let bare_ipv6 = host.contains(':') && !host.starts_with('[');
    (!host.is_empty() && !bare_ipv6 && !host.contains([' ', '/'])).then_some((host, port))
}

/// The endpoint to advertise for a `HOST`, a `HOST:PORT` or a whole endpoint. If it names no port, the bound port is
/// added. `None` if nobody could dial it: another form, or an address that stands for all of a machine's.
pub fn advertised(address: &str, bound_port: &str) -> Option<String> {
    let address = host_and_port(address);
    let is_bare_ipv6 = address.parse::<Ipv6Addr>().is_ok();
    let names_port = !is_bare_ipv6 && address.rsplit(']').next().is_some_and(|rest| rest.contains(':'));
    let endpoint = match (is_bare_ipv6, names_port) {
        (true, _) => format!("tcp://[{address}]:{bound_port}"),
        (false, true) => format!("tcp://{address}"),
        (false, false) => format!("tcp://{address}:{bound_port}"),
    };
    let (host, _) = parts(&endpoint)?;
    (can_be_dialled(&endpoint) && leads_somewhere(host)).then_some(endpoint)
}

/// Whether the host is a name, or the address of one interface.
fn leads_somewhere(host: &str) -> bool {
    if let Some(ipv6) = host.strip_prefix('[') {
        // A link-local address may name its interface.
        let ipv6 = ipv6.strip_suffix(']').and_then(|ipv6| ipv6.split('%').next());
        return ipv6.and_then(|ipv6| ipv6.parse::<Ipv6Addr>().ok()).is_some_and(|ip| !ip.is_unspecified());
    }
    if host.bytes().all(|byte| byte.is_ascii_digit() || byte == b'.') {
        return host.parse::<Ipv4Addr>().is_ok_and(|ip| !ip.is_unspecified());
    }
    host.chars().all(|char| char.is_alphanumeric() || "-._".contains(char))
}

/// The endpoint of a numeric address.
pub fn of_ip(ip: IpAddr, port: &str) -> String {
    match ip {
        IpAddr::V4(ip) => format!("tcp://{ip}:{port}"),
        IpAddr::V6(ip) => format!("tcp://[{ip}]:{port}"),
    }
}

/// This machine's own address on the route to an endpoint: a peer there can most likely reach it. Nothing is sent, but
/// the endpoint's name is looked up.
pub fn own_towards(endpoint: &str) -> Option<IpAddr> {
    let remote = endpoint.strip_prefix("tcp://")?.to_socket_addrs().ok()?.next()?;
    let any = if remote.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
    let socket = UdpSocket::bind(any).ok()?;
    socket.connect(remote).ok()?;
    socket.local_addr().ok().map(|address| address.ip())
}

/// The plain form of an IPv4 address: a socket for both families calls it `[::ffff:127.0.0.1]`, people and scripts
/// `127.0.0.1`.
pub(crate) fn without_mapping(endpoint: &str) -> String {
    match endpoint.strip_prefix("tcp://[::ffff:").and_then(|rest| rest.split_once(']')) {
        Some((ipv4, port)) if ipv4.contains('.') => format!("tcp://{ipv4}{port}"),
        _ => endpoint.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_have_a_host_and_a_port() {
        for good in ["tcp://localhost:5555", "tcp://10.0.0.1:1", "tcp://[::1]:5555", "tcp://pi-1.local:65535"] {
            assert!(can_be_dialled(good) && can_be_bound(good), "{good}");
        }
        for bad in
            ["localhost:1", "tcp://", "tcp://a b:1", "tcp://127.0.0.1", "ipc:///tmp/x", "tcp://a:99999", "tcp://::1:5"]
        {
            assert!(!can_be_dialled(bad) && !can_be_bound(bad), "{bad}");
        }
        for any_port in ["tcp://127.0.0.1:0", "tcp://*:*", "tcp://0.0.0.0:*"] {
            assert!(!can_be_dialled(any_port) && can_be_bound(any_port), "{any_port}");
        }
    }

    #[test]
    fn the_scheme_may_be_left_away() {
        for text in ["cloud:5555", "tcp://cloud:5555"] {
            assert_eq!(completed(text), "tcp://cloud:5555");
        }
        assert!(!can_be_dialled(&completed("http://cloud:5555")));
    }

    #[test]
    fn advertised_addresses_take_the_bound_port_unless_they_name_one() {
        for (told, endpoint) in [
            ("edge7", "tcp://edge7:7000"),
            ("edge7:81", "tcp://edge7:81"),
            ("tcp://edge7:81", "tcp://edge7:81"),
            ("10.0.0.7", "tcp://10.0.0.7:7000"),
            ("[2001:db8::1]", "tcp://[2001:db8::1]:7000"),
            ("[2001:db8::1]:81", "tcp://[2001:db8::1]:81"),
            ("fd00::5", "tcp://[fd00::5]:7000"),
            ("[fe80::1%eth0]:81", "tcp://[fe80::1%eth0]:81"),
        ] {
            assert_eq!(advertised(told, "7000").as_deref(), Some(endpoint));
        }
    }

    #[test]
    fn an_address_that_nobody_can_dial_is_not_advertised() {
        for told in [
            "",
            "*",
            "0.0.0.0",
            "0.0.0.0:81",
            "::",
            "[::]:81",
            "host name",
            "http://x",
            "a:b:c",
            "a:b",
            "edge7:0",
            "edge7:99999",
            "edge7:",
            "[edge7]:81",
            "10.0.0",
            "[fd00::5",
            "x/y",
            "tcp://",
        ] {
            assert_eq!(advertised(told, "7000"), None, "{told}");
        }
    }

    #[test]
    fn the_way_to_this_machine_is_the_loopback() {
        assert_eq!(own_towards("tcp://127.0.0.1:5555"), Some("127.0.0.1".parse().expect("an address")));
        assert_eq!(own_towards("nonsense"), None);
    }

    #[test]
    fn ipv4_addresses_look_like_themselves() {
        for (given, plain) in [
            ("tcp://[::ffff:127.0.0.1]:5555", "tcp://127.0.0.1:5555"),
            ("tcp://[::1]:5555", "tcp://[::1]:5555"),
            ("tcp://0.0.0.0:5555", "tcp://0.0.0.0:5555"),
        ] {
            assert_eq!(without_mapping(given), plain);
        }
    }
}
