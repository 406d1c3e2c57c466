"""Which optimizers a run may use, and which of their settings would be unknown, out of range or silently wrong."""

from __future__ import annotations

import json
from typing import Any

from launch.deepspeed_keys import is_number, refuse_unknown, stated
from model.config import ConfigError

OPTIMIZER_PARAMS = {
    "AdamW": ("lr", "betas", "eps", "weight_decay"),
    "Muon": ("lr", "muon_lr", "adam_lr", "momentum", "ns_method", "betas", "eps", "weight_decay"),
}


def refuse_optimizer(tree: dict[str, Any], *, has_experts: bool, router_optimizer: str | None) -> None:
    """Refuse optimizer settings that are unknown, out of range, or would be silently wrong."""
    optimizer = stated(tree, "optimizer", 'State one, such as {"type": "AdamW", "params": {"lr": 3e-4}}.')
    kind = stated(optimizer, "type", "Use 'AdamW' or 'Muon'.", parent="optimizer.")
    if kind not in OPTIMIZER_PARAMS:
        raise ConfigError(f"optimizer.type={json.dumps(kind)} is not supported. Use 'AdamW' or 'Muon'.")
    params = optimizer.get("params", {})
    for name in params:
        if name not in OPTIMIZER_PARAMS[kind]:
            refuse_unknown(f"optimizer.params.{name}", list(OPTIMIZER_PARAMS[kind]))
    for name in ("lr", "muon_lr", "adam_lr", "eps", "weight_decay"):
        if name in params and (not is_number(params[name]) or params[name] < 0):
            raise ConfigError(f"optimizer.params.{name}={json.dumps(params[name])}: should be a number of at least 0.")
    betas = params.get("betas", [0.9, 0.999])
    if not (isinstance(betas, list) and len(betas) == 2 and all(is_number(beta) and 0 <= beta < 1 for beta in betas)):
        raise ConfigError(f"optimizer.params.betas={json.dumps(betas)}: should be two numbers in [0, 1).")
    if kind == "Muon":
        refuse_muon(tree, params, has_experts, router_optimizer)
        return
    stated(params, "lr", "State the peak learning rate.", parent="optimizer.params.")
    if router_optimizer is not None:
        raise ConfigError(
            f"run.train.router_optimizer={router_optimizer!r} has no effect with optimizer.type='AdamW'. "
            "Remove it, or use optimizer.type='Muon'."
        )


def refuse_muon(tree: dict[str, Any], params: dict[str, Any], has_experts: bool, router_optimizer: str | None) -> None:
    both = "muon_lr" in params and "adam_lr" in params
    if "lr" in params and both:
        raise ConfigError(
            f"optimizer.params.lr={params['lr']} has no effect beside muon_lr and adam_lr. Remove it, or one of them."
        )
    if not both:
        stated(params, "lr", "State it, or both muon_lr and adam_lr.", parent="optimizer.params.")
    momentum, method = params.get("momentum", 0.95), params.get("ns_method", "gram")
    if not is_number(momentum) or not 0 <= momentum < 1:
        raise ConfigError(f"optimizer.params.momentum={json.dumps(momentum)}: should be a number in [0, 1).")
    if method not in ("gram", "standard"):
        raise ConfigError(f"optimizer.params.ns_method={json.dumps(method)}: should be 'gram' or 'standard'.")
    if tree["gradient_clipping"] != 0:
        raise ConfigError(
            f"gradient_clipping={tree['gradient_clipping']} with optimizer.type='Muon': deepspeed 0.19.8 would scale "
            "the updates that Muon has already orthogonalised, not the gradients. Use gradient_clipping=0."
        )
    zero = tree.get("zero_optimization", {})
    if zero.get("stage", 0) not in (1, 2):
        raise ConfigError(
            f"zero_optimization.stage={zero.get('stage', 0)} with optimizer.type='Muon' is not supported. Use 1 or 2."
        )
    if tree.get("data_types", {}).get("grad_accum_dtype") not in (None, "bf16", "bfloat16") and (
        zero["stage"] == 1 and tree.get("bf16", {}).get("enabled")
    ):
        raise ConfigError(
            f"data_types.grad_accum_dtype={json.dumps(tree['data_types']['grad_accum_dtype'])} with "
            "optimizer.type='Muon' and bf16 under ZeRO-1 is refused by deepspeed 0.19.8. Remove it, or use "
            "zero_optimization.stage=2."
        )
    if router_optimizer is not None and not has_experts:
        raise ConfigError(f"run.train.router_optimizer={router_optimizer!r} has no effect in a dense model. Remove it.")
