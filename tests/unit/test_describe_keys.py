"""ds_configs/README.md names every run file and describes every key as the schema has it."""

from __future__ import annotations

from launch.run_config import REPO_ROOT
from tools.describe_keys import README, describe_keys, with_keys


def test_the_reference_is_what_the_schema_says() -> None:
    readme = README.read_text(encoding="utf-8")
    assert with_keys(readme) == readme, "run: python -m tools.describe_keys"


def test_the_reference_tells_type_limits_default_and_meaning() -> None:
    lines = describe_keys().splitlines()
    assert "### `run.model.moe`" in lines
    assert "| `top_k` | int ≥ 1 | `2` | experts that a token goes to |" in lines
    assert any(line.startswith("| `decay_frac` | float > 0, ≤ 1 | `0.2` |") for line in lines)
    assert any(line.startswith("| `ep_size` | int or 'auto' or 'max' | `\"auto\"` |") for line in lines)
    assert any(line.startswith("| `mode` | 'static' or 'dynamic' or 'none' |") for line in lines)
    assert any(line.startswith("| `hidden_size` | int ≥ 1 | required |") for line in lines)


def test_every_run_file_answers_a_question() -> None:
    table = README.read_text(encoding="utf-8")
    folder = REPO_ROOT / "ds_configs"
    for path in [*folder.glob("*.json"), *folder.glob("routing/*.json")]:
        assert f"| `{path.relative_to(folder)}` |" in table, path.name
