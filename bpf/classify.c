// SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause)
/*
 * The classifier: decides for each packet of the LAN whether the kernel forwards it, ztun gets it, or nobody does.
 *
 *   capture  tc ingress of each LAN interface: direct -> go on, tunnel -> redirect into the TUN, drop -> drop
 *   reply    tc ingress of the TUN: what ztun writes to a client leaves by the client's interface at once
 *   xdp      XDP of each LAN interface: drop, for what is blocked and plain; all else is left to capture
 *
 * Maps and entry points are here because bcc rewrites its map syntax in the main file only.
 */
#include "frame.h"
#include "parse.h"

/* bcc makes the licence section of it. */
#define BPF_LICENSE Dual BSD/GPL

/* bcc's own declaration lacks `plen`; the number is that of enum bpf_func_id (include/uapi/linux/bpf.h). */
static long (*redirect_neigh)(__u32 ifindex, void *params, int plen, __u64 flags) = (void *)152;

/* TC_ACT_* of linux/pkt_cls.h. UNSPEC is TCX_NEXT as well: programs and filters behind us have their say. */
#define GO_ON (-1)
#define SHOT 2

BPF_ARRAY(settings, struct settings, 1);
BPF_ARRAY(heartbeat, u64, 1);
BPF_F_TABLE("lpm_trie", struct prefix4, struct decision, prefixes4, MAX_PREFIXES, BPF_F_NO_PREALLOC);
BPF_F_TABLE("lpm_trie", struct prefix6, struct decision, prefixes6, MAX_PREFIXES, BPF_F_NO_PREALLOC);
BPF_TABLE("lru_hash", u32, struct decision, learned4, MAX_LEARNED);
BPF_TABLE("lru_hash", struct address6, struct decision, learned6, MAX_LEARNED);
BPF_TABLE("hash", struct address6, u32, own, MAX_OWN);
BPF_TABLE("lru_hash", struct address6, struct client, clients, MAX_CLIENTS);
/* What XDP needs besides: the prefixes that are blocked and nothing else, and the interfaces' own MAC addresses. */
BPF_F_TABLE("lpm_trie", struct prefix4, struct decision, blocked4, MAX_PREFIXES, BPF_F_NO_PREALLOC);
BPF_F_TABLE("lpm_trie", struct prefix6, struct decision, blocked6, MAX_PREFIXES, BPF_F_NO_PREALLOC);
BPF_TABLE("hash", u32, struct port, ports, MAX_PORTS);
BPF_PERCPU_ARRAY(counters, struct counter, COUNTERS);
BPF_PERCPU_ARRAY(rules, struct counter, MAX_RULES + RULE_OFFSET);

static __always_inline void count(__u32 index, __u32 octets)
{
	struct counter *counter = counters.lookup(&index);

	if (counter) {
		counter->packets++;
		counter->bytes += octets;
	}
}

static __always_inline void count_rule(__s32 rule, __u32 octets)
{
	__u32 index = rule + RULE_OFFSET;
	struct counter *counter = rules.lookup(&index);

	if (counter) {
		counter->packets++;
		counter->bytes += octets;
	}
}

static __always_inline int pass(enum pass_reason reason, __u32 octets)
{
	count(COUNTER_PASS + reason, octets);
	return GO_ON;
}

static __always_inline int drop(enum drop_reason reason, __u32 octets)
{
	count(COUNTER_VERDICT + VERDICT_DROP, octets);
	count(COUNTER_DROP + reason, octets);
	return SHOT;
}

/* A reader of the heartbeat that is older than its writer by an interrupt must not see a huge age: signed. */
static __always_inline bool gateway_is_dead(void)
{
	__u32 index = 0;
	__u64 *beat = heartbeat.lookup(&index);

	return beat && (__s64)(bpf_ktime_get_ns() - *beat) > STALE_NS;
}

static __always_inline struct decision *find_decision4(struct packet *packet)
{
	struct prefix4 prefix = {.length = 32, .address = packet->destination4};
	struct decision *decision = learned4.lookup(&packet->destination4);

	return decision ? decision : prefixes4.lookup(&prefix);
}

static __always_inline struct decision *find_decision6(struct packet *packet)
{
	struct prefix6 prefix = {.length = 128, .address = packet->destination};
	struct decision *decision = learned6.lookup(&packet->destination);

	return decision ? decision : prefixes6.lookup(&prefix);
}

/* fe80::/10 stays on its link whatever the rules say (RFC 4291, 2.5.6): neighbour discovery lives there. */
static __always_inline bool is_link_local(struct address6 *address)
{
	return address->octets[0] == 0xfe && (address->octets[1] & 0xc0) == 0x80;
}

