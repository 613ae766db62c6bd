"""The review as an investigator reads it: Markdown, each sentence tied to the flags it rests on."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from deployments.claims.model import Claim, Frequency, ServiceLine, format_money
from deployments.claims.rules import EditTable
from deployments.claims.rules.edits import day_range

_ACTION_TEXT = {
    "pay": "pay as billed",
    "pay_adjusted": "pay an adjusted amount",
    "pend": "pend for correction",
    "request_records": "request records",
    "deny_line": "deny the flagged lines",
    "route_siu": "send to special investigations",
}
_ABSTAINED_TEXT = {
    "model_error": "the model could not be reached or failed",
    "model_timeout": "the model did not answer in time",
    "output_cut": "the model's answer was cut short",
    "invalid_json": "the model's answer was not JSON",
    "schema_violation": "the model's answer did not fit this claim",
}
_FREQUENCY_TEXT = {
    Frequency.ORIGINAL: "original claim",
    Frequency.REPLACEMENT: "replacement of an earlier claim",
    Frequency.VOID: "void of an earlier claim",
}
_ORIGIN_TEXT = {
    "shared": "of shared text",
    "decode_cache": "cached on decode",
    "prefill_cache": "cached on prefill",
    "prefill_computed": "computed on prefill",
    "decode_computed": "computed on decode",
}


def render_narrative(review: Mapping[str, Any], claim: Claim, table: EditTable, serving: Mapping[str, Any]) -> str:
    """Markdown of a finished review. Everything that is not ours (ids, codes, the model's words) is escaped."""
    blocks = [
        f"# Claim {escape(claim.claim_id)}: {_headline(review)}",
        _verdict(review),
        _facts(claim),
        _line_table(claim, review, table),
        *(_flag_section(flag, table) for flag in review["flags"]),
        _next_steps(review),
        _model_section(review),
        _footer(review, serving),
    ]
    return "\n\n".join(block for block in blocks if block) + "\n"


def _headline(review: Mapping[str, Any]) -> str:
    risk = "no risk found" if review["risk_category"] == "none" else f"{review['risk_category']} risk"
    return f"{risk}, {_ACTION_TEXT[review['recommended_action']]}"


def _verdict(review: Mapping[str, Any]) -> str:
    flags = review["flags"]
    if not flags:
        return "**Every rule passed; nothing keeps this claim from being paid as billed.** [no flags]"
    cents = review["projected_overpayment"]["cents"]
    ids = [flag["id"] for flag in flags]
    titles = _joined([_title_of(flag) for flag in _distinct(flags)])
    stake = f" {format_money(cents)} of what was billed is at stake." if cents else " No amount is at stake."
    person = " A person decides." if review["action"]["needs_person"] else ""
    return f"**{titles[0].upper()}{titles[1:]}.{stake}{person}** {tie(ids)}"


def _distinct(flags: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    return list({flag["rule_id"]: flag for flag in reversed(flags)}.values())[::-1]


def _title_of(flag: Mapping[str, Any]) -> str:
    words: str = flag["code"].replace("_", " ")
    return _TITLES.get(flag["rule_id"], words)


_TITLES = {
    "R-NPI": "a provider identifier is not valid",
    "R-DUP-EXACT": "a service is billed a second time",
    "R-DUP-SUSPECT": "a service may be billed a second time",
    "R-PTP-NEVER": "a component is billed beside the service it is part of",
    "R-PTP-MODIFIER": "a component is billed without a modifier that separates it",
    "R-MUE": "more units are billed than a day may hold",
    "R-TIMELY": "the claim came too late",
    "R-DATE": "a service is dated after the claim was received",
    "R-ADDON": "an add-on is billed without its primary service",
    "R-TOTAL": "the total is not the sum of the lines",
    "R-PRIOR-REF": "a correction does not say what it corrects",
    "R-DX-POINTER": "a line points at no diagnosis",
}


def _facts(claim: Claim) -> str:
    kind = _FREQUENCY_TEXT[claim.frequency]
    if claim.prior_claim_ref:
        kind += f" ({escape(claim.prior_claim_ref)})"
    providers = f"billing NPI {escape(claim.billing_npi or 'missing')}"
    if claim.rendering_npi and claim.rendering_npi != claim.billing_npi:
        providers += f", rendering NPI {escape(claim.rendering_npi)}"
    diagnoses = ", ".join(claim.diagnoses)
    return (
        f"{kind[0].upper()}{kind[1:]}, received {claim.received_date}; member {claim.member}; {providers};"
        f" diagnoses {diagnoses}."
    )


def _line_table(claim: Claim, review: Mapping[str, Any], table: EditTable) -> str:
    flags_of: dict[int, list[str]] = {}
    for flag in review["flags"]:
        for number in flag["lines"]:
            flags_of.setdefault(number, []).append(flag["id"])
    rows = [
        "| Line | Date | Code | Service | Units | Charge | Flags |",
        "|---:|---|---|---|---:|---:|---|",
        *(_line_row(line, flags_of.get(line.line_number, []), table) for line in claim.lines),
    ]
    if claim.total_charge_cents == claim.line_total_cents:
        rows.append(f"| | | | **Total** | | **{format_money(claim.total_charge_cents)}** | |")
    else:
        marks = " ".join(flag["id"] for flag in review["flags"] if flag["rule_id"] == "R-TOTAL")
        rows.append(f"| | | | **Sum of the lines** | | **{format_money(claim.line_total_cents)}** | |")
        rows.append(f"| | | | **Total as stated** | | **{format_money(claim.total_charge_cents)}** | {marks} |")
    return "\n".join(rows)


def _line_row(line: ServiceLine, flags: Sequence[str], table: EditTable) -> str:
    label = escape(table.labels.get(line.procedure_code, ""))
    units = f"{line.units}{' min' if line.unit_basis.value == 'MJ' else ''}"
    return (
        f"| {line.line_number} | {day_range(line.date_from, line.date_to)} | {line.code_with_modifiers} | {label}"
        f" | {units} | {format_money(line.charge_cents)} | {', '.join(flags)} |"
    )


def _flag_section(flag: Mapping[str, Any], table: EditTable) -> str:
    rule = table.rules[flag["rule_id"]]
    mark = tie([flag["id"]])
    refs = flag["policy_refs"]
    policy = f"{_joined([ref['section'] for ref in refs])} of {refs[0]['id']}, revision {refs[0]['revision']}"
    codes = f"CARC {flag['carc']}" + (f", RARC {flag['rarc']}" if flag["rarc"] else "")
    cents = flag["projected_overpayment"]["cents"]
    sentences = [
        f"{escape(flag['summary'])} {mark}",
        f"{_weight_text(flag)} {mark}",
        (f"At stake: {format_money(cents)}. {mark}" if cents else f"No amount is at stake. {mark}"),
        f"Policy section{'s' if len(refs) > 1 else ''} {policy}; {codes}. {mark}",
        f"Evidence: {_evidence_text(flag)}. {mark}",
    ]
    parts = [f"## {flag['id']} {rule.title} ({flag['severity']}, {flag['status']})", " ".join(sentences[:3])]
    parts.append(" ".join(sentences[3:]))
    note = flag["model"]
    if note is not None:
        where = f" Look first at line {note['line']}." if note["line"] is not None and len(flag["lines"]) > 1 else ""
        parts.append(f"> Model note ({note['status']}): {escape(note['rationale'])}{where} {mark}")
    return "\n\n".join(parts)


def _weight_text(flag: Mapping[str, Any]) -> str:
    said = flag["model"]
    if not flag["is_decisive"]:
        if said is not None and said["status"] == "confirmed":
            return "The rule suspects it and the model finds it borne out; the record decides."
        if said is not None and said["status"] == "refuted":
            return "The rule suspects it; the model sees an explanation in the claim, which a person should check."
        return "The rule suspects it; the record decides."
    if said is not None and said["status"] != "confirmed":
        return f"The claim's own data settles it; the model called it {said['status']} and is overruled."
    return "The claim's own data settles it."


def _evidence_text(flag: Mapping[str, Any]) -> str:
    names = {"claim": "this claim", "history": "earlier claim", "edit_table": "edit table", "plan": "plan"}
    return "; ".join(f"{names[item['source']]}, {escape(item['ref'])}" for item in flag["evidence"])


def _next_steps(review: Mapping[str, Any]) -> str:
    steps = [
        f"{number}. {escape(step['text'])} {tie(step['flags'])}"
        for number, step in enumerate(review["next_steps"], start=1)
    ]
    return "\n".join(["## Next steps", "", *steps])


def _model_section(review: Mapping[str, Any]) -> str:
    if review["abstained"]:
        return (
            f"*The model took no part: {_ABSTAINED_TEXT[review['abstained_reason']]}."
            " This review rests on the rules alone.*"
        )
    agreement, action = review["rules_model_agreement"], review["action"]
    if not review["flags"]:
        return ""
    text = f"The model assessed {_count(agreement['num_assessed'], 'flag')} and agrees on {agreement['num_agreed']}"
    unasked = len(review["flags"]) - agreement["num_assessed"]
    if unasked:
        text += f" ({_count(unasked, 'further flag')} {'was' if unasked == 1 else 'were'} not put to it)"
    verb = "which raised the action" if action["raised_by_model"] else "which changes nothing"
    if action["by_model"] == review["action"]["by_rules"]:
        verb = "as the rules do"
    return f"*{text}; it would {_ACTION_TEXT[action['by_model']]}, {verb}.*"


def _footer(review: Mapping[str, Any], serving: Mapping[str, Any]) -> str:
    provenance, model = review["provenance"], review["model"]
    by_origin = serving.get("prompt_tokens_by_origin", {})
    origins = ", ".join(f"{count} {_ORIGIN_TEXT[origin]}" for origin, count in by_origin.items() if count)
    confidence = review["confidence"]
    rows = [
        f"- review {review['review_id']}, {review['created']}; plan {review['plan']}; zone {review['zone']}",
        f"- confidence {confidence['value']:.2f} by {confidence['basis']}, not calibrated; risk score"
        f" {review['risk_score']:.2f}",
        f"- rules {review['provenance']['rules_revision']} ({provenance['rules_digest'][:12]}), claim"
        f" {provenance['claim_digest'][:12]}, prompt {provenance['prompt_digest'][:12]}",
        f"- model {escape(model['id'])}, revision {escape(model['revision'])},"
        f" KV profile {escape(model['kv_profile'])}",
        f"- prompt tokens {serving['prompt_tokens']}{': ' if origins else ''}{origins}",
    ]
    return "\n".join(["---", "", *rows])


def tie(flag_ids: Sequence[str]) -> str:
    """`[F1]`, `[F1, F2]`, or `[no flags]`: what a sentence rests on."""
    return f"[{', '.join(flag_ids) or 'no flags'}]"


def escape(text: str) -> str:
    """Text with everything that Markdown or HTML would act on made harmless, on one line."""
    flat = " ".join(text.split())
    return re.sub(r"([\\`*_{}\[\]<>#|!~&])", r"\\\1", flat)


def _joined(parts: Sequence[str]) -> str:
    """`a`, `a and b`, `a, b and c`."""
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
