"""env.json: what is recorded, what is never recorded, and what is absent rather than wrong."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from launch.environment import (
    describe_checkout,
    describe_environment,
    package_versions,
    telling_variables,
    variables_of_interpreter,
)
from launch.run_config import REPO_ROOT, load_run


def git(folder: Path, *arguments: str) -> None:
    identity = {
        "GIT_AUTHOR_NAME": "a",
        "GIT_AUTHOR_EMAIL": "a@b.c",
        "GIT_COMMITTER_NAME": "a",
        "GIT_COMMITTER_EMAIL": "a@b.c",
    }
    subprocess.run(
        ["git", "-C", str(folder), *arguments], check=True, capture_output=True, env={**os.environ, **identity}
    )


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    git(tmp_path, "init", "--quiet")
    (tmp_path / "tracked").write_text("one")
    (tmp_path / ".gitignore").write_text("ignored\n")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "--quiet", "-m", "first")
    return tmp_path


def test_the_environment_is_json_and_holds_what_it_was_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NCCL_DEBUG", "INFO")
    run = load_run(REPO_ROOT / "ds_configs" / "moe_tiny.json")
    env = describe_environment(run, ["train.py", "--set", "a b"], ["NVIDIA H200"], world_size=8)
    assert json.loads(json.dumps(env)) == env
    assert env["config_hash"] == run.config_hash
    assert env["launch_line"] == "train.py --set 'a b'"
    assert (env["devices"], env["world_size"]) == (["NVIDIA H200"], 8)
    assert env["variables"]["NCCL_DEBUG"] == "INFO"
    assert {"started", "python", "platform", "cpu", "cpu_count", "hostname", "packages"} <= env.keys()
    assert env["cpu_count_usable"] == len(os.sched_getaffinity(0))
    assert env["memory_total_mib"] > 0


def test_package_versions_are_read_without_importing_and_absent_where_not_installed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("launch.environment.PACKAGES", ("pytest", "no-such-package"))
    assert package_versions() == {"pytest": pytest.__version__}


def test_variables_are_chosen_by_name() -> None:
    variables = {
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8", "CUDA_VISIBLE_DEVICES": "0", "DS_ACCELERATOR": "cpu",
        "HF_HUB_OFFLINE": "1", "NCCL_DEBUG": "INFO", "NVIDIA_TF32_OVERRIDE": "0", "OMP_NUM_THREADS": "1",
        "PYTORCH_CUDA_ALLOC_CONF": "x", "SLURM_JOB_ID": "7", "TOKENIZERS_PARALLELISM": "false",
        "TORCH_NCCL_BLOCKING_WAIT": "1", "TRITON_CACHE_DIR": "/tmp", "WORLD_SIZE": "2",
    }  # fmt: skip
    assert telling_variables({**variables, "HOME": "/root", "LS_COLORS": "x"}) == variables


@pytest.mark.parametrize(
    "name",
    [
        "WANDB_API_KEY", "DS_TOKEN", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "SLURM_JWT", "NCCL_SECRET",
        "MASTER_PASSWORD", "TORCH_AUTH", "PYTHON_COOKIE", "TOKENIZERS_TOKEN",
    ],
)  # fmt: skip
def test_a_variable_whose_name_smells_of_a_secret_is_never_recorded(name: str) -> None:
    assert telling_variables({name: "hunter2"}) == {}


def test_a_login_inside_a_url_is_not_recorded() -> None:
    variables = {
        "WANDB_BASE_URL": "https://me:hunter2@wandb.example.org/x",
        "HF_ENDPOINT": "https://hub.example.org/@x",
    }
    assert telling_variables(variables) == {
        "HF_ENDPOINT": "https://hub.example.org/@x",
        "WANDB_BASE_URL": "https://wandb.example.org/x",
    }


def test_no_secret_of_this_process_reaches_env_json(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WANDB_API_KEY", "HF_TOKEN", "SLURM_JWT"):
        monkeypatch.setenv(name, "hunter2")
    run = load_run(REPO_ROOT / "ds_configs" / "moe_tiny.json")
    assert "hunter2" not in json.dumps(describe_environment(run, ["train.py"], ["cpu"]))


def test_a_clean_checkout_has_a_commit_and_no_dirty_hash(checkout: Path) -> None:
    (checkout / "ignored").write_text("does not matter")
    found = describe_checkout(checkout)
    assert len(found.pop("commit")) == 40
    assert found == {"dirty": False}


@pytest.mark.parametrize("name", ["tracked", "untracked"])
def test_a_changed_or_new_file_makes_the_checkout_dirty_and_its_content_is_in_the_hash(
    checkout: Path, name: str
) -> None:
    hashes = []
    for content in ("two", "three", "two"):
        (checkout / name).write_text(content)
        found = describe_checkout(checkout)
        assert found["dirty"] is True
        hashes.append(found["dirty_hash"])
    assert hashes[0] == hashes[2] != hashes[1]


def test_a_folder_that_is_no_checkout_of_its_own_has_no_commit(checkout: Path) -> None:
    (checkout / "inside").mkdir()
    assert describe_checkout(checkout / "inside") == {}


def test_a_machine_without_git_has_no_commit(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert describe_checkout(checkout) == {}


def test_ninja_and_the_ops_that_set_up_built_are_found_without_activating(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", str(tmp_path / "bin" / "python"))
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    assert variables_of_interpreter({"PATH": "/usr/bin"}) == {"PATH": f"{tmp_path}/bin:/usr/bin"}, "no ops were built"
    (tmp_path / "torch_extensions").mkdir()
    found = variables_of_interpreter({"PATH": f"/usr/bin:{tmp_path}/bin"})
    assert found == {"PATH": f"/usr/bin:{tmp_path}/bin", "TORCH_EXTENSIONS_DIR": f"{tmp_path}/torch_extensions"}
    assert "TORCH_EXTENSIONS_DIR" not in variables_of_interpreter({"PATH": "", "TORCH_EXTENSIONS_DIR": "/mine"})
