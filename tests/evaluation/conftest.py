"""A model and a tokenizer that are small enough to be decoded naively."""

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast


def words(start, **special):
    """A tokenizer of 128 words, `w0` to `w127`, the first of them replaced by special tokens."""
    vocabulary = [*special.values(), *(f"w{i}" for i in range(start, 128))]
    backend = Tokenizer(WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="w127"))
    backend.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, **special)


@pytest.fixture
def tokenizer():
    return words(2, pad_token="<pad>", eos_token="<eos>")


@pytest.fixture
def tokenizer_without_special_tokens():
    return words(0)


@pytest.fixture
def model():
    torch.manual_seed(0)
    sizes = {"vocab_size": 128, "hidden_size": 32, "intermediate_size": 64, "max_position_embeddings": 128}
    heads = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    # With weights this large the logits are far from uniform, so that the largest one is never in doubt.
    special = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads, **special, initializer_range=0.5)).eval()


@pytest.fixture
def prompts():
    generator = torch.Generator().manual_seed(1)
    lengths = [3, 17, 1, 9, 9, 30, 2, 5]
    return [torch.randint(2, 128, (length,), generator=generator).tolist() for length in lengths]
