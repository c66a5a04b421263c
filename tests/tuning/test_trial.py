"""One trial: what it holds while it trains, and what its failure is taken for."""

from __future__ import annotations

import json
import math
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import ray
import torch

from lum_ray import config, steps
from lum_ray.artifacts import MachineError
from lum_ray.config import Run
from lum_ray.steps.gts_train import align_uri
from lum_ray.training.fit import fit
from lum_ray.training.loop import StoppedError
from tests import s3
from tuning import trial
from tuning.ledger import Ledger, Record, key_of
from tuning.shapes import Shapes


@pytest.mark.ray
def test_only_what_its_settings_make_wrong_fails_a_trial(
    tmp_path: Path, tiny_gts: Run, s3_server: s3.Server, ray_session: None
) -> None:
    shapes, ledger = Shapes.remote(), Ledger(str(tmp_path))

    def arguments(run: Run) -> tuple[Any, ...]:
        plain = json.dumps(config.dump(run))
        job = trial.Job(plain, ledger.uri, "eval/ndcg_10", math.inf, str(tmp_path))
        ledger.start(key_of(run), 0, {})
        return {"key": key_of(run), "run": plain, "steps": 8}, job, shapes

    def end(run: Run) -> Record:
        trial.run_trial(*arguments(run))
        return ledger.read(key_of(run))

    missing = tmp_path / "missing"
    own = replace(tiny_gts.data, source=None, events=replace(tiny_gts.data.events, path=str(missing)))
    failed = end(replace(tiny_gts, data=own))
    told = f"{missing}: expected a file or a folder, found nothing; check the path in the run file"
    assert (failed.state, failed.message) == ("failed", told), "expected the cause's own words"
    no_bucket = replace(tiny_gts, root="s3://no-such-bucket/runs", name="elsewhere")
    with pytest.raises(MachineError) as caught:
        ray.get(ray.remote(trial.run_trial).remote(*arguments(no_bucket)))  # as Tune hands it to the driver
    assert str(trial.plain(caught.value)).startswith("s3://no-such-bucket: expected a bucket")
    assert ledger.read(key_of(no_bucket)).state == "unfinished"
    if not torch.cuda.is_available():
        with pytest.raises(MachineError, match="torch sees none"):
            fit(lambda worker: {}, gpus=True)
    ray.kill(shapes)


@pytest.mark.ray
def test_phase_1_is_lent_to_one_trial_for_as_long_as_it_trains(
    tmp_path: Path, tiny_gts: Run, ray_session: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    section = replace(tiny_gts.section, align_steps=5)  # none has trained it
    run = replace(tiny_gts, section=section, train=replace(tiny_gts.train, workers=2))
    prepared = steps.prepare(run)
    shapes = Shapes.remote(lease_s=0.5)
    shared = align_uri(run, prepared)

    def long_training(*_: Any, watch: Any) -> None:
        assert not watch.stop()
        time.sleep(1.5)
        assert not ray.get(shapes.lease.remote(shared, "another")), "the lease ran out"
        raise StoppedError("enough")

    monkeypatch.setattr(trial, "RENEW_S", 0.1)
    monkeypatch.setattr(trial, "TuneReportCallback", object)  # it wants a session of Tune
    monkeypatch.setattr(steps, "train", long_training)
    job = trial.Job(json.dumps(config.dump(run)), str(tmp_path), "eval/ndcg_10", math.inf, str(tmp_path))
    with pytest.raises(StoppedError):
        trial._train(run, run, job, shapes, Ledger(str(tmp_path)), key_of(run))
    time.sleep(0.6)
    assert ray.get(shapes.lease.remote(shared, "another")), "the lease outlives its trial"
    ray.kill(shapes)
