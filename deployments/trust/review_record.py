"""What the audit log keeps of a review: what it takes to run it again, and to tell whether it came out the same.

Digests of what a claim says are keyed: a plain hash of one could be guessed. The key lives as long as the master key
that the replica started with, so digests of two keys tell nothing of each other.
"""

from __future__ import annotations

import hmac
from collections.abc import Mapping
from typing import Any

from deployments.claims.model import canonical_sha256
from deployments.trust.audit.record import Value

# What the two keys of reviews are derived from the master key for.
PSEUDONYM_KEY_INFO = b"member-pseudonym"
CONTENT_KEY_INFO = b"audit-content"

# Two runs of a review can be compared where these are the same, and then these must come out the same, in this order.
CONDITIONS = (
    "model_digest", "arithmetic", "policy_digest", "manifest_digest", "schema_digest", "rules_digest", "plan",
    "max_tokens",
)  # fmt: skip
RESULTS = ("prompt_digest", "outcome", "action", "num_prompt_tokens", "num_output_tokens", "output_digest")


def review_fields(
    review: Mapping[str, Any], serving: Mapping[str, Any], content_key: bytes, conditions: Mapping[str, Value]
) -> dict[str, Value]:
    """Fields of a `review.complete`.

    Args:
        content_key: Derived for `CONTENT_KEY_INFO`.
        conditions: Those of `CONDITIONS` that the review itself does not say.
    """
    provenance = review["provenance"]
    return {
        "review_id": review["review_id"],
        "zone": review["zone"],
        "outcome": review["abstained_reason"] or "answered",
        "action": review["recommended_action"],
        "plan": review["plan"],
        "rules_digest": provenance["rules_digest"],
        "claim_digest": keyed_digest(content_key, provenance["claim_digest"]),
        "prompt_digest": keyed_digest(content_key, provenance["prompt_digest"]),
        "output_digest": output_digest(content_key, review),
        "num_prompt_tokens": serving["prompt_tokens"],
        "num_output_tokens": serving["completion_tokens"],
        **conditions,
    }


def output_digest(content_key: bytes, review: Mapping[str, Any]) -> str:
    """Keyed digest of a whole review but for the time at which it was made."""
    said = {name: value for name, value in review.items() if name != "created"}
    return keyed_digest(content_key, canonical_sha256(said))


def keyed_digest(content_key: bytes, digest: str) -> str:
    """Of a plain digest (hex), as the log keeps it."""
    return hmac.digest(content_key, digest.encode(), "sha256").hex()
