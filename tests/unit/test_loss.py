"""Cross-entropy in chunks: plain's value and gradients, without the logits of all tokens ever being in memory."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from itertools import pairwise
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from launch.run_config import REPO_ROOT, load_run
from model import loss
from model.config import ConfigError, CrossEntropy
from model.data import IGNORED_TARGET
from model.gpt import GPT
from model.loss import chunked, liger, plain, refuse_cross_entropy

CHUNK = 8
T, D, V = 4 * CHUNK, 16, 50
UPSTREAM = 1 / 3  # what comes from above, as with three micro-steps; not a power of two


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss, "CROSS_ENTROPY_CHUNK", CHUNK)


def inputs(num_tokens: int = T, dtype: torch.dtype = torch.float32, vocab: int = V) -> tuple[Tensor, Tensor, Tensor]:
    """x, weight and targets; one chunk and a half are ignored, a whole chunk among them."""
    generator = torch.Generator().manual_seed(0)
    x_TD = torch.randn(num_tokens, D, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    weight_VD = torch.randn(vocab, D, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    targets_T = torch.randint(0, vocab, (num_tokens,), generator=generator)
    targets_T[CHUNK : 2 * CHUNK + CHUNK // 2] = IGNORED_TARGET
    return x_TD, weight_VD, targets_T


def value_and_gradients(way: Any, *case: Tensor, softcap: float | None) -> tuple[Tensor, Tensor, Tensor]:
    x_TD, weight_VD, targets_T = case
    value = way(x_TD, weight_VD, targets_T, softcap)
    return value.detach(), *torch.autograd.grad(value * UPSTREAM, (x_TD, weight_VD))


# --- equal to plain -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("num_tokens", [T, T + 3, CHUNK - 1])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-14), (torch.float32, 1e-6)])
def test_chunks_give_plains_value_and_gradients_to_rounding(
    dtype: torch.dtype, tolerance: float, num_tokens: int, softcap: float | None
) -> None:
    case = inputs(num_tokens, dtype)
    expected = value_and_gradients(plain, *case, softcap=softcap)
    for found, wanted in zip(value_and_gradients(chunked, *case, softcap=softcap), expected, strict=True):
        assert found.dtype == wanted.dtype
        torch.testing.assert_close(found, wanted, rtol=10 * tolerance, atol=tolerance * wanted.abs().max().item())


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_in_bf16_a_gradient_is_four_roundings_away_from_that_of_the_same_logits_in_fp32(softcap: float | None) -> None:
    """A gradient is a sum of products. Rounded to bf16, by a factor of 1 +- 2**-8 at the most, are one factor of each
    product, the sum of a chunk, that of all chunks, and what the upstream gradient makes of it."""
    x_TD, weight_VD, targets_T = inputs(dtype=torch.bfloat16)
    value, *gradients = value_and_gradients(chunked, x_TD, weight_VD, targets_T, softcap=softcap)
    torch.testing.assert_close(value, plain(x_TD, weight_VD, targets_T, softcap))  # in fp32, from the same logits

    x_TD, weight_VD = x_TD.detach().float(), weight_VD.detach().float()
    logits_TV = (x_TD @ weight_VD.t()).bfloat16().float().requires_grad_()
    total = F.cross_entropy(loss.bend(logits_TV, softcap), targets_T, ignore_index=IGNORED_TARGET)
    (grad_TV,) = torch.autograd.grad(total * UPSTREAM, logits_TV)
    for found, left, right in zip(gradients, (grad_TV, grad_TV.t()), (weight_VD, x_TD), strict=True):
        assert found.dtype == torch.bfloat16
        assert ((found - left @ right).abs() <= 4 * 2**-8 * (left.abs() @ right.abs())).all()


def test_the_weights_gradient_is_summed_over_chunks_in_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    """512 equal terms of which a sum in bf16 takes 256: then a term is half of the last bit."""
    monkeypatch.setattr(loss, "CROSS_ENTROPY_CHUNK", 1)
    x_TD, weight_VD = torch.ones(512, 1, dtype=torch.bfloat16), torch.zeros(2, 1, dtype=torch.bfloat16)
    weight_VD.requires_grad_()
    chunked(x_TD, weight_VD, torch.zeros(512, dtype=torch.int64), None).backward()
    assert weight_VD.grad is not None
    assert weight_VD.grad.tolist() == [[-0.5], [0.5]]


@pytest.mark.parametrize("way", [plain, chunked])
def test_without_any_target_the_loss_and_its_gradients_are_zero(way: Any) -> None:
    x_TD, weight_VD, targets_T = inputs()
    for part in value_and_gradients(way, x_TD, weight_VD, torch.full_like(targets_T, IGNORED_TARGET), softcap=3.0):
        assert not part.any()


@pytest.mark.parametrize("way", [plain, chunked])
def test_a_target_outside_the_vocabulary_is_an_error(way: Any) -> None:
    x_TD, weight_VD, targets_T = inputs()
    targets_T[-1] = V
    with pytest.raises(IndexError):
        way(x_TD, weight_VD, targets_T, None)


def gradients_of_a_model(cross_entropy: CrossEntropy, *settings: str) -> dict[str, Tensor]:
    """All gradients after two accumulated micro-batches, blocks recomputed, with an auxiliary loss that counts."""
    run = load_run(REPO_ROOT / "ds_configs" / "moe_tiny.json", ["run.model.moe.aux_loss_coeff=0.5", *settings])
    model = GPT(run.model, seed=3, activation_checkpointing="block", cross_entropy=cross_entropy)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, 0.0, 0.2, generator=generator)
    for _ in range(2):
        tokens = torch.randint(0, run.model.vocab_size, (2, 33), generator=generator)
        total, _ = model(tokens[:, :-1], tokens[:, 1:])
        (total / 2).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize("settings", [(), ("run.model.tie_embeddings=true", "run.model.logit_softcap=2.0")], ids=str)
def test_every_parameter_of_a_model_gets_plains_gradient(settings: tuple[str, ...]) -> None:
    expected, found = (gradients_of_a_model(way, *settings) for way in ("plain", "chunked"))
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(
            found[name], gradient, rtol=1e-4, atol=1e-7, msg=lambda text, name=name: f"{name}: {text}"
        )


def test_compiled_the_function_is_one_graph_with_the_same_results() -> None:
    case = inputs()
    compiled = torch.compile(chunked, backend="aot_eager", fullgraph=True)
    expected = value_and_gradients(chunked, *case, softcap=3.0)
    for found, wanted in zip(value_and_gradients(compiled, *case, softcap=3.0), expected, strict=True):
        torch.testing.assert_close(found, wanted)


# --- memory ---------------------------------------------------------------------------------------------------------


class Watch(TorchDispatchMode):
    """Remembers the shapes of all results, counts operators, and tracks the memory that they made and still hold."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: set[tuple[int, ...]] = set()
        self.matrix_products = 0
        self.made: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = func(*args, **(kwargs or {}))
        self.matrix_products += func is torch.ops.aten.mm.default
        given = {leaf.untyped_storage()._cdata for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        for leaf in tree_leaves(results):
            if isinstance(leaf, Tensor):
                storage = leaf.untyped_storage()
                self.shapes.add(tuple(leaf.shape))
                if storage._cdata not in given:
                    self.made[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        in_use = sum(size for reference, size in self.made.values() if not reference.expired())
        self.peak = max(self.peak, in_use)
        return results


def watch(way: Any, num_tokens: int, softcap: float | None = 3.0) -> Watch:
    x_TD, weight_VD, targets_T = inputs(num_tokens, vocab=512)
    with Watch() as watched:
        way(x_TD, weight_VD, targets_T, softcap).backward()
    return watched


def test_no_tensor_holds_the_logits_of_more_than_one_chunk() -> None:
    def most_logits(way: Any) -> int:
        sizes = (shape for shape in watch(way, 16 * CHUNK).shapes if 512 in shape and shape not in weight_shapes)
        return max(torch.Size(shape).numel() for shape in sizes)

    weight_shapes = {(512, D), (D, 512)}
    assert most_logits(chunked) == CHUNK * 512
    assert most_logits(plain) == 16 * CHUNK * 512, "a test that cannot see all logits proves nothing"


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_another_chunk_takes_no_more_memory_than_its_hidden_states(
    softcap: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a chunk held is gone before the next. Its logits, 32 times its hidden states, are the largest tensors."""
    monkeypatch.setattr(loss, "CROSS_ENTROPY_CHUNK", 64)
    peaks = [watch(chunked, chunks * 64, softcap).peak for chunks in (1, 2, 3)]
    for before, after in pairwise(peaks):
        assert after - before <= 2 * 4 * 64 * D, "the gradient of x, and a few numbers for each token"


def test_without_gradients_only_the_loss_is_computed() -> None:
    x_TD, weight_VD, targets_T = inputs()
    with torch.no_grad(), Watch() as watched:
        value = chunked(x_TD, weight_VD, targets_T, None)
    assert watched.matrix_products == T // CHUNK, "the logits of each chunk, and no gradient"
    torch.testing.assert_close(value, plain(x_TD, weight_VD, targets_T, None))


# --- liger ----------------------------------------------------------------------------------------------------------


def test_liger_gets_its_arguments_in_the_order_of_its_release(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in with the parameters of liger-kernel 0.8.5's function, in their order, and plain's arithmetic."""

    class StandIn:
        @staticmethod
        def apply(
            _input: Tensor,
            weight: Tensor,
            target: Tensor,
            bias: Tensor | None = None,
            ce_weight: Tensor | None = None,
            ignore_index: int = -100,
            lse_square_scale: float = 0.0,
            label_smoothing: float = 0.0,
            reduction: str = "mean",
            softcap: float | None = None,
            return_z_loss: bool = False,
            accum_dtype: torch.dtype | None = None,
        ) -> tuple[Tensor, None, None, None]:
            assert (bias, ce_weight, lse_square_scale, return_z_loss) == (None, None, 0.0, False)
            assert accum_dtype == torch.float32
            logits = F.linear(_input, weight)
            logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
            value = F.cross_entropy(
                logits, target, ignore_index=ignore_index, reduction=reduction, label_smoothing=label_smoothing
            )
            return value, None, None, None

    module = ModuleType("liger_kernel.ops")
    module.LigerFusedLinearCrossEntropyFunction = StandIn  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "liger_kernel", ModuleType("liger_kernel"))
    monkeypatch.setitem(sys.modules, "liger_kernel.ops", module)
    for softcap in (None, 3.0):
        expected = value_and_gradients(plain, *inputs(), softcap=softcap)
        for found, wanted in zip(value_and_gradients(liger, *inputs(), softcap=softcap), expected, strict=True):
            torch.testing.assert_close(found, wanted)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="liger-kernel needs a GPU")
@pytest.mark.skipif(find_spec("liger_kernel") is None, reason="liger-kernel is not installed: extra gpu")
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_liger_gives_plains_value_and_gradients(softcap: float | None) -> None:
    case = [part.detach().cuda() for part in inputs()]
    case[:2] = [part.requires_grad_() for part in case[:2]]
    expected = value_and_gradients(plain, *case, softcap=softcap)
    for found, wanted in zip(value_and_gradients(liger, *case, softcap=softcap), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)


def test_liger_is_refused_where_it_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss, "find_spec", lambda name: None)
    refuse_cross_entropy("chunked", on_gpu=False)
    refuse_cross_entropy("plain", on_gpu=True)
    with pytest.raises(ConfigError) as refusal:
        refuse_cross_entropy("liger", on_gpu=False)
    assert str(refusal.value) == (
        "run.train.cross_entropy='liger' has kernels for GPUs only, and this run is on the CPU. Use 'chunked'."
    )
    with pytest.raises(ConfigError) as refusal:
        refuse_cross_entropy("liger", on_gpu=True)
    assert str(refusal.value) == (
        "run.train.cross_entropy='liger' needs liger-kernel, which is not installed. "
        "Run pip install -c constraints.txt -e '.[gpu]', or use 'chunked'."
    )
    monkeypatch.setattr(loss, "find_spec", lambda name: object())
    refuse_cross_entropy("liger", on_gpu=True)
