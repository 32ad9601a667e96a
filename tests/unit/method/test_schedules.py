import numpy as np
import pytest

from pipeline.errors import ConfigError
from pipeline.method.curriculum import competence
from pipeline.method.schedules import Schedules
from tests.helpers import tiny
from tests.helpers.paths import RECIPES
from tools.docs.plot_schedules import main

DEMO = str(RECIPES / "demo.yaml")
BUDGET = 9600
"""Samples of every job here."""
PERCENTILES = np.linspace(0, 1, 7, dtype=np.float32)
LABELLED = np.zeros(7, bool)


def schedules(batch, *, distill=None, curriculum=None):
    settings = {"global_size": batch, "micro_size": 1, "distill": distill, "curriculum": curriculum}
    return Schedules(tiny.job(steps=BUDGET // batch, **settings))


@pytest.mark.parametrize("release", ["cosine", "linear", "step", "constant"])
@pytest.mark.parametrize("batch", [16, 32, 48])
def test_another_batch_size_keeps_the_curves_over_samples(release, batch):
    """Bit for bit where both have a step after the same number of samples."""
    one, other = (schedules(b, distill={"release": release}, curriculum={}) for b in (8, batch))
    for step in range(BUDGET // batch):
        earlier = step * batch // 8
        assert one.samples(earlier) == other.samples(step)
        assert one.tau(earlier) == other.tau(step)
        assert one.competence(earlier) == other.competence(step)
        assert one.token_beta(earlier) == other.token_beta(step)
        alphas = (of.alpha(at, PERCENTILES, LABELLED) for of, at in ((one, earlier), (other, step)))
        assert np.array_equal(*alphas)


def test_the_gap_is_measured_after_the_same_samples_from_t0_to_t1():
    distill = {"release": "adaptive", "release_from": 0.25, "release_to": 0.75, "adaptive": {"every": 0.05}}
    samples = [[s.samples(i) for i in s.gap_steps()] for s in (schedules(b, distill=distill) for b in (8, 16, 48))]
    assert samples[0] == samples[1] == samples[2] == [BUDGET * k // 20 for k in range(5, 15)]
    assert len(schedules(8, distill={}).gap_steps()) == len(schedules(8).gap_steps()) == 0


def test_schedules_read_the_jobs_own_settings():
    job = schedules(
        8, distill={"token_tilt": (-0.5, 0.25)}, curriculum={"competence_start": 0.4, "competence_until": 0.8}
    )
    assert job.competence(300) == pytest.approx(competence(0.25, 0.4, 0.8))
    assert [job.token_beta(0), job.token_beta(1199)] == pytest.approx([-0.5, 0.25])
    assert job.feature_beta(0) == 0
    features = {"student_layer": 2, "tilt": (0.5, 2.0)}
    job = schedules(8, distill={"token_tilt": (0, 0), "features": features}, curriculum={"competence_start": 0.4})
    assert [job.feature_beta(0), job.feature_beta(1199), job.token_beta(600)] == pytest.approx([0.5, 2.0, 0.0])
    without = schedules(8)
    assert without.token_beta(0) == 0 and without.alpha(0, PERCENTILES, LABELLED).tolist() == [0.0] * 7


def test_the_teachers_share_of_the_pool_stays_for_features_too():
    """There is nothing better to release a sample to whose label is the teacher's own."""
    features = {"student_layer": 2, "release_to": 0.6}
    job = schedules(8, distill={"alpha_start": 0.8, "alpha_end": 0.1, "features": features})
    pool = np.array([True, False] * 3 + [True])
    for alpha in (job.alpha, job.feature_alpha):
        last = alpha(1199, PERCENTILES, pool)
        assert last[pool].tolist() == pytest.approx([0.8] * 4) and last[~pool].tolist() == pytest.approx([0.1] * 3)
        first = alpha(0, PERCENTILES, pool)
        assert first.tolist() == pytest.approx([0.8] * 7)


def test_the_tool_prints_and_draws_the_demos_schedules(tmp_path, capsys):
    picture = tmp_path / "schedules.png"
    main([DEMO, "--picture", str(picture)])
    printed = capsys.readouterr().out
    assert "clkd: 600 steps of 16 samples, release: cosine" in printed and "sft:" not in printed
    rows = [line.split() for line in printed.split("clkd:")[1].splitlines()[2:13]]
    assert rows[0] == ["0", "0.700", "0.700", "0.700", "1.000"]
    assert rows[-1] == ["9,584", "0.000", "0.000", "0.000", "1.000"]
    assert picture.read_bytes()[:4] == b"\x89PNG" and picture.stat().st_size > 10_000


def test_the_tool_refuses_a_job_without_schedules():
    with pytest.raises(ConfigError, match=r"among \['sft'\]: nothing to show"):
        main([DEMO, "job=sft"])
