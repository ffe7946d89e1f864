"""Weights of 8 and 4 bits: how near they are, and that rows stay their own."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from services.inference.worker import linears, packed
from tests.inference import rows_kit as kit

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """Tests run side by side; threads that wait for one another awake would fill every core."""
    torch.set_num_threads(1)


@pytest.mark.parametrize(("kind", "near"), [(packed.Int8, 0.02), (packed.Int4, 0.12)])
def test_products_are_near_those_of_plain_weights(kind: Any, near: float) -> None:
    with torch.no_grad():
        torch.manual_seed(0)
        plain = nn.Linear(128, 192, bias=True)
        small = kind(plain.weight.data, plain.bias)
        x = torch.randn(9, 128)
        wanted = plain(x)
        assert float((small(x) - wanted).norm() / wanted.norm()) < near
        assert float((small.dequantized - plain.weight).norm() / plain.weight.norm()) < near
        torch.testing.assert_close(small(x[None])[0], small(x))
        held = sum(b.nbytes for b in small.buffers())
        assert held < plain.weight.nbytes / (3.5 if kind is packed.Int8 else 6)


@pytest.mark.parametrize("kind", [packed.Int8, packed.Int4])
def test_a_row_is_not_changed_by_its_neighbours(kind: Any) -> None:
    with torch.no_grad():
        torch.manual_seed(0)
        small = kind(torch.randn(64, 128), None)
        x = torch.randn(5, 128)
        x[3] *= 1000
        torch.testing.assert_close(small(x)[0], small(x[:1])[0], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("tokens", [1, 8, 9, 128, 129])
def test_8_bits_are_near_whatever_the_number_of_tokens(tokens: int) -> None:
    with torch.no_grad():
        torch.manual_seed(0)
        plain = nn.Linear(128, 192, bias=True)
        small = packed.Int8(plain.weight.data, plain.bias)
        x = torch.randn(tokens, 128)
        assert float((small(x) - plain(x)).norm() / plain(x).norm()) < 0.02


def test_nf4_gives_the_same_in_both_of_its_forms() -> None:
    bnb = pytest.importorskip("bitsandbytes")
    if not bnb.functional.has_avx512bf16():
        pytest.skip("this processor has no products for the second form")
    with torch.no_grad():
        torch.manual_seed(0)
        module = bnb.nn.Linear4bit(128, 192, bias=True, compute_dtype=torch.bfloat16, quant_type="nf4")
        module = module.to(torch.bfloat16).to("cpu").eval()
        module.support_avx512bf16_for_cpu = False
        module(torch.randn(1, 128, dtype=torch.bfloat16))
        whole = nn.Module()
        whole.inner = module
        packed.twice(whole)
        assert isinstance(whole.inner, packed.Nf4)
        x = torch.randn(40, 128, dtype=torch.bfloat16)
        many = whole.inner(x)
        few = torch.cat([whole.inner(x[n : n + 10]) for n in range(0, 40, 10)])
        assert float((few - many).float().norm() / many.float().norm()) < 0.01
        wanted = x.float() @ whole.inner.dequantized.float().t() + module.bias.float()
        assert float((few.float() - wanted).norm() / wanted.norm()) < 0.01


def test_joined_modules_are_the_modules_side_by_side() -> None:
    with torch.no_grad():
        torch.manual_seed(0)
        parts = [packed.Int8(torch.randn(n, 128), torch.randn(n)) for n in (64, 32, 32)]
        x = torch.randn(7, 128)
        wanted = torch.cat([part(x) for part in parts], -1)
        torch.testing.assert_close(linears.of(parts)(x), wanted)
        torch.testing.assert_close(torch.cat([part(x) for part in parts], -1), wanted)
        assert parts[1].quantized.untyped_storage().data_ptr() == parts[0].quantized.untyped_storage().data_ptr()


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("family", ["Llama", "Phi", "GPTNeoX"])
def test_a_packed_model_answers_with_its_adapters(family: str, bits: int) -> None:
    """Near the plain model in likelihood, and an adapter beside it counts as it should."""
    with torch.no_grad():
        adapters = {"ada": kit.with_adapter(family, 1)}
        model = kit.tiny(family)
        plain = {"": model, "ada": adapters["ada"]}
        prompt = kit.prompt_of(2, 60)
        sure = {name: torch.log_softmax(m(input_ids=torch.tensor([prompt])).logits[0], -1) for name, m in plain.items()}
        small = kit.tiny(family).to(torch.bfloat16)
        packed.pack(small, bits)
        assert any(isinstance(m, packed.Int4 if bits == 4 else packed.Int8) for m in small.modules())
        made = kit.engine(small, adapters)
        calls = {name: made.score(prompt, name) for name in plain}
        made.run()
        for name, call in calls.items():
            (scored,) = made.said(call, "scored")
            own = torch.tensor([t.log_probability for t in scored.tokens[1:]])
            wanted = sure[name][torch.arange(59), torch.tensor(prompt[1:])]
            other = sure["ada" if name == "" else ""][torch.arange(59), torch.tensor(prompt[1:])]
            assert float((own - wanted).abs().mean()) < 0.5 * float((own - other).abs().mean())


@pytest.mark.parametrize("kind", [packed.Int8, packed.Int4])
def test_modules_that_read_the_same_are_one_product_and_keep_their_parts(kind: Any) -> None:
    with torch.no_grad():
        torch.manual_seed(0)
        parts = [kind(torch.randn(outs, 128), torch.randn(outs)) for outs in (64, 192, 128)]
        for tokens in (1, 5, 200):
            x = torch.randn(tokens, 128)
            apart = torch.cat([part(x) for part in parts], dim=-1)
            together = linears.of(parts)(x)
            torch.testing.assert_close(together, apart, rtol=1e-2, atol=1e-2 * float(apart.abs().max()))
            torch.testing.assert_close(torch.cat([part(x) for part in parts], dim=-1), apart)
            parts = [kind(part.dequantized, part.bias) for part in parts]


def test_weights_of_4_bits_made_plain_are_those_of_the_kernel() -> None:
    with torch.no_grad():
        torch.manual_seed(0)
        small = packed.Int4(torch.randn(192, 128), None)
        if not packed._has_known_layout():
            pytest.skip("this processor's kernel has a layout of its own")
        torch.testing.assert_close(small.plain().float().t(), small.dequantized, rtol=1e-2, atol=1e-2)
        x = torch.randn(300, 128)
        few = torch.cat([small(x[n : n + 10]) for n in range(0, 300, 10)])
        torch.testing.assert_close(small(x), few, rtol=0.02, atol=0.02 * float(few.abs().max()))


def test_the_second_form_of_nf4_is_that_of_the_library() -> None:
    bnb = pytest.importorskip("bitsandbytes")
    weight = torch.randn(96, 256, generator=torch.Generator().manual_seed(0)).bfloat16()
    for nested in (False, True):
        data, state = bnb.functional.quantize_4bit(weight, blocksize=64, compress_statistics=nested, quant_type="nf4")
        theirs, their_state = bnb.functional._convert_weight_packed_for_cpu(data, copy.deepcopy(state))
        assert torch.equal(packed._bytes_for_few(data, (96, 256)), theirs)
        ours = packed._state_for_few(state)
        assert torch.equal(ours.absmax, their_state.absmax) and ours.dtype == their_state.dtype
        assert ours.nested is their_state.nested is False and state.nested is nested
