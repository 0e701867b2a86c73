// SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause)
/*
 * The classifier: decides for each packet of the LAN whether the kernel forwards it, ztun gets it, or nobody does.
 *
 *   capture  tc ingress of each LAN interface: direct -> go on, tunnel -> redirect into the TUN, drop -> drop
 *   reply    tc ingress of the TUN: what ztun writes to a client leaves by the client's interface at once
 *   guard    tc egress of the TUN: our own packets must not come back to us
 *   leave    tc egress of the interfaces by which this host sends (capture.host): as capture, for its own packets
 *   arrive   tc ingress of these: notes whose datagrams the host is going to answer
 *   xdp      XDP of each LAN interface: drop, for what is blocked and plain; all else is left to capture
 *   carry_up    behind capture: a client's segments of connections that need ztun no more, straight to the proxy
 *   carry_down  tc ingress of the interfaces of proxies: theirs, straight to the client
 *
 * Maps and entry points are here because bcc rewrites its map syntax in the main file only.
 */
#include "carry.h"
#include "flow.h"
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
BPF_PERCPU_ARRAY(recents, struct recent, MAX_RECENT);
BPF_TABLE("lru_hash", struct address6, struct client, clients, MAX_CLIENTS);
/* Connections that a host of the LAN answered, and whether there were any: most gateways have none. */
BPF_TABLE("lru_hash", struct flow, u32, answered, MAX_ANSWERED);
BPF_ARRAY(is_answering, u32, 1);
/* What XDP needs besides: the prefixes that are blocked and nothing else, and the interfaces' own MAC addresses. */
BPF_F_TABLE("lpm_trie", struct prefix4, struct decision, blocked4, MAX_PREFIXES, BPF_F_NO_PREALLOC);
BPF_F_TABLE("lpm_trie", struct prefix6, struct decision, blocked6, MAX_PREFIXES, BPF_F_NO_PREALLOC);
BPF_TABLE("hash", u32, struct port, ports, MAX_PORTS);
/* This host's own traffic. flows: captured connections -> the rule; homes: our addresses -> where packets left. */
BPF_TABLE("hash", u32, u32, exits, MAX_EXITS);
BPF_TABLE("lru_hash", struct flow, s32, flows, MAX_FLOWS);
BPF_TABLE("lru_hash", struct flow, u64, arrivals, MAX_ARRIVALS);
BPF_TABLE("lru_hash", struct piece, s32, pieces, MAX_PIECES);
BPF_TABLE("lru_hash", struct address6, struct client, homes, MAX_HOMES);
/* Connections that need ztun no more: the flows of clients and of proxies, what they are made into, and whose end came. */
BPF_F_TABLE("array", u32, struct bucket, carried, CARRIED_BUCKETS, BPF_F_MMAPABLE);
BPF_F_TABLE("array", u32, struct splice, splices, MAX_SPLICES, BPF_F_MMAPABLE);
BPF_F_TABLE("array", u32, struct news, ended, 1, BPF_F_MMAPABLE);
BPF_PROG_ARRAY(jumps, 1);
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

/* What becomes of a packet that is not direct when nobody is there to take it (capture.fail); 0: go on. */
static __always_inline int judge_without_gateway(__u32 flags, int verdict, __u32 octets)
{
	if (!gateway_is_dead())
		return 0;
	if (!(flags & SETTING_FAIL_CLOSED))
		return pass(PASS_FAIL_OPEN, octets);
	return verdict == VERDICT_TUNNEL ? drop(DROP_GATEWAY_DEAD, octets) : 0;
}

static __always_inline struct decision *find_decision4(__be32 address)
{
	struct prefix4 prefix = {.length = 32, .address = address};
	struct decision *decision = learned4.lookup(&address);

	return decision ? decision : prefixes4.lookup(&prefix);
}

static __always_inline struct decision *find_decision6(struct address6 *address)
{
	struct prefix6 prefix = {.length = 128, .address = *address};
	struct decision *decision = learned6.lookup(address);

	return decision ? decision : prefixes6.lookup(&prefix);
}

static __always_inline struct decision *find_decision(struct packet *packet)
{
	return packet->is_ipv4 ? find_decision4(packet->destination4) : find_decision6(&packet->destination);
}

/* fe80::/10 stays on its link whatever the rules say (RFC 4291, 2.5.6): neighbour discovery lives there. */
static __always_inline bool is_link_local(struct address6 *address)
{
	return address->octets[0] == 0xfe && (address->octets[1] & 0xc0) == 0x80;
}

