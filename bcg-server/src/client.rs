//! Who a client is: whoever shows one of the keys, or else an address.

use std::net::IpAddr;

use bcg_engine::ClientId;

/// Whose connection a request came by; an extension of the request.
#[derive(Debug, Clone)]
pub(crate) struct Peer(pub(crate) ClientId);

/// Names a client by the key that it shows; `index` is the key's place among those of the server.
pub(crate) fn of_key(index: usize) -> ClientId {
    ClientId::new(&format!("key {index}"))
}

/// Names a client by its address: an IPv4 address, or the first 64 bits of an IPv6 address, since whoever has one has all
/// that begin with them.
pub(crate) fn of_peer(peer: IpAddr) -> ClientId {
    match peer.to_canonical() {
        IpAddr::V4(address) => ClientId::new(&address.to_string()),
        IpAddr::V6(address) => {
            let [a, b, c, d, ..] = address.segments();
            ClientId::new(&format!("{a:x}:{b:x}:{c:x}:{d:x}::/64"))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_ipv4_address_is_one_client_and_an_ipv6_network_too() {
        let client = |address: &str| of_peer(address.parse().expect("an address")).to_string();
        assert_eq!(client("10.0.0.1"), "10.0.0.1");
        assert_eq!(client("::ffff:10.0.0.1"), "10.0.0.1");
        assert_eq!(client("2001:db8:1:2:3:4:5:6"), "2001:db8:1:2::/64");
        assert_eq!(client("2001:db8:1:2::"), client("2001:db8:1:2:ffff::1"));
        assert_ne!(client("2001:db8:1:2::"), client("2001:db8:1:3::"));
        assert_ne!(of_key(0), of_key(1));
    }
}
