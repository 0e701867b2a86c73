/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/*
 * What a packet of this host is part of: needed to tell what the host began from what it answers.
 *
 * Like parse.h, everything is read from the network header on. What cannot be read is an UNKNOWN, and passes: the packet
 * is the kernel's own, or that of a program that may send what it likes.
 */
#pragma once
#include "parse.h"

#define TCP_FIN 0x01
#define TCP_SYN 0x02
#define TCP_RST 0x04
#define TCP_ACK 0x10

/* RFC 792; RFC 4443. */
#define ICMP4_UNREACHABLE 3
#define ICMP4_ECHO 8
#define ICMP4_TIME_EXCEEDED 11
#define ICMP4_PARAMETER 12
#define ICMP6_LAST_ERROR 4
#define ICMP6_ECHO 128
#define ICMP_HEADER 8

enum kind {
	KIND_UNKNOWN,
	KIND_TCP_OPENING, /* a SYN and nothing else */
	KIND_TCP,
	KIND_UDP,
	KIND_ECHO,        /* an echo request */
	KIND_TCP_ERROR,   /* an ICMP error about a segment that came in; `flow` is that of the segment */
	KIND_UDP_ERROR,
	KIND_PIECE,       /* a fragment that is not the first */
};

static __always_inline int parse_tcp(struct __sk_buff *skb, struct packet *packet)
{
	__u8 flags;

	if (load(skb, packet->offset + 13, &flags, 1))
		return KIND_UNKNOWN;
	flags &= TCP_FIN | TCP_SYN | TCP_RST | TCP_ACK;
	return flags == TCP_SYN ? KIND_TCP_OPENING : KIND_TCP;
}

/* The packet that an ICMP error quotes went the other way. Extension headers are not stepped over. */
static __always_inline int parse_quoted(struct __sk_buff *skb, struct packet *packet, struct flow *flow)
{
	__u32 start = packet->offset + ICMP_HEADER, transport;
	__u8 first, protocol;
	__be32 addresses[2];

	if (load(skb, start, &first, 1))
		return KIND_UNKNOWN;
	if (packet->is_ipv4) {
		transport = start + (first & 0xf) * 4;
		if (load(skb, start + 9, &protocol, 1) || load(skb, start + 12, addresses, 8))
			return KIND_UNKNOWN;
		map_ipv4(&flow->remote, addresses[0]);
		map_ipv4(&flow->local, addresses[1]);
	} else {
		transport = start + sizeof(struct ipv6hdr);
		if (load(skb, start + 6, &protocol, 1) || load(skb, start + 8, &flow->remote, 16) ||
		    load(skb, start + 24, &flow->local, 16))
			return KIND_UNKNOWN;
	}
	if (load(skb, transport, &flow->remote_port, 2) || load(skb, transport + 2, &flow->local_port, 2))
		return KIND_UNKNOWN;
	packet->destination_port = flow->remote_port;
	return protocol == IPPROTO_TCP ? KIND_TCP_ERROR : protocol == IPPROTO_UDP ? KIND_UDP_ERROR : KIND_UNKNOWN;
}

static __always_inline int parse_icmp(struct __sk_buff *skb, struct packet *packet, struct flow *flow)
{
	bool is_error;
	__u8 type;

	if (load(skb, packet->offset, &type, 1))
		return KIND_UNKNOWN;
	if (type == (packet->is_ipv4 ? ICMP4_ECHO : ICMP6_ECHO))
		return KIND_ECHO;
	if (packet->is_ipv4)
		is_error = type == ICMP4_UNREACHABLE || type == ICMP4_TIME_EXCEEDED || type == ICMP4_PARAMETER;
	else
		is_error = type >= 1 && type <= ICMP6_LAST_ERROR;
	return is_error ? parse_quoted(skb, packet, flow) : KIND_UNKNOWN;
}

/* What an outgoing packet is, and its flow where it has ports. */
static __always_inline int parse_flow(struct __sk_buff *skb, struct packet *packet, struct flow *flow)
{
	if (packet->is_fragment && packet->protocol == IPPROTO_NONE)
		return KIND_PIECE;
	if (packet->protocol == (packet->is_ipv4 ? IPPROTO_ICMP : IPPROTO_ICMPV6))
		return parse_icmp(skb, packet, flow);
	if (packet->protocol != IPPROTO_TCP && packet->protocol != IPPROTO_UDP)
		return KIND_UNKNOWN;
	flow->local = packet->source;
	flow->remote = packet->destination;
	flow->remote_port = packet->destination_port;
	if (load(skb, packet->offset, &flow->local_port, 2))
		return KIND_UNKNOWN;
	return packet->protocol == IPPROTO_UDP ? KIND_UDP : parse_tcp(skb, packet);
}
