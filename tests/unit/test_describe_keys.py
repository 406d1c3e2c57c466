"""ds_configs/README.md names every run file and describes every key as the schema has it."""

from __future__ import annotations

import pytest

from launch.run_config import REPO_ROOT
from launch.suite import GateConfig, LegConfig, SuiteConfig
from tools.describe_keys import END, README, RUN_KEYS, SUITE_KEYS, describe_keys, with_keys


def test_the_reference_is_what_the_schema_says() -> None:
    readme = README.read_text(encoding="utf-8")
    assert with_keys(readme) == readme, "run: python -m tools.describe_keys"


def test_the_reference_tells_type_limits_default_and_meaning() -> None:
    lines = "\n".join(describe_keys().values()).splitlines()
    assert "### `run.model.moe`" in lines
    assert "| `top_k` | int ≥ 1 | `2` | experts that a token goes to |" in lines
    assert any(line.startswith("| `decay_frac` | float > 0, ≤ 1 | `0.2` |") for line in lines)
    assert any(line.startswith("| `ep_size` | int or 'auto' or 'max' | `\"auto\"` |") for line in lines)
    assert any(line.startswith("| `mode` | 'static' or 'dynamic' or 'none' |") for line in lines)
    assert any(line.startswith("| `hidden_size` | int ≥ 1 | required |") for line in lines)


def test_the_reference_has_every_key_of_a_suite_file() -> None:
    of_run, of_suite = describe_keys()[RUN_KEYS], describe_keys()[SUITE_KEYS]
    for section in (SuiteConfig, LegConfig, GateConfig):
        assert all(f"| `{name}` |" in of_suite for name in section.model_fields)
    assert "| `repeats` | int ≥ 1 | `2` |" in of_suite
    assert "| `legs` | object | required |" in of_suite
    assert "| `slots` | int or 'auto' | `\"auto\"` |" in of_suite
    assert "suite" not in of_run


@pytest.mark.parametrize("mark", [RUN_KEYS, SUITE_KEYS, END])
def test_a_readme_without_a_place_for_a_table_is_refused(mark: str) -> None:
    with pytest.raises(SystemExit, match="Put both where the tables belong"):
        with_keys(README.read_text(encoding="utf-8").replace(mark, ""))


def test_every_run_file_and_every_suite_answers_a_question() -> None:
    table = README.read_text(encoding="utf-8")
    folder = REPO_ROOT / "ds_configs"
    for path in folder.rglob("*.json"):
        assert f"| `{path.relative_to(folder)}` |" in table, path.name
