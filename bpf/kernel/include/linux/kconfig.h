/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* bcc includes this file first, and its helpers.h asks for this option. */
#pragma once
#define CONFIG_BPF_SYSCALL 1
