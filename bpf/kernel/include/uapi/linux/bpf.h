/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* Empty: bcc brings its own copy of linux/bpf.h and has read it before this. */
#pragma once
