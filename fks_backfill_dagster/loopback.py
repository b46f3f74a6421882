"""Whether a host is this machine: one rule for addresses that are sent a key, and for those that a request may name.

Does not belong here: what follows from it.
"""

from __future__ import annotations

from ipaddress import IPv6Address, ip_address


def is_loopback(host: str) -> bool:
    """`host` is an address (IPv6 without brackets) or a name, without a port.

    A name other than localhost is no loopback: what it resolves to is not in our hands.
    """
    if host.lower() == "localhost":
        return True
    try:
        address = ip_address(host)
    except ValueError:
        return False
    mapped = address.ipv4_mapped if isinstance(address, IPv6Address) else None
    return (mapped or address).is_loopback
