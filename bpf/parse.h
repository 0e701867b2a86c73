/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/*
 * IPv4 and IPv6 headers down to the ports of TCP and UDP.
 *
 * What lies in the linear part of a packet is read in place; all else with bpf_skb_load_bytes_relative() from the network
 * header, which works for paged packets (GRO) and for interfaces without a link-layer header (WireGuard, PPP) alike. Each
 * parser checks its bounds, advances the offset and says what comes next; a negative answer is -1 - a drop reason.
 */
#pragma once
#include <linux/if_ether.h>
#include <linux/in.h>
#include <linux/ip.h>
#include <linux/ipv6.h>

#include "shared.h"

#define DROPPED(reason) (-1 - (reason))
#define REASON(result) (-1 - (result))

#define IPV4_FRAGMENT_OFFSET 0x1fff
#define IPV4_MORE_FRAGMENTS 0x2000
#define IPV6_FRAGMENT_OFFSET 0xfff8
#define IPV6_MORE_FRAGMENTS 0x0001
#define IPV6_MAX_EXTENSIONS 8

struct packet {
	struct address6 source;      /* IPv4 as ::ffff:a.b.c.d (RFC 4291, 2.5.5.2) */
	struct address6 destination;
	__be32 destination4;
	__u32 length;      /* octets of the IP packet, without link-layer header */
	__u32 offset;      /* of what comes next, from the network header */
	__u8 protocol;     /* what comes next */
	__u8 is_ipv4;
	__u8 is_fragment;  /* first or later: its ports decide nothing, so that all fragments go one way */
	__be16 destination_port; /* 0: there is none */
};

static __always_inline int load(struct __sk_buff *skb, __u32 offset, void *to, __u32 length)
{
	return bpf_skb_load_bytes_relative(skb, offset, to, length, BPF_HDR_START_NET);
}

/*
 * `count` words at `offset` from the network header. link_header: octets in front of that, a constant, or the verifier
 * could not tell; 0 where there are none or it is not known, and then nothing is read in place.
 */
static __always_inline int read_words(struct __sk_buff *skb, __u32 link_header, __u32 offset, __u32 *to, __u32 count)
{
	void *data = (void *)(long)skb->data, *end = (void *)(long)skb->data_end;
	__u32 *words, near = offset;

	if (!link_header)
		return load(skb, offset, to, count * sizeof(*to));
	/* The verifier wants a bound that the compiler would find needless, and one pointer for check and use. */
	asm volatile("" : "+r"(near));
	words = data + link_header + (near & 0x3f);
	asm volatile("" : "+r"(words));
	if (offset > 60 || (void *)(words + count) > end)
		return load(skb, offset, to, count * sizeof(*to));
	for (int i = 0; i < count; i++)
		to[i] = words[i];
	return 0;
}

static __always_inline void map_ipv4(struct address6 *to, __be32 address)
{
	__builtin_memset(to, 0, 10);
	to->octets[10] = to->octets[11] = 0xff;
	__builtin_memcpy(&to->octets[12], &address, 4);
}

static __always_inline bool is_mapped(struct address6 *address)
{
	__u32 *words = (__u32 *)address;

	return !(words[0] | words[1] | (words[2] ^ bpf_htonl(0xffff)));
}

/* RFC 791, 3.1. The header checksum is left to whoever gets the packet. */
static __always_inline int parse_ipv4(struct __sk_buff *skb, __u32 link_header, struct packet *packet)
{
	struct iphdr header;
	__u32 header_length, total;
	__u16 fragment;

	if (read_words(skb, link_header, 0, (__u32 *)&header, sizeof(header) / 4))
		return DROPPED(DROP_TRUNCATED);
	if (header.version != 4)
		return DROPPED(DROP_BAD_VERSION);
	header_length = header.ihl * 4;
	if (header_length < sizeof(header) || header_length > packet->length)
		return DROPPED(DROP_BAD_HEADER);
	total = bpf_ntohs(header.tot_len);
	/* BIG TCP: a super-segment beyond 64 KiB has a total length of 0. */
	if (total == 0 && skb->gso_size)
		total = packet->length;
	if (total < header_length || total > packet->length)
		return DROPPED(DROP_BAD_LENGTH);

	map_ipv4(&packet->source, header.saddr);
	map_ipv4(&packet->destination, header.daddr);
	packet->destination4 = header.daddr;
	packet->is_ipv4 = 1;
	packet->length = total;
	packet->offset = header_length;
	packet->protocol = header.protocol;
	fragment = bpf_ntohs(header.frag_off);
	packet->is_fragment = (fragment & (IPV4_FRAGMENT_OFFSET | IPV4_MORE_FRAGMENTS)) != 0;
	/* Beyond the first fragment there is payload where the ports would be. */
	if (fragment & IPV4_FRAGMENT_OFFSET)
		packet->protocol = IPPROTO_NONE;
	return packet->protocol;
}

