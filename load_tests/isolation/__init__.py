"""The isolation audit: what a caller can learn of another tenant from time, and what it can do to its cache."""
