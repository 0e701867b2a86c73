/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/*
 * Structs, enums and constants that the BPF programs share with Python.
 *
 * ztun/platform/linux/layout.py reads this file as text: each `enum` becomes a list of names, each `#define NAME number`
 * a constant, and the structs are mirrored there as struct formats. Keep one enumerator to a line.
 */
#pragma once

/* ztun.ports.Verdict */
enum verdict {
	VERDICT_DIRECT,
	VERDICT_TUNNEL,
	VERDICT_DROP,
};

/* Why a packet was dropped here. The names, in lower case, are keys of the counters; so are those of pass_reason. */
enum drop_reason {
	DROP_RULE,            /* a rule says block */
	DROP_TRUNCATED,       /* shorter than the fixed header */
	DROP_BAD_VERSION,     /* the version field is not that of the EtherType */
	DROP_BAD_HEADER,      /* IPv4 header length below 20 octets or beyond the packet */
	DROP_BAD_LENGTH,      /* the length field says more than there is, or less than the header */
	DROP_BAD_EXTENSION,   /* IPv6 extension headers run over the end, or there are too many */
	DROP_SHORT_TRANSPORT, /* TCP or UDP without even its ports (RFC 1858: the tiny fragment attack) */
	DROP_BAD_SOURCE,      /* a source that no answer can reach: loopback, multicast, unspecified, this host's own */
	DROP_GATEWAY_DEAD,    /* fail: closed, and no heartbeat */
	DROP_NO_ROOM,         /* the packet could not be prepared for its new device */
	DROP_LOOP,            /* ztun's own packet, by its mark, on its way into the TUN */
	DROP_UNCARRIED,       /* a segment of a carried connection with options that nobody sends, or without hops left */
	DROP_EARLY,           /* of a proxy whose client has yet to answer our SYN-ACK: it is sent again */
	DROP_REASONS,
};

/* Packets that were no verdict's business. */
enum pass_reason {
	PASS_OTHER,      /* not IP, not to this host's MAC address, of a VLAN, or ours by its mark */
	PASS_FAIL_OPEN,  /* fail: open, and no heartbeat: would have been tunnelled or dropped */
	PASS_REPLIES,    /* from the TUN to a client, sent straight out of its interface */
	PASS_TO_HOST,    /* from the TUN into the kernel's own stack */
	PASS_MARKED,     /* of this host, with a mark: ztun's own, or of somebody with a policy of his own */
	PASS_UNCAPTURED, /* of this host, in a flow that is not captured: direct, begun by the other side, or before us */
	PASS_UNCARRIED,  /* of this host, neither TCP nor UDP nor an echo request: ztun could not carry it */
	PASS_BACK,       /* from the TUN to a program of this host, by the interface that its packets left by */
	PASS_ANSWERS,    /* of the LAN, in a connection that came from outside: a published port, a pinhole */
	PASS_UP,         /* from a client to its proxy, without ztun: capture.offload */
	PASS_DOWN,       /* and back */
	PASS_REASONS,
};

/* How many of drop_rule were dropped before there was an skb. */
enum xdp_reason {
	XDP_DROPS,
	XDP_REASONS,
};

/* The part of the verdicts that was about packets of this host. */
enum host_verdict {
	HOST_DIRECT,
	HOST_TUNNEL,
	HOST_DROP,
	HOST_REASONS,
};

/* The index space of the per-CPU map `counters`: verdicts, then drop, pass, XDP and host reasons. */
#define COUNTER_VERDICT 0
#define COUNTER_DROP 3
#define COUNTER_PASS 16
#define COUNTER_XDP 28
#define COUNTER_HOST 32
#define COUNTERS 36

/* Rule r of the configuration counts at index r + RULE_OFFSET: the built-in rules are -1 to -4 (ztun.ports.RULE_*). */
#define RULE_OFFSET 4
#define RULE_DEFAULT -1
#define RULE_BUILTIN -2
#define RULE_DNS -4

#define MAX_RULES 16384
#define MAX_PREFIXES 1048576
#define MAX_LEARNED 65536
#define MAX_CLIENTS 16384
#define MAX_OWN 1024
#define MAX_PORTS 1024
#define MAX_EXITS 256
#define MAX_FLOWS 32768
#define MAX_ANSWERED 16384
#define MAX_ARRIVALS 16384
#define MAX_PIECES 1024
#define MAX_HOMES 1024
#define MAX_SPLICES 32768
/* Where carried connections are found: so many buckets, by flow_hash() of carry.h; places in each. */
#define CARRIED_BUCKETS 32768
#define CARRIED_SLOTS 8
#define RECENT_BITS 9
#define MAX_RECENT (1 << RECENT_BITS)

/* Of so many packets to a recent address one takes the long way. */
#define LONG_WAY 64

