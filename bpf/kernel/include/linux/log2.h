/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* Asked for by bcc's helpers.h for tables that no program here uses. */
#pragma once
