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
	DROP_BAD_SOURCE,      /* a source that no answer can reach: loopback, multicast, unspecified */
	DROP_GATEWAY_DEAD,    /* fail: closed, and no heartbeat */
	DROP_NO_ROOM,         /* the packet could not be prepared for its new device */
	DROP_REASONS,
};

/* Packets that were no verdict's business. */
enum pass_reason {
	PASS_OTHER,     /* not IP, not to this host's MAC address, of a VLAN, or ours by its mark */
	PASS_FAIL_OPEN, /* fail: open, and no heartbeat: would have been tunnelled or dropped */
	PASS_REPLIES,   /* from the TUN to a client, sent straight out of its interface */
	PASS_TO_HOST,   /* from the TUN into the kernel's own stack */
	PASS_REASONS,
};

/* How many of drop_rule were dropped before there was an skb. */
enum xdp_reason {
	XDP_DROPS,
	XDP_REASONS,
};

/* The index space of the per-CPU map `counters`: verdicts, then drop, pass and XDP reasons. */
#define COUNTER_VERDICT 0
#define COUNTER_DROP 3
#define COUNTER_PASS 16
#define COUNTER_XDP 24
#define COUNTERS 32

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

#define SETTING_HIJACK_DNS 1
#define SETTING_FAIL_CLOSED 2

/* How long the gateway may be silent before it counts as dead. */
#define STALE_NS 1000000000

struct counter {
	__u64 packets;
	__u64 bytes;
};

struct settings {
	__u32 tun_ifindex;
	__u32 mark;
	__u32 flags;
	__u32 unused;
};

struct address6 {
	__u8 octets[16];
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
