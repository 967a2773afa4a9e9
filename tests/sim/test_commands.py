"""What stands around a run: pictures, the cost model, faults on a schedule, the command line."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

import sim.plot
from llmasos.errors import UsageError
from llmasos.peer.runner import Speed
from llmasos.span import Span
from sim.__main__ import build_parser
from sim.calibrate import Calibration, Point, calibrate, fit
from sim.compare import Comparison
from sim.compare import draw as draw_comparison
from sim.local import LocalFault, LocalWork
from sim.plot import check, draw
from sim.report import Latency
from sim.scenario import load, resize
from sim.simulation import simulate

ROOT = Path(__file__).parents[2]


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "sim", *arguments], cwd=ROOT, capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_a_run_and_a_comparison_become_pictures(suffix: str, tmp_path: Path) -> None:
    report = simulate(resize(load("steady"), peers=6, clients=2, duration_s=5), 1)
    draw(report, tmp_path / f"run.{suffix}")
    draw_comparison(Comparison((report, report), (1,)), tmp_path / f"bars.{suffix}")
    for name in ("run", "bars"):
        assert (tmp_path / f"{name}.{suffix}").stat().st_size > 3_000


def test_a_plot_that_cannot_be_is_refused_before_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="cannot plot"):
        check(tmp_path / "plot.gif")
    with pytest.raises(UsageError, match="no folder"):
        check(tmp_path / "nowhere" / "plot.png")
    monkeypatch.setattr(sim.plot, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match="needs matplotlib") as caught:
        check(tmp_path / "plot.png")
    assert "pip install" in caught.value.hint


def test_the_cost_model_is_the_line_through_the_points() -> None:
    truth = Speed(first_row_s=0.0013, row_s=0.00007)
    sizes = ((1, 1), (4, 1), (16, 1), (1, 32), (1, 128))
    points = tuple(Point(a, b, truth.first_row_s + (a * b - 1) * truth.row_s) for a, b in sizes)
    found = Calibration("model", Span(0, 3), points, fit(points))
    assert found.speed.first_row_s == pytest.approx(truth.first_row_s)
    assert found.speed.row_s == pytest.approx(truth.row_s)
    assert found.worst_error < 1e-9
    assert found.as_toml() == "[peers]\nblock_ms = 1.3000\nrow_ms = 0.0700\n"


async def test_a_calibration_is_of_the_real_runner_and_makes_a_scenario(tmp_path: Path) -> None:
    found = await calibrate("smollm2", Span(3, 5))
    assert {(point.sessions, point.rows) for point in found.points} >= {(1, 1), (16, 1), (1, 128)}
    assert found.predict(Point(1, 128, 0.0)) > found.predict(Point(1, 1, 0.0)) > 0
    path = tmp_path / "measured.toml"
    path.write_text(f'title = "measured"\nduration_s = 2\n{found.as_toml()}')
    assert load(str(path)).peers.block_ms == pytest.approx(1e3 * found.speed.first_row_s, abs=1e-4)


def test_noise_never_makes_a_cost_negative() -> None:
    speed = fit([Point(1, 1, 0.002), Point(1, 16, 0.0019), Point(1, 64, 0.0018)])
    assert speed.first_row_s > 0
    assert speed.row_s > 0


def test_faults_of_local_processes() -> None:
    assert LocalFault.parse("kill", "peer2@5s") == LocalFault("kill", "peer2", 5.0)
    assert LocalFault.parse("restart", "peer1@0.5") == LocalFault("restart", "peer1", 0.5)
    for text in ("peer2", "@5s", "peer2@soon", "peer2@-1s"):
        with pytest.raises(UsageError, match="which peer and when"):
            LocalFault.parse("stop", text)
    work = LocalWork(("a prompt",), faults=(LocalFault("kill", "peer4", 1.0),))
    work.check(["peer3", "peer4"])
    with pytest.raises(UsageError, match="there is no peer4 to kill"):
        work.check(["peer1", "peer2"])


def test_list_shows_every_scenario() -> None:
    done = command("list")
    assert done.returncode == 0
    assert done.stdout.splitlines()[0].startswith("churn ")
    assert "copy one" in done.stderr


def test_run_puts_data_on_stdout_and_talk_on_stderr() -> None:
    done = command("run", "steady", "--peers", "6", "--clients", "2", "--duration", "3", "--seed", "5")
    assert done.returncode == 0
    assert done.stdout.count("\n") == 1
    assert done.stdout.startswith("steady seed=5 trace=")
    assert "first token" in done.stderr


def test_a_violation_ends_with_the_replay_command(tmp_path: Path) -> None:
    path = tmp_path / "impatient.toml"
    path.write_text('title = "impatient"\nduration_s = 2\n[peers]\nblock_ms = 90\n[promises]\nstall_s = 0.5\n')
    done = command("run", str(path), "--seed", "4", "--json")
    assert done.returncode == 1
    assert len(json.loads(done.stdout)["violations"]) == 1
    assert f"replay: python -m sim run {path} --peers 24 --clients 8 --duration 2 --seed 4" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["run", "nonsense"], "there is no scenario"),
        (["run", "steady", "--plot", "x.gif"], "cannot plot"),
        (["run", "steady", "--peers", "1"], "do not cover"),
        (["run", str(ROOT)], "cannot be read: Is a directory"),
        (["local", "--prompts", "/nonexistent"], "from /nonexistent: No such file or directory"),
        (["hunt", "nonsense"], "there is no scenario"),
        (["compare", "nonsense"], "there is no scenario"),
        (["local", "--latency", "5"], "'5' is no latency"),
        (["local", "--link", "peer1=5ms"], "which two are linked"),
        (["local", "--spans", "0:10,20:30"], "nobody has 10:20"),
        (["local", "--peers", "1", "--speedup"], "one peer is what a speedup is measured against"),
        (["local", "--peers", "2", "--spans", "0:30"], "not allowed with"),
    ],
)
def test_wrong_usage(arguments: list[str], words: str) -> None:
    done = command(*arguments)
    assert done.returncode == 2
    assert words in done.stderr
    assert "Traceback" not in done.stderr
    assert "Errno" not in done.stderr


@pytest.mark.parametrize("name", ["run", "compare", "hunt"])
@pytest.mark.parametrize("duration", ["0", "nan", "inf", "-5"])
def test_a_run_takes_its_time(name: str, duration: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        build_parser().parse_args([name, "churn", "--duration", duration])
    assert "argument --duration" in capsys.readouterr().err


def test_a_comparison_names_those_who_are_left_out() -> None:
    ours = simulate(resize(load("steady"), peers=6, clients=2, duration_s=5), 1)
    lazy = replace(ours, policy="lazy", done=1, first_token=Latency(count=1, p95_s=0.001))
    slow = replace(ours, policy="slow", first_token=Latency(count=1, p95_s=99.0))
    together = Comparison((ours, lazy, slow), (1,))
    assert {standing.who for standing in together.standings()} == {"ours"}
    assert together.rule().endswith("that leaves out lazy (1)")
    assert together.rule().startswith(
        f"best: of the policies that answered at least 90% of what the busiest did ({ours.done}"
    )
    assert Comparison((ours, slow), (1,)).rule().endswith(": of all")


def test_what_was_replayed_without_a_failover_is_not_charged_to_one() -> None:
    """Peers that leave in good order hand their sessions over, and those are replayed as well."""
    report = replace(simulate(resize(load("steady"), peers=6, clients=1, duration_s=3), 1), replayed_tokens=253)
    cells = dict(zip(*(column.cells for column in report.table().columns), strict=True))
    assert cells["failovers"] == "0; they and hand-overs replayed 253 tokens"
    assert cells["swarm"].startswith("6 peers, 24 blocks, 1 client, ")
