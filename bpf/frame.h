/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/*
 * Ethernet frames before there is an skb, as XDP sees them.
 *
 * This is for plain frames only. What is odd, or has more in front of the ports than a bare IP header, is left to tc,
 * whose parsers (parse.h) give every kind of damage its name. Octets are read in place: a frame that is in several
 * pieces ends, for us, with the first one.
 */
#pragma once
#include "parse.h"

/* RFC 791, 3.1. */
static __always_inline bool parse_frame4(void *data, void *end, struct packet *packet)
{
	struct iphdr *header = data;
	__u16 fragment;

	if (data + sizeof(*header) > end || header->version != 4)
		return false;
	packet->offset = header->ihl * 4;
	packet->length = bpf_ntohs(header->tot_len);
	if (packet->offset < sizeof(*header) || packet->length < packet->offset)
		return false;
	map_ipv4(&packet->destination, header->daddr);
	packet->destination4 = header->daddr;
	packet->is_ipv4 = 1;
	packet->protocol = header->protocol;
	fragment = bpf_ntohs(header->frag_off);
	packet->is_fragment = (fragment & (IPV4_FRAGMENT_OFFSET | IPV4_MORE_FRAGMENTS)) != 0;
	if (fragment & IPV4_FRAGMENT_OFFSET)
		packet->protocol = IPPROTO_NONE;
	return true;
}

/* RFC 8200, 3. */
static __always_inline bool parse_frame6(void *data, void *end, struct packet *packet)
{
	struct ipv6hdr *header = data;

	if (data + sizeof(*header) > end || header->version != 6 || is_extension(header->nexthdr))
		return false;
	packet->offset = sizeof(*header);
	packet->length = sizeof(*header) + bpf_ntohs(header->payload_len);
	__builtin_memcpy(&packet->destination, &header->daddr, 16);
	packet->protocol = header->nexthdr;
	return true;
}

/* Whether `packet` was filled in. The caller has seen that the Ethernet header is there. */
static __always_inline bool parse_frame(void *data, void *end, struct packet *packet)
{
	struct ethhdr *ethernet = data;
	__u32 length;
	__be16 *ports;

	data += sizeof(*ethernet);
	if (ethernet->h_proto == bpf_htons(ETH_P_IP)) {
		if (!parse_frame4(data, end, packet))
			return false;
	} else if (ethernet->h_proto != bpf_htons(ETH_P_IPV6) || !parse_frame6(data, end, packet)) {
		return false;
	}
	/* The verifier of Linux 6.1 knows no bounds of octets that were swapped; the compiler does, and drops a plain mask. */
	length = packet->length;
	asm volatile("" : "+r"(length));
	if (data + (length & 0x1ffff) > end)
		return false;
	if (packet->protocol != IPPROTO_TCP && packet->protocol != IPPROTO_UDP)
		return true;
	ports = data + (packet->offset & 0x3f);
	if (packet->offset + 4 > packet->length || (void *)(ports + 2) > end)
		return false;
	packet->destination_port = ports[1];
	return true;
}
