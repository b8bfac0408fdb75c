"""Whose an IP address is."""

import ipaddress


def is_this_machine(address: str) -> bool:
    """Tell whether an IP address is one of loopback's, also as an IPv4 address that IPv6 carries (::ffff:127.0.0.1)."""
    parsed = ipaddress.ip_address(address)
    mapped = parsed.ipv4_mapped if isinstance(parsed, ipaddress.IPv6Address) else None  # Python 3.13 looks by itself
    return (mapped or parsed).is_loopback
