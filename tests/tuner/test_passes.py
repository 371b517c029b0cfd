"""Which passes count in the running moments, what checkpointing runs again, and parts of a model called alone."""

import pytest
import torch

from badit.errors import BaditError
from tuner.helpers import adapted, enable_checkpointing, padded, random_rows, randomise


def standardised(tiny_model, **options):
    model = adapted(tiny_model("llama"), router_input="standardised", lora_dropout=0.0, **options)
    return randomise(model).train()


def moments(model):
    return {name: value.clone() for name, value in model.state_dict().items() if "moments" in name or "batches" in name}


def batch(seed):
    ids, mask = padded(random_rows(9, 7, 5, seed=seed))
    labels = torch.full_like(ids, -100)
    labels[:, -2:] = ids[:, -2:]
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def test_passes_without_gradients_do_not_count(tiny_model):
    """As those of a preference loss's reference, in training mode."""
    model = standardised(tiny_model)
    before = moments(model)
    with torch.no_grad():
        for seed in range(3):
            model(**batch(seed))
    torch.testing.assert_close(moments(model), before, rtol=0, atol=0)
    model(**batch(0))
    assert all(not torch.equal(value, before[name]) for name, value in moments(model).items())


def gradients(model, checkpoint, reentrant):
    model.enable_input_require_grads()
    if checkpoint:
        enable_checkpointing(model, reentrant=reentrant)
    losses = [model(**batch(seed), use_cache=False).loss for seed in range(2)]
    sum(losses).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize("reentrant", [False, True])
def test_two_passes_before_one_backward_pass_with_checkpointing(tiny_model, reentrant):
    """Each is computed again with the moments that it had, although the other has changed them since."""
    plain, again = standardised(tiny_model), standardised(tiny_model)
    again.load_state_dict(plain.state_dict())
    expected, found = gradients(plain, False, reentrant), gradients(again, True, reentrant)
    assert found.keys() == expected.keys()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(moments(again), moments(plain))


def test_moments_in_bfloat16(tiny_model):
    model = standardised(tiny_model).to(torch.bfloat16)
    assert model(**batch(0)).loss.isfinite()
    assert all(value.isfinite().all() for value in moments(model).values())


def test_a_decoder_called_by_itself_is_refused(tiny_model):
    model = randomise(adapted(tiny_model("llama"))).eval()
    ids, mask = padded(random_rows(6, 4))
    with pytest.raises(BaditError, match=r"the model's decoder was called by itself.*routing='token'"):
        model.get_base_model().get_decoder()(input_ids=ids, attention_mask=mask)
    by_token = randomise(adapted(tiny_model("llama"), routing="token")).eval()
    by_token.get_base_model().get_decoder()(input_ids=ids, attention_mask=mask)
