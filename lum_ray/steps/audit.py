"""audit: the leak battery on a trained run. What must not change a score is changed, and the scores are compared.

Source: FIELD.md, section 3 (leak battery). `steps/lumos_audit.py` and `steps/gts_audit.py` measure, `evaluation/audit`
judges; here is what both share: the sample of test users, and the artifact.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lum_ray import weights
from lum_ray.artifacts import commit, digest, find, join, open_artifact, read_json, write_json
from lum_ray.config import Run
from lum_ray.data.reader import Timelines
from lum_ray.evaluation.audit import Check, from_plain, leaky, to_plain
from lum_ray.steps.audit_rows import cases_of
from lum_ray.steps.gts_audit import gts_checks
from lum_ray.steps.gts_evaluate import trained_stage as trained_gts
from lum_ray.steps.gts_prepare import prepare_gts
from lum_ray.steps.gts_train import train_gts
from lum_ray.steps.lumos_audit import lumos_checks
from lum_ray.steps.predict import trained_stage as trained_lumos
from lum_ray.steps.prepare import Log, cut_plan, prepare, silent
from lum_ray.steps.train import train

AUDIT_VERSION = 1
MAX_USERS = 200


@dataclass(frozen=True)
class Audited:
    """The artifact with `audit.json`, and its table of checks."""

    uri: str
    checks: tuple[Check, ...]

    @property
    def leaky(self) -> list[str]:
        """Names of the checks that failed."""
        return leaky(self.checks)


def audit(run: Run, log: Log = silent, max_users: int = MAX_USERS) -> Audited:
    """Run the leak battery on the run's model, on a stable sample of `max_users` test users.

    Prepares and trains what is missing. Raises UserError where fewer than two test users have a cut.
    """
    prepared: Any
    if run.model == "gts":
        prepared = prepare_gts(run, log)
        checkpoint, data = train_gts(run, log), prepared.sequences
    else:
        prepared = prepare(run, log)
        checkpoint, data = train(run, log), prepared.timelines
    end_day = int(data.manifest["end_day"])
    plan = cut_plan(run, "test", end_day)
    read = [data.manifest["digest"], checkpoint.rsplit("/", 1)[-1], weights.fingerprint(checkpoint), run.data.source]
    name = digest("audit", AUDIT_VERSION, read, plan, max_users)
    uri = join(run.root, "reports", f"{run.name}-audit-{name}")
    if find(uri) is not None:
        log("already audited")
        return Audited(uri, tuple(from_plain(read_json(join(uri, "audit.json"))["checks"])))
    cases = cases_of(Timelines.open(data.uri), plan, max_users, run.train.seed)
    if run.model == "gts":
        checks = gts_checks(run, prepared, trained_gts(run, prepared, checkpoint), cases, log)
    else:
        checks = lumos_checks(run, prepared, trained_lumos(run, prepared, checkpoint, end_day), cases, log)
    content = {
        "run": run.name, "model": run.model, "checkpoint": checkpoint.rsplit("/", 1)[-1],
        "step": open_artifact(checkpoint).manifest["step"], "users": int(cases.user.max()) + 1, "cuts": len(cases),
        "leaky": leaky(checks), "checks": to_plain(checks),
    }  # fmt: skip
    write_json(join(uri, "audit.json"), content)
    commit(uri, {"kind": "audit", "digest": name, "checkpoint": content["checkpoint"], "leaky": content["leaky"]})
    return Audited(uri, tuple(checks))
