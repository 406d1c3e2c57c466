"""Run files that cannot work: each is refused with its own line, which names the key, the rule and the way out."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from test_run_config import VALID, data, fp8, launch, load, model, moe, muon, train, write

from launch.run_config import REPO_ROOT, load_run, merge_patch
from model.config import ConfigError

WRONG: list[tuple[dict[str, Any], str]] = [
    # misspelt
    ({"gradient_cliping": 1.0}, "gradient_cliping is not a known key. Did you mean gradient_clipping?"),
    (
        {"zero_optimization": {"stge": 1}},
        "zero_optimization.stge is not a known key. Did you mean zero_optimization.stage?",
    ),
    (
        {"optimizer": {"params": {"weight_deacy": 0.1}}},
        "optimizer.params.weight_deacy is not a known key. Did you mean optimizer.params.weight_decay?",
    ),
    (train(warmup_step=3), "run.train.warmup_step is not a known key. Did you mean run.train.warmup_steps?"),
    (
        train(num_steps=None, num_stpes=10),
        "run.train.num_stpes is not a known key. Did you mean run.train.num_steps?",
    ),
    (
        moe(capacity_facter=1.0),
        "run.model.moe.capacity_facter is not a known key. Did you mean run.model.moe.capacity_factor?",
    ),
    (
        moe(num_experts=None, num_expert=4),
        "run.model.moe.num_expert is not a known key. Did you mean run.model.moe.num_experts?",
    ),
    (
        moe(expert_backend="grouped"),
        "run.model.moe.expert_backend='grouped' needs dropless routing, and capacity_factor=1.0. Use 'bmm' or 'loop', "
        "or another capacity_factor.",
    ),
    (
        moe(expert_backend="bmm", capacity_factor=0.0),
        "run.model.moe.expert_backend='bmm' needs a capacity, and capacity_factor=0.0. Use 'grouped' or 'loop', or "
        "another capacity_factor.",
    ),
    (
        moe(ffn_hidden_size=42),
        "run.model.moe.ffn_hidden_size=42 is not a multiple of 4, and eval_capacity_factor=0.0 needs torch's grouped "
        "GEMM, which takes rows of whole 16 bytes (fp32). Use a multiple of 4, expert_backend='loop', or a capacity.",
    ),
    (
        {**moe(ffn_hidden_size=20, capacity_factor=0.0), "bf16": {"enabled": True}},
        "run.model.moe.ffn_hidden_size=20 is not a multiple of 8, and capacity_factor=0.0 needs torch's grouped "
        "GEMM, which takes rows of whole 16 bytes (bf16). Use a multiple of 8, expert_backend='loop', or a capacity.",
    ),
    (
        {"run": {"compile": {"mode": "fast"}}},
        "run.compile.mode=\"fast\": should be 'static', 'dynamic' or 'none'.",
    ),
    ({"run": {"zzz": {}}}, "run.zzz is not a known key. Known here: compile, data, fp8, launch, model, train, wandb."),
    # FP8
    (fp8(recipe="row"), "run.fp8.recipe=\"row\": should be 'rowwise_with_gw_hp', 'rowwise' or 'tensorwise'."),
    (
        fp8(experts=False),
        "run.fp8.enabled=true converts nothing: experts, dense and lm_head are false. Ask for one, or remove it.",
    ),
    (
        {"run": {"fp8": {"dense": True}}},
        "run.fp8.dense=True has no effect with enabled=false. Remove it, or set enabled to true.",
    ),
    (
        fp8(experts=False, dense=True, casts="triton"),
        "run.fp8.casts=triton has no effect with experts=false. Remove it, or set experts to true.",
    ),
    (
        {"run": {**fp8()["run"], **model(moe=None, ffn_hidden_size=32)["run"]}},
        "run.fp8.experts=true has no effect without run.model.moe. Set it to false, and run.fp8.dense to true.",
    ),
    (
        merge_patch(fp8(), moe(ffn_hidden_size=40)),
        "run.model.moe.ffn_hidden_size=40 is not a multiple of 16, which FP8 products need. Use 48, or no run.fp8 for "
        "it.",
    ),
    (
        merge_patch(fp8(experts=False, dense=True), model(hidden_size=40)),
        "run.model.hidden_size=40 is not a multiple of 16, which FP8 products need. Use 48, or no run.fp8 for it.",
    ),
    (
        merge_patch(fp8(lm_head=True), model(vocab_size=100)),
        "run.model.vocab_size=100 is not a multiple of 16, which FP8 products need. Use 112, or no run.fp8 for it.",
    ),
    (
        fp8(recipe="tensorwise"),
        "run.fp8.recipe='tensorwise' has no product for all experts at once. Use 'rowwise_with_gw_hp', or "
        "run.model.moe.expert_backend='loop'.",
    ),
    (
        merge_patch(fp8(recipe="rowwise"), moe(capacity_factor=0.0)),
        "run.fp8.recipe='rowwise' with run.model.moe.capacity_factor=0.0: torchao's operator takes groups of a "
        "multiple of 16 rows, and dropless ones have any size. Use 'rowwise_with_gw_hp', or a capacity.",
    ),
    (
        merge_patch(fp8(casts="triton"), moe(expert_backend="loop")),
        "run.fp8.casts='triton' has no effect with run.model.moe.expert_backend='loop', where torchao casts. "
        "Remove it.",
    ),
    (
        fp8(casts="triton", recipe="rowwise"),
        "run.fp8.casts='triton' has no effect with run.fp8.recipe='rowwise', where torchao casts. Remove it.",
    ),
    (
        merge_patch(fp8(lm_head=True), train(cross_entropy="liger")),
        "run.fp8.lm_head=true with run.train.cross_entropy='liger', which multiplies in bf16. Use 'chunked'.",
    ),
    (
        fp8(lm_head=True, recipe="rowwise"),
        "run.fp8.lm_head=true with run.fp8.recipe='rowwise' and run.train.cross_entropy='chunked', whose FP8 products "
        "are 'rowwise_with_gw_hp'. Use that recipe, or 'plain'.",
    ),
    (
        {
            "run": {**fp8(experts=False, dense=True)["run"], **model(moe=None, ffn_hidden_size=32)["run"]},
            "zero_optimization": {"stage": 3},
        },
        "run.fp8.enabled=true is not supported at zero_optimization.stage=3, which takes weights away between the "
        "passes. Use stage 1 or 2.",
    ),
    (
        fp8(min_reduced_width=100.0),
        "run.fp8.min_reduced_width=100.0 converts nothing: of what is asked for, N*K/(N+K) is 16 at the most. Use a "
        "smaller one, or remove run.fp8.",
    ),
    # missing
    (
        {"run": None},
        "run is missing: a moelab run file needs a `run` section beside DeepSpeed's keys. See ds_configs/.",
    ),
    ({"run": {"model": None}}, "run.model is missing. State it."),
    (model(seq_len=None), "run.model.seq_len is missing. State it."),
    ({"train_batch_size": None}, "train_batch_size is missing. State it, in sequences."),
    (
        {"train_micro_batch_size_per_gpu": None},
        "train_micro_batch_size_per_gpu is missing. State it, in sequences.",
    ),
    (
        {"gradient_clipping": None},
        "gradient_clipping is missing. State it: DeepSpeed's silent default is 1.0, and 0 turns clipping off.",
    ),
    (
        {"optimizer": None},
        'optimizer is missing. State one, such as {"type": "AdamW", "params": {"lr": 3e-4}}.',
    ),
    ({"optimizer": {"type": None}}, "optimizer.type is missing. Use 'AdamW' or 'Muon'."),
    ({"optimizer": {"params": {"lr": None}}}, "optimizer.params.lr is missing. State the peak learning rate."),
    (
        muon({"lr": None, "adam_lr": 1e-3}),
        "optimizer.params.lr is missing. State it, or both muon_lr and adam_lr.",
    ),
    # of the wrong type or size
    (
        {"train_batch_size": "8"},
        'train_batch_size="8": should be a number of sequences, an integer of at least 1.',
    ),
    (
        {"train_micro_batch_size_per_gpu": True},
        "train_micro_batch_size_per_gpu=true: should be a number of sequences, an integer of at least 1.",
    ),
    ({"gradient_clipping": -1}, "gradient_clipping=-1: should be a number of at least 0."),
    ({"optimizer": {"params": {"lr": -1e-3}}}, "optimizer.params.lr=-0.001: should be a number of at least 0."),
    ({"optimizer": {"params": {"betas": 0.9}}}, "optimizer.params.betas=0.9: should be two numbers in [0, 1)."),
    ({"bf16": {"enabled": "auto"}}, 'bf16.enabled="auto": should be true or false.'),
    ({"bf16": True}, "bf16=true: should be an object. Remove it, or write {...}."),
    (model(num_layers="2"), 'run.model.num_layers="2": should be a valid integer.'),
    (model(num_layers=True), "run.model.num_layers=true: should be a valid integer."),
    (model(num_layers=2.0), "run.model.num_layers=2.0: should be a valid integer."),
    (model(hidden_size=-32), "run.model.hidden_size=-32: should be greater than or equal to 1."),
    (model(qk_norm=1), "run.model.qk_norm=1: should be a valid boolean."),
    (model(activation="gelu"), "run.model.activation=\"gelu\": should be 'relu2' or 'swiglu'."),
    (model(moe=8), "run.model.moe=8: should be an object."),
    (moe(capacity_factor=-1.0), "run.model.moe.capacity_factor=-1.0: should be greater than or equal to 0."),
    (train(num_steps=0), "run.train.num_steps=0: should be greater than or equal to 1."),
    (train(max_skipped_steps=-1), "run.train.max_skipped_steps=-1: should be greater than or equal to 0."),
    (train(spike_factor=1.0), "run.train.spike_factor=1.0: should be greater than 1."),
    (train(profile_steps=0), "run.train.profile_steps=0: should be greater than or equal to 1."),
    (train(hang_timeout_s=0.5), "run.train.hang_timeout_s=0.5: should be greater than or equal to 1."),
    (train(profile_steps=[4, 6]), "run.train.profile_steps=[4, 6]: should be a valid integer."),
    (
        train(activation_checkpointing="full"),
        "run.train.activation_checkpointing=\"full\": should be 'none', 'block' or 'selective'.",
    ),
    (
        train(cross_entropy="fused"),
        "run.train.cross_entropy=\"fused\": should be 'plain', 'chunked' or 'liger'.",
    ),
    (train(decay_frac=1.5), "run.train.decay_frac=1.5: should be less than or equal to 1."),
    (data(train=""), 'run.data.train="": should be a string that is not empty.'),
    (
        data(train=7),
        "run.data.train=7: should be a prefix, 'builtin', 'synthetic' or a list such as "
        '[[0.7, "data/a/train"], [0.3, "builtin"]].',
    ),
    (
        data(val=True),
        "run.data.val=true: should be a prefix, 'builtin', 'synthetic', 'none', an object such as "
        '{"a": "data/a/val"} or a list such as [[0.7, "data/a/train"], [0.3, "builtin"]].',
    ),
    (data(train=[]), 'run.data.train=[]: should be a list such as [[0.7, "data/a/train"], [0.3, "builtin"]].'),
    (data(train=["data/a"]), 'run.data.train.0="data/a": should be [weight, prefix].'),
    (data(train=[[1, "a"], [1, "b", "c"]]), 'run.data.train.1=[1, "b", "c"]: should be [weight, prefix].'),
    (data(train=[[0, "a"]]), "run.data.train.0.0=0: should be a weight, a finite number above 0."),
    (data(val=[[-1, "a"]]), "run.data.val.0.0=-1: should be a weight, a finite number above 0."),
    (data(train=[["1", "a"]]), 'run.data.train.0.0="1": should be a weight, a finite number above 0.'),
    (data(train=[[True, "a"]]), "run.data.train.0.0=true: should be a weight, a finite number above 0."),
    (
        data(train=[[10**309, "a"]]),
        f"run.data.train.0.0={10**309}: should be a weight, a finite number above 0.",
    ),
    (data(train=[[1, ""]]), 'run.data.train.0.1="": should be a string that is not empty.'),
    (
        data(train=[[1, "a"], [1, "synthetic"]]),
        "run.data.train.1.1='synthetic' has no place beside other data: its tokens are made up. Use it alone, "
        "or remove it.",
    ),
    (
        data(train=[[1, "./a"], [2, "b"], [1, "a"]]),
        "run.data.train: './a' stands in it twice. Give it one entry with the sum of its weights.",
    ),
    (data(val={"a": "x", "b": "x"}), "run.data.val: 'x' stands in it twice. Name it once."),
    (data(val={"a": 3}), "run.data.val.a=3: should be a string that is not empty."),
    (
        data(val={"a/b": "x"}),
        'run.data.val.a/b="x": the name becomes the metric val/a/b/loss. Use letters, digits, _ and -, and neither '
        "'loss' nor 'bpb'.",
    ),
    (
        data(val={"bpb": "x"}),
        'run.data.val.bpb="x": the name becomes the metric val/bpb/loss. Use letters, digits, _ and -, and neither '
        "'loss' nor 'bpb'.",
    ),
    (data(val={}), "run.data.val={} names nothing to validate with. Name a prefix, or use run.data.val='none'."),
    (data(vall="x"), "run.data.vall is not a known key. Did you mean run.data.val?"),
    ({"run": {"wandb": {"tags": ["a", 1]}}}, "run.wandb.tags.1=1: should be a valid string."),
    ({"run": {"wandb": {"job_type": 1}}}, "run.wandb.job_type=1: should be a valid string."),
    (launch(ep_size="big"), "run.launch.ep_size=\"big\": should be a valid integer or 'auto' or 'max'."),
    (launch(ep_size=0), "run.launch.ep_size=0 is below 1. Use a number of at least 1, or 'auto'."),
    (muon({"momentum": 1}), "optimizer.params.momentum=1: should be a number in [0, 1)."),
    (muon({"muon_lr": -1}), "optimizer.params.muon_lr=-1: should be a number of at least 0."),
    (muon({"ns_method": "svd"}), "optimizer.params.ns_method=\"svd\": should be 'gram' or 'standard'."),
    (train(schedule="step"), "run.train.schedule=\"step\": should be 'constant', 'wsd', 'cosine' or 'linear'."),
    (train(decay_shape="sqrt"), "run.train.decay_shape=\"sqrt\": should be 'linear', 'cosine' or '1-sqrt'."),
    (
        train(router_optimizer="sgd"),
        "run.train.router_optimizer=\"sgd\": should be 'muon' or 'adamw'.",
    ),
    (
        muon({"momentun": 0.9}),
        "optimizer.params.momentun is not a known key. Did you mean optimizer.params.momentum?",
    ),
    (
        {"optimizer": {"params": {"momentum": 0.9}}},
        "optimizer.params.momentum is not a known key. Known here: betas, eps, lr, weight_decay.",
    ),
    # contradictions
    (
        {"train_batch_size": 9},
        "train_batch_size=9 is not a multiple of train_micro_batch_size_per_gpu=2. Change one of them.",
    ),
    (moe(top_k=5), "run.model.moe.top_k=5 exceeds num_experts=4. Use a top_k of at most 4."),
    (
        model(num_attention_heads=3),
        "run.model.hidden_size=32 is not a multiple of num_attention_heads=3. "
        "Use a hidden_size such as 33, or other heads.",
    ),
    (
        model(num_attention_heads=32),
        "run.model.hidden_size=32 over num_attention_heads=32 gives heads of 1; rotary embedding rotates pairs. "
        "Use an even head size.",
    ),
    (
        model(num_attention_heads=4, num_kv_heads=3),
        "run.model.num_kv_heads=3 does not divide num_attention_heads=4. Use one of 1, 2, 4.",
    ),
    (
        moe(layer_freq=3),
        "run.model.moe.layer_freq=3 leaves none of the num_layers=2 blocks with experts. "
        "Use a layer_freq of at most 2, or remove moe.",
    ),
    (
        moe(layer_freq=2),
        "run.model.ffn_hidden_size is missing, but 1 of 2 blocks have a dense MLP. State its width.",
    ),
    (
        train(target_tokens=100_000),
        "run.train.num_steps, target_tokens, tokens_per_active_param: num_steps and target_tokens given. "
        "State exactly one.",
    ),
    (
        train(num_steps=None),
        "run.train.num_steps, target_tokens, tokens_per_active_param: none of them given. State exactly one.",
    ),
    (
        train(num_steps=None, target_tokens=100),
        "run.train.target_tokens=100 is 100 tokens, less than one step of 128. Raise it, or lower train_batch_size.",
    ),
    (
        launch(num_nodes=2, hostfile="hosts"),
        "run.launch.num_gpus='auto' looks at this machine only, and num_nodes=2. State the number of GPUs per node.",
    ),
    (
        muon(gradient_clipping=1.0),
        "gradient_clipping=1.0 with optimizer.type='Muon': deepspeed 0.19.8 would scale the updates that Muon has "
        "already orthogonalised, not the gradients. Use gradient_clipping=0.",
    ),
    (
        muon(zero_optimization={"stage": 0}, run={"model": {"moe": None, "ffn_hidden_size": 64}}),
        "zero_optimization.stage=0 with optimizer.type='Muon' is not supported. Use 1 or 2.",
    ),
    (
        muon(bf16={"enabled": True}, data_types={"grad_accum_dtype": "fp32"}),
        "data_types.grad_accum_dtype=\"fp32\" with optimizer.type='Muon' and bf16 under ZeRO-1 is refused by deepspeed "
        "0.19.8. Remove it, or use zero_optimization.stage=2.",
    ),
    # without effect
    (
        muon({"muon_lr": 0.02, "adam_lr": 1e-3}),
        "optimizer.params.lr=0.003 has no effect beside muon_lr and adam_lr. Remove it, or one of them.",
    ),
    (
        muon(run={"train": {"router_optimizer": "adamw"}, "model": {"moe": None, "ffn_hidden_size": 64}}),
        "run.train.router_optimizer='adamw' has no effect in a dense model. Remove it.",
    ),
    (
        train(router_optimizer="muon"),
        "run.train.router_optimizer='muon' has no effect with optimizer.type='AdamW'. Remove it, or use "
        "optimizer.type='Muon'.",
    ),
    (
        train(schedule="linear", decay_shape="cosine"),
        "run.train.decay_shape=cosine has no effect with schedule='linear'. Remove it, or use schedule='wsd'.",
    ),
    (
        train(schedule="constant", final_lr_frac=0.1),
        "run.train.final_lr_frac=0.1 has no effect with schedule='constant'. Remove it, or use a schedule that decays.",
    ),
    (
        launch(master_port=80),
        "run.launch.master_port=80: should be greater than or equal to 1024.",
    ),
    # without effect
    (
        launch(hostfile="hosts"),
        "run.launch.hostfile=hosts has no effect with num_nodes=1, which starts ranks on this machine. "
        "Remove it, or state the number of nodes.",
    ),
    (
        launch(num_nodes=1, master_addr="10.0.0.1"),
        "run.launch.master_addr=10.0.0.1 has no effect with num_nodes=1, which starts ranks on this machine. "
        "Remove it, or state the number of nodes.",
    ),
    (
        model(ffn_hidden_size=64),
        "run.model.ffn_hidden_size=64 has no effect: every block has experts (moe.layer_freq=1). "
        "Remove it, or set moe.ffn_hidden_size for the width of an expert.",
    ),
    # routing
    (
        moe(top_k=1, norm_topk_prob=True),
        "run.model.moe.norm_topk_prob=true with top_k=1 divides every gate by itself: it is 1, and the loss does not "
        "reach the router. Use norm_topk_prob=false, or a larger top_k.",
    ),
    (moe(num_groups=3), "run.model.moe.num_groups=3 does not divide num_experts=4. Use one of 1, 2, 4."),
    (
        moe(num_groups=2, top_k_groups=3),
        "run.model.moe.top_k_groups=3 exceeds num_groups=2. Use at most 2.",
    ),
    (
        moe(top_k=3, num_groups=2, top_k_groups=2),
        "run.model.moe.top_k_groups=2 does not divide top_k=3: a group is judged by its top_k / top_k_groups best "
        "experts. Use one of 1, or another top_k.",
    ),
    (
        moe(num_groups=4, top_k_groups=1),
        "run.model.moe.top_k=2 exceeds the 1 experts of top_k_groups=1 of num_groups=4. Use more top_k_groups, or "
        "fewer groups.",
    ),
    (
        moe(score_func="tanh"),
        "run.model.moe.score_func=\"tanh\": should be 'softmax' or 'sigmoid'.",
    ),
    (
        moe(top_k_groups=2),
        "run.model.moe.top_k_groups=2 has no effect with num_groups=1. Remove it, or divide the experts into "
        "num_groups.",
    ),
    (
        moe(capacity_factor=0.0, drop_policy="probability"),
        "run.model.moe.drop_policy=probability has no effect where nothing is dropped. Remove it, or set a "
        "capacity_factor.",
    ),
    (
        moe(capacity_factor=0.0, min_capacity=8),
        "run.model.moe.min_capacity=8 has no effect where nothing is dropped. Remove it, or set a capacity_factor.",
    ),
    (
        moe(bias_update_rate=0.01),
        "run.model.moe.bias_update_rate=0.01 has no effect with balance='aux_loss'. Remove it, or use balance='bias'.",
    ),
    (
        moe(balance="bias", aux_loss_scope="sequence"),
        "run.model.moe.aux_loss_scope=sequence has no effect without an auxiliary loss. Remove it, or set "
        "aux_loss_coeff.",
    ),
    (
        moe(balance="none", aux_loss_scope="global_batch"),
        "run.model.moe.aux_loss_scope=global_batch has no effect without an auxiliary loss. Remove it, or set "
        "aux_loss_coeff.",
    ),
    (
        {"run": {**train(expert_load_every=5)["run"], **model(moe=None, ffn_hidden_size=64)["run"]}},
        "run.train.expert_load_every=5 has no effect without run.model.moe. Remove it, or give the model experts.",
    ),
    (
        moe(balance="none", aux_loss_coeff=0.01),
        "run.model.moe.aux_loss_coeff=0.01 has no effect with balance='none'. Remove it, or use balance='aux_loss'.",
    ),
    (
        train(schedule="cosine", decay_frac=0.1),
        "run.train.decay_frac=0.1 has no effect with schedule='cosine'. Remove it, or use schedule='wsd'.",
    ),
    (
        train(sample_tokens=0, sample_every=5),
        "run.train.sample_every=5 has no effect with sample_tokens=0. Remove it, or ask for tokens.",
    ),
    (
        {"activation_checkpointing": {}},
        "activation_checkpointing is not supported: run.train.activation_checkpointing says what blocks keep. "
        "Remove it.",
    ),
    # not supported
    (
        {"prescale_gradients": True},
        "prescale_gradients=true is not supported: gradients are averaged over the ranks, and ZeRO-1 would ignore it. "
        "Remove it, or use false.",
    ),
    (
        {"bf16": {"enabled": True, "check_grad_overflow": False}},
        "bf16.check_grad_overflow=false is not supported: an update that is not finite would be applied. Remove it, or "
        "use true.",
    ),
    (
        {"bf16": {"enabled": True, "bf16_optimizer_states": True}},
        "bf16.bf16_optimizer_states=true is not supported: the optimizer keeps weights and moments in fp32. Remove it, "
        "or use false.",
    ),
    (
        {"zero_optimization": {"elastic_checkpoint": True}},
        "zero_optimization.elastic_checkpoint=true is not supported: deepspeed 0.19.8 saves with it what it cannot "
        "resume. Remove it, or use false.",
    ),
    (
        {"checkpoint": {"load_universal": True}},
        "checkpoint.load_universal=true is not supported: DeepSpeed's universal checkpoints do not hold experts. "
        "Remove it, or use false.",
    ),
    (
        {"zero_optimization": {"contiguous_gradients": False}},
        "zero_optimization.contiguous_gradients=false is not supported with experts: deepspeed 0.19.8 then trains "
        "shared experts on wrong gradients, or refuses. Remove it.",
    ),
    ({"zero_optimization": {"overlap_comm": "yes"}}, 'zero_optimization.overlap_comm="yes": should be true or false.'),
    ({"steps_per_print": "x"}, 'steps_per_print="x": should be a number of at least 1.'),
    ({"communication_data_type": "float99"}, "communication_data_type=\"float99\": should be 'fp32' or 'bf16'."),
    (
        {"data_types": {"grad_accum_dtype": "bf16"}},
        'data_types.grad_accum_dtype="bf16": gradients of a run in fp32 are accumulated in fp32. Remove it, or use '
        "bf16.",
    ),
    (
        {"scheduler": {"type": "WarmupLR"}},
        'scheduler.type="WarmupLR" has no place here: run.train.schedule sets the learning rate. '
        "Remove the scheduler section.",
    ),
    ({"optimizer": {"type": "Adam"}}, "optimizer.type=\"Adam\" is not supported. Use 'AdamW' or 'Muon'."),
    ({"fp16": {"enabled": True}}, "fp16.enabled=true is not supported. Use bf16, or neither for fp32."),
    (
        {"expert_parallel": {"enabled": True}},
        "expert_parallel.enabled=true is not supported. That is DeepSpeed's AutoEP; set run.launch.ep_size and "
        "run.model.moe instead.",
    ),
]


@pytest.mark.parametrize(("patch", "error"), WRONG, ids=lambda value: json.dumps(value) if type(value) is dict else "")
def test_a_wrong_file_is_refused_in_one_line(tmp_path: Path, patch: dict[str, Any], error: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        load(tmp_path, patch)
    assert str(refusal.value) == error
    assert "\n" not in error


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("", "run.json line 1, column 1: Expecting value. Fix the JSON."),
        ('{"a": 1,\n "b" 2}', "run.json line 2, column 6: Expecting ':' delimiter. Fix the JSON."),
        ("[1]", "run.json: holds a list, not an object. A run file is one JSON object."),
        (
            '{"run": {"train": {"seed": 1, "seed": 2}}}',
            "run.json: the key 'seed' stands twice in one object. Remove one of them.",
        ),
        ('{"gradient_clipping": NaN}', "run.json: NaN is not a finite number. Write one."),
        ('{"gradient_clipping": -Infinity}', "run.json: -Infinity is not a finite number. Write one."),
        ('{"gradient_clipping": 1e999}', "run.json: 1e999 is not a finite number. Write one."),
        ('{"base": 7}', "base=7 in run.json is not a path. Name another run file, relative to this one."),
        ("{}", "run is missing: a moelab run file needs a `run` section beside DeepSpeed's keys. See ds_configs/."),
    ],
)
def test_a_file_that_is_not_a_run_file_is_refused_in_one_line(tmp_path: Path, text: str, error: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        load_run(write(tmp_path / "run.json", text))
    assert str(refusal.value) == error


def test_a_file_that_cannot_be_read_is_refused_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as refusal:
        load_run(tmp_path)
    assert str(refusal.value) == f"{tmp_path}: cannot be read (Is a directory). Name a run file, a JSON file."

    (tmp_path / "run.json").write_bytes(b'{"a": "\xff"}')
    with pytest.raises(ConfigError) as refusal:
        load_run(tmp_path / "run.json")
    assert str(refusal.value) == "run.json: not UTF-8 text at byte 7. Save it as UTF-8."


def test_null_for_a_section_of_deepspeed_is_refused_where_no_base_can_take_it_away(tmp_path: Path) -> None:
    path = write(tmp_path / "run.json", {**VALID, "zero_optimization": None})
    with pytest.raises(ConfigError) as refusal:
        load_run(path)
    assert str(refusal.value) == "zero_optimization=null: should be an object. Remove it, or write {...}."


def test_a_misspelt_key_is_refused_before_torch_is_imported(tmp_path: Path) -> None:
    path = write(tmp_path / "run.json", merge_patch(VALID, {"gradient_cliping": 1.0}))
    script = f"""
import sys
from launch.run_config import load_run
from model.config import ConfigError
try:
    load_run({str(path)!r})
except ConfigError as error:
    print(error)
print([name for name in ("torch", "deepspeed", "wandb", "numpy") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=REPO_ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["gradient_cliping is not a known key. Did you mean gradient_clipping?", "[]"]
