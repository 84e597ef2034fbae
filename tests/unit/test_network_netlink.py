"""Every message we write, read back by pyroute2."""

from __future__ import annotations

import socket
import struct
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyroute2.netlink.nfnetlink.nfctsocket import nfct_msg
from pyroute2.netlink.rtnl.ifaddrmsg import ifaddrmsg
from pyroute2.netlink.rtnl.ifinfmsg import ifinfmsg
from pyroute2.netlink.rtnl.ndmsg import ndmsg
from pyroute2.netlink.rtnl.rtmsg import rtmsg
from pyroute2.netlink.rtnl.tcmsg import tcmsg

from dolium.network import netlink


def read(kind: type[Any], data: bytes) -> Any:
    assert struct.unpack_from("=I", data)[0] == len(data)
    message = kind(data)
    message.decode()
    return message


def test_bridge() -> None:
    message = read(ifinfmsg, netlink.new_bridge("dol01234567", 1400, "02:42:ac:12:00:01"))
    assert message["header"]["type"] == netlink.RTM_NEWLINK
    assert (message.get("IFLA_IFNAME"), message.get("IFLA_MTU")) == ("dol01234567", 1400)
    assert message.get("IFLA_ADDRESS") == "02:42:ac:12:00:01"
    assert message.get_nested("IFLA_LINKINFO", "IFLA_INFO_KIND") == "bridge"
    assert message.get_nested("IFLA_LINKINFO", "IFLA_INFO_DATA", "IFLA_BR_FORWARD_DELAY") == 0


def test_veth() -> None:
    message = read(ifinfmsg, netlink.new_veth("dp0123456700ffx", "eth0", 9, 1400))
    peer = message.get_nested("IFLA_LINKINFO", "IFLA_INFO_DATA", "VETH_INFO_PEER")
    assert message.get_nested("IFLA_LINKINFO", "IFLA_INFO_KIND") == "veth"
    assert (message.get("IFLA_IFNAME"), message.get("IFLA_NUM_TX_QUEUES")) == ("dp0123456700ffx", 1)
    assert (peer.get("IFLA_IFNAME"), peer.get("IFLA_NET_NS_FD"), peer.get("IFLA_MTU")) == ("eth0", 9, 1400)


def test_set_link() -> None:
    message = read(ifinfmsg, netlink.set_link(7, name="dv0123456789", alias="dolium:x:y", mac="02:00:00:00:00:01",
                                              mtu=1400, master=3, up=True))
    assert (message["index"], message["flags"], message["change"]) == (7, 1, 1)
    assert (message.get("IFLA_IFNAME"), message.get("IFLA_MASTER")) == ("dv0123456789", 3)
    assert (message.get("IFLA_ADDRESS"), message.get("IFLA_MTU")) == ("02:00:00:00:00:01", 1400)
    assert message.get("IFLA_IFALIAS") == "dolium:x:y"
    message = read(ifinfmsg, netlink.set_link(7, down=True))
    assert (message["flags"], message["change"], message["attrs"]) == (0, 1, [])
    message = read(ifinfmsg, netlink.delete_link(7))
    assert (message["header"]["type"], message["index"]) == (netlink.RTM_DELLINK, 7)


def test_hairpin() -> None:
    data = netlink.set_hairpin(7)
    assert data[16] == socket.AF_BRIDGE if hasattr(socket, "AF_BRIDGE") else data[16] == 7
    (kind, value), = netlink.attributes(data[32:])
    assert kind == 12 and list(netlink.attributes(value)) == [(4, b"\x01")]


def test_address_and_route() -> None:
    message = read(ifaddrmsg, netlink.new_address(2, IPv4Address("172.18.0.5"), IPv4Network("172.18.0.0/16")))
    assert (message["family"], message["prefixlen"], message["index"]) == (socket.AF_INET, 16, 2)
    assert (message.get("IFA_LOCAL"), message.get("IFA_ADDRESS")) == ("172.18.0.5", "172.18.0.5")
    assert message.get("IFA_BROADCAST") == "172.18.255.255"
    message = read(rtmsg, netlink.new_default_route(2, IPv4Address("172.18.0.1")))
    assert (message["dst_len"], message["table"], message["type"]) == (0, 254, 1)
    assert (message.get("RTA_GATEWAY"), message.get("RTA_OIF")) == ("172.18.0.1", 2)
    message = read(ifaddrmsg, netlink.new_address6(2, IPv6Address("fd00:1::5"), IPv6Network("fd00:1::/64")))
    assert (message["family"], message["prefixlen"], message["index"]) == (socket.AF_INET6, 64, 2)
    assert message["flags"] == 0x02  # nodad
    assert (message.get("IFA_LOCAL"), message.get("IFA_ADDRESS")) == ("fd00:1::5", "fd00:1::5")
    message = read(rtmsg, netlink.new_default_route(2, IPv6Address("fd00:1::1")))
    assert (message["family"], message["dst_len"], message["table"]) == (socket.AF_INET6, 0, 254)
    assert (message.get("RTA_GATEWAY"), message.get("RTA_OIF")) == ("fd00:1::1", 2)
    message = read(ndmsg, netlink.forget_neighbour(3, IPv6Address("fd00:1::5")))
    assert (message["header"]["type"], message["family"], message["ifindex"]) == (netlink.RTM_DELNEIGH, socket.AF_INET6, 3)
    assert message.get("NDA_DST") == "fd00:1::5"


