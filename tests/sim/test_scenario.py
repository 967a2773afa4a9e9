"""A scenario file says what it means, or is refused by name."""

from pathlib import Path

import pytest

from sim.scenario import Scenario, ScenarioError, load, parse, resize, scenarios
from sim.simulation import simulate

NAMES = [
    "churn",
    "cold-start",
    "exodus",
    "flash-crowd",
    "growth",
    "liars",
    "region-outage",
    "relays",
    "rolling-restart",
    "scale",
    "soak",
    "steady",
    "storm",
    "stragglers",
]


def test_the_scenarios_that_there_are() -> None:
    found = scenarios()
    assert [scenario.name for scenario in found] == NAMES
    assert all(scenario.title for scenario in found)
    assert len({scenario.title for scenario in found}) == len(NAMES)


def test_a_copy_can_be_changed(tmp_path: Path) -> None:
    text = (
        'title = "mine"\n[peers]\ncount = 7\nblocks = 24\n[churn]\nsession_s = 9\n[[faults]]\nat_s = 3\nkind = "kill"\n'
    )
    path = tmp_path / "mine.toml"
    path.write_text(text)
    scenario = load(str(path))
    assert (scenario.name, scenario.peers.count, scenario.faults[0].kind) == ("mine", 7, "kill")
    assert scenario.churn is not None
    assert scenario.churn.session_s == 9.0


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "title"),
        ('title = "x"\npeeers = 3', "peeers"),
        ('title = "x"\n[peers]\nspeed = 3', r"speed.*\$\.peers"),
        ('title = "x"\n[peers]\ncount = -3', r"\$\.peers\.count"),
        ('title = "x"\n[peers]\ncount = "many"', r"\$\.peers\.count"),
        ('title = "x"\n[[faults]]\nat_s = 3\nkind = "explode"', "explode"),
        ('title = "x"\n[churn]\nsession_s = 0', "session_s"),
        ('title = "x"\n[peers]\ncount = 2\nblocks = 3', "do not cover 24 blocks"),
        ('title = "x"\n[peers]\nregions = ["atlantis"]', "atlantis"),
        ('title = "x"\n[clients]\nprompt_tokens = [9, 3]', "empty"),
        ('title = "x"\n[clients]\nprompt_tokens = [9, 9000]', "does not fit"),
        ("title = ", "TOML|Invalid"),
    ],
)
def test_what_cannot_be_is_refused(text: str, words: str) -> None:
    with pytest.raises(ScenarioError, match=words) as caught:
        parse(text, "x", "x.toml")
    assert "x.toml" in str(caught.value)


def test_an_unknown_name_lists_the_known() -> None:
    with pytest.raises(ScenarioError, match="there is no scenario 'nonsense'") as caught:
        load("nonsense")
    assert "churn, cold-start" in caught.value.hint


@pytest.mark.parametrize("name", NAMES)
def test_a_replay_that_names_all_sizes_is_the_scenario_itself(name: str) -> None:
    """One that begins with nobody began with one peer."""
    scenario = load(name)
    sizes = {"peers": scenario.peers.count, "clients": scenario.clients.count, "duration_s": scenario.duration_s}
    assert resize(scenario, **sizes) == scenario


def test_the_example_of_the_documentation_runs_as_it_stands() -> None:
    text = (Path(__file__).parents[2] / "docs" / "simulator.md").read_text(encoding="utf-8")
    example = text.split("```toml\n")[1].split("```")[0]
    report = simulate(resize(parse(example, "example", "docs/simulator.md"), clients=2, duration_s=20), 0)
    assert report.done > 0
    assert not report.violations


def test_a_scenario_can_be_resized() -> None:
    grown = resize(load("growth"), peers=1_000, clients=3, duration_s=5.5)
    assert (grown.peers.count, grown.peers.at_start, grown.clients.count, grown.duration_s) == (1_000, 100, 3, 5.5)
    with pytest.raises(ScenarioError, match="do not cover"):
        resize(load("steady"), peers=2)


def test_it_cannot_be_changed_by_accident() -> None:
    scenario: Scenario = load("steady")
    with pytest.raises(AttributeError):
        scenario.duration_s = 1.0  # type: ignore[misc]
