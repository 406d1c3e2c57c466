"""One JSON file = one run: read it, apply its bases and --set, fill in defaults, refuse what cannot work.

    base chain -> file -> --set -> defaults -> refusal

Nothing here imports torch: a bad file is refused within a second, on a laptop or a head node. What DeepSpeed owns stays
at the top level, spelt as DeepSpeed spells it, and reaches `deepspeed.initialize` untouched; `base` and `run` are ours.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn, Self, TypeVar, get_args, get_origin

from pydantic import BaseModel, Field, ValidationError, model_validator

from launch.data_config import DataConfig
from launch.deepspeed_keys import (
    check_deepspeed_keys,
    check_deepspeed_values,
    is_integer,
    is_number,
    refuse_unknown,
    stated,
)
from launch.fp8_settings import refuse_fp8_settings
from launch.optimizer_settings import refuse_optimizer
from launch.zero_settings import refuse_zero_settings, zero_stage
from model.config import (
    ActivationCheckpointing,
    CompileMode,
    ConfigError,
    CrossEntropy,
    FP8Config,
    ModelConfig,
    Section,
)
from model.flops import count_parameters

REPO_ROOT = Path(__file__).resolve().parents[1]
DEFAULT_CONFIG = REPO_ROOT / "ds_configs" / "moe_d12.json"


class TrainConfig(Section):
    """`run.train`: horizon, learning-rate schedule, and how often to look at the run."""

    num_steps: int | None = Field(default=None, ge=1)  # optimizer steps
    target_tokens: int | None = Field(default=None, ge=1)  # or as many steps as this many tokens fill
    tokens_per_active_param: float | None = Field(default=None, gt=0)  # or tokens by active matmul parameters
    stop_at_step: int | None = Field(default=None, ge=1)  # end here, saved; the schedule stays that of the whole run
    schedule: Literal["constant", "wsd", "cosine", "linear"] = "wsd"  # wsd: warm up, stay at the peak, decay
    warmup_steps: int = Field(default=0, ge=0)  # linear, from 1/warmup_steps of the peak
    decay_frac: float = Field(default=0.2, gt=0, le=1)  # of all steps: the last ones, over which wsd decays
    decay_shape: Literal["linear", "cosine", "1-sqrt"] = "linear"  # of wsd's decay
    final_lr_frac: float = Field(default=0.0, ge=0, le=1)  # of the peak: where the decay would end
    router_optimizer: Literal["muon", "adamw"] | None = None  # of the gates, with Muon; default there: muon
    eval_every: int | None = Field(default=None, ge=1)  # steps between validations, besides step 0 and the last
    save_every: int | None = Field(default=None, ge=1)  # steps between checkpoints, besides the last
    keep_last: int = Field(default=2, ge=1)  # checkpoints; older ones are deleted
    sample_every: int | None = Field(default=None, ge=1)  # steps between samples of text, besides the last
    sample_prompt: str = Field(default="The state of the Union", min_length=1)  # what the samples continue
    sample_tokens: int = Field(default=48, ge=0)  # in a sample; 0: no samples
    log_every: int = Field(default=10, ge=1)  # steps between lines of metrics, besides the first
    expert_load_every: int | None = Field(default=None, ge=1)  # between lines of expert_load.jsonl; default: log_every
    activation_checkpointing: ActivationCheckpointing = "none"  # less memory for more work; see model/recompute.py
    profile_steps: int | None = Field(default=None, ge=1)  # to profile after the warm-up: trace, and time by part
    cross_entropy: CrossEntropy = "chunked"  # logits of all tokens at once, in chunks, or liger-kernel's; model/loss.py
    hang_timeout_s: float | None = Field(default=540.0, ge=1)  # without progress, until all ranks end; null: no end
    max_skipped_steps: int = Field(default=3, ge=0)  # updates skipped in a row for NaN or spikes; one more ends the run
    spike_factor: float | None = Field(default=None, gt=1)  # x median of 32 losses: a step above is skipped; null: off
    seed: int = Field(default=0, ge=0)  # of weights, data order and samples

    @model_validator(mode="after")
    def _check(self) -> Self:
        stated = [name for name in HORIZONS if getattr(self, name) is not None]
        if len(stated) != 1:
            found = " and ".join(stated) if stated else "none of them"
            raise ConfigError(f"num_steps, target_tokens, tokens_per_active_param: {found} given. State exactly one.")
        return self

    def without_effect(self) -> dict[str, str]:
        unused = {}
        if self.schedule != "wsd":
            way_out = f"with schedule={self.schedule!r}. Remove it, or use schedule='wsd'."
            unused["decay_frac"] = unused["decay_shape"] = way_out
        if self.schedule == "constant":
            unused["final_lr_frac"] = "with schedule='constant'. Remove it, or use a schedule that decays."
        if self.sample_tokens == 0:
            unused["sample_every"] = unused["sample_prompt"] = "with sample_tokens=0. Remove it, or ask for tokens."
        return unused


HORIZONS = ("num_steps", "target_tokens", "tokens_per_active_param")


class LaunchConfig(Section):
    """`run.launch`: what launch.run starts. Inside train.py the world size wins; ep_size must divide it."""

    num_nodes: int = Field(default=1, ge=1)  # machines
    num_gpus: int | Literal["auto"] = "auto"  # per node; auto: as many as are there and divide the batch
    ep_size: int | Literal["auto", "max"] = "auto"  # auto: the smallest that fits; max: the largest that divides
    hostfile: str | None = Field(default=None, min_length=1)  # "host slots=N" lines, for pdsh; without: Slurm's nodes
    master_addr: str | None = Field(default=None, min_length=1)  # of the first node; default: what it says of itself
    master_port: int | None = Field(default=None, ge=1024, le=65535)  # there; default: one that is free on this machine

    @model_validator(mode="after")
    def _check(self) -> Self:
        for name in ("num_gpus", "ep_size"):
            value = getattr(self, name)
            if isinstance(value, int) and value < 1:
                raise ConfigError(f"{name}={value} is below 1. Use a number of at least 1, or 'auto'.")
        if self.num_nodes > 1 and self.num_gpus == "auto":
            raise ConfigError(
                f"num_gpus='auto' looks at this machine only, and num_nodes={self.num_nodes}. "
                "State the number of GPUs per node."
            )
        return self

    def without_effect(self) -> dict[str, str]:
        alone = "with num_nodes=1, which starts ranks on this machine. Remove it, or state the number of nodes."
        return {"hostfile": alone, "master_addr": alone} if self.num_nodes == 1 else {}


class CompileConfig(Section):
    """`run.compile`: torch.compile of every block. A new graph takes seconds to minutes; see model/compiling.py."""

    mode: CompileMode = "none"  # static: shapes are constants; dynamic: symbols; none: not compiled


class WandbConfig(Section):
    """`run.wandb`: Weights & Biases, from rank 0. auto: online with a key, offline without one."""

    mode: Literal["auto", "online", "offline", "disabled"] = "auto"  # auto: online with a key, else offline
    project: str = "moelab"  # where the run appears
    entity: str | None = None  # the team or user; default: that of the key
    group: str | None = None  # runs to be shown together
    job_type: str | None = None  # what kind of run it is within its group, such as a leg of an ablation
    name: str | None = None  # of the run; default: the run folder's
    tags: list[str] = Field(default_factory=list)  # to filter runs by


class RunSection(Section):
    """Everything under `run`."""

    model: ModelConfig
    data: DataConfig = Field(default_factory=lambda: DataConfig.model_validate({}))
    train: TrainConfig
    fp8: FP8Config = FP8Config()
    compile: CompileConfig = CompileConfig()
    launch: LaunchConfig = LaunchConfig()
    wandb: WandbConfig = WandbConfig()

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.train.eval_every is not None and self.data.val is None:
            raise ConfigError(
                f"train.eval_every={self.train.eval_every} has no effect without run.data.val. "
                "Name validation data, or remove it."
            )
        if self.train.expert_load_every is not None and self.model.moe is None:
            raise ConfigError(
                f"train.expert_load_every={self.train.expert_load_every} has no effect without run.model.moe. "
                "Remove it, or give the model experts."
            )
        return self


@dataclass(frozen=True)
class Run:
    """A resolved run: validated sections, DeepSpeed's own dictionary, and what identifies the run."""

    model: ModelConfig
    data: DataConfig
    train: TrainConfig
    fp8: FP8Config
    compile: CompileConfig
    launch: LaunchConfig
    wandb: WandbConfig
    deepspeed: dict[str, Any]  # for deepspeed.initialize, as the file spells it
    resolved: dict[str, Any]  # the whole file, bases applied, defaults filled in
    num_steps: int
    config_hash: str  # of all that the trajectory depends on; see hash_of

    @property
    def train_batch_size(self) -> int:
        return self.deepspeed["train_batch_size"]

    @property
    def micro_batch_size(self) -> int:
        return self.deepspeed["train_micro_batch_size_per_gpu"]

    @property
    def tokens_per_step(self) -> int:
        return self.train_batch_size * self.model.seq_len


