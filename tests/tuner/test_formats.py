"""Adapters of readable formats give the same outputs as when saved; others are refused."""

import json
import shutil

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

from badit.presets import SYSTEM
from badit.tuner.config import FORMAT, OLDEST_FORMAT
from refusals import refuses
from tuner.make_format import FOLDER, base_model, computed

LEFT_OUT = object()
# What is gated, the key and the codes; of others they are the first version's.
FORMS = {
    "change": ("change", "layer", "random"),
    "codes": ("change", "layer", "grouped-random"),
    "embedding": ("change", "embedding", "grouped"),
    "extended": ("change", "embedding", "random"),
}
FOLDERS = sorted(folder.parent for folder in FOLDER.parent.glob("*/*/adapter_config.json"))


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


@pytest.mark.parametrize(
    "folder", FOLDERS, ids=lambda folder: f"{folder.parent.name}-{folder.name}"
)
def test_adapter_reproduces_its_saved_outputs(monkeypatch, folder):
    # What an adapter saves does not depend on the default of the version that reads it.
    monkeypatch.setattr("badit.presets.DEFAULT", SYSTEM)
    model = load(folder)
    expected = load_file(folder / "computed.safetensors")
    # Another processor changes a logit, up to 6, by up to 1e-5, another cluster by more than 0.1.
    torch.testing.assert_close(computed(model), expected, atol=5e-5, rtol=1e-5)
    config = model.peft_config["default"]
    gated, key, codes = FORMS.get(folder.name, ("factors", "layer", "random"))
    assert (config.gated, config.key, config.codes) == (gated, key, codes)


def test_adapter_of_an_earlier_format_is_saved_in_the_current_one(tmp_path):
    earlier = FOLDER.parent / "2" / "clusters"
    assert "codes" not in json.loads((earlier / "adapter_config.json").read_text())
    load(earlier).save_pretrained(tmp_path, save_embedding_layers=False)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (saved["format_version"], saved["codes"]) == (FORMAT, "random")
    expected = load_file(earlier / "computed.safetensors")
    torch.testing.assert_close(computed(load(tmp_path)), expected, atol=1e-6, rtol=1e-5)


@pytest.mark.filterwarnings("ignore:Unexpected keyword arguments")
@pytest.mark.parametrize(
    ("version", "message"),
    [
        (FORMAT + 1, f"up to {FORMAT}; install a later version of badit"),
        (OLDEST_FORMAT - 1, "older format that this version does not read; train it again"),
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
