"""The gateway at work: real clients, a real kernel, real servers. Needs root."""