#define SETTING_HIJACK_DNS 1
#define SETTING_FAIL_CLOSED 2
#define SETTING_CAPTURE_HOST 4
#define SETTING_OFFLOAD 8

/* Of an interface by which this host sends: the IP versions whose prefixes count there. Port 53 does in any case. */
#define EXIT_IPV4 1
#define EXIT_IPV6 2

/* What is written to tc_index of a packet that is put into the ingress of an interface: it did not arrive there. */
#define PUT_BACK 31348

/* How long the gateway may be silent before it counts as dead. */
#define STALE_NS 1000000000

/* A peer that sent a datagram unasked is answered for so long (RFC 4787, 4.3); written down once a second. */
#define ARRIVAL_NS 180000000000
#define ARRIVAL_STEP_NS 1000000000

struct counter {
	__u64 packets;
	__u64 bytes;
};

struct settings {
	__u32 tun_ifindex;
	__u32 mark;
	__u32 flags;
	__u32 generation;
};

/* Aligned, or the compiler would copy and compare it octet by octet. */
struct address6 {
	__u8 octets[16] __attribute__((aligned(4)));
};

/* Where a client's packets come from. mac: of the sender; zeros where the interface has no link-layer header. */
struct client {
	__u32 ifindex;
	__u8 mac[6];
	__u16 unused;
};

/* An interface, by its index. */
struct port {
	__u8 mac[6];
	__u16 unused;
};

/* The keys of the tries, as BPF_MAP_TYPE_LPM_TRIE wants them: length in host order, address in network order. */
struct prefix4 {
	__u32 length;
	__u32 address;
};

struct prefix6 {
	__u32 length;
	struct address6 address;
};

struct decision {
	__u32 verdict;
	__s32 rule;
	__u64 hits;
};

/* An address that packets went to directly a moment ago. */
struct recent {
	struct address6 destination;
	__u32 generation; /* of the settings when it was decided, which is another after each change; 0: free */
	__s32 rule;
	__u32 has_decision; /* whether an entry of a table decided */
	__u32 hits;         /* which that entry has not been told of yet */
};

/* Of TCP or UDP, as this host sees it, or a client of the LAN. */
struct flow {
	struct address6 local;
	struct address6 remote;
	__be16 local_port;
	__be16 remote_port;
};

/* The fragments of one packet of this host. */
struct piece {
	struct address6 remote;
	__u32 id;
};

/* One direction of a connection that the kernel carries. Numbers as the sender of the segments has them, in host order. */
struct way {
	__u64 packets;
	__u64 bytes; /* of payload */
	__u64 last;  /* CLOCK_MONOTONIC in nanoseconds */
	__u32 ack;   /* the newest; for `down` in the client's numbers */
	__u32 end;   /* the number behind what was sent so far */
	__u32 fin;   /* what acknowledges the FIN */
	__u32 stamp; /* the last timestamp, as its receiver got it */
};

/*
 * A connection of a client, and one to a proxy, that are made into one: what comes in of either goes on in the other,
 * its numbers moved by a constant. Python writes addresses and ports, with an `uplink` of 0, and enters it in `carried`;
 * then it takes the connection from the kernel's TCP and writes the rest above `ends`. Only then is the client answered.
 */
struct splice {
	struct address6 client;
	struct address6 destination; /* what the client takes the other end for */
	struct address6 local;
	struct address6 proxy;
	__be16 client_port;
	__be16 destination_port;
	__be16 local_port;
	__be16 proxy_port;
	__u32 offset;      /* from the client's sequence numbers to those that the proxy knows; the proxy's stay */
	__u32 stamps;      /* the same for the client's timestamps (RFC 7323, 3) */
	__u32 base;        /* the timestamp of the SYN-ACK, from which the proxy's go on */
	__u32 uplink;      /* the interface of the proxy */
	__u8 shift_client; /* window scale of the client, then what the proxy was told; of the proxy, what the client was */
	__u8 shift_local;
	__u8 shift_proxy;
	__u8 shift_told;
	__u8 ends[2];      /* 1: that end has closed; the client's first. Octets, since two CPUs may write at once */
	__u8 resets[2];
	__u8 closed;       /* both ends have, and each knows that the other knows */
	__u8 echoes;       /* `back` is known */
	__u16 unused;
	__u32 lan;         /* the interface of the client */
	__u32 back;        /* from the proxy's timestamps to the client's */
	struct way up;
	struct way down;
};

/*
 * Of each slot the upper half is of the hash, and never 0; then the place among the splices, and whether it is about
 * `down`. 0: free. Python writes one slot at a time, programs only read.
 */
struct bucket {
	__u32 slots[CARRIED_SLOTS];
};

/* 1: there is news of the splice at this place. Octets, since two CPUs may write at once; Python sets them back. */
struct news {
	__u8 places[MAX_SPLICES];
};