def load_run(path: str | Path, assignments: list[str] | None = None) -> Run:
    """Read, resolve and check a run file. `assignments` are --set strings, "run.train.num_steps=20".

    Raises ConfigError, one line, for anything that can be known to be wrong without a GPU.
    """
    tree = read_with_bases(Path(path))
    for assignment in assignments or []:
        apply_assignment(tree, assignment)
    return resolve(tree)


def resolve(tree: dict[str, Any]) -> Run:
    """Validate a merged tree (bases and --set already applied) and fill in its defaults."""
    tree = copy.deepcopy(tree)
    tree.pop("base", None)
    run_tree = tree.pop("run", None)
    if not isinstance(run_tree, dict):
        raise ConfigError(
            "run is missing: a moelab run file needs a `run` section beside DeepSpeed's keys. See ds_configs/."
        )
    check_deepspeed_keys(tree, our_keys=("base", "run"))
    section = parse_section(RunSection, with_router_optimizer(run_tree, tree), "run")
    refuse_deepspeed_settings(tree, section)
    resolved = {**tree, "run": section.model_dump(mode="json")}
    return Run(
        model=section.model,
        data=section.data,
        train=section.train,
        fp8=section.fp8,
        compile=section.compile,
        launch=section.launch,
        wandb=section.wandb,
        deepspeed=tree,
        resolved=resolved,
        num_steps=horizon(section, tree["train_batch_size"]),
        config_hash=hash_of(resolved),
    )