static __always_inline bool is_query(struct packet *packet, __u32 flags)
{
	return (flags & SETTING_HIJACK_DNS) && !packet->is_fragment && packet->destination_port == bpf_htons(53);
}

/* hits: packets that are decided by this one. Leaves in `found` what decided. */
static __always_inline int decide_anew(struct packet *packet, __u32 flags, __u32 hits, struct recent *found)
{
	struct decision *decision;

	found->rule = RULE_BUILTIN;
	if (own.lookup(&packet->destination) || (!packet->is_ipv4 && is_link_local(&packet->destination)))
		return VERDICT_DIRECT;
	if (is_query(packet, flags)) {
		found->rule = RULE_DNS;
		return VERDICT_TUNNEL;
	}
	decision = find_decision(packet);
	found->rule = RULE_DEFAULT;
	if (!decision)
		return VERDICT_DIRECT;
	__sync_fetch_and_add(&decision->hits, hits);
	found->rule = decision->rule;
	found->has_decision = 1;
	return decision->verdict;
}

/* Where an address is among the recent ones of this CPU, whoever is there now. */
static __always_inline struct recent *find_place(struct address6 *address)
{
	__u32 *words = (__u32 *)address;
	__u32 place = (words[0] ^ words[1] ^ words[2] ^ words[3]) * 0x9e3779b1u >> (32 - RECENT_BITS);

	return recents.lookup(&place);
}

/* Tell of the hits of one that has to make room. */
static __always_inline void settle(struct recent *recent)
{
	struct address6 address = recent->destination;
	struct decision *decision;

	if (!recent->has_decision || !recent->hits)
		return;
	if (is_mapped(&address))
		decision = find_decision4(*(__be32 *)&address.octets[12]);
	else
		decision = find_decision6(&address);
	if (decision)
		__sync_fetch_and_add(&decision->hits, recent->hits);
}

/*
 * Looking into hashes and tries takes longer than all the rest, and packets to one address come in runs: where the last
 * ones went directly so does this one, until something changes. A few of them take the long way all the same, or what was
 * learned would be forgotten as unused.
 */
