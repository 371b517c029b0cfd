"""Adapters saved by earlier releases give the same outputs, and adapters of later formats are refused."""

import json
import shutil

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

from badit.support.errors import BaditError
from badit.tuner.config import FORMAT, BaditConfig
from tuner.make_format import FOLDER, OPTIONS, base_model, computed

SAVED = [FOLDER / str(version) / name for version in range(1, FORMAT + 1) for name in OPTIONS]


def copy_with_settings(copy, folder=SAVED[0], **settings):
    shutil.copytree(folder, copy)
    config = copy / "adapter_config.json"
    content = {**json.loads(config.read_text()), **settings}
    config.write_text(
        json.dumps({key: value for key, value in content.items() if value != "left out"})
    )
    return copy


@pytest.mark.parametrize("folder", SAVED, ids=lambda folder: f"{folder.parent.name}-{folder.name}")
@pytest.mark.parametrize(
    "old", [{}, {"format_version": "left out"}, {"base_weight": "folded"}], ids=str
)
def test_adapters_of_all_formats_reproduce_their_saved_outputs(tmp_path, folder, old):
    """Early adapters had no format number; ``base_weight: folded`` stored the same model in another way."""
    model = PeftModel.from_pretrained(
        base_model(), str(copy_with_settings(tmp_path / "copy", folder, **old))
    ).eval()
    found = computed(model)
    torch.testing.assert_close(
        found, load_file(folder / "computed.safetensors"), atol=1e-6, rtol=1e-5
    )
    assert torch.equal(
        found["delta"], computed(PeftModel.from_pretrained(base_model(), str(folder)))["delta"]
    )
    assert model.peft_config["default"].to_dict()["format_version"] == FORMAT


def test_adapter_without_format_and_router_input_reads_the_mean(tmp_path):
    left_out = dict.fromkeys(("format_version", "router_input", "base_weight"), "left out")
    folder = copy_with_settings(tmp_path / "copy", init_weights="lora", **left_out)
    assert BaditConfig.from_pretrained(str(folder)).router_input == "mean"


@pytest.mark.filterwarnings("ignore:Unexpected keyword arguments")
def test_newer_format_is_refused(tmp_path):
    """PEFT alone would warn, ignore the new setting, and load a different adapter than the saved one."""
    folder = copy_with_settings(tmp_path / "new", format_version=FORMAT + 1, something_new=1)
    with pytest.raises(
        BaditError, match=f"format {FORMAT + 1}, .* up to {FORMAT}: pip install --upgrade badit"
    ):
        PeftModel.from_pretrained(base_model(), str(folder))


@pytest.mark.parametrize("labels", [[0, 0, 0, 1, 2, 2], [0, 0, 1, 1, 2, 3], [0, 0, 1, 1, 2, -1]])
def test_invalid_expert_labels_are_refused(tmp_path, labels):
    folder = copy_with_settings(tmp_path / "damaged")
    weights = load_file(folder / "adapter_model.safetensors")
    (name,) = [name for name in weights if name.endswith("expert_of")]
    save_file({**weights, name: torch.tensor(labels)}, folder / "adapter_model.safetensors")
    with pytest.raises(
        BaditError, match=r"does not give each of the 3 experts 2 components; the file is damaged"
    ):
        PeftModel.from_pretrained(base_model(), str(folder))
