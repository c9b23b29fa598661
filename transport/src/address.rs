//! The form of addresses: `tcp://HOST:PORT`. libzmq lets through what cannot work (port 99999 becomes 34463).

/// What to say about an address that has not the form.
pub(crate) const FORM: &str = "an address looks like tcp://HOST:PORT";

/// Is it an address that can be dialled?
pub(crate) fn can_be_dialled(endpoint: &str) -> bool {
    split(endpoint).is_some_and(|(_, port)| port.parse::<u16>().is_ok_and(|port| port > 0))
}

/// Is it an address that can be listened on? Port `0` and `*` stand for any free one.
pub(crate) fn can_be_bound(endpoint: &str) -> bool {
    split(endpoint).is_some_and(|(_, port)| port == "*" || port.parse::<u16>().is_ok())
}

/// What stands where `HOST:PORT` is meant.
pub(crate) fn host_and_port(endpoint: &str) -> &str {
    endpoint.strip_prefix("tcp://").unwrap_or(endpoint)
}

fn split(endpoint: &str) -> Option<(&str, &str)> {
    let (host, port) = endpoint.strip_prefix("tcp://")?.rsplit_once(':')?;
    let bare_ipv6 = host.contains(':') && !host.starts_with('[');
    (!host.is_empty() && !bare_ipv6 && !host.contains([' ', '/'])).then_some((host, port))
}

/// A socket for both families names an IPv4 address `[::ffff:127.0.0.1]`; people and scripts know it as `127.0.0.1`.
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
