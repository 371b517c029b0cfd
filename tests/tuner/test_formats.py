"""Adapters of the current format give the same outputs as when saved; others are refused."""

import json
import shutil

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

from badit.tuner.config import FORMAT
from refusals import refuses
from tuner.make_format import FOLDER, OPTIONS, base_model, computed

LEFT_OUT = object()


def copied(folder, **settings):
    """Copies a saved adapter and changes settings of its configuration."""
    shutil.copytree(FOLDER / "bad", folder)
    path = folder / "adapter_config.json"
    content = {**json.loads(path.read_text()), **settings}
    content = {key: value for key, value in content.items() if value is not LEFT_OUT}
    path.write_text(json.dumps(content))
    return folder


def load(folder):
    return PeftModel.from_pretrained(base_model(), str(folder)).eval()


@pytest.mark.parametrize("name", OPTIONS)
def test_adapter_reproduces_its_saved_outputs(name):
    expected = load_file(FOLDER / name / "computed.safetensors")
    torch.testing.assert_close(computed(load(FOLDER / name)), expected, atol=1e-6, rtol=1e-5)


@pytest.mark.filterwarnings("ignore:Unexpected keyword arguments")
@pytest.mark.parametrize(
    ("version", "message"),
    [
        (FORMAT + 1, f"up to {FORMAT}: pip install --upgrade badit"),
        (FORMAT - 1, "older format that this version does not read; train it again"),
        (LEFT_OUT, "older format that this version does not read; train it again"),
    ],
)
def test_other_formats_are_refused(tmp_path, version, message):
    """PEFT alone would warn, ignore unknown settings and load a different adapter."""
    folder = copied(tmp_path / "other", format_version=version, unknown_setting=1)
    refuses(rf"adapter_config\.json: format_version: .*{message}", load, folder)


@pytest.mark.parametrize("labels", [[0, 0, 0, 1, 2, 2], [0, 0, 1, 1, 2, 3], [0, 0, 1, 1, 2, -1]])
def test_invalid_expert_labels_are_refused(tmp_path, labels):
    folder = copied(tmp_path / "damaged")
    weights = load_file(folder / "adapter_model.safetensors")
    (name,) = [name for name in weights if name.endswith("expert_of")]
    save_file({**weights, name: torch.tensor(labels)}, folder / "adapter_model.safetensors")
    refuses("each of the 3 experts 2 components; the file is damaged", load, folder)
