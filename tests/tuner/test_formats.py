"""Adapters that earlier releases have saved are read as they were meant, and those of later ones are refused."""

import json
import shutil

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

from badit.errors import BaditError
from badit.tuner.config import FORMAT
from tuner.make_format import FOLDER, OPTIONS, base_model, computed

SAVED = [FOLDER / str(version) / name for version in range(1, FORMAT + 1) for name in OPTIONS]


def changed(copy, folder=SAVED[0], **settings):
    shutil.copytree(folder, copy)
    config = copy / "adapter_config.json"
    content = {**json.loads(config.read_text()), **settings}
    config.write_text(json.dumps({key: value for key, value in content.items() if value != "left out"}))
    return copy


@pytest.mark.parametrize("folder", SAVED, ids=lambda folder: f"{folder.parent.name}-{folder.name}")
@pytest.mark.parametrize("old", [{}, {"format_version": "left out"}, {"base_weight": "folded"}], ids=str)
def test_a_saved_adapter_is_read_as_it_was_meant(tmp_path, folder, old):
    """Formats had no number at first; a residual written into the base weight was the same model."""
    model = PeftModel.from_pretrained(base_model(), str(changed(tmp_path / "copy", folder, **old))).eval()
    found = computed(model)
    torch.testing.assert_close(found, load_file(folder / "computed.safetensors"), atol=1e-6, rtol=1e-5)
    assert torch.equal(found["delta"], computed(PeftModel.from_pretrained(base_model(), str(folder)))["delta"])
    assert model.peft_config["default"].to_dict()["format_version"] == FORMAT


@pytest.mark.filterwarnings("ignore:Unexpected keyword arguments")
def test_a_newer_format_is_refused(tmp_path):
    """PEFT alone would leave a new setting out, with a warning, and continue with another adapter than was saved."""
    folder = changed(tmp_path / "new", format_version=FORMAT + 1, something_new=1)
    with pytest.raises(BaditError, match=f"format {FORMAT + 1}, .* up to {FORMAT}: pip install --upgrade badit"):
        PeftModel.from_pretrained(base_model(), str(folder))


@pytest.mark.parametrize("labels", [[0, 0, 0, 1, 2, 2], [0, 0, 1, 1, 2, 3], [0, 0, 1, 1, 2, -1]])
def test_labels_that_lose_a_component_are_refused(tmp_path, labels):
    folder = changed(tmp_path / "damaged")
    weights = load_file(folder / "adapter_model.safetensors")
    (name,) = [name for name in weights if name.endswith("expert_of")]
    save_file({**weights, name: torch.tensor(labels)}, folder / "adapter_model.safetensors")
    with pytest.raises(BaditError, match=r"does not give each of the 3 experts 2 components; the file is damaged"):
        PeftModel.from_pretrained(base_model(), str(folder))
