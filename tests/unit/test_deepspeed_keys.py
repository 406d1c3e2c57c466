"""The table of DeepSpeed's keys is that of the installed DeepSpeed, and misspelt keys are refused by it."""

from __future__ import annotations

import ast
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import deepspeed
import deepspeed.runtime.config as ds_config
import pytest
from deepspeed.comm.config import CommsLoggerConfig
from deepspeed.module_inject import auto_ep_config
from deepspeed.monitor.config import DeepSpeedMonitorConfig
from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from deepspeed.utils.config import DeepSpeedThroughputTimerConfig
from pydantic import BaseModel

from launch.deepspeed_keys import (
    ANY_SECTION,
    KNOWN_KEYS,
    REMOVED_KEYS,
    RENAMED_KEYS,
    UNSUPPORTED_KEYS,
    Keys,
    check_deepspeed_keys,
)
from model.config import ConfigError

VALID: dict[str, Any] = {"train_batch_size": 8, "zero_optimization": {"stage": 1}, "optimizer": {"type": "AdamW"}}


# --- the table against the installed DeepSpeed -----------------------------------------------------------------------


def known_section(path: str) -> Keys:
    section: Keys | None = KNOWN_KEYS
    for name in path.split("."):
        assert section is not None
        section = section[name]
    assert section is not None
    return section


def members(annotation: Any) -> Iterator[Any]:
    """An annotation and all types inside it: Optional[Dict[str, X]] gives itself, Dict[str, X], str, X, None."""
    yield annotation
    for inner in typing.get_args(annotation):
        yield from members(inner)


def keys_of(model: type[BaseModel]) -> Keys:
    """Fields of a pydantic model and their aliases, in the shape of KNOWN_KEYS."""
    keys: Keys = {}
    for name, field in model.model_fields.items():
        kinds = [kind for kind in members(field.annotation) if isinstance(kind, type)]
        inner = next((keys_of(kind) for kind in kinds if issubclass(kind, BaseModel)), None)
        keys[name] = inner
        keys[field.alias or name] = inner
    return keys


@pytest.mark.parametrize(
    ("path", "model"),
    [
        ("zero_optimization", DeepSpeedZeroConfig),
        ("bf16", DeepSpeedBF16Config),
        ("bfloat16", DeepSpeedBF16Config),
        ("fp16", DeepSpeedFP16Config),
        ("comms_logger", CommsLoggerConfig),
        ("timers.throughput", DeepSpeedThroughputTimerConfig),
        ("compile", ds_config.CompileConfig),
        *((name, field.annotation) for name, field in DeepSpeedMonitorConfig.model_fields.items()),
    ],
)
def test_a_section_that_deepspeed_models_has_exactly_the_keys_of_the_model(path: str, model: type[BaseModel]) -> None:
    assert known_section(path) == keys_of(model)


class AskedKeys:
    """What dict.keys() returns, as far as DeepSpeed uses it."""

    def __init__(self, asked: AskedDict) -> None:
        self.asked = asked

    def __contains__(self, key: object) -> bool:
        return key in self.asked

    def __iter__(self) -> Iterator[str]:
        return dict.__iter__(self.asked)


class AskedDict(dict[str, Any]):
    """A section that remembers every key that it was asked for, present or not."""

    def __init__(self, content: dict[str, Any]) -> None:
        super().__init__({k: AskedDict(v) if isinstance(v, dict) else v for k, v in content.items()})
        self.asked: set[str] = set()

    def __contains__(self, key: object) -> bool:
        self.asked.add(str(key))
        return super().__contains__(key)

    def __getitem__(self, key: str) -> Any:
        self.asked.add(key)
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        self.asked.add(key)
        return super().get(key, default)

    def keys(self) -> Any:
        return AskedKeys(self)

    def __copy__(self) -> AskedDict:  # DeepSpeedConfig reads from a copy
        return self

    def section(self, path: str) -> AskedDict:
        section = self
        for name in path.split("."):
            section = dict.__getitem__(section, name)
        return section


# Sections that DeepSpeed reads key by key, with what they must hold for it to read on.
READ_KEY_BY_KEY: dict[str, Any] = {
    "activation_checkpointing": {},
    "aio": {},
    "checkpoint": {"writer": {}, "parallel_write": {}},
    "data_types": {},
    "flops_profiler": {},
    "optimizer": {"type": "AdamW", "params": {}},
    "scheduler": {"type": "WarmupLR", "params": {}},
    "timers": {},
    "torch_autocast": {"dtype": "bfloat16", "lower_precision_safe_modules": []},
}


@pytest.fixture(scope="module")
def asked() -> AskedDict:
    """A configuration after DeepSpeed has read it."""
    tree = AskedDict({"train_batch_size": 1, **READ_KEY_BY_KEY})
    ds_config.DeepSpeedConfig(tree)
    return tree


