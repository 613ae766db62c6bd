"""Token ids in, token ids out: paged KV, continuous batching, chunked prefill, prefix reuse.

One process, synchronous, deterministic. Knows no Ray, no NIXL, no HTTP.
"""