static __always_inline int decide(struct packet *packet, __u32 flags, __s32 *rule)
{
	struct decision *decision;

	*rule = RULE_BUILTIN;
	if (own.lookup(&packet->destination) || (!packet->is_ipv4 && is_link_local(&packet->destination)))
		return VERDICT_DIRECT;
	if ((flags & SETTING_HIJACK_DNS) && !packet->is_fragment && packet->destination_port == bpf_htons(53)) {
		*rule = RULE_DNS;
		return VERDICT_TUNNEL;
	}
	decision = packet->is_ipv4 ? find_decision4(packet) : find_decision6(packet);
	*rule = RULE_DEFAULT;
	if (!decision)
		return VERDICT_DIRECT;
	__sync_fetch_and_add(&decision->hits, 1);
	*rule = decision->rule;
	return decision->verdict;
}

/* A source that is nobody's address would have the answer sent to the wrong place, or to everybody. */
static __always_inline bool is_bad_source(struct packet *packet)
{
	__u8 first = packet->is_ipv4 ? packet->source.octets[12] : packet->source.octets[0];

	if (packet->is_ipv4)
		return first == 0 || first == 127 || first >= 224; /* RFC 1122, 3.2.1.3 */
	if (first == 0xff)
		return true;
	for (int i = 0; i < 15; i++)
		if (packet->source.octets[i])
			return false;
	return packet->source.octets[15] <= 1; /* :: and ::1 */
}

static __always_inline bool is_same(struct client *one, struct client *other)
{
	__u8 different = 0;

	for (int i = 0; i < 6; i++)
		different |= one->mac[i] ^ other->mac[i];
	return one->ifindex == other->ifindex && !different;
}

/* Written only when it differs: an LRU update takes a lock, a lookup does not. */
static __always_inline void remember_client(struct __sk_buff *skb, struct address6 *source, __u32 link_header)
{
	struct client now = {.ifindex = skb->ifindex}, *known;
	void *data = (void *)(long)skb->data, *end = (void *)(long)skb->data_end;

	/* Octets 6 to 11 of the Ethernet header, which the kernel keeps in one piece (IEEE 802.3, 3.1.1). */
	if (link_header && data + ETH_HLEN <= end)
		__builtin_memcpy(now.mac, data + ETH_ALEN, sizeof(now.mac));
	known = clients.lookup(source);
	if (!known || !is_same(known, &now))
		clients.update(source, &now);
}

static __always_inline int tunnel(struct __sk_buff *skb, struct packet *packet, __u32 tun_ifindex, __u32 link_header)
{
	if (is_bad_source(packet))
		return drop(DROP_BAD_SOURCE, packet->length);
	/* A priority tag (VLAN 0) would be written into the middle of the packet by the TUN. */
	if (skb->vlan_present && bpf_skb_vlan_pop(skb))
		return drop(DROP_NO_ROOM, packet->length);
	remember_client(skb, &packet->source, link_header);
	count(COUNTER_VERDICT + VERDICT_TUNNEL, packet->length);
	/* The kernel takes the link-layer header off on the way to a device that has none. */
	return bpf_redirect(tun_ifindex, 0);
}

/* Frames of a VLAN belong to its own interface; VLAN 0 is a priority only (IEEE 802.1Q, 9.6). */
static __always_inline bool is_not_ours(struct __sk_buff *skb, struct settings *setting)
{
	if (skb->pkt_type != 0 /* PACKET_HOST */ || (skb->vlan_present && (skb->vlan_tci & 0xfff)))
		return true;
	return setting->mark && skb->mark == setting->mark;
}

/* The length of what follows the link-layer header, found without trusting the packet. */
static __always_inline __u32 network_length(struct __sk_buff *skb, __u32 link_header)
{
	return skb->len > link_header ? skb->len - link_header : 0;
}

static __always_inline int parse(struct __sk_buff *skb, struct packet *packet)
{
	int result;

	if (skb->protocol == bpf_htons(ETH_P_IP))
		result = parse_ipv4(skb, packet);
	else
		result = parse_ipv6(skb, packet);
	return result < 0 ? result : parse_ports(skb, packet);
}