@pytest.mark.parametrize("path", [*READ_KEY_BY_KEY, "checkpoint.writer", "checkpoint.parallel_write"])
def test_a_section_that_deepspeed_reads_key_by_key_has_exactly_the_keys_it_asks_for(
    asked: AskedDict, path: str
) -> None:
    assert set(known_section(path)) == asked.section(path).asked


def test_expert_parallel_has_exactly_the_keys_that_deepspeed_asks_for() -> None:
    section = AskedDict({"enabled": False, "load_balance_coeff": None, "expert_w3": None})
    auto_ep_config.parse_autoep_config(section)
    assert set(known_section("expert_parallel")) == section.asked


def keys_read_by_initialize() -> set[str]:
    """Keys that deepspeed.initialize takes from the file before DeepSpeedConfig: config["a"], "a" in config, get."""
    keys = set()
    for node in ast.walk(ast.parse(Path(deepspeed.__file__).read_text())):
        match node:
            case ast.Subscript(value=ast.Name(id="config"), slice=ast.Constant(value=str(key))):
                keys.add(key)
            case ast.Compare(left=ast.Constant(value=str(key)), ops=[ast.In()], comparators=[ast.Name(id="config")]):
                keys.add(key)
            case ast.Call(
                func=ast.Attribute(value=ast.Name(id="config"), attr="get"), args=[ast.Constant(value=str(key)), *_]
            ):
                keys.add(key)
    return keys


def test_the_top_level_has_exactly_the_keys_that_deepspeed_asks_for(asked: AskedDict) -> None:
    removed = {key for key in REMOVED_KEYS if "." not in key}
    assert set(KNOWN_KEYS) == (asked.asked | keys_read_by_initialize()) - removed


def test_removed_keys_are_those_that_deepspeed_refuses() -> None:
    top = set(ds_config._REMOVED_TOP_LEVEL_CONFIG_KEYS)
    zero = {f"zero_optimization.{name}" for name in ds_config._REMOVED_ZERO_CONFIG_KEYS}
    assert set(REMOVED_KEYS) == top | zero
    assert len(REMOVED_KEYS) == len(set(REMOVED_KEYS))


def test_renamed_keys_are_those_that_deepspeed_calls_deprecated() -> None:
    deprecated = {
        f"zero_optimization.{name}"
        for name, field in DeepSpeedZeroConfig.model_fields.items()
        if isinstance(field.json_schema_extra, dict) and field.json_schema_extra.get("deprecated")
    }
    assert set(RENAMED_KEYS) == deprecated | {"bfloat16"}