/* The extension headers of RFC 8200, 4, RFC 4302 and RFC 6275; ESP hides all that follows, as a transport does. */
static __always_inline int is_extension(__u8 protocol)
{
	return protocol == IPPROTO_HOPOPTS || protocol == IPPROTO_ROUTING || protocol == IPPROTO_DSTOPTS ||
	       protocol == IPPROTO_FRAGMENT || protocol == IPPROTO_AH || protocol == IPPROTO_MH;
}

/* Step over the extension header that `packet` stands at. */
static __always_inline int parse_extension(struct __sk_buff *skb, struct packet *packet)
{
	__u8 header[4]; /* next header, length in units that depend, and for a fragment its offset */
	__u16 fragment;
	__u32 length;

	if (packet->offset + 8 > packet->length || load(skb, packet->offset, header, sizeof(header)))
		return DROPPED(DROP_BAD_EXTENSION);
	length = (header[1] + 1) * 8;
	if (packet->protocol == IPPROTO_AH) /* RFC 4302, 2.2: in units of 4 octets, minus 2 */
		length = (header[1] + 2) * 4;
	if (packet->protocol == IPPROTO_FRAGMENT) {
		length = 8;
		fragment = header[2] << 8 | header[3];
		if (fragment & (IPV6_FRAGMENT_OFFSET | IPV6_MORE_FRAGMENTS)) /* not an atomic fragment (RFC 6946) */
			packet->is_fragment = 1;
		if (fragment & IPV6_FRAGMENT_OFFSET)
			header[0] = IPPROTO_NONE;
	}
	packet->offset += length;
	packet->protocol = header[0];
	return packet->offset > packet->length ? DROPPED(DROP_BAD_EXTENSION) : 0;
}

/* RFC 8200, 3. */
static __always_inline int parse_ipv6(struct __sk_buff *skb, __u32 link_header, struct packet *packet)
{
	struct ipv6hdr header;
	__u32 total;

	if (read_words(skb, link_header, 0, (__u32 *)&header, sizeof(header) / 4))
		return DROPPED(DROP_TRUNCATED);
	if (header.version != 6)
		return DROPPED(DROP_BAD_VERSION);
	total = sizeof(header) + bpf_ntohs(header.payload_len);
	if (header.payload_len == 0 && skb->gso_size) /* BIG TCP, as above */
		total = packet->length;
	if (total > packet->length)
		return DROPPED(DROP_BAD_LENGTH);

	__builtin_memcpy(&packet->source, &header.saddr, 16);
	__builtin_memcpy(&packet->destination, &header.daddr, 16);
	packet->length = total;
	packet->offset = sizeof(header);
	packet->protocol = header.nexthdr;
	for (int i = 0; i < IPV6_MAX_EXTENSIONS && is_extension(packet->protocol); i++)
		if (parse_extension(skb, packet))
			return DROPPED(DROP_BAD_EXTENSION);
	return is_extension(packet->protocol) ? DROPPED(DROP_BAD_EXTENSION) : packet->protocol;
}

/* The destination port stands in octets 2 and 3 of TCP (RFC 9293, 3.1) and UDP (RFC 768). */
static __always_inline int parse_ports(struct __sk_buff *skb, __u32 link_header, struct packet *packet)
{
	__u32 ports;

	if (packet->protocol != IPPROTO_TCP && packet->protocol != IPPROTO_UDP)
		return 0;
	if (packet->offset + 4 > packet->length || read_words(skb, link_header, packet->offset, &ports, 1))
		return DROPPED(DROP_SHORT_TRANSPORT);
	packet->destination_port = bpf_htons((__u16)bpf_ntohl(ports));
	return 0;
}

static __always_inline bool is_same_address(struct address6 *one, struct address6 *other)
{
	__u32 *words = (__u32 *)one, *others = (__u32 *)other;

	return !((words[0] ^ others[0]) | (words[1] ^ others[1]) | (words[2] ^ others[2]) | (words[3] ^ others[3]));
}
