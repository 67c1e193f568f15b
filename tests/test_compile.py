"""Compiling and exporting: generation, a forward pass, a training step. Inductor is left out: it takes its time."""

from __future__ import annotations

import pytest
import torch
import transformers
from conftest import compat, lacks, needs_sdpa, random_ids, sampled, tiny_model

pytestmark = pytest.mark.skipif(not hasattr(torch, "compiler"), reason="needs the compiler of torch 2.1")
CompileConfig = getattr(transformers, "CompileConfig", None)
NTK_LOGN = {"use_dynamic_ntk": True, "use_logn_attn": True}
GREEDY = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "max_new_tokens": 6}


class Graphs:
    """A backend that runs what it is given as it is, and counts it."""

    def __init__(self):
        self.number = 0

    def __call__(self, graph, inputs, **kwargs):
        self.number += 1
        return graph


@pytest.fixture
def graphs():
    torch._dynamo.reset()
    return Graphs()


def test_generation_with_a_static_cache_compiles_once(graphs):
    """Prompts of other lengths, NTK scales and padding, and sampling, go through the graph that the first one made."""
    if CompileConfig is None or "_compile_all_devices" not in vars(CompileConfig):
        lacks("does not compile generation on a CPU")
    model = tiny_model(**NTK_LOGN)
    config = CompileConfig(backend=lambda *args, **kwargs: graphs(*args, **kwargs), mode=None, fullgraph=True)
    config._compile_all_devices = True
    # Up to 4.52 the mask grows with every token: a second graph is for masks of any length.
    number = 1 if compat.masking_utils is not None else 2
    for length, padding in ((100, 0), (40, 3), (20, 0), (70, 30)):
        ids = random_ids(2, length, seed=length)
        mask = torch.ones_like(ids)
        mask[0, :padding] = 0
        expected = model.generate(ids, attention_mask=mask, **GREEDY)
        output = model.generate(
            ids, attention_mask=mask, cache_implementation="static", compile_config=config, **GREEDY
        )
        assert torch.equal(output, expected)
        assert graphs.number == number
    sampling = {**GREEDY, "do_sample": True}
    model.generate(ids, attention_mask=mask, cache_implementation="static", compile_config=config, **sampling)
    assert graphs.number == number


@pytest.mark.slow
@pytest.mark.parametrize("strict", sampled([False, True]))
@pytest.mark.parametrize("attention", ["eager", pytest.param("sdpa", marks=needs_sdpa)])
def test_exported_forward_for_batches_of_any_size(attention, strict, monkeypatch):
    if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 9):
        pytest.skip("needs torch 2.9 or so: 2.8 can't export masks that are made by vmap")
    model = tiny_model(attn_implementation=attention, num_hidden_layers=2, **NTK_LOGN)
    size = {0: torch.export.Dim("batch", max=8), 1: torch.export.Dim("tokens", min=2, max=512)}
    example = {"input_ids": random_ids(2, 40), "attention_mask": torch.ones(2, 40, dtype=torch.long)}
    shapes = {**dict.fromkeys(example, size), "use_cache": None}
    arguments = {**example, "use_cache": False}
    with torch.no_grad():
        program = torch.export.export(model, (), arguments, dynamic_shapes=shapes, strict=strict).module()
        for batch, length, padding in ((2, 40, 0), (3, 70, 11), (1, 9, 0)):
            ids = random_ids(batch, length)
            mask = torch.ones_like(ids)
            mask[0, :padding] = 0
            logits = program(input_ids=ids, attention_mask=mask, use_cache=False).logits
            torch.testing.assert_close(logits, model(ids, attention_mask=mask).logits)


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", sampled([True, False]))
@pytest.mark.parametrize("attention", ["eager", pytest.param("sdpa", marks=needs_sdpa)])
def test_training_step_is_one_graph_and_stays_it(attention, checkpointing):
    model = tiny_model(attn_implementation=attention, num_hidden_layers=2, **NTK_LOGN).train()
    if checkpointing:
        model.gradient_checkpointing_enable()
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(3):
        ids = random_ids(2, 40, seed=step)
        mask = torch.ones_like(ids)
        mask[0, 40 - 5 * step :] = 0
        batch = {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}
        gradients, losses = [], []
        for forward in (model, compiled):
            optimizer.zero_grad()
            loss = forward(**batch).loss
            loss.backward()
            losses.append(loss.detach())
            gradients.append([p.grad.clone() for p in model.parameters()])
        torch.testing.assert_close(*losses)
        for eager, ours in zip(*gradients):
            torch.testing.assert_close(ours, eager, rtol=1e-4, atol=1e-6)
        optimizer.step()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