def with_router_optimizer(run_tree: dict[str, Any], tree: dict[str, Any]) -> dict[str, Any]:
    """`run` with the default of router_optimizer filled in where there is a gate that Muon could update."""
    train, model = run_tree.get("train"), run_tree.get("model")
    uses_muon = tree.get("optimizer", {}).get("type") == "Muon"
    if uses_muon and isinstance(train, dict) and isinstance(model, dict) and model.get("moe") is not None:
        return {**run_tree, "train": {**train, "router_optimizer": train.get("router_optimizer") or "muon"}}
    return run_tree


def horizon(section: RunSection, train_batch_size: int) -> int:
    """Number of optimizer steps, from whichever of the three horizons the file states."""
    train, tokens_per_step = section.train, train_batch_size * section.model.seq_len
    if train.num_steps is not None:
        return train.num_steps
    if train.target_tokens is not None:
        name, tokens = "target_tokens", float(train.target_tokens)
    else:
        assert train.tokens_per_active_param is not None
        name, tokens = (
            "tokens_per_active_param",
            train.tokens_per_active_param * count_parameters(section.model).active_matmul,
        )
    if tokens < tokens_per_step:
        raise ConfigError(
            f"run.train.{name}={getattr(train, name)} is {tokens:,.0f} tokens, less than one step of "
            f"{tokens_per_step:,}. Raise it, or lower train_batch_size."
        )
    return int(tokens // tokens_per_step)


# Settings that say where and under whose eyes a run happens, when it pauses, what is recorded of it, or how it trades
# time for memory without another result, but for rounding, which moves with the number of ranks too: a run may be
# continued with others.
NOT_IN_HASH = (
    "zero_optimization",
    "run.compile",
    "run.launch",
    "run.wandb",
    "run.model.moe.expert_backend",
    "run.train.stop_at_step",
    "run.train.save_every",
    "run.train.keep_last",
    "run.train.activation_checkpointing",
    "run.train.profile_steps",
    "run.train.expert_load_every",
    "run.train.cross_entropy",
    "run.train.hang_timeout_s",
    "run.train.max_skipped_steps",
)


def hash_of(resolved: dict[str, Any]) -> str:
    """Hash of the resolved file without NOT_IN_HASH: equal hashes may continue each other's run folder."""
    tree = copy.deepcopy(resolved)
    for path in NOT_IN_HASH:
        *parents, name = path.split(".")
        section: Any = tree
        for parent in parents:
            section = (section or {}).get(parent)
        if section is not None:
            section.pop(name, None)
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()[:16]


# --- reading ----------------------------------------------------------------------------------------------------------


def read_with_bases(path: Path, seen: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The file as an RFC 7396 merge patch over its base, that one over its own, and so on."""
    path = path.resolve()
    if path in seen:
        raise ConfigError(
            f"base: {' -> '.join(p.name for p in (*seen, path))} is a cycle. Remove one of these `base` keys."
        )
    tree = read_json(path, named_by=seen[-1] if seen else None)
    base = tree.pop("base", None)
    if base is None:
        return tree
    if not isinstance(base, str):
        raise ConfigError(f"base={base!r} in {path.name} is not a path. Name another run file, relative to this one.")
    return lay_over(read_with_bases(path.parent / base, (*seen, path)), tree)


def read_json(path: Path, named_by: Path | None = None) -> dict[str, Any]:
    """One JSON object from a file."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        via = f" (named as base by {named_by.name})" if named_by else ""
        raise ConfigError(f"{path}: no such run file{via}. ds_configs/ holds those that ship.") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path.name}: not UTF-8 text at byte {error.start}. Save it as UTF-8.") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}). Name a run file, a JSON file.") from None
    try:
        tree = parse_json(text, path.name)
    except json.JSONDecodeError as error:
        raise ConfigError(
            f"{path.name} line {error.lineno}, column {error.colno}: {error.msg}. Fix the JSON."
        ) from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{path.name}: holds a {type(tree).__name__}, not an object. A run file is one JSON object.")
    return tree


