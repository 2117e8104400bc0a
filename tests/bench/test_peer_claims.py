"""The table `peer_speed`: its claims, its report and its stages."""

from pathlib import Path

import pytest

from benchmarks import peer_speed
from benchmarks.peers import claims, harness, page
from benchmarks.peers.work import WORKS

ROOT = Path(__file__).parents[2]

TIMES = {"ours": 1.0, "base": 1.0, "inner": 100.0, "plain": 1.0}


def make_rows() -> list[dict]:
    """Returns rows in which every claim is met and every aim is reached."""
    rows = []
    for work in WORKS:
        for name in claims.ORDER:
            time = TIMES.get(name, 1000.0)
            rows.append(
                {
                    "work": work,
                    "method": name,
                    "seconds": [1e-7 * time * k for k in (0.5, 1, 1, 1, 9)],
                    "discarded": 1,
                    "first": 1.0,
                    "peak": 1e6 * time,
                    "scratch": 1e6,
                    "notes": {
                        "longer": 1e6,
                        "finite": 1.0,
                        "trusted": 0.0,
                        "ritz_min": -1.0,
                        "adjoint_residual": 0.1,
                    },
                    "error": 1e-6,
                    "reason": None,
                    "library_versions": {"jax": "1.2"},
                    "versions": {"hypergrad": "0.9"},
                    "cpu": "a processor",
                    "cores": 2,
                    "memory": 2**34,
                }
            )
    return rows


def of(rows: list[dict], work: str, name: str) -> dict:
    return next(r for r in rows if (r["work"], r["method"]) == (work, name))


def test_rows_that_meet_every_claim():
    """Every claim is supported and every aim is reached."""
    for finding in claims.findings(make_rows()):
        assert finding.outcome in (None, "supported"), finding
        assert "not reached" not in finding.text


@pytest.mark.parametrize(
    "claim", claims.CLAIMS, ids=lambda c: f"{c.work}: {c.quantity}"
)
def test_rows_that_break_a_claim(claim):
    """A number that is far worse does not fail the check; a missing number does."""
    rows = make_rows()
    told = {"longer": 1e8, "finite": 0.0, "trusted": 1.0, "ritz_min": 1.0}
    told["adjoint_residual"] = 2.0
    worse = of(rows, claim.work, claim.contender)
    worse["seconds"] = [1e5 * s for s in worse["seconds"]]
    worse["peak"] *= 1e5
    if claim.measure is not claims.longer_scratch:
        worse["scratch"] *= 1e5
    worse["notes"] = told
    finding = claim.evaluate(claims.by_work(rows)[claim.work])
    outcome = None if claim.max_value is None else "not supported"
    assert finding.outcome == outcome
    assert claim.aim is None or "not reached" in finding.text
    for spoilt in ({"reason": "wrong: by far"}, {"seconds": [1.0] * 4}):
        of(rows, claim.work, claim.contender).update(spoilt)
        assert claim.evaluate(claims.by_work(rows)[claim.work]).failed
    assert claim.evaluate({}).failed


def test_the_fastest_that_is_right_is_the_peer():
    """One that is wrong is none, however fast; one that was rarely clean may be it."""
    rows = make_rows()
    of(rows, "w4", "higher")["seconds"] = [2e-7] * 5
    of(rows, "w4", "torchopt").update(seconds=[1e-7] * 5, reason="wrong: by far")
    (first, *_) = [v for v in claims.findings(rows) if v.text.startswith("w4")]
    assert ": 0.5 (1e-07 s, higher 2e-07 s), at most 1 claimed; 0.6 reached" in (
        first.text
    )
    of(rows, "w4", "higher")["seconds"] = [2e-7] * 4
    (first, *_) = [v for v in claims.findings(rows) if v.text.startswith("w4")]
    assert first.failed
    assert "higher has 4 clean repetitions of 5" in first.text
    of(rows, "w4", "higher")["seconds"] = []  # nobody knows how fast it is
    (first, *_) = [v for v in claims.findings(rows) if v.text.startswith("w4")]
    assert first.failed
    assert "higher has 0 clean repetitions of 5" in first.text
    for row in rows:
        if row["method"] in claims.TORCH:
            row["reason"] = "wrong"
    (first, *_) = [v for v in claims.findings(rows) if v.text.startswith("w4")]
    assert "nothing to compare to (torch_by_hand: wrong; " in first.text
    assert not first.failed


def test_the_fastest_peer_is_of_any_library():
    """JAX is as good a rival as PyTorch; both are told."""
    rows = make_rows()
    of(rows, "w1-solve", "jaxopt")["seconds"] = [2e-7] * 5
    texts = [
        v.text for v in claims.findings(rows) if v.text.startswith("w1-solve, time")
    ]
    _, torch, every = texts[:3]
    assert "fastest PyTorch peer: 0.001 (1e-07 s, torch_by_hand 0.0001 s)" in torch
    assert "fastest peer: 0.5 (1e-07 s, jaxopt 2e-07 s), at most 0.5 claimed" in every


def test_the_table_and_the_section_have_rows_and_reasons(tmp_path):
    """Ratios stand where there are any; hardware and versions stand once."""
    rows = make_rows()
    of(rows, "w4", "higher")["reason"] = "out of memory"
    text = "\n".join(peer_speed.body(rows))
    assert "| higher | out of memory |  | 5 of 6 |" in text
    assert "| ours | 5e-08 / **1e-07** / 9e-07 | 0.01 | 5 of 6 |" in text
    assert "a processor, 2 cores, 16 GiB, float32" in text
    section = page.section(rows)
    assert section.count("\n| ") == len(claims.CLAIMS)
    assert "| w4 | peak, MB | **1** | 1.3e+03 | met |  |  |" in section
    assert section.count(" jax 1.2") == section.count("hypergrad-jax 0.9") == 1
    text = "before\n<!-- results: peers -->\nstale\n<!-- end of results -->\nafter\n"
    written = page.rewrite(text, rows)
    assert written == text.replace("stale\n", section)
    assert "stale" not in page.rewrite(text, [])
    of(rows, "w1-solve", "moskomule")["library_versions"] = {"hypergrad": "0.0.1"}
    assert "moskomule 0.0.1" in page.section(rows)
    peer_speed.plot(rows, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 1000


def test_the_page_of_other_libraries_says_what_the_rows_do():
    """Else run python -m benchmarks.peers.page docs/other_libraries.md."""
    text = (ROOT / "docs/other_libraries.md").read_text()
    assert "<!-- results: peers -->" in text
    assert page.rewrite(text, page.committed_rows()) == text


def test_a_work_is_measured_as_a_whole(monkeypatch):
    """One cell of the first stage measures all contenders; the others select one."""
    works = []

    def measure(work, contenders):
        works.append((work, list(contenders)))
        rows = [row for row in make_rows() if row["work"] == work]
        return [row for row in rows if row["method"] in contenders]

    monkeypatch.setattr(harness, "measure", measure)
    stage, cells = peer_speed.table.stages("small", 1)
    assert [cell["work"] for cell in stage] == list(WORKS)
    row = stage[0] | peer_speed.table.measure(stage[0], "small", [])
    assert works == [("w1-unrolled", claims.contenders_of("w1-unrolled"))]
    actual = peer_speed.table.measure(cells[0], "small", [row])
    assert actual == of(make_rows(), cells[0]["work"], cells[0]["method"])
    with pytest.raises(ValueError, match="run without --only"):
        peer_speed.table.measure(cells[-1], "small", [row])
