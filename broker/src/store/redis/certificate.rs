//! Tells what is wrong with the certificate of a rediss:// server, and what to do. Owns these words. Never connects.

/// What the TLS library says, in part, then what is wrong and the next step. The first that fits counts.
const FAULTS: &[(&str, &str)] = &[
    (
        "CaUsedAsEndEntity",
        "the server's certificate is an authority's (as self-signed ones mostly are), not a server's: make one with \
         basicConstraints=CA:FALSE, and name it, or the authority that signed it, with --redis-ca",
    ),
    (
        "UnknownIssuer",
        "nobody whom this broker trusts has signed the server's certificate: name the certificate of the authority, or a \
         self-signed certificate itself, with --redis-ca",
    ),
    ("not valid for name", "the server's certificate is for another host: write the host that it names in --redis"),
    ("NotValidForName", "the server's certificate is for another host: write the host that it names in --redis"),
    ("xpired", "the server's certificate has expired, or this machine's clock is wrong: renew it, or set the clock"),
    ("not valid yet", "the server's certificate is not valid yet: check the clocks of both machines"),
    ("NotValidYet", "the server's certificate is not valid yet: check the clocks of both machines"),
    (
        "invalid peer certificate",
        "the server's certificate cannot be verified: name the certificate of the authority that signed it, or a \
         self-signed certificate itself, with --redis-ca, or give the server another one",
    ),
    ("InvalidContentType", "the server does not speak TLS at this port: write redis:// in --redis, or its TLS port"),
];

/// What is wrong and the next step, if the error is about a certificate or TLS as such.
pub(super) fn fault(error: &str) -> Option<&'static str> {
    let is_tls = error.contains("invalid peer certificate") || error.contains("corrupt message");
    FAULTS.iter().find(|(said, _)| is_tls && error.contains(said)).map(|(_, fault)| *fault)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_fault_of_a_certificate_has_its_own_next_step() {
        for (said, advice) in [
            ("UnknownIssuer", "--redis-ca"),
            ("Other(OtherError(CaUsedAsEndEntity))", "CA:FALSE"),
            ("certificate not valid for name \"cache\"; certificate is only valid for localhost", "in --redis"),
            ("certificate expired: verification time 2 (UNIX)", "renew"),
            ("certificate not valid yet: verification time 2 (UNIX)", "clocks"),
            ("BadSignature", "another one"),
        ] {
            let fault = fault(&format!("IoError: invalid peer certificate: {said}")).expect("it is told");
            assert!(fault.contains(advice), "{said}: {fault}");
        }
        assert!(
            fault("received corrupt message of type InvalidContentType").is_some_and(|told| told.contains("redis://"))
        );
        assert_eq!(fault("Connection refused (os error 111)"), None);
        assert_eq!(fault("the lease has expired"), None);
    }
}
