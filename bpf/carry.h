/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/*
 * A segment of one connection made into one of another: addresses, ports, numbers, timestamps, window (RFC 9293, 3.1;
 * RFC 7323; RFC 2018). Payload is not looked at. Checksums are brought up to date by what changed (RFC 1624), which the
 * helpers do as the packet needs it: a super-segment has only the sum of its pseudo-header yet.
 */
#pragma once
#include "flow.h"

#define TCP_HEADER 20
#define TCP_CHECKSUM 16
#define MAX_OPTION_WORDS 10
/*
 * Four octets that begin an option behind two NOPs, as everybody sends them, so that all lies at multiples of four: kind
 * and length of timestamps; kind of SACK, whose length is that of what follows and itself.
 */
#define LEAD_STAMPS 0x0101080a
#define LEAD_SACK 0x01010500
#define LENGTH_STAMPS 12

/* Of a flow as it is entered in `carried`: its address6 and ports as 32-bit words of this machine, one behind the other,
 * as digits of a number to the base 2^32, modulo the prime 2^31 - 1, in which 2^32 is 2; then mixed. 31 bits.
 */
#define HASH_PRIME 0x7fffffffULL
#define HASH_FACTOR 1640531527ULL
#define FLOW_WORDS 9

static __always_inline __u32 flow_hash(struct flow *flow)
{
	__u32 *words = (__u32 *)flow;
	__u64 sum = 0;

	for (int i = 0; i < FLOW_WORDS; i++)
		sum += (__u64)words[i] << i;
	return sum % HASH_PRIME * HASH_FACTOR % HASH_PRIME;
}

/* Whether the splice is that of the flow. */
static __always_inline bool is_of(struct splice *splice, struct flow *flow, bool up)
{
	return flow->local_port == (up ? splice->client_port : splice->proxy_port) &&
	       flow->remote_port == (up ? splice->destination_port : splice->local_port) &&
	       is_same_address(&flow->local, up ? &splice->client : &splice->proxy) &&
	       is_same_address(&flow->remote, up ? &splice->destination : &splice->local);
}

struct segment {
	__be16 source;
	__be16 destination;
	__be32 seq;
	__be32 ack;
	__u8 words; /* of the header, in the upper four bits */
	__u8 flags;
	__be16 window;
	__be16 checksum;
	__be16 urgent;
};

static __always_inline __be16 rescale(__be16 window, __u8 from, __u8 to)
{
	__u32 octets = bpf_ntohs(window) << (from & 15) >> (to & 15);

	return bpf_htons(octets > 0xffff ? 0xffff : octets);
}

static __always_inline __be32 move_value(struct splice *splice, bool up, __be32 value)
{
	if (up) {
		splice->up.stamp = bpf_ntohl(value) + splice->stamps;
		return bpf_htonl(splice->up.stamp);
	}
	/* The first timestamp of the proxy goes on where that of our SYN-ACK was. */
	if (!splice->echoes) {
		splice->back = splice->base - bpf_ntohl(value);
		splice->echoes = 1;
	}
	splice->down.stamp = bpf_ntohl(value) + splice->back;
	return bpf_htonl(splice->down.stamp);
}

/* 0, which echoes nothing, before the proxy has sent anything that could be. */
static __always_inline __be32 move_echo(struct splice *splice, bool up, __be32 echo)
{
	if (!up)
		return bpf_htonl(bpf_ntohl(echo) - splice->stamps);
	return splice->echoes ? bpf_htonl(bpf_ntohl(echo) - splice->back) : 0;
}

/* How many words of a list of edges, and of a pair of timestamps, are still to come. */
struct reading {
	__u32 edges;
	__u32 stamps;
};

