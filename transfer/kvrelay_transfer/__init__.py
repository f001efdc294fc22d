"""What is moved: KV transports, frames and digests, layout negotiation, leases."""
