"""Errors meant for a person: one line that says what is wrong, where, and what to do about it."""

from __future__ import annotations


class ZtunError(Exception):
    """Something could not be done at run time. The command ends with exit code 1."""


class ConfigError(ZtunError):
    """Wrong usage or configuration. The command ends with exit code 2."""
