"""Which IP addresses belong to the internet: what tenants name may not reach inner networks."""

import ipaddress
from typing import Final

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
NAT64: Final = ipaddress.ip_network("64:ff9b::/96")
"""IPv6 addresses that stand for IPv4 ones; so do `ipv4_mapped`, 6to4 and Teredo."""
SPECIAL: Final = tuple(
    map(ipaddress.ip_network, ("192.0.0.0/24", "192.88.99.0/24", "3fff::/20", "fec0::/10"))
)
"""Special-purpose networks of which `is_global` takes all or a part for public ones."""


def is_public(address: Address) -> bool:
    """Whether the address belongs to the internet, also where it stands for an IPv4 address."""
    if isinstance(address, ipaddress.IPv6Address):
        if address in NAT64 or address.sixtofour is not None or address.teredo is not None:
            return False
        if address.ipv4_mapped is not None:
            address = address.ipv4_mapped
    if any(address in network for network in SPECIAL):
        return False
    return address.is_global and not address.is_multicast and not address.is_reserved