/* The next word. Returns whether it is one that we know. */
static __always_inline bool move_word(struct splice *splice, bool up, struct reading *reading, __be32 *at)
{
	__u32 word = bpf_ntohl(*at);

	if (reading->stamps) {
		*at = reading->stamps == 2 ? move_value(splice, up, *at) : move_echo(splice, up, *at);
		reading->stamps--;
	} else if (reading->edges) {
		/* What the client has got is told in the proxy's numbers, which are its own. */
		if (!up)
			*at = bpf_htonl(word - splice->offset);
		reading->edges--;
	} else if (word == LEAD_STAMPS) {
		reading->stamps = 2;
	} else if ((word & 0xffffff00) == LEAD_SACK && (word & 7) == 2) {
		reading->edges = ((word & 0xff) - 2) / 4;
	} else {
		return false;
	}
	return true;
}

/* Written out, since the verifier wants to know the place of each word, and the compiler would make a loop of it. */
#define MOVE_WORD(n) \
	if (count > (n) && !move_word(splice, up, &reading, &words[n])) \
		return false

static __always_inline bool move_options(struct splice *splice, bool up, __be32 *words, __u32 count)
{
	struct reading reading = {};

	MOVE_WORD(0);
	MOVE_WORD(1);
	MOVE_WORD(2);
	MOVE_WORD(3);
	MOVE_WORD(4);
	MOVE_WORD(5);
	MOVE_WORD(6);
	MOVE_WORD(7);
	MOVE_WORD(8);
	MOVE_WORD(9);
	return !reading.edges && !reading.stamps;
}

/* Returns the change of the checksum, added to `changed`; -1: there is more than we know how to read. */
static __always_inline __s64 carry_options(struct __sk_buff *skb, struct splice *splice, bool up, __u32 offset,
					   __u32 length, __s64 changed)
{
	__be32 old[MAX_OPTION_WORDS] = {}, new[MAX_OPTION_WORDS];

	if (length == LENGTH_STAMPS) {
		if (bpf_skb_load_bytes(skb, offset, old, LENGTH_STAMPS))
			return -1;
		__builtin_memcpy(new, old, LENGTH_STAMPS);
		if (!move_options(splice, up, new, LENGTH_STAMPS / 4) ||
		    bpf_skb_store_bytes(skb, offset, new, LENGTH_STAMPS, 0))
			return -1;
		return bpf_csum_diff(old, LENGTH_STAMPS, new, LENGTH_STAMPS, changed);
	}
	/* The verifier wants the bounds here, and again; the compiler knows them. */
	asm volatile("" : "+r"(length));
	if (length < 4 || length > sizeof(old) || bpf_skb_load_bytes(skb, offset, old, length))
		return -1;
	__builtin_memcpy(new, old, sizeof(new));
	if (!move_options(splice, up, new, length / 4))
		return -1;
	asm volatile("" : "+r"(length));
	if (length < 4 || length > sizeof(old) || bpf_skb_store_bytes(skb, offset, new, length, 0))
		return -1;
	return bpf_csum_diff(old, sizeof(old), new, sizeof(new), changed);
}

/* The IP header: from whom, to whom, a hop less. Returns the change of the pseudo-header's sum; -1: not done. */
static __always_inline __s64 carry_addresses4(struct __sk_buff *skb, struct address6 *from, struct address6 *to)
{
	/* Octets 8 to 19: TTL, protocol and checksum, then the addresses (RFC 791, 3.1). */
	__be32 old[3], new[3];

	if (load(skb, 8, old, sizeof(old)))
		return -1;
	new[0] = old[0] - bpf_htonl(0x01000000);
	__builtin_memcpy(&new[1], &from->octets[12], 4);
	__builtin_memcpy(&new[2], &to->octets[12], 4);
	if (bpf_skb_store_bytes(skb, ETH_HLEN + 8, new, sizeof(new), 0) ||
	    bpf_l3_csum_replace(skb, ETH_HLEN + 10, 0, bpf_csum_diff(old, sizeof(old), new, sizeof(new), 0), 0))
		return -1;
	return bpf_csum_diff(&old[1], 8, &new[1], 8, 0);
}

