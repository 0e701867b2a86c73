"""Names: Fake-IPs that stand for them, and the DNS messages in which they are asked for. Pure but for the store."""
