//! The address of a client, for the limits of an address.

use std::net::{IpAddr, Ipv6Addr};

/// The last entry of an `X-Forwarded-For`, in the forms in which proxies write it: with or without
/// a port, in brackets, in quotes.
pub fn last_forwarded(header: &str) -> Option<IpAddr> {
    let last = header.rsplit(',').next()?.trim().trim_matches('"').trim();
    let bare = || last.strip_prefix('[')?.strip_suffix(']')?.parse().ok();
    let with_port = || Some(last.parse::<std::net::SocketAddr>().ok()?.ip());
    last.parse().ok().or_else(with_port).or_else(bare)
}

/// The unit that a limit by address counts: an IPv4 address, or the /64 network of an IPv6 address,
/// because a single customer has all addresses of it.
pub fn counted(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V4(address) => IpAddr::V4(address),
        IpAddr::V6(address) => {
            let network = address.to_bits() & !u128::from(u64::MAX);
            IpAddr::V6(Ipv6Addr::from_bits(network))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_form_of_a_forwarded_address_is_read() {
        for (header, expected) in [
            ("203.0.113.5", Some("203.0.113.5")),
            ("198.51.100.9, 203.0.113.5", Some("203.0.113.5")),
            ("203.0.113.5:51000", Some("203.0.113.5")),
            (" \"203.0.113.5:51000\" ", Some("203.0.113.5")),
            ("2001:db8::1", Some("2001:db8::1")),
            ("[2001:db8::1]", Some("2001:db8::1")),
            ("[2001:db8::1]:443", Some("2001:db8::1")),
            ("203.0.113.5,", None),
            ("unknown", None),
            ("", None),
        ] {
            let expected = expected.map(|address| address.parse().unwrap());
            assert_eq!(last_forwarded(header), expected, "{header}");
        }
    }

    #[test]
    fn a_limit_counts_an_ipv4_address_and_an_ipv6_network() {
        for (address, expected) in [
            ("203.0.113.5", "203.0.113.5"),
            ("::ffff:203.0.113.5", "203.0.113.5"),
            ("2001:db8:0:1:2:3:4:5", "2001:db8:0:1::"),
            ("2001:db8:0:1:ffff::", "2001:db8:0:1::"),
        ] {
            let counted = counted(address.parse().unwrap());
            assert_eq!(counted.to_string(), expected, "{address}");
        }
    }
}
