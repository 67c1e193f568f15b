"""What a generation remembers follows its rows, its cache and its conversation: NTK scales, beams, offloading."""

from __future__ import annotations

import copy
import importlib
import pickle

import pytest
import torch
import transformers
from conftest import compat, lacks, modeling_qwen, random_ids, tiny_model
from qwen.transformers_compat import DynamicCache
from transformers import GenerationConfig

QWenCache = importlib.import_module("qwen.qwen_cache").QWenCache
NTK_LOGN = {"seq_length": 16, "use_dynamic_ntk": True, "use_logn_attn": True}
LENGTHS = (12, 24, 40)  # rows on both sides of the training context: scales 1, 3 and 7


def padded_prompt():
    width = max(LENGTHS)
    ids = random_ids(3, width)
    mask = (torch.arange(width) >= width - torch.tensor(LENGTHS)[:, None]).long()
    return ids, mask


def alone(model, row: int, ids, new) -> torch.Tensor:
    """Logits of the new tokens behind a row without its padding."""
    cache = DynamicCache()
    with torch.no_grad():
        model(ids[row : row + 1, -LENGTHS[row] :], past_key_values=cache)
        return model(new, past_key_values=cache).logits


@pytest.mark.parametrize("make", [DynamicCache, QWenCache])
@pytest.mark.parametrize(
    "way", ["reorder_cache", "batch_select_indices", "batch_repeat_interleave", "deepcopy", "pickle"]
)
def test_the_ntk_scale_follows_the_rows_of_a_cache(make, way):
    model, (ids, mask) = tiny_model(**NTK_LOGN), padded_prompt()
    cache = make()
    with torch.no_grad():
        model(ids, attention_mask=mask, past_key_values=cache)
    rows = torch.tensor([2, 0, 0, 1])
    if way == "reorder_cache":
        rows = torch.tensor([2, 0, 1])
        cache.reorder_cache(rows)
    elif way in ("deepcopy", "pickle"):
        rows = torch.arange(3)
        other = copy.deepcopy(cache) if way == "deepcopy" else pickle.loads(pickle.dumps(cache))
        cache.ntk_alpha.fill_(99)
        cache = other
    elif not hasattr(make, way):
        lacks(f"has no {way} of caches")
    elif way == "batch_select_indices":
        cache.batch_select_indices(rows)
    else:
        cache.batch_repeat_interleave(2)
        rows = torch.tensor([0, 0, 1, 1, 2, 2])
    new = random_ids(len(rows), 1, seed=1)
    longer = torch.cat((mask[rows], torch.ones(len(rows), 1, dtype=torch.long)), 1)
    with torch.no_grad():
        logits = model(new, attention_mask=longer, past_key_values=cache).logits
    for i, row in enumerate(rows.tolist()):
        torch.testing.assert_close(logits[i : i + 1], alone(model, row, ids, new[i : i + 1]), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("make", [DynamicCache, QWenCache])
@pytest.mark.parametrize("emptied", ["reset", "crop"])
def test_an_emptied_cache_has_no_scale(make, emptied):
    """A prompt of 40 tokens, then one of 12: scales 7 and 1."""
    if emptied == "reset" and not hasattr(make, "reset"):
        lacks("has no reset of caches")
    model, cache = tiny_model(**NTK_LOGN), make()
    ids = random_ids(1, 40)
    with torch.no_grad():
        model(ids, past_key_values=cache)
        if emptied == "crop":
            compat.crop_cache(cache, 0)
        else:
            cache.reset()
            if cache.get_seq_length():
                lacks("keeps the length of a cache that was reset")
        for part, expected in zip(ids[:, :14].split((12, 2), 1), model(ids[:, :14]).logits.split((12, 2), 1)):
            found = model(part, past_key_values=cache).logits
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("make", [DynamicCache, QWenCache])
def test_contrastive_search_of_padded_rows(make):
    """It repeats and selects the rows of its cache at every step."""
    if not any(hasattr(transformers.GenerationMixin, name) for name in ("contrastive_search", "_contrastive_search")):
        lacks("has no contrastive search of its own")
    if not compat.DRAFTS_CROP_CACHES:
        lacks("slices the tensors of a cache itself in contrastive search, and compares with padding")
    model, (ids, mask) = tiny_model(**NTK_LOGN), padded_prompt()
    settings = {"max_new_tokens": 6, "penalty_alpha": 0.6, "top_k": 3, "eos_token_id": None, "pad_token_id": 0}
    together = model.generate(ids, attention_mask=mask, past_key_values=make(), **settings)
    for row, length in enumerate(LENGTHS):
        single = ids[row : row + 1, -length:]
        found = model.generate(single, attention_mask=torch.ones_like(single), past_key_values=make(), **settings)
        assert together[row, ids.shape[1] :].tolist() == found[0, length:].tolist()


def test_packed_rows_have_scales_of_their_own():
    """As DataCollatorWithFlattening tells them: by positions alone."""
    if compat.masking_utils is None:
        lacks("has no packed rows")
    model, (ids, _) = tiny_model(attn_implementation="eager", **NTK_LOGN), padded_prompt()
    rows = [ids[row : row + 1, -length:] for row, length in enumerate(LENGTHS)]
    packed = torch.cat(rows, 1)
    position_ids = torch.cat([torch.arange(length) for length in LENGTHS])[None]
    mask = torch.block_diag(*(torch.ones(n, n).tril() for n in LENGTHS)).bool()[None, None]
    with torch.no_grad():
        expected = torch.cat([model(row).logits for row in rows], 1)
        for arguments in ({"use_cache": False}, {}):
            found = model(packed, position_ids=position_ids, attention_mask=mask, **arguments).logits
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("beams", [1, 3])
def test_without_a_cache_the_scale_is_that_of_the_prompt(beams):
    """A prompt of 14 tokens grows over the training context of 16 while it is generated."""
    model = tiny_model(**NTK_LOGN)
    ids = random_ids(2, 14)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    settings = {"max_new_tokens": 24, "do_sample": False, "num_beams": beams, "eos_token_id": None, "pad_token_id": 0}
    with_cache = model.generate(ids, attention_mask=mask, **settings)
    assert model.generate(ids, attention_mask=mask, use_cache=False, **settings).tolist() == with_cache.tolist()


@pytest.mark.parametrize("given", ["mask", "inferred"])
def test_padding_does_not_count_for_the_scale_of_a_generation(given):
    model = tiny_model(**NTK_LOGN)
    ids = random_ids(2, 30)
    ids[ids == 0] = 1
    ids[0, :20] = 0  # a row of 10 tokens, one of 30
    arguments = {"attention_mask": (ids != 0).long()} if given == "mask" else {}
    settings = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    for use_cache in (True, False):
        batch = model.generate(ids, use_cache=use_cache, **arguments, **settings)[:, 30:]
        single = model.generate(ids[:1, 20:], attention_mask=torch.ones(1, 10), **settings)[:, 10:]
        assert batch[0].tolist() == single[0].tolist()


def test_a_prompt_in_pieces_takes_the_scale_that_is_passed():
    model = tiny_model(**NTK_LOGN)
    ids = random_ids(2, 60)
    alpha = modeling_qwen.ntk_alpha(torch.tensor([60, 60]), 16)
    for cache in (DynamicCache(), QWenCache()):
        with torch.no_grad():
            expected = model(ids).logits
            first = model(ids[:, :20], past_key_values=cache, ntk_alpha=alpha).logits
            rest = [model(part, past_key_values=cache).logits for part in ids[:, 20:].split(20, 1)]
        torch.testing.assert_close(torch.cat((first, *rest), 1), expected, rtol=1e-4, atol=1e-4)


@pytest.fixture
def chatting(demo_tokenizer):
    model = tiny_model(vocab_size=len(demo_tokenizer), seq_length=64)
    model.generation_config = GenerationConfig(chat_format="chatml", max_new_tokens=6, do_sample=False)
    return model, demo_tokenizer


def test_a_conversation_goes_on_behind_beams(chatting):
    model, tokenizer = chatting

    def stopped(input_ids, scores):
        raise RuntimeError("stopped")

    history, cache = [], DynamicCache()
    for query in ("hi", "你好", "What?"):
        expected, _ = model.chat(tokenizer, query, history, num_beams=4)
        response, again = model.chat(tokenizer, query, history, num_beams=4, past_key_values=cache)
        assert response == expected
        with pytest.raises(RuntimeError, match="stopped"):
            model.chat(tokenizer, "?", again, num_beams=4, past_key_values=cache, logits_processor=[stopped])
        plain, _ = model.chat(tokenizer, "and?", again)
        assert model.chat(tokenizer, "and?", again, past_key_values=copy.deepcopy(cache))[0] == plain
        history = again


@pytest.mark.parametrize("emptied", ["reset", "crop"])
def test_a_conversation_begins_again_with_an_emptied_cache(chatting, emptied):
    model, tokenizer = chatting
    cache = QWenCache()
    _, history = model.chat(tokenizer, "hi", None, past_key_values=cache)
    if emptied == "reset":
        cache.reset()
    else:
        compat.crop_cache(cache, 0)
    expected, _ = model.chat(tokenizer, "and?", history)
    assert model.chat(tokenizer, "and?", history, past_key_values=cache)[0] == expected


def test_a_conversation_goes_on_with_a_shortened_cache(chatting):
    model, tokenizer = chatting
    cache = QWenCache()
    _, history = model.chat(tokenizer, "hi", None, past_key_values=cache)
    compat.crop_cache(cache, 5)
    expected, _ = model.chat(tokenizer, "and?", history)
    assert model.chat(tokenizer, "and?", history, past_key_values=cache)[0] == expected


def test_chat_with_an_offloaded_embedding(chatting):
    accelerate = importlib.import_module("accelerate")
    model, tokenizer = chatting
    expected = model.chat(tokenizer, "hi", None)[0]
    offloaded = accelerate.cpu_offload(copy.deepcopy(model), execution_device=torch.device("cpu"))
    assert offloaded.transformer.wte.weight.device.type == "meta"
    assert offloaded.chat(tokenizer, "hi", None)[0] == expected
    assert list(offloaded.chat_stream(tokenizer, "hi", None))[-1] == expected


def test_what_a_cache_hands_out_stays_what_it_was():
    model = tiny_model()
    ids = random_ids(1, 20)
    cache = QWenCache()
    with torch.no_grad():
        model(ids[:, :15], past_key_values=cache)
        held = [*cache[1], *cache.to_legacy_cache()[2]]
        before = [tensor.clone() for tensor in held]
        compat.crop_cache(cache, 5)
        model(ids[:, 15:], past_key_values=cache)
    assert all(map(torch.equal, held, before))


def test_tied_embeddings(tmp_path):
    """For people who train small models: one matrix, in the model and in the file, through saving and loading."""
    config = tiny_model(tie_word_embeddings=True).config
    model = modeling_qwen.QWenLMHeadModel(copy.deepcopy(config)).eval()
    assert model.lm_head.weight is model.transformer.wte.weight
    model(random_ids(1, 8), labels=random_ids(1, 8)).loss.backward()
    assert len(list(model.parameters())) == len(dict(model.named_parameters()))
    model.save_pretrained(tmp_path)
    again = modeling_qwen.QWenLMHeadModel.from_pretrained(tmp_path, fp32=True).eval()
    assert again.lm_head.weight is again.transformer.wte.weight
    ids = random_ids(2, 9)
    with torch.no_grad():
        torch.testing.assert_close(again(ids).logits, model(ids).logits)
        found = again.generate(ids, max_new_tokens=5, do_sample=False, pad_token_id=0)
    assert found.shape == (2, 14)
    resized = again.resize_token_embeddings(330)
    assert resized.num_embeddings == again.lm_head.out_features == 330
    assert again.lm_head.weight is again.transformer.wte.weight


def test_accumulated_gradients_equal_those_of_one_batch(tmp_path):
    """The Trainer hands over the number of labels of all accumulated batches; Qwen2 beside."""
    if "num_items_in_batch" not in compat.parameter_names(transformers.Trainer.training_step):
        lacks("averages accumulated batches, whatever their lengths")
    ids = random_ids(4, 12)
    lengths = (12, 5, 9, 3)
    rows = [{"input_ids": row, "labels": torch.where(torch.arange(12) < n, row, -100)} for row, n in zip(ids, lengths)]
    norms = {}
    for per_device, steps in ((4, 1), (1, 4)):
        arguments = (
            transformers.TrainingArguments(
                str(tmp_path / str(steps)),
                per_device_train_batch_size=per_device,
                gradient_accumulation_steps=steps,
                max_steps=1,
                logging_steps=1,
                learning_rate=0.0,
                report_to=[],
                use_cpu=True,
                save_strategy="no",
                max_grad_norm=1e9,
            )
            if "use_cpu" in compat.parameter_names(transformers.TrainingArguments)
            else None
        )
        if arguments is None:
            lacks("has no use_cpu of the Trainer")
        trainer = transformers.Trainer(tiny_model(), arguments, train_dataset=rows)
        trainer.train()
        norms[steps] = next(entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry)
    assert norms[4] == pytest.approx(norms[1], rel=1e-4)


@pytest.mark.parametrize("make", [DynamicCache, QWenCache])
def test_a_cache_whose_layers_broke_off_apart_is_shortened_to_one_length(make):
    model, ids = tiny_model(), random_ids(1, 9)
    cache = make()

    def stop(*args):
        raise KeyboardInterrupt

    with torch.no_grad():
        model(ids[:, :6], past_key_values=cache)
        handle = model.transformer.h[1].register_forward_hook(stop)
        with pytest.raises(KeyboardInterrupt):
            model(ids[:, 6:], past_key_values=cache)
        handle.remove()
        compat.crop_cache(cache, 6)
        found = model(ids[:, 6:], past_key_values=cache).logits
        expected = model(ids).logits[:, 6:]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