def test_links_above_others() -> None:
    def data(message: Any) -> Any:
        return message.get_nested("IFLA_LINKINFO", "IFLA_INFO_DATA")
    message = read(ifinfmsg, netlink.new_child("dc01", 3, "macvlan", data=netlink.macvlan_data("private"), namespace=9,
                                               mac="02:00:00:00:00:01", mtu=1400))
    assert (message.get("IFLA_IFNAME"), message.get("IFLA_LINK"), message.get("IFLA_NET_NS_FD")) == ("dc01", 3, 9)
    assert (message.get("IFLA_ADDRESS"), message.get("IFLA_MTU")) == ("02:00:00:00:00:01", 1400)
    assert data(message).get("IFLA_MACVLAN_MODE") == "private"
    message = read(ifinfmsg, netlink.new_child("dc01", 3, "ipvlan", data=netlink.ipvlan_data("l3s", "vepa")))
    assert data(message).get("IFLA_IPVLAN_MODE") == 2
    # pyroute2 does not know the flags
    assert dict(netlink.attributes(netlink.ipvlan_data("l3s", "vepa")))[2][:2] == struct.pack("=H", 2)
    message = read(ifinfmsg, netlink.new_child("eth0.20", 3, "vlan", data=netlink.vlan_data(20)))
    assert data(message).get("IFLA_VLAN_ID") == 20
    message = read(ifinfmsg, netlink.new_child("dw01", 0, "vxlan", data=netlink.vxlan_data(77, 4789, IPv4Address("192.0.2.1"))))
    assert message.get("IFLA_LINK") is None
    assert [data(message).get(f"IFLA_VXLAN_{key}") for key in ("ID", "PORT", "LOCAL")] == [77, 4789, "192.0.2.1"]
    message = read(ifinfmsg, netlink.new_child("ds01", 0, "dummy"))
    assert message.get_nested("IFLA_LINKINFO", "IFLA_INFO_KIND") == "dummy" and data(message) is None


def test_hosts_of_an_overlay() -> None:
    message = read(ndmsg, netlink.flood_to(5, IPv4Address("192.0.2.2")))
    assert (message["header"]["type"], message["header"]["flags"] & 0xE00, message["ifindex"]) == (28, 0xC00, 5)
    assert (message["family"], message["state"], message["flags"]) == (7, 0x80, 0x02)
    assert (message.get("NDA_DST"), message.get("NDA_LLADDR")) == ("192.0.2.2", "00:00:00:00:00:00")
    message = read(ndmsg, netlink.flood_to(5, IPv4Address("192.0.2.2"), remove=True))
    assert (message["header"]["type"], message["header"]["flags"] & 0xE00) == (29, 0)


@pytest.mark.parametrize(("rate", "burst"), [(1_000_000, 65536), (125_000_000, 1_250_000), (12_500_000_000, 125_000_000)])
def test_a_rate(rate: int, burst: int) -> None:
    message = read(tcmsg, netlink.limit_rate(4, rate))
    assert (message["index"], message["parent"], message.get("TCA_KIND")) == (4, 0xFFFFFFFF, "tbf")
    options = dict(netlink.attributes(dict(netlink.attributes(netlink.limit_rate(4, rate)[36:]))[2]))
    assert struct.unpack_from("=I", options[1], 8)[0] == min(rate, 0xFFFFFFFF)
    assert struct.unpack("=I", options[6])[0] == burst
    assert options.get(4) == (struct.pack("=Q", rate) if rate > 0xFFFFFFFF else None)


def test_connection_tracking() -> None:
    message = read(nfct_msg, netlink.flush_udp_to(IPv4Address("172.18.0.5")))
    reply = message.get("CTA_TUPLE_REPLY")
    assert reply.get_nested("CTA_TUPLE_IP", "CTA_IP_V4_SRC") == "172.18.0.5"
    assert reply.get_nested("CTA_TUPLE_PROTO", "CTA_PROTO_NUM") == socket.IPPROTO_UDP
    assert message.get_nested("CTA_FILTER", "CTA_FILTER_REPLY_FLAGS") == 0b1001
    message = read(nfct_msg, netlink.flush_udp_port(5353, IPv4Address("127.0.0.1")))
    original = message.get("CTA_TUPLE_ORIG")
    assert original.get_nested("CTA_TUPLE_IP", "CTA_IP_V4_DST") == "127.0.0.1"
    assert original.get_nested("CTA_TUPLE_PROTO", "CTA_PROTO_DST_PORT") == 5353
    assert message.get_nested("CTA_FILTER", "CTA_FILTER_ORIG_FLAGS") == 0b101010
    message = read(nfct_msg, netlink.flush_udp_port(5353, IPv4Address("0.0.0.0")))
    assert message.get_nested("CTA_FILTER", "CTA_FILTER_ORIG_FLAGS") == 0b101000


@given(st.lists(st.tuples(st.integers(0, 0x3FFF), st.binary(max_size=40)), max_size=8))
def test_attributes_come_back(given_in: list[tuple[int, bytes]]) -> None:
    data = b"".join(netlink.attribute(kind, value) for kind, value in given_in)
    assert len(data) % 4 == 0 and list(netlink.attributes(data)) == given_in


@given(st.binary(max_size=200))
def test_any_bytes_are_read_to_an_end(data: bytes) -> None:
    assert sum(len(value) + 4 for _, value in netlink.attributes(data)) <= len(data)


def test_links_of_this_namespace() -> None:
    host = netlink.Netlink()
    try:
        loopback = host.link(name="lo")
        assert loopback is not None and loopback.index == 1
        assert loopback in host.links() and host.link(index=1) == loopback
        assert host.link(name="nosuch0") is None
        assert IPv4Network("127.0.0.0/8") in [route.network for route in host.routes()]
    finally:
        host.close()
        host.close()
