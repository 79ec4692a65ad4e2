"""Pushes and loads through the hub that HF_ENDPOINT names; `files/test_hub.py` runs this."""

import json
import sys
import warnings
from pathlib import Path

import torch

import opendelta
from opendelta import AdapterModel, AutoDeltaConfig, AutoDeltaModel, LoraModel
from support.models import build, logits
from support.nets import IDS, net, shake


def main(root):
    warnings.simplefilter("error", opendelta.DeltaWarning)
    seen = {}
    model = net()
    lora = shake(LoraModel(model, modified_modules=["linear"], lora_r=2))
    lora.freeze_module()
    expected = model(IDS)
    seen["address"] = lora.push_to_hub("ada/german", private=True)
    ways = [AutoDeltaModel.from_finetuned, LoraModel.from_finetuned, opendelta.load]
    for number, load in enumerate(ways):
        fresh = net()
        load("ada/german", fresh)
        seen[f"equal by way {number}"] = torch.equal(fresh(IDS), expected)
    seen["rank"] = AutoDeltaConfig.from_finetuned("ada/german").lora_r

    lora.save_finetuned(root / "by-its-folder", push_to_hub=True)
    lora.save_finetuned(root / "x", push_to_hub="ada/by-name")

    shake(AdapterModel(model, modified_modules=["bare"], name="style")).freeze_module()
    both = model(IDS)
    opendelta.composition(model).push_to_hub("ada/german")
    fresh = net()
    seen["names"] = opendelta.load("ada/german", fresh).names
    seen["both equal"] = torch.equal(fresh(IDS), both)
    again = net()
    opendelta.load("ada/german", again, local_files_only=True)
    seen["equal without the net"] = torch.equal(again(IDS), both)
    seen["no such name"] = opendelta.load("ada/nothing", net(), strict=False).problem
    try:
        lora.push_to_hub("ada/german", token="hf_of_eve")
    except OSError as error:
        seen["wrong token"] = type(error).__name__
    whole = build("llama").eval()
    shake(LoraModel(whole)).freeze_module()
    whole.push_to_hub("ada/whole")
    plain = type(whole).from_pretrained("ada/whole").eval()
    seen["equal plain"] = torch.equal(logits(plain), logits(build("llama").eval()))
    seen["equal whole"] = torch.equal(logits(opendelta.from_pretrained("ada/whole")), logits(whole))
    print(json.dumps(seen))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
