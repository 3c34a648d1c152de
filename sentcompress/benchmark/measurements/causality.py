"""Proof that the model does not see the future: quality and text are measured of a causal model only. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from sentcompress.benchmark.measurement import Compared, Measurement, Section
from sentcompress.errors import CausalityError
from sentcompress.provenance import Record
from sentcompress.table import Table

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from sentcompress.benchmark.results import Results
    from sentcompress.benchmark.runner import Bench


class CausalityCheck(Record):
    """One comparison of two runs of a model."""

    name: str
    kind: Literal["future", "equality"]
    """``future``: contents behind a point were changed, nothing before it may differ at all; ``equality``: two
    ways to compute the same, which may differ by rounding."""
    attention: str
    max_delta: float
    tolerance: float
    effect: float | None = None
    """How much the change moved what it may move; 0 would prove nothing."""
    passed: bool
    detail: str = ""


class CausalityReport(Record):
    """All checks of one model."""

    checks: list[CausalityCheck]

    @property
    def passed(self) -> bool:
        return bool(self.checks) and all(check.passed for check in self.checks)

    @property
    def failures(self) -> list[CausalityCheck]:
        return [check for check in self.checks if not check.passed]

    @property
    def future_delta(self) -> float:
        """The largest effect of the future on the past."""
        return max(check.max_delta for check in self.checks if check.kind == "future")


def require_causal(report: CausalityReport | None) -> None:
    """Refuse a model that failed, or was not checked.

    Raises:
        CausalityError: naming the checks.
    """
    if report is None:
        raise CausalityError("the model was not checked for causality", fix="measure causality first")
    if report.passed:
        return
    lines = [
        f"  {check.name} ({check.attention}): max |delta| {check.max_delta:g}, allowed {check.tolerance:g}"
        + (f"; {check.detail}" if check.detail else "")
        for check in report.failures
    ]
    raise CausalityError(
        "the model fails the causality check, so its quality figures would be worthless:\n"
        + "\n".join(lines),
        fix="look at the backbone adapter: it must apply the attention mask it is given "
        "('sentcompress bench causality DIR' shows every check)",
    )


class Causality(Measurement[CausalityReport | None]):
    """Prove that later sentences do not affect earlier ones. Fails (exit code 1) for a model that leaks."""

    title = "Causality: effect of later sentences on earlier ones"
    order = 10
    distributed = True
    reads_corpus = False
    one_line = True
    examples = ("sentcompress bench causality out/quickstart/graft",)

    def measure(self, bench: Bench) -> CausalityReport:
        from sentcompress.benchmark.causality_checks import check_causality
        from sentcompress.modeling.sentence_lm import SentenceLM

        model = bench.models.grafted
        if isinstance(model, SentenceLM):
            report = check_causality(model, seed=bench.recipe.seed)
        else:
            report = _split_report(model)
        for check in report.checks:
            bench.row(
                self.name,
                f"{check.name} ({check.attention})",
                {
                    "max_delta": check.max_delta,
                    "tolerance": check.tolerance,
                    "effect": check.effect,
                    "passed": check.passed,
                    "detail": check.detail,
                },
                bench.graft_stages,
                model=model,
            )
        return report

    def verdict(self, results: Results) -> None:
        if (report := self.of(results)) is not None:
            require_causal(report)

    def sections(self, results: Results) -> list[Section]:
        report = self.of(results)
        checks = report.checks if report else []
        backends = list(dict.fromkeys(check.attention for check in checks))
        lines = []
        for name in dict.fromkeys(check.name for check in checks):
            lines.append(_line([check for check in checks if check.name == name], backends))
        passed = sum(check.passed for check in checks)
        notes = [f"{passed} of {len(checks)} checks passed. Figures are the largest |difference| seen."]
        notes += [f"{check.name} ({check.attention}): {check.detail}" for check in checks if check.detail]
        return [Section(Table(self.title, ["check", "allowed", *backends, ""], lines, notes))]

    def tiles(self, results: Results) -> list[tuple[str, str]]:
        report = self.of(results)
        if report is None:
            return []
        delta = f"{report.future_delta:g}" if report.future_delta else "0.0"
        return [(delta, "causal: largest effect of the future" if report.passed else "NOT causal")]

    def comparison(self, results: Results) -> list[Compared]:
        report = self.of(results)
        if report is None or not report.checks:
            return []
        return [
            Compared("all checks", "future max_delta", report.future_delta),
            Compared("all checks", "passed", report.passed),
        ]


def _split_report(lm: PreTrainedModel) -> CausalityReport:
    """The proof of a split LLM, which is run once: its masks are the same for all implementations of attention."""
    from sentcompress.modeling.split_proof import prove_split

    return CausalityReport(
        checks=[
            CausalityCheck(
                name=finding.name,
                kind="future" if finding.name == "future" else "equality",
                attention=str(lm.config._attn_implementation),
                max_delta=finding.delta,
                tolerance=finding.allowed,
                passed=finding.passed,
                detail=finding.problem,
            )
            for finding in prove_split(lm)
        ]
    )


def _line(checks: Sequence[CausalityCheck], backends: Sequence[str]) -> list[str]:
    """A check under each implementation of attention."""
    deltas = {check.attention: check.max_delta for check in checks}
    allowed = f"at most {max(check.tolerance for check in checks):.0e}"
    if checks[0].kind == "future":
        allowed = "must be 0.0"
    figures = [f"{deltas[backend]:.1e}" if deltas[backend] else "0.0" for backend in backends]
    return [checks[0].name, allowed, *figures, "pass" if all(check.passed for check in checks) else "FAIL"]