def parse_json(text: str, where: str) -> Any:
    """Parse JSON without Python's leniency: a key given twice, NaN and numbers too large for a float are refused.

    Raises json.JSONDecodeError for what is not JSON at all, ConfigError for the rest.
    """

    def no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        keys = [key for key, _ in pairs]
        for key in keys:
            if keys.count(key) > 1:
                raise ConfigError(f"{where}: the key {key!r} stands twice in one object. Remove one of them.")
        return dict(pairs)

    def finite(number: str) -> float:
        if not math.isfinite(float(number)):
            raise ConfigError(f"{where}: {number} is not a finite number. Write one.")
        return float(number)

    return json.loads(text, object_pairs_hook=no_duplicates, parse_float=finite, parse_constant=finite)


def merge_patch(target: Any, patch: Any) -> Any:
    """RFC 7396: objects merge key by key, null deletes, anything else replaces."""
    if not isinstance(patch, dict):
        return patch
    merged = dict(target) if isinstance(target, dict) else {}
    for key, value in patch.items():
        if value is None:
            merged.pop(key, None)
        else:
            merged[key] = merge_patch(merged.get(key), value)
    return merged


def lay_over(tree: dict[str, Any], patch: dict[str, Any]) -> dict[str, Any]:
    """`patch` merged over `tree`; a patch that states a horizon replaces the one it inherits."""
    return merge_patch(with_the_horizon_of(patch, tree), patch)