static __always_inline __s64 carry_addresses6(struct __sk_buff *skb, struct address6 *from, struct address6 *to)
{
	struct address6 old[2], new[2] = {*from, *to};
	__u8 hops;

	if (load(skb, 7, &hops, 1) || load(skb, 8, old, sizeof(old)))
		return -1;
	hops--;
	if (bpf_skb_store_bytes(skb, ETH_HLEN + 7, &hops, 1, 0) ||
	    bpf_skb_store_bytes(skb, ETH_HLEN + 8, new, sizeof(new), 0))
		return -1;
	return bpf_csum_diff((__be32 *)old, sizeof(old), (__be32 *)new, sizeof(new), 0);
}

static __always_inline __u8 hops_left(struct __sk_buff *skb, struct packet *packet)
{
	__u8 hops = 0;

	load(skb, packet->is_ipv4 ? 8 : 7, &hops, 1);
	return hops;
}

/* a at or behind b (RFC 9293, 3.4). */
static __always_inline bool is_at_least(__u32 a, __u32 b)
{
	return (__s32)(a - b) >= 0;
}

/* Keep count. Whether there is news for Python: both ends closed, or one reset. */
static __always_inline bool note_segment(struct splice *splice, bool up, struct segment *segment, __u32 payload)
{
	struct way *way = up ? &splice->up : &splice->down;
	__u32 ack = bpf_ntohl(segment->ack), end = bpf_ntohl(segment->seq) + payload;

	if (!way->packets || is_at_least(end, way->end))
		way->end = end;
	way->packets++;
	way->bytes += payload;
	way->last = bpf_ktime_get_ns();
	if (segment->flags & TCP_ACK)
		way->ack = up ? ack : ack - splice->offset;
	if (segment->flags & TCP_RST) {
		splice->resets[!up] = 1;
		return true;
	}
	if (segment->flags & TCP_FIN) {
		way->fin = end + 1;
		splice->ends[!up] = 1;
	}
	if (!splice->ends[0] || !splice->ends[1] || splice->closed)
		return false;
	if (!is_at_least(splice->down.ack, splice->up.fin) || !is_at_least(splice->up.ack, splice->down.fin))
		return false;
	splice->closed = 1;
	return true;
}

/* Make it a segment of the other connection. 1: it has something that we cannot read; -1: it may be spoilt. */
static __always_inline int carry(struct __sk_buff *skb, struct packet *packet, struct splice *splice, bool up,
				 struct segment *old, __u32 header)
{
	struct address6 *from = up ? &splice->local : &splice->destination;
	struct address6 *to = up ? &splice->proxy : &splice->client;
	__u32 offset = ETH_HLEN + packet->offset;
	struct segment new = *old;
	__s64 changed, moved;

	new.source = up ? splice->local_port : splice->destination_port;
	new.destination = up ? splice->proxy_port : splice->client_port;
	if (up) {
		new.seq = bpf_htonl(bpf_ntohl(old->seq) + splice->offset);
		new.window = rescale(old->window, splice->shift_client, splice->shift_local);
	} else {
		new.ack = bpf_htonl(bpf_ntohl(old->ack) - splice->offset);
		new.window = rescale(old->window, splice->shift_proxy, splice->shift_told);
	}
	changed = bpf_csum_diff((__be32 *)old, sizeof(*old), (__be32 *)&new, sizeof(new), 0);
	if (header > TCP_HEADER) {
		changed = carry_options(skb, splice, up, offset + TCP_HEADER, header - TCP_HEADER, changed);
		if (changed < 0)
			return 1;
	}
	if (bpf_skb_store_bytes(skb, offset, &new, sizeof(new), 0))
		return -1;
	moved = packet->is_ipv4 ? carry_addresses4(skb, from, to) : carry_addresses6(skb, from, to);
	if (moved < 0 || bpf_l4_csum_replace(skb, offset + TCP_CHECKSUM, 0, changed, 0) ||
	    bpf_l4_csum_replace(skb, offset + TCP_CHECKSUM, 0, moved, BPF_F_PSEUDO_HDR))
		return -1;
	return 0;
}
