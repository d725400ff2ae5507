"""Which addresses belong to the internet."""

import ipaddress

from deltadock.addresses import is_public


def test_addresses_that_stand_for_inner_ones_are_not_public() -> None:
    for inner in (
        "127.0.0.1", "10.1.2.3", "172.16.0.1", "192.168.1.1", "169.254.169.254", "100.64.0.1",
        "0.0.0.0", "224.0.0.1", "255.255.255.255", "::1", "::", "fe80::1", "fd00::1", "ff02::1",
        "::ffff:127.0.0.1", "::ffff:10.0.0.1", "64:ff9b::7f00:1", "2002:7f00:1::",
        "2001:0:7f00:1::", "192.0.0.8", "192.88.99.1", "3fff::1", "fec0::1",
    ):  # fmt: skip
        assert not is_public(ipaddress.ip_address(inner)), inner
    for outer in ("8.8.8.8", "2606:4700:4700::1111", "::ffff:8.8.8.8"):
        assert is_public(ipaddress.ip_address(outer)), outer