static __always_inline int classify(struct __sk_buff *skb, __u32 link_header)
{
	struct packet packet = {.length = network_length(skb, link_header)};
	__u32 index = 0;
	struct settings *setting = settings.lookup(&index);
	int verdict = VERDICT_DROP, result;
	__s32 rule;

	if (!setting || is_not_ours(skb, setting))
		return pass(PASS_OTHER, skb->len);
	if (skb->protocol != bpf_htons(ETH_P_IP) && skb->protocol != bpf_htons(ETH_P_IPV6))
		return pass(PASS_OTHER, skb->len);

	result = parse(skb, &packet);
	if (result >= 0) {
		verdict = decide(&packet, setting->flags, &rule);
		count_rule(rule, packet.length);
	}
	if (verdict == VERDICT_DIRECT) {
		count(COUNTER_VERDICT + VERDICT_DIRECT, packet.length);
		return GO_ON;
	}
	if (gateway_is_dead()) {
		if (!(setting->flags & SETTING_FAIL_CLOSED))
			return pass(PASS_FAIL_OPEN, packet.length);
		if (verdict == VERDICT_TUNNEL)
			return drop(DROP_GATEWAY_DEAD, packet.length);
	}
	if (verdict == VERDICT_TUNNEL)
		return tunnel(skb, &packet, setting->tun_ifindex, link_header);
	return drop(result < 0 ? REASON(result) : DROP_RULE, packet.length);
}

int capture(struct __sk_buff *skb)
{
	return classify(skb, ETH_HLEN);
}

/* For LAN interfaces without a link-layer header, such as WireGuard and PPP. */
int capture_l3(struct __sk_buff *skb)
{
	return classify(skb, 0);
}

static __always_inline int find_receiver(struct __sk_buff *skb, struct address6 *address)
{
	__be32 address4;

	if (skb->protocol == bpf_htons(ETH_P_IPV6))
		return load(skb, 24, address, 16);
	if (skb->protocol != bpf_htons(ETH_P_IP) || load(skb, 16, &address4, sizeof(address4)))
		return -1;
	map_ipv4(address, address4);
	return 0;
}

int reply(struct __sk_buff *skb)
{
	struct address6 receiver;
	struct client *client;
	__u32 length = skb->len, target;

	if (find_receiver(skb, &receiver))
		return pass(PASS_TO_HOST, length);
	client = clients.lookup(&receiver);
	if (!client)
		return pass(PASS_TO_HOST, length);
	target = client->ifindex;
	/* redirect_neigh drops what has no MAC header, which a packet from a TUN has not: push an empty one. */
	if (bpf_skb_change_head(skb, ETH_HLEN, 0))
		return drop(DROP_NO_ROOM, length);
	count(COUNTER_PASS + PASS_REPLIES, length);
	return redirect_neigh(target, NULL, 0, 0);
}

/* Nearly every packet ends here, after one look into a small trie. Names that are blocked are no prefixes: tc has them. */
static __always_inline bool may_be_blocked(struct packet *packet)
{
	struct prefix4 prefix4 = {.length = 32, .address = packet->destination4};
	struct prefix6 prefix6 = {.length = 128, .address = packet->destination};

	return packet->is_ipv4 ? blocked4.lookup(&prefix4) != NULL : blocked6.lookup(&prefix6) != NULL;
}

/* tc goes by pkt_type, which the kernel finds like this (eth_type_trans() in net/ethernet/eth.c). */
static __always_inline bool is_to_host(__u32 ifindex, struct ethhdr *ethernet)
{
	struct port *port = ports.lookup(&ifindex);
	__u8 different = 0;

	if (!port)
		return false;
	for (int i = 0; i < ETH_ALEN; i++)
		different |= port->mac[i] ^ ethernet->h_dest[i];
	return !different;
}

/* The decision that drops a packet, by the same order as in decide(); NULL: somebody else has to look at it. */
static __always_inline struct decision *find_block(struct packet *packet, __u32 flags)
{
	struct decision *decision;

	if (own.lookup(&packet->destination) || (!packet->is_ipv4 && is_link_local(&packet->destination)))
		return NULL;
	if ((flags & SETTING_HIJACK_DNS) && !packet->is_fragment && packet->destination_port == bpf_htons(53))
		return NULL;
	decision = packet->is_ipv4 ? find_decision4(packet) : find_decision6(packet);
	return decision && decision->verdict == VERDICT_DROP ? decision : NULL;
}

/* There is no mark yet: what has ours comes from this host, and arrives nowhere. */
int xdp(struct xdp_md *context)
{
	void *data = (void *)(long)context->data, *end = (void *)(long)context->data_end;
	struct packet packet = {};
	struct decision *decision;
	struct settings *setting;
	__u32 index = 0;

	if (data + sizeof(struct ethhdr) > end || !parse_frame(data, end, &packet) || !may_be_blocked(&packet))
		return XDP_PASS;
	setting = settings.lookup(&index);
	if (!setting || !is_to_host(context->ingress_ifindex, data) || gateway_is_dead())
		return XDP_PASS;
	decision = find_block(&packet, setting->flags);
	if (!decision)
		return XDP_PASS;
	__sync_fetch_and_add(&decision->hits, 1);
	count_rule(decision->rule, packet.length);
	count(COUNTER_XDP, packet.length);
	drop(DROP_RULE, packet.length);
	return XDP_DROP;
}
