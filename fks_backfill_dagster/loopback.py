"""The loopback check: one rule for addresses that are sent a key, and for those that a request may name."""

from __future__ import annotations

from ipaddress import IPv6Address, ip_address


def is_loopback(host: str) -> bool:
    """`host` is an address (IPv6 without brackets) or a name, without a port.

    Of names only localhost counts: this program does not control what others resolve to.
    """
    if host.lower() == "localhost":
        return True
    try:
        address = ip_address(host)
    except ValueError:
        return False
    mapped = address.ipv4_mapped if isinstance(address, IPv6Address) else None
    return (mapped or address).is_loopback
