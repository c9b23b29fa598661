//! Owns the form of addresses, `tcp://HOST:PORT`, and the choice of this machine's own address for others. libzmq
//! itself accepts addresses that cannot work (port 99999 becomes 34463).

use std::net::{IpAddr, ToSocketAddrs, UdpSocket};

/// The error text for an address of another form.
pub(crate) const FORM: &str = "an address looks like tcp://HOST:PORT";

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
/// added.
pub fn advertised(address: &str, bound_port: &str) -> String {
    let address = host_and_port(address);
    let is_whole =
        |(host, port): (&str, &str)| port.parse::<u16>().is_ok() && (!host.contains(':') || host.ends_with(']'));
    if address.rsplit_once(':').is_some_and(is_whole) {
        format!("tcp://{address}")
    } else {
        format!("tcp://{address}:{bound_port}")
    }
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
    fn advertised_addresses_take_the_bound_port_unless_they_name_one() {
        let told = ["edge7", "edge7:81", "tcp://edge7:81", "[2001:db8::1]", "[2001:db8::1]:81"];
        assert_eq!(
            told.map(|address| advertised(address, "7000")),
            [
                "tcp://edge7:7000",
                "tcp://edge7:81",
                "tcp://edge7:81",
                "tcp://[2001:db8::1]:7000",
                "tcp://[2001:db8::1]:81"
            ]
        );
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