def join_patches(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    """The patch that does what `first` and then `second` would: unlike in lay_over, nulls stay, and delete later.

    But for an object where `first` has null: no patch deletes and then states anew, so the object is merged.
    """

    def join(old: Any, new: Any) -> Any:
        if not isinstance(old, dict) or not isinstance(new, dict):
            return new
        return {**old, **{key: join(old.get(key), value) for key, value in new.items()}}

    joined: dict[str, Any] = join(with_the_horizon_of(second, first), second)
    return joined


def with_the_horizon_of(patch: dict[str, Any], tree: dict[str, Any]) -> dict[str, Any]:
    """`tree` as it is, or without its horizon if `patch` states one."""
    section = patch["run"].get("train") if isinstance(patch.get("run"), dict) else None
    inherited = tree["run"].get("train") if isinstance(tree.get("run"), dict) else None
    if not isinstance(section, dict) or not isinstance(inherited, dict):
        return tree
    if all(section.get(name) is None for name in HORIZONS):
        return tree
    train = {name: value for name, value in inherited.items() if name not in HORIZONS}
    return {**tree, "run": {**tree["run"], "train": train}}


def apply_assignment(tree: dict[str, Any], assignment: str) -> None:
    """Apply "a.b.c=value" in place; the value is JSON, else a string; null deletes."""
    path, equals, text = assignment.partition("=")
    keys = path.strip().split(".")
    if not equals or not all(keys):
        raise ConfigError(f"--set {assignment}: not of the form key.key=value. Example: --set run.train.num_steps=20")
    if keys[0] == "base":
        raise ConfigError(f"--set {assignment}: base cannot be set at the prompt. Write a run file with that base.")
    try:
        value = parse_json(text, f"--set {assignment}")
    except json.JSONDecodeError:
        value = text
    patch: Any = value
    for key in reversed(keys):
        patch = {key: patch}
    merged = lay_over(tree, patch)
    tree.clear()
    tree.update(merged)


# --- refusing ---------------------------------------------------------------------------------------------------------

S = TypeVar("S", bound=BaseModel)


def parse_section(section: type[S], tree: dict[str, Any], where: str) -> S:
    """Validate `tree` as `section`; the first violation becomes a one-line ConfigError that names the full key."""
    try:
        return section.model_validate(tree)
    except ValidationError as errors:
        raise_first(section, errors.errors(), where)


def location_of(error: Any) -> list[str]:
    """Keys that lead to an error, without the members of a union ("int", "literal['auto']") that stand among them."""
    members = ("int", "float", "str")
    return [str(part) for part in error["loc"] if not (str(part).startswith("literal[") or part in members)]


def raise_first(section: type[BaseModel], errors: list[Any], where: str) -> NoReturn:
    # a misspelt key first: it is the cause when the same key is also missing
    error = min(errors, key=lambda each: each["type"] != "extra_forbidden")
    location = location_of(error)
    key = ".".join([where, *location])
    if error["type"] == "extra_forbidden":
        refuse_unknown(key, known_keys(section, location[:-1]))
    if error["type"] == "missing":
        raise ConfigError(f"{key} is missing. State it.") from None
    cause = error.get("ctx", {}).get("error")
    if isinstance(cause, ConfigError):
        raise ConfigError(f"{key}.{cause}") from None
    rules = dict.fromkeys(rule_of(each) for each in errors if location_of(each) == location)
    raise ConfigError(f"{key}={json.dumps(error['input'])}: should be {' or '.join(rules)}.") from None


def rule_of(error: Any) -> str:
    """What a value should have been, to be read after "should be"."""
    if error["type"] == "model_type":
        return "an object"
    if error["type"] == "string_too_short":
        return "a string that is not empty"
    if error["type"] == "too_short":
        return f"{'a list' if error['ctx']['field_type'] == 'List' else 'an object'} that is not empty"
    return error["msg"].removeprefix("Input should be ")


def known_keys(section: type[BaseModel], location: list[str]) -> list[str]:
    """Keys of the section at `location` below `section`."""
    names = iter(location)
    for name in names:
        annotation = section.model_fields[name].annotation
        if get_origin(annotation) in (dict, list):
            next(names)  # which entry: they are all of one kind
        section = next(
            kind
            for kind in (annotation, *get_args(annotation))
            if isinstance(kind, type) and issubclass(kind, BaseModel)
        )
    return list(section.model_fields)


def refuse_deepspeed_settings(tree: dict[str, Any], run: RunSection) -> None:
    """Refuse DeepSpeed settings that would be wrong, silently ineffective or unsupported in this run."""
    check_deepspeed_values(tree)
    for name in ("train_batch_size", "train_micro_batch_size_per_gpu"):
        value = stated(tree, name, "State it, in sequences.")
        if not is_integer(value) or value < 1:
            raise ConfigError(f"{name}={json.dumps(value)}: should be a number of sequences, an integer of at least 1.")
    if tree["train_batch_size"] % tree["train_micro_batch_size_per_gpu"]:
        raise ConfigError(
            f"train_batch_size={tree['train_batch_size']} is not a multiple of "
            f"train_micro_batch_size_per_gpu={tree['train_micro_batch_size_per_gpu']}. Change one of them."
        )
    clipping = stated(
        tree, "gradient_clipping", "State it: DeepSpeed's silent default is 1.0, and 0 turns clipping off."
    )
    if not is_number(clipping) or clipping < 0:
        raise ConfigError(f"gradient_clipping={json.dumps(clipping)}: should be a number of at least 0.")
    if "scheduler" in tree:
        raise ConfigError(
            f"scheduler.type={json.dumps(tree['scheduler'].get('type'))} has no place here: run.train.schedule sets "
            "the learning rate. Remove the scheduler section."
        )
    refuse_optimizer(tree, has_experts=run.model.moe is not None, router_optimizer=run.train.router_optimizer)
    bf16 = tree.get("bf16", {}).get("enabled", False)
    if not isinstance(bf16, bool):
        raise ConfigError(f"bf16.enabled={json.dumps(bf16)}: should be true or false.")
    refuse_widths_of_grouped_experts(run.model, bf16)
    dtype = tree.get("data_types", {}).get("grad_accum_dtype")
    if dtype is not None and not bf16:
        raise ConfigError(
            f"data_types.grad_accum_dtype={json.dumps(dtype)}: gradients of a run in fp32 are accumulated in fp32. "
            "Remove it, or use bf16."
        )
    for name, way_out in (
        ("fp16", "Use bf16, or neither for fp32"),
        ("expert_parallel", "That is DeepSpeed's AutoEP; set run.launch.ep_size and run.model.moe instead"),
    ):
        if tree.get(name, {}).get("enabled"):
            raise ConfigError(f"{name}.enabled={json.dumps(tree[name]['enabled'])} is not supported. {way_out}.")

    refuse_fp8_settings(run.fp8, run.model, run.train.cross_entropy, tree)
    refuse_zero_settings(tree, run.model.moe is not None, run.train.activation_checkpointing)
    if run.compile.mode != "none" and zero_stage(tree) == 3:
        raise ConfigError(
            f"run.compile.mode={run.compile.mode!r} is not supported at zero_optimization.stage=3, which gathers "
            "weights by hooks within a block. Use 'none', or stage 1 or 2."
        )


def refuse_widths_of_grouped_experts(model: ModelConfig, bf16: bool) -> None:
    """Torch's grouped GEMM takes rows of whole 16 bytes. Dropless experts use it, in a dropless validation too."""
    moe = model.moe
    if moe is None or moe.expert_backend == "loop" or (moe.capacity_factor and moe.eval_capacity_factor):
        return
    unit = 8 if bf16 else 4  # elements in 16 bytes
    for name, width in (("hidden_size", model.hidden_size), ("moe.ffn_hidden_size", moe.ffn_hidden_size)):
        if width % unit:
            dropless = "capacity_factor" if moe.capacity_factor == 0 else "eval_capacity_factor"
            raise ConfigError(
                f"run.model.{name}={width} is not a multiple of {unit}, and {dropless}=0.0 needs torch's grouped GEMM, "
                f"which takes rows of whole 16 bytes ({'bf16' if bf16 else 'fp32'}). Use a multiple of {unit}, "
                "expert_backend='loop', or a capacity."
            )
