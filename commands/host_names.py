"""Addresses that servers listen at."""

import ipaddress


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches an address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def bracketed(host: str) -> str:
    """An address as it is written in a URL: IPv6 stands in brackets."""
    return f"[{host}]" if ":" in host else host