static __always_inline int decide(struct packet *packet, struct settings *setting, __s32 *rule)
{
	struct recent now = {.destination = packet->destination, .generation = setting->generation};
	struct recent *recent = find_place(&packet->destination);
	bool is_alone;
	__u32 hits = 1;
	int verdict;

	*rule = RULE_BUILTIN;
	if (!recent)
		return VERDICT_DROP; /* never: an array has all its elements */
	/* Else who sends IPv6 to an IPv4-mapped address would have a say in where IPv4 goes. */
	is_alone = packet->is_ipv4 || !is_mapped(&packet->destination);
	if (is_alone && recent->generation == now.generation && is_same_address(&recent->destination, &now.destination) &&
	    !is_query(packet, setting->flags)) {
		*rule = recent->rule;
		if (++recent->hits < LONG_WAY)
			return VERDICT_DIRECT;
		hits = recent->hits;
		recent->hits = recent->generation = 0; /* the kernel may have forgotten what was learned */
	}
	verdict = decide_anew(packet, setting->flags, hits, &now);
	*rule = now.rule;
	if (is_alone && verdict == VERDICT_DIRECT) {
		settle(recent);
		*recent = now;
	}
	return verdict;
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

/* The interface and who sent the frame. */
static __always_inline struct client find_sender(struct __sk_buff *skb, __u32 link_header)
{
	struct client sender = {.ifindex = skb->ifindex};
	void *data = (void *)(long)skb->data, *end = (void *)(long)skb->data_end;

	/* Octets 6 to 11 of the Ethernet header, which the kernel keeps in one piece (IEEE 802.3, 3.1.1). */
	if (link_header && data + ETH_HLEN <= end)
		__builtin_memcpy(sender.mac, data + ETH_ALEN, sizeof(sender.mac));
	return sender;
}

/* Written only when it differs: an LRU update takes a lock, a lookup does not. */
static __always_inline void remember_client(struct __sk_buff *skb, struct address6 *source, __u32 link_header)
{
	struct client now = find_sender(skb, link_header), *known = clients.lookup(source);

	if (!known || !is_same(known, &now))
		clients.update(source, &now);
}

static __always_inline void remember_home(struct __sk_buff *skb, struct address6 *source, __u32 link_header)
{
	struct client now = find_sender(skb, link_header), *known = homes.lookup(source);

	if (!known || !is_same(known, &now))
		homes.update(source, &now);
}

/*
 * A connection that came from outside, by a published port or a pinhole: who answers a SYN did not send one. What
 * follows in it goes the same way; it would be no connection to ztun.
 */
static __always_inline bool is_answer(struct __sk_buff *skb, struct packet *packet)
{
	struct flow flow = {.local = packet->source, .remote = packet->destination};
	__u32 index = 0, yes = 1, *any = is_answering.lookup(&index);
	__u8 flags;

	if (packet->protocol != IPPROTO_TCP || packet->is_fragment || !any || load(skb, packet->offset + 13, &flags, 1))
		return false;
	flags &= TCP_SYN | TCP_ACK;
	if (flags == TCP_SYN || (!*any && flags != (TCP_SYN | TCP_ACK)))
		return false;
	if (load(skb, packet->offset, &flow.local_port, 2))
		return false;
	flow.remote_port = packet->destination_port;
	if (flags != (TCP_SYN | TCP_ACK))
		return answered.lookup(&flow) != NULL;
	answered.update(&flow, &yes);
	*any = 1;
	return true;
}

static __always_inline int tunnel(struct __sk_buff *skb, struct packet *packet, __u32 tun_ifindex, __u32 link_header)
{
	/* With one of ours it would become a client, and get what is sent to us. */
	if (is_bad_source(packet) || own.lookup(&packet->source))
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

static __always_inline int parse(struct __sk_buff *skb, __u32 link_header, struct packet *packet)
{
	int result;

	if (skb->protocol == bpf_htons(ETH_P_IP))
		result = parse_ipv4(skb, link_header, packet);
	else
		result = parse_ipv6(skb, link_header, packet);
	return result < 0 ? result : parse_ports(skb, link_header, packet);
}

static __always_inline bool has_fresh_arrival(struct flow *flow)
{
	__u64 *arrival = arrivals.lookup(flow);

	return arrival && (__s64)(bpf_ktime_get_ns() - *arrival) < ARRIVAL_NS;
}

/*
 * A peer sent to us: what we send back is an answer, and goes the same way. Answers of DNS servers are no such thing,
 * since each of them would let the next query from that port slip by.
 */
static __always_inline void note_arrival(struct __sk_buff *skb, struct packet *packet)
{
	struct flow flow = {.local = packet->destination, .remote = packet->source};
	__u64 now = bpf_ktime_get_ns(), *known;

	if (skb->tc_index == PUT_BACK) {
		skb->tc_index = 0;
		return;
	}
	if (packet->protocol != IPPROTO_UDP || load(skb, packet->offset, &flow.remote_port, 2))
		return;
	flow.local_port = packet->destination_port;
	if (flow.remote_port == bpf_htons(53) || !own.lookup(&flow.local))
		return;
	known = arrivals.lookup(&flow);
	if (known && (__s64)(now - *known) < ARRIVAL_STEP_NS)
		return;
	arrivals.update(&flow, &now);
}

static __always_inline int classify(struct __sk_buff *skb, __u32 link_header)
{
	struct packet packet = {.length = network_length(skb, link_header)};
	__u32 index = 0;
	struct settings *setting = settings.lookup(&index);
	int verdict = VERDICT_DROP, result, dead;
	__s32 rule;

	if (!setting || is_not_ours(skb, setting))
		return pass(PASS_OTHER, skb->len);
	if (skb->protocol != bpf_htons(ETH_P_IP) && skb->protocol != bpf_htons(ETH_P_IPV6))
		return pass(PASS_OTHER, skb->len);

	result = parse(skb, link_header, &packet);
	if (result >= 0) {
		verdict = decide(&packet, setting, &rule);
		count_rule(rule, packet.length);
	}
	if (verdict == VERDICT_DIRECT) {
		if (setting->flags & SETTING_CAPTURE_HOST)
			note_arrival(skb, &packet);
		count(COUNTER_VERDICT + VERDICT_DIRECT, packet.length);
		return GO_ON;
	}
	if (verdict == VERDICT_TUNNEL && is_answer(skb, &packet))
		return pass(PASS_ANSWERS, packet.length);
	if (verdict == VERDICT_TUNNEL && link_header && packet.protocol == IPPROTO_TCP && setting->flags & SETTING_OFFLOAD)
		jumps.call(skb, 0); /* carry_up; comes back only where there is none */
	dead = judge_without_gateway(setting->flags, verdict, packet.length);
	if (dead)
		return dead;
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

/*
 * To a program of this host, as if it had come in where its packets left: a program that is bound to that interface
 * gets it, rp_filter and firewalls see nothing unusual.
 */
static __always_inline int put_back(struct __sk_buff *skb, struct client *home)
{
	struct ethhdr ethernet = {.h_proto = skb->protocol};
	__u32 target = home->ifindex, length = skb->len;
	__u8 different = 0;

	__builtin_memcpy(ethernet.h_dest, home->mac, ETH_ALEN);
	for (int i = 0; i < ETH_ALEN; i++)
		different |= ethernet.h_dest[i];
	if (different && (bpf_skb_change_head(skb, ETH_HLEN, 0) ||
			  bpf_skb_store_bytes(skb, 0, &ethernet, sizeof(ethernet), 0)))
		return drop(DROP_NO_ROOM, length);
	skb->tc_index = PUT_BACK;
	count(COUNTER_PASS + PASS_BACK, length);
	return bpf_redirect(target, BPF_F_INGRESS);
}

int reply(struct __sk_buff *skb)
{
	struct address6 receiver;
	struct client *client;
	__u32 length = skb->len, target;

	if (find_receiver(skb, &receiver))
		return pass(PASS_TO_HOST, length);
	client = homes.lookup(&receiver);
	if (client)
		return put_back(skb, client);
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

/* The splice that carries a flow, and its place; NULL: none does. */
static __always_inline struct splice *find_splice(struct flow *flow, bool up, __u32 *place)
{
	__u32 hash = flow_hash(flow), index = hash % CARRIED_BUCKETS, tag = (hash >> 15 | 1) << 16 | !up;
	struct bucket *bucket = carried.lookup(&index);
	struct splice *splice;

	if (!bucket)
		return NULL; /* never: an array has all its elements */
#pragma unroll
	for (int i = 0; i < CARRIED_SLOTS; i++) {
		__u32 slot = bucket->slots[i];

		if ((slot & 0xffff0001) != tag)
			continue;
		*place = slot >> 1 & (MAX_SPLICES - 1);
		splice = splices.lookup(place);
		if (splice && is_of(splice, flow, up))
			return splice;
	}
	return NULL;
}

static __always_inline void tell_end(__u32 place)
{
	__u32 index = 0;
	struct news *news = ended.lookup(&index);

	if (news)
		news->places[place & (MAX_SPLICES - 1)] = 1;
}

/*
 * Carry a segment on where its connection is carried. 0: it is none of these; else what becomes of it. Who begins a
 * connection anew is nobody's old acquaintance: a SYN is never carried. What cannot be carried is lost: to the kernel's
 * TCP, which holds the port, it would make no sense.
 */
static __always_inline int carry_on(struct __sk_buff *skb, struct packet *packet, struct settings *setting, bool up)
{
	struct flow flow = {.local = packet->source, .remote = packet->destination};
	__u32 header, place, target;
	struct splice *splice;
	struct segment segment;
	int result;

	if (packet->is_fragment || packet->offset + TCP_HEADER > packet->length || skb->vlan_present ||
	    load(skb, packet->offset, &segment, sizeof(segment)) || segment.flags & TCP_SYN)
		return 0;
	flow.local_port = segment.source;
	flow.remote_port = segment.destination;
	splice = find_splice(&flow, up, &place);
	if (!splice)
		return 0;
	header = (segment.words >> 4) * 4;
	if (header < TCP_HEADER || packet->offset + header > packet->length || hops_left(skb, packet) < 2)
		return drop(DROP_UNCARRIED, packet->length);
	/* It is being taken from the kernel's TCP just now, which is not to hear of this any more. */
	if (!splice->uplink)
		return up ? 0 : drop(DROP_EARLY, packet->length);
	/* A client that knows of no connection yet would reset it. */
	if (!up && !splice->up.packets && !(segment.flags & TCP_RST))
		return drop(DROP_EARLY, packet->length);
	if (up && splice->lan != skb->ifindex)
		splice->lan = skb->ifindex;
	target = up ? splice->uplink : splice->lan;
	if (up)
		skb->mark = setting->mark; /* it is as one of ours now, for routes and for tc behind us */
	result = carry(skb, packet, splice, up, &segment, header);
	if (result)
		return drop(result > 0 ? DROP_UNCARRIED : DROP_NO_ROOM, packet->length);
	if (note_segment(splice, up, &segment, packet->length - packet->offset - header))
		tell_end(place);
	count(COUNTER_PASS + (up ? PASS_UP : PASS_DOWN), packet->length);
	return redirect_neigh(target, NULL, 0, 0);
}

/* What is carried needs no gateway that lives: one that stands still for a while finds its connections as they are. */
int carry_up(struct __sk_buff *skb)
{
	struct packet packet = {.length = network_length(skb, ETH_HLEN)};
	__u32 index = 0;
	struct settings *setting = settings.lookup(&index);
	int result;

	if (!setting || parse(skb, ETH_HLEN, &packet) < 0)
		return SHOT; /* never: `capture` has seen both */
	result = carry_on(skb, &packet, setting, true);
	if (!result)
		result = judge_without_gateway(setting->flags, VERDICT_TUNNEL, packet.length);
	return result ? result : tunnel(skb, &packet, setting->tun_ifindex, ETH_HLEN);
}

int carry_down(struct __sk_buff *skb)
{
	struct packet packet = {.length = network_length(skb, ETH_HLEN)};
	__u32 index = 0;
	struct settings *setting = settings.lookup(&index);
	int result;

	if (!setting || skb->pkt_type != 0 /* PACKET_HOST */ ||
	    (skb->protocol != bpf_htons(ETH_P_IP) && skb->protocol != bpf_htons(ETH_P_IPV6)))
		return GO_ON;
	if (parse(skb, ETH_HLEN, &packet) < 0 || packet.protocol != IPPROTO_TCP)
		return GO_ON;
	result = carry_on(skb, &packet, setting, false);
	return result ? result : GO_ON;
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
	if (is_query(packet, flags))
		return NULL;
	decision = find_decision(packet);
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

int guard(struct __sk_buff *skb)
{
	__u32 index = 0;
	struct settings *setting = settings.lookup(&index);

	if (setting && setting->mark && skb->mark == setting->mark)
		return drop(DROP_LOOP, skb->len);
	return GO_ON;
}

/* RFC 791, 3.1; RFC 8200, 4.5, where the fragment header is the first one. 0: no fragment that we know. */
static __always_inline __u32 find_piece_id(struct __sk_buff *skb, struct packet *packet)
{
	__u8 next = 0;
	__u16 id4 = 0;
	__u32 id = 0;

	if (packet->is_ipv4) {
		load(skb, 4, &id4, sizeof(id4));
		return id4;
	}
	if (load(skb, 6, &next, 1) || next != IPPROTO_FRAGMENT)
		return 0;
	load(skb, sizeof(struct ipv6hdr) + 4, &id, sizeof(id));
	return id;
}

/* Later fragments follow the first one, which this host sent just before. */
static __always_inline bool is_captured_piece(struct piece *piece, __s32 *rule)
{
	__s32 *known = pieces.lookup(piece);

	if (known)
		*rule = *known;
	return known;
}

/* A connection that was captured at its beginning is so to its end, whatever becomes of the rules. */
static __always_inline bool is_captured_flow(struct flow *flow, __s32 *rule)
{
	__s32 *known = flows.lookup(flow);

	if (known)
		*rule = *known;
	return known;
}

/* The verdict about what this host began to send; -1 - a pass reason for all else. */
static __always_inline int judge(struct packet *packet, enum kind kind, struct flow *flow, struct piece *piece,
				 struct settings *setting, __s32 *rule)
{
	int verdict;

	if (kind == KIND_UNKNOWN)
		return DROPPED(PASS_UNCARRIED);
	if (kind == KIND_PIECE)
		return is_captured_piece(piece, rule) ? VERDICT_TUNNEL : DROPPED(PASS_UNCAPTURED);
	if (kind == KIND_TCP || kind == KIND_TCP_ERROR)
		return is_captured_flow(flow, rule) ? VERDICT_TUNNEL : DROPPED(PASS_UNCAPTURED);
	if ((kind == KIND_UDP || kind == KIND_UDP_ERROR) && has_fresh_arrival(flow))
		return DROPPED(PASS_UNCAPTURED);
	verdict = decide(packet, setting, rule);
	if (kind == KIND_TCP_OPENING) {
		if (verdict == VERDICT_TUNNEL)
			flows.update(flow, rule);
		else
			flows.delete(flow);
	}
	if (packet->is_fragment) {
		if (verdict == VERDICT_TUNNEL)
			pieces.update(piece, rule);
		else
			pieces.delete(piece);
	}
	return verdict;
}

/* Where only queries are taken, or only one IP version: other packets have nothing to do with us. */
static __always_inline bool is_exit_for(__u32 exit, struct packet *packet, __u32 flags)
{
	if (exit & (packet->is_ipv4 ? EXIT_IPV4 : EXIT_IPV6))
		return true;
	return (flags & SETTING_HIJACK_DNS) && packet->destination_port == bpf_htons(53);
}

static __always_inline int tunnel_host(struct __sk_buff *skb, struct packet *packet, __u32 tun_ifindex,
				       __u32 link_header)
{
	if (skb->vlan_present && bpf_skb_vlan_pop(skb))
		return drop(DROP_NO_ROOM, packet->length);
	remember_home(skb, &packet->source, link_header);
	count(COUNTER_VERDICT + VERDICT_TUNNEL, packet->length);
	count(COUNTER_HOST + HOST_TUNNEL, packet->length);
	return bpf_redirect(tun_ifindex, 0);
}

/*
 * What is forwarded was judged where it came in. A mark is somebody's policy: ours, or that of a tunnel for its own
 * packets. A source that is not ours belongs to a namespace that shares the interface (macvlan, ipvlan).
 */
static __always_inline int judge_leaving(struct __sk_buff *skb, __u32 link_header)
{
	struct packet packet = {.length = network_length(skb, link_header)};
	__u32 index = 0, ifindex = skb->ifindex, *exit = exits.lookup(&ifindex);
	struct settings *setting = settings.lookup(&index);
	struct piece piece = {};
	struct flow flow = {};
	enum kind kind;
	__s32 rule = RULE_BUILTIN;
	int verdict, dead;

	if (!exit || !setting || (skb->vlan_present && (skb->vlan_tci & 0xfff)))
		return GO_ON;
	if (skb->protocol != bpf_htons(ETH_P_IP) && skb->protocol != bpf_htons(ETH_P_IPV6))
		return GO_ON;
	if (parse(skb, link_header, &packet) < 0 || !own.lookup(&packet.source))
		return GO_ON;
	if (skb->mark)
		return pass(PASS_MARKED, packet.length);
	if (!is_exit_for(*exit, &packet, setting->flags))
		return GO_ON;

	kind = parse_flow(skb, &packet, &flow);
	if (packet.is_fragment) {
		piece.remote = packet.destination;
		piece.id = find_piece_id(skb, &packet);
	}
	verdict = judge(&packet, kind, &flow, &piece, setting, &rule);
	if (verdict < 0)
		return pass(REASON(verdict), packet.length);
	count_rule(rule, packet.length);
	if (verdict == VERDICT_DIRECT) {
		count(COUNTER_VERDICT + VERDICT_DIRECT, packet.length);
		count(COUNTER_HOST + HOST_DIRECT, packet.length);
		return GO_ON;
	}
	dead = judge_without_gateway(setting->flags, verdict, packet.length);
	if (dead)
		return dead;
	if (verdict == VERDICT_TUNNEL)
		return tunnel_host(skb, &packet, setting->tun_ifindex, link_header);
	count(COUNTER_HOST + HOST_DROP, packet.length);
	return drop(DROP_RULE, packet.length);
}

int leave(struct __sk_buff *skb)
{
	return skb->ingress_ifindex ? GO_ON : judge_leaving(skb, ETH_HLEN);
}

/* For interfaces without a link-layer header. */
int leave_l3(struct __sk_buff *skb)
{
	return skb->ingress_ifindex ? GO_ON : judge_leaving(skb, 0);
}

/* The length is that of the frame, if there is one: nothing is counted here, and every octet is read with care. */
int arrive(struct __sk_buff *skb)
{
	struct packet packet = {.length = skb->len};

	if (skb->pkt_type != 0 /* PACKET_HOST */ || (skb->vlan_present && (skb->vlan_tci & 0xfff)))
		return GO_ON;
	if (skb->protocol != bpf_htons(ETH_P_IP) && skb->protocol != bpf_htons(ETH_P_IPV6))
		return GO_ON;
	if (parse(skb, 0, &packet) >= 0)
		note_arrival(skb, &packet);
	return GO_ON;
}
