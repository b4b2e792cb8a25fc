"""What `mope-bb doctor` says of an endpoint: its cells, and how their values are worded."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final, Literal

Verdict = Literal["ok", "warning", "error", "unknown"]
CHECKS: Final = (
    "reachable",
    "model",
    "logprobs",
    "top-k",
    "order",
    "token ids",
    "bytes",
    "prefill",
    "trailing space",
    "end of answer",
    "scale",
    "drafts",
    "scoring",
    "latency",
    "together",
    "tokenizer",
    "connection",
)
SCORING: Final = {
    "none": "token by token",
    "prefixes": "list of prefixes",
    "forced": "forced decoding",
    "start_len": "from a position on",
    "echo": "echo of the prompt",
}
NOT_NEEDED: Final = ("drafts", "scoring")
"""Without them an expert is asked token by token."""
DRAFTS: Final = {"exact": "true samples", "lists": "lists only", "none": "-"}


@dataclass(frozen=True, slots=True)
class Finding:
    """One cell."""

    check: str
    verdict: Verdict
    value: str
    advice: str = ""
    """What it means and what to do, where it is not as it should be."""


@dataclass(slots=True)
class ExpertReport:
    """One expert's column."""

    name: str
    provider: str
    findings: dict[str, Finding] = field(default_factory=dict)
    fingerprint: str | None = None

    @property
    def can_run(self) -> bool:
        """Nothing stands in the way of merging it."""
        return all(finding.verdict != "error" for finding in self.findings.values())

    def add(self, check: str, verdict: Verdict, value: str, advice: str = "") -> None:
        """Note a finding."""
        self.findings[check] = Finding(check, verdict, value, advice)
