/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* No guard of its own: found under include/ it finds itself again under include/uapi/, and from there the real one. */
#include_next <linux/if_ether.h>
