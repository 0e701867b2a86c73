"""Numbers of macOS that Python's socket module does not name, or names there only.

Each is cited from a header of XNU (github.com/apple-oss-distributions/xnu). They are written out so that this package
can be imported, checked and tested on any system.
"""

from __future__ import annotations

# bsd/sys/socket.h
AF_INET = 2
AF_ROUTE = 17
AF_LINK = 18
AF_INET6 = 30
AF_SYSTEM = 32
NET_RT_DUMP = 1
NET_RT_FLAGS = 2
NET_RT_IFLIST = 3

# bsd/sys/sysctl.h
CTL_NET = 4

# bsd/sys/kern_control.h, bsd/sys/sys_domain.h
SYSPROTO_CONTROL = 2
CTLIOCGINFO = 0xC0644E03  # _IOWR('N', 3, struct ctl_info), which has 100 bytes
MAX_KCTL_NAME = 96

# bsd/net/if_utun.h
UTUN_CONTROL_NAME = "com.apple.net.utun_control"
UTUN_OPT_IFNAME = 2
UTUN_OPT_MAX_PENDING_PACKETS = 16

# bsd/netinet/in.h, bsd/netinet6/in6.h
IP_BOUND_IF = 25
IPV6_BOUND_IF = 125

# bsd/net/if.h
IFF_UP = 0x1
IFF_LOOPBACK = 0x8
IFF_RUNNING = 0x40

# bsd/net/route.h
RTM_VERSION = 5
RTM_ADD, RTM_DELETE, RTM_CHANGE, RTM_GET = 0x1, 0x2, 0x3, 0x4
RTM_NEWADDR, RTM_DELADDR, RTM_IFINFO, RTM_GET2 = 0xC, 0xD, 0xE, 0x14
RTF_UP = 0x1
RTF_GATEWAY = 0x2
RTF_HOST = 0x4
RTF_REJECT = 0x8
RTF_LLINFO = 0x400
RTF_BLACKHOLE = 0x1000
RTF_WASCLONED = 0x20000
RTF_IFSCOPE = 0x1000000
RTA_DST, RTA_GATEWAY, RTA_NETMASK, RTA_GENMASK = 0x1, 0x2, 0x4, 0x8
RTA_IFP, RTA_IFA, RTA_AUTHOR, RTA_BRD = 0x10, 0x20, 0x40, 0x80

# bsd/sys/event.h
EVFILT_READ, EVFILT_WRITE = -1, -2
EV_ADD, EV_DELETE, EV_CLEAR = 0x1, 0x2, 0x20
EV_OOBAND, EV_ERROR, EV_EOF = 0x2000, 0x4000, 0x8000