@pytest.mark.parametrize("path", [*RENAMED_KEYS.values(), *UNSUPPORTED_KEYS])
def test_a_key_that_an_error_speaks_of_is_one_that_deepspeed_knows(path: str) -> None:
    parent, _, name = path.rpartition(".")
    assert name in (known_section(parent) if parent else KNOWN_KEYS)


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("patch", "error"),
    [
        ({"gradient_cliping": 1.0}, "gradient_cliping is not a known key. Did you mean gradient_clipping?"),
        ({"zero_optimisation": {}}, "zero_optimisation is not a known key. Did you mean zero_optimization?"),
        ({"rnu": {}}, "rnu is not a known key. Did you mean run?"),
        (
            {"num_layers": 12},
            "num_layers is not a known key. DeepSpeed has none of that name; what is moelab's own stands under run.",
        ),
        (
            {"zero_optimization": {"stge": 1}},
            "zero_optimization.stge is not a known key. Did you mean zero_optimization.stage?",
        ),
        (
            {"zero_optimization": {"offload_optimizer": {"devise": "cpu"}}},
            "zero_optimization.offload_optimizer.devise is not a known key. "
            "Did you mean zero_optimization.offload_optimizer.device?",
        ),
        (
            {"timers": {"zzz": {}}},
            "timers.zzz is not a known key. Known here: throughput.",
        ),
        ({"bf16": True}, "bf16=true: should be an object. Remove it, or write {...}."),
        (
            {"optimizer": {"params": [3e-4]}},
            "optimizer.params=[0.0003]: should be an object. Remove it, or write {...}.",
        ),
        ({"gradient_clipping": {"max": 1}}, 'gradient_clipping={"max": 1}: should be a value, not an object.'),
        ({"nebula": {}}, "nebula is refused by deepspeed 0.19.8: its feature was removed. Remove it."),
        (
            {"zero_optimization": {"mics_shard_size": 2}},
            "zero_optimization.mics_shard_size is refused by deepspeed 0.19.8: its feature was removed. Remove it.",
        ),
        ({"bfloat16": {"enabled": True}}, "bfloat16 is an old name. Use bf16."),
        (
            {"zero_optimization": {"cpu_offload": True}},
            "zero_optimization.cpu_offload is an old name. Use zero_optimization.offload_optimizer.",
        ),
        (
            {"pipeline": {"stages": 2}},
            "pipeline is not supported: the model has no pipeline stages, so it would have no effect. Remove it.",
        ),
    ],
    ids=lambda value: ".".join(value) if isinstance(value, dict) else "",
)
def test_a_wrong_key_is_refused_in_one_line(patch: dict[str, Any], error: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        check_deepspeed_keys({**VALID, **patch}, our_keys=("base", "run"))
    assert str(refusal.value) == error


@pytest.mark.parametrize(
    ("off", "on"),
    [
        ({"bfloat16": {"enabled": False}}, {"bfloat16": {"enabled": True}}),
        ({"zero_optimization": {"cpu_offload": False}}, {"zero_optimization": {"cpu_offload": True}}),
        ({"autotuning": {"enabled": False, "fast": True}}, {"autotuning": {"fast": True}}),
        ({"torch_autocast": {"enabled": False, "dtype": "bfloat16"}}, {"torch_autocast": {"enabled": True}}),
        (
            {"activation_checkpointing": {"partition_activations": False, "number_checkpoints": None}},
            {"activation_checkpointing": {"partition_activations": False, "number_checkpoints": 4}},
        ),
    ],
    ids=lambda value: ".".join(value),
)
def test_what_is_switched_off_may_stay_and_is_refused_once_it_is_on(off: dict[str, Any], on: dict[str, Any]) -> None:
    check_deepspeed_keys({**VALID, **off}, our_keys=())
    ds_config.DeepSpeedConfig({**VALID, **off})
    with pytest.raises(ConfigError, match=r"is an old name|is not supported"):
        check_deepspeed_keys({**VALID, **on}, our_keys=())


@pytest.mark.parametrize(
    ("section", "new"),
    [
        ({"cpu_offload": False, "offload_optimizer": {"device": "none"}}, "offload_optimizer"),
        ({"cpu_offload_param": False, "offload_param": {"device": "none"}}, "offload_param"),
        *(
            ({"stage3_gather_fp16_weights_on_model_save": False, name: False}, name)
            for name in ("stage3_gather_16bit_weights_on_model_save", "gather_16bit_weights_on_model_save")
        ),
    ],
)
def test_an_old_name_beside_the_new_one_is_refused_since_deepspeed_fails(section: dict[str, Any], new: str) -> None:
    tree = {**VALID, "zero_optimization": section}
    with pytest.raises(AssertionError, match="Cannot provide deprecated parameter"):
        ds_config.DeepSpeedConfig(tree)
    with pytest.raises(ConfigError, match=r"is an old name\. Use zero_optimization"):
        check_deepspeed_keys(tree, our_keys=())
    check_deepspeed_keys({**VALID, "zero_optimization": {new: section[new]}}, our_keys=())


@pytest.mark.parametrize(
    ("patch", "error"),
    [
        ({"torch_autocast": {"enabled": False, "dtpye": "bfloat16"}}, "torch_autocast.dtpye is not a known key"),
        ({"managed_gradient_accumulation": False}, "managed_gradient_accumulation is not supported"),
        ({"pipeline": {}}, "pipeline is not supported"),
        ({"amp": {"enabled": False}}, "amp is refused by deepspeed 0.19.8"),
    ],
    ids=lambda value: ".".join(value) if isinstance(value, dict) else "",
)
def test_switched_off_does_not_excuse_what_is_misspelt_or_on_by_default_or_refused_by_deepspeed(
    patch: dict[str, Any], error: str
) -> None:
    with pytest.raises(ConfigError, match=f"^{error}"):
        check_deepspeed_keys({**VALID, **patch}, our_keys=())


def test_the_inside_of_a_section_that_is_not_tabulated_is_free() -> None:
    assert KNOWN_KEYS["datastates_ckpt"] is ANY_SECTION
    check_deepspeed_keys({**VALID, "datastates_ckpt": {"anything": {"at": "all"}}}, our_keys=())


def test_our_keys_may_stand_beside_those_of_deepspeed() -> None:
    check_deepspeed_keys({**VALID, "run": {"model": {}}}, our_keys=("run",))
    with pytest.raises(ConfigError, match="run is not a known key"):
        check_deepspeed_keys({**VALID, "run": {"model": {}}}, our_keys=())


def test_the_parsed_file_is_left_as_it_was() -> None:
    tree = {**VALID, "scheduler": {"type": "WarmupLR", "params": {}}}
    check_deepspeed_keys(tree, our_keys=())
    assert tree == {**VALID, "scheduler": {"type": "WarmupLR", "params": {}}}
