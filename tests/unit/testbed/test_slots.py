"""Clusters beside each other have nothing in common."""

from __future__ import annotations

import itertools
from ipaddress import ip_address, ip_network

from tests.testbed.slots import COUNT, Addresses

NODES = 8


def networks(own: Addresses):
    return [ip_network(f"198.18.{own.number}.0/24"), ip_network(own.all_pods), ip_network(own.services)]


def test_no_two_clusters_share_an_address():
    found = [network for number in range(COUNT) for network in networks(Addresses(number))]
    assert not [pair for pair in itertools.combinations(found, 2) if pair[0].overlaps(pair[1])]


def test_all_addresses_are_of_the_range_for_testbeds():
    for number in range(COUNT):
        assert all(network.subnet_of(ip_network("198.18.0.0/15")) for network in networks(Addresses(number)))


def test_nodes_pods_and_services_are_where_their_networks_are():
    own = Addresses(COUNT - 1)
    machines, pods, services = networks(own)
    for index in range(NODES):
        assert ip_address(own.node(index)) in machines
        assert ip_network(own.pods(index)).subnet_of(pods)
    assert ip_address(own.service(10)) in services
    assert len({own.host, own.control_plane, *(own.node(index) for index in range(NODES))}) == NODES + 2
