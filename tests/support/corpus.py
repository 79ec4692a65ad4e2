"""Writes tests/hostile/attacks, folders that no loader may take: `python tests/support/corpus.py`.

Each is a good folder but for one thing. `index.json` gives the error that each must end in.
"""

import base64
import hashlib
import io
import json
import shutil
import struct
import sys
import zipfile
from pathlib import Path

import safetensors.torch
import torch

HERE = Path(__file__).parents[1] / "hostile" / "attacks"
NEXT_TO = "is no safetensors file beside it"
TENSORS = {
    "linear.deltas.lora.lora_A": torch.linspace(-1, 1, 16).view(2, 8),
    "linear.deltas.lora.lora_B": torch.linspace(1, -1, 16).view(8, 2),
}
A, B = TENSORS
PEFT = {
    "base_model.model.linear.lora_A.weight": TENSORS[A],
    "base_model.model.linear.lora_B.weight": TENSORS[B],
}
ADAPTERS = {"linear.loras.task.lora_A": TENSORS[A], "linear.loras.task.lora_B": TENSORS[B]}
OLD = {"linear.lora.lora_A": TENSORS[A], "linear.lora.lora_B": TENSORS[B]}
CATASTROPHE = r"[r]([a-z]+)+!"


def raw(header, data=b""):
    """A safetensors file of a header and data that need not be right."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(dtype="F32", shape=(2, 8), start=0, end=64):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}


# ------------------------------------------------------------------------------- our own folders
def config(delta_type="lora", delta=None, options=None, **changes):
    """The JSON of a LoRA on `linear`, changed."""
    own = {"lora_r": 2, "modified_modules": ["linear"]} if delta_type == "lora" else {}
    fact = {
        "delta_type": delta_type,
        "name": "lora",
        "active": True,
        "frozen": [],
        "options": {"modified_modules": ["linear"], **own, **(options or {})},
        **(delta or {}),
    }
    facts = {"format": "opendelta", "schema_version": 1, "opendelta_version": "1.0.0"}
    facts |= {"backbone_class": "Net", "backbone_tensors": [], "fingerprint": {}, "deltas": [fact]}
    return {**facts, **changes}


def ours(facts=None, tensors=None, weights=None, text=None):
    """{file: content} of a folder of ours, with the right sha256 unless the JSON gives another."""
    if weights is None:
        weights = safetensors.torch.save(TENSORS if tensors is None else tensors)
    digest = hashlib.sha256(weights).hexdigest()
    name = f"delta-{digest[:16]}.safetensors"
    facts = {"weights": name, "sha256": digest, **(facts or config())}
    return {"config.json": (text or json.dumps(facts, indent=1)).encode(), name: weights}


def option(error, delta_type="lora", **options):
    return ours(config(delta_type, options=options)), error


def named(name, error="is no name for a delta"):
    return ours(config(delta={"name": name})), error


def with_tensor(value, error):
    return ours(tensors={**TENSORS, A: value}), error


def jsons(text, error):
    return ours(text=text), error


def own_attacks():
    """{name: ({file: content}, the error)}."""
    good = safetensors.torch.save(TENSORS)
    digest = hashlib.sha256(good).hexdigest()
    damaged = "is damaged, or no safetensors file"
    overlap = {A: entry(), B: entry(shape=(8, 2), start=32, end=96)}
    bad_value = TENSORS[A].clone()
    bad_value[0, 0] = float("nan")
    infinite = TENSORS[A].clone()
    infinite[1, 7] = float("-inf")
    changed = {**ours(), f"delta-{digest[:16]}.safetensors": good[:-1] + b"\0"}
    truncated = {**ours(), f"delta-{digest[:16]}.safetensors": good[:-9]}
    pickled = io.BytesIO()
    torch.save(TENSORS, pickled)
    nans = base64.b64encode(struct.pack("<16f", *[float("nan")] * 16)).decode()
    two = [*config()["deltas"], *config()["deltas"]]
    return {
        "truncated": (truncated, damaged),
        "truncated_with_its_sha256": (ours(weights=good[:-9]), damaged),
        "cut_inside_the_header": (ours(weights=good[:50]), damaged),
        "empty_weights": (ours(weights=b""), damaged),
        "one_bit_changed": (changed, "is damaged: its sha256"),
        "header_of_2_62": (
            ours(weights=struct.pack("<Q", 2**62) + b"{}"),
            "a header of 4,611,686,018,427,387,904 bytes",
        ),
        "header_of_60_mb": (ours(weights=struct.pack("<Q", 60 * 10**6)), "a header of 60,000,000"),
        "header_no_json": (ours(weights=raw(b"{" * 64)), damaged),
        "header_overlapping_ranges": (ours(weights=raw(overlap, bytes(96))), damaged),
        "header_range_beyond_the_end": (ours(weights=raw({A: entry(end=2**40)})), damaged),
        "header_huge_shape": (ours(weights=raw({A: entry(shape=[2**40, 2**40])})), damaged),
        "header_unknown_dtype": (ours(weights=raw({A: entry("P32")}, bytes(64))), damaged),
        "pickle_under_a_safetensors_name": (
            ours(weights=pickled.getvalue()),
            "is no safetensors file",
        ),
        "missing_key": (ours(tensors={A: TENSORS[A]}), f"1 missing: {B}"),
        "extra_key": (ours(tensors={**TENSORS, "x": torch.zeros(1)}), "1 unexpected: x"),
        "key_of_the_backbone": (
            ours(tensors={**TENSORS, "linear.weight": torch.zeros(8, 8)}),
            "1 unexpected: linear.weight",
        ),
        "wrong_shape": with_tensor(torch.zeros(3, 8), r"1 of another shape: .*\[3, 8\] instead"),
        "scalar": with_tensor(torch.zeros(()), r"\[\] instead of \[2, 8\]"),
        "int8_for_float": with_tensor(torch.zeros(2, 8, dtype=torch.int8), "1 not floating: .* I8"),
        "complex_for_float": with_tensor(
            torch.zeros(2, 8, dtype=torch.complex64), "1 not floating: .* C64"
        ),
        "nan": with_tensor(bad_value, f"{A} holds values that are not finite"),
        "infinity": with_tensor(infinite, f"{A} holds values that are not finite"),
        "too_large_for_float32": with_tensor(
            torch.full((2, 8), 1e300, dtype=torch.float64), "not finite in torch.float32"
        ),
        "rank_2_000_000": option(r"\[2, 8\] instead of \[2000000, 8\]", lora_r=2_000_000),
        "rank_2_62": option("no memory holds", lora_r=2**62),
        "rank_of_100_bits": option("an integer of more than 64 bits", lora_r=2**100),
        "rank_negative": option("lora_r=-1 must be at least 1", lora_r=-1),
        "rank_text": option("must be int, not str", lora_r="8"),
        "rank_pattern_2_000_000": option(
            r"instead of \[2000000, 8\]", rank_pattern={"linear": 2_000_000}
        ),
        "alpha_1e30": option("lora_alpha=1e[+]30 must be a number between", lora_alpha=1e30),
        "alpha_negative": option("must be a number between", lora_alpha=-1e30),
        "alpha_of_60_bits": option("must be a number between", lora_alpha=2**60),
        "alpha_pattern_1e30": option("must be a number between", alpha_pattern={"linear": 1e30}),
        "alpha_nan": option("the number nan", lora_alpha=float("nan")),
        "alpha_infinity": jsons(json.dumps(config()).replace('"lora_r": 2', '"lora_alpha": 1e999'),
                                "the number inf"),
        "vera_rank": option("r=2000000 must be below", "vera", r=2_000_000),
        "compacter_division": option("must divide", "compacter", hypercomplex_division=10**6,
                                     shared_W_phm=True),
        "oft_terms": option("must be below", "oft", num_cayley_neumann_terms=10**9),
        "fourierft_seed": option("an integer of more than 64 bits", "fourierft",
                                 random_loc_seed=2**70),
        "prefix_of_10_12_tokens": option("does not fit", "prefix", prefix_token_num=10**12,
                                         modified_modules=["attention"]),
        "labels": option("num_labels", modules_to_save=["head"], num_labels=10**9),
        "unknown_method": (ours(config("lroa")), "no method 'lroa'; nearest: lora"),
        "method_to_import": (ours(config("os.system")), "no method 'os.system'"),
        "unknown_option": option("no option 'lora_rank'; nearest: lora_r", lora_rank=3),
        "option_dunder": option("no option '__class__'", __class__="x"),
        "newer_schema": (ours(config(schema_version=2)), "has schema 2.* update opendelta"),
        "schema_text": (ours(config(schema_version="1")), "has schema '1'"),
        "another_format": (ours(config(format="pickle")), "was not written by opendelta"),
        "weights_path_traversal": (ours(config(weights="../x.safetensors")), NEXT_TO),
        "weights_absolute_path": (ours(config(weights="/etc/x.safetensors")), NEXT_TO),
        "weights_windows_path": (ours(config(weights="..\\x.safetensors")), NEXT_TO),
        "weights_with_a_null_byte": (ours(config(weights="\0.safetensors")), NEXT_TO),
        "weights_no_text": (ours(config(weights=["x.safetensors"])), NEXT_TO),
        "weights_not_there": (ours(config(weights="x.safetensors")), "is missing, though"),
        "sha256_of_another_file": (ours(config(sha256="0" * 64)), "is damaged: its sha256"),
        "sha256_missing": (ours(config(sha256=None)), "is damaged: its sha256"),
        "name_with_a_slash": named("a/b"),
        "name_dot_dot": named(".."),
        "name_with_a_dot": named("a.b"),
        "name_empty": named(""),
        "name_of_70_letters": named("a" * 70),
        "name_with_a_line_break": named("a\n"),
        "name_of_an_attribute": named("keys", "ModuleDict has an attribute"),
        "name_no_text": named(7, "name=7 must be a str"),
        "name_twice": (ours(config(deltas=two)), "two deltas have the same name"),
        "json_deeply_nested": jsons('{"format":' * 2000, "cannot be read as JSON"),
        "json_nested_option": option("nested more than 32 deep",
                                     lora_r=json.loads("[" * 200 + "]" * 200)),
        "json_list": jsons("[]", "was not written by opendelta"),
        "json_cut": jsons(json.dumps(config())[:-9], "cannot be read as JSON"),
        "json_not_utf8": (ours() | {"config.json": b"\xff\xfe{}"}, "cannot be read as JSON"),
        "json_long_text": option("a text of 2,000 characters", modified_modules=["a" * 2000]),
        "json_digits": jsons('{"a": ' + "9" * 5000 + "}", "cannot be read as JSON"),
        "catastrophic_regex": option("is a pattern", modified_modules=[CATASTROPHE]),
        "catastrophic_regex_in_unfrozen": option("is a pattern", unfrozen_modules=[CATASTROPHE]),
        "catastrophic_regex_in_pattern": option("is a pattern", rank_pattern={CATASTROPHE: 2}),
        "catastrophic_regex_in_ia3": option("is a pattern", "ia3",
                                            feedforward_modules=[CATASTROPHE]),
        "module_unknown": option("no module matches 'linaer'", modified_modules=["linaer"]),
        "module_dunder": option("no module matches", modified_modules=["linear.__class__"]),
        "module_of_no_kind": option("cannot carry 'lora'", modified_modules=["norm"]),
        "modules_none": (ours(config(options={"modified_modules": None})), "changes no module"),
        "modules_a_text": option("modified_modules='linear' must be a list",
                                 modified_modules="linear"),
        "modules_no_list": option("must be list", modified_modules={"linear": 1}),
        "backbone_tensor_unknown": (ours(config(backbone_tensors=["heed.weight"])),
                                    "no name matches 'heed.weight'"),
        "backbone_tensor_a_module": (ours(config(backbone_tensors=["head"])), "is no tensor"),
        "backbone_tensor_missing": (ours(config(backbone_tensors=["head.bias"])),
                                    "1 missing: head.bias"),
        "backbone_tensor_nan": (
            ours(config(backbone_tensors=["head.bias"]),
                 {**TENSORS, "head.bias": torch.full((3,), float("nan"))}),
            "head.bias holds values that are not finite",
        ),
        "frozen_unknown": (ours(config(delta={"frozen": ["linear.weight"]})), "no parameter of"),
        "fingerprint_malformed": (ours(config(fingerprint={"linear.weight": 3})),
                                  "fingerprint must hold"),
        "fingerprint_missing": (ours({k: v for k, v in config().items() if k != "fingerprint"}),
                                "fingerprint must hold"),
        "fingerprint_nan": (
            ours(config(fingerprint={"linear.weight": {"shape": [8, 8], "values": nans}})),
            "saved from another backbone",
        ),
        "deltas_none": (ours(config(deltas=[])), "deltas must be a list of at least one"),
        "delta_with_more": (ours(config(delta={"more": 1})), "each of deltas must have just"),
    }  # fmt: skip


# --------------------------------------------------------------- PEFT's, OpenDelta 0.3's, adapters'
DEEP, LONG = "a." * 60_000 + "lora_A", "a tensor with a name of 120,006 characters, more than"


def peft(tensors=None, weights=None, text=None, **changes):
    fields = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["linear"], **changes}
    content = weights or safetensors.torch.save(PEFT if tensors is None else tensors)
    return {
        "adapter_config.json": (text or json.dumps(fields)).encode(),
        "adapter_model.safetensors": content,
    }


def peft_attacks():
    """The same against a folder of PEFT's."""
    first, second = PEFT
    good = safetensors.torch.save(PEFT)
    overlap = {first: entry(), second: entry(shape=(8, 2), start=32, end=96)}
    pickled = io.BytesIO()
    torch.save(PEFT, pickled)
    only_pickle = peft() | {"adapter_model.bin": pickled.getvalue()}
    del only_pickle["adapter_model.safetensors"]
    base = {**PEFT, "base_model.model.linear.base_layer.weight": torch.zeros(8, 8)}
    no = "no safetensors file"
    return {
        "name_of_60_000_modules": (peft({**PEFT, DEEP: torch.zeros(1)}), LONG),
        "truncated": (peft(weights=good[:-9]), no),
        "header_of_2_62": (peft(weights=struct.pack("<Q", 2**62) + b"{}"), no),
        "header_of_60_mb": (peft(weights=struct.pack("<Q", 60 * 10**6) + bytes(99)), "a header of"),
        "header_overlapping_ranges": (peft(weights=raw(overlap, bytes(96))), no),
        "pickle_under_a_safetensors_name": (peft(weights=pickled.getvalue()), no),
        "pickle": (only_pickle, "a pickle, which is never read"),
        "missing_key": (peft({first: PEFT[first]}), "1 missing"),
        "extra_key": (peft({**PEFT, "base_model.model.x": torch.zeros(1)}), "belong to nothing"),
        "key_of_the_backbone": (peft(base), "brings another weight"),
        "wrong_shape": (peft({**PEFT, first: torch.zeros(3, 8)}), "1 of another shape"),
        "int8_for_float": (peft({**PEFT, first: torch.zeros(2, 8, dtype=torch.int8)}),
                           "not floating"),
        "nan": (peft({**PEFT, first: torch.full((2, 8), float("nan"))}), "not finite"),
        "rank_2_000_000": (peft(r=2_000_000), r"instead of \[2000000, 8\]"),
        "rank_of_100_bits": (peft(r=2**100), "an integer of more than 64 bits"),
        "alpha_1e30": (peft(lora_alpha=1e30), "must be a number between"),
        "unknown_method": (peft(peft_type="LROA"), "is none of those that opendelta reads"),
        "unknown_option": (peft(lora_magic=True), "lora_magic=True cannot be loaded"),
        "catastrophic_regex": (peft(rank_pattern={"([a-z]+)+!": 2}), "repeats too much"),
        "target_of_no_module": (peft({k.replace("linear", "linaer"): v for k, v in PEFT.items()}),
                                "belong to nothing"),
        "json_deeply_nested": (peft(text='{"peft_type":' * 2000), "cannot be read as JSON"),
        "json_list": (peft(text='["peft_type"]'), "must hold a JSON object"),
        "json_wrong_types": (peft(target_modules=[["linear"]], rank_pattern=[1]), "rank_pattern"),
    }  # fmt: skip


def saved(tensors):
    """What torch.save writes."""
    buffer = io.BytesIO()
    torch.save(tensors, buffer)
    return buffer.getvalue()


def compressed(content):
    """The same archive with its parts compressed, as a small file could hold gigabytes."""
    buffer = io.BytesIO()
    with (
        zipfile.ZipFile(io.BytesIO(content)) as old,
        zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as new,
    ):
        for part in old.infolist():
            new.writestr(part.filename, old.read(part))
    return buffer.getvalue()


class Harm:
    """Would run code when it is unpickled."""

    def __reduce__(self):
        return print, ("harm",)


def old(tensors=None, weights=None, text=None, **changes):
    fields = {"delta_type": "lora", "lora_r": 2, "modified_modules": ["linear"], **changes}
    return {
        "config.json": (text or json.dumps(fields)).encode(),
        "pytorch_model.bin": weights or saved(OLD if tensors is None else tensors),
    }


def old_attacks():
    """The same against a folder of OpenDelta 0.3's."""
    first, second = OLD
    zeros = saved({**OLD, first: torch.zeros(2, 1000)})
    expanded = {**OLD, first: torch.zeros(1).expand(2**40, 8)}
    no = "is no state dict of plain tensors"
    return {
        "name_of_60_000_modules": (old({**OLD, DEEP: torch.zeros(1)}), LONG),
        "truncated": (old(weights=saved(OLD)[:-99]), no),
        "no_archive": (old(weights=b"\x80\x02}q\x00."), no),
        "pickle_that_runs_code": (old(weights=saved({"a": Harm()})), no),
        "compressed": (old(weights=compressed(zeros)), "it is compressed"),
        "one_value_as_10_13": (old(expanded), "claims more values than the file holds"),
        "on_the_meta_device": (old({**OLD, first: torch.zeros(2, 8, device="meta")}),
                               "it holds GLOBAL torch._utils _rebuild_meta"),
        "list": (old(weights=saved([TENSORS[A]])), "it holds EMPTY_LIST"),
        "missing_key": (old({first: OLD[first]}), "1 missing"),
        "extra_key": (old({**OLD, "x": torch.zeros(1)}), "no name matches 'x'"),
        "two_deltas_on_one_module": (old({**OLD, "linear.lora_1.lora_A": TENSORS[A]}),
                                     "several 'lora' deltas on 'linear'"),
        "only_another_delta": (old(modified_modules=["head"]), "selects none of the modules"),
        "wrong_shape": (old({**OLD, first: torch.zeros(3, 8)}), "1 of another shape"),
        "int8_for_float": (old({**OLD, first: torch.zeros(2, 8, dtype=torch.int8)}),
                           "1 not floating"),
        "nan": (old({**OLD, second: torch.full((8, 2), float("nan"))}), "not finite"),
        "backbone_nan": (old({**OLD, "head.bias": torch.full((3,), float("nan"))}), "not finite"),
        "rank_2_000_000": (old(lora_r=2_000_000), r"instead of \[2000000, 8\]"),
        "alpha_1e30": (old(lora_alpha=1e30), "must be a number between"),
        "unknown_method": (old(delta_type="lroa"), "is none of OpenDelta 0.3's"),
        "unknown_option": (old(lora_rank=2), "is no option of 'lora'"),
        "catastrophic_regex": (
            old({"x.reparams.wte.weight": torch.zeros(2, 8)}, delta_type="prefix", lora_r=None,
                modified_modules=[CATASTROPHE]),
            "repeats too much",
        ),
        "json_deeply_nested": (old(text='{"delta_type":' * 2000), "cannot be read as JSON"),
        "json_wrong_types": (old(delta_type=["lora"]), "is none of OpenDelta 0.3's"),
    }  # fmt: skip


def adapters(tensors=None, weights=None, text=None, name="task", **changes):
    options = {"architecture": "lora", "r": 2, "alpha": 4, **changes}
    fields = {"config": options, "name": name, "version": "adapters.1.3.0"}
    return {
        "adapter_config.json": (text or json.dumps(fields)).encode(),
        "pytorch_adapter.bin": weights or saved(ADAPTERS if tensors is None else tensors),
    }


def adapters_attacks():
    """The same against a folder of the adapters library's."""
    first, second = ADAPTERS
    zeros = saved({**ADAPTERS, first: torch.zeros(2, 1000)})
    no = "is no state dict of plain tensors"
    return {
        "name_of_60_000_modules": (adapters({**ADAPTERS, DEEP: torch.zeros(1)}), LONG),
        "truncated": (adapters(weights=saved(ADAPTERS)[:-99]), no),
        "pickle_that_runs_code": (adapters(weights=saved({"a": Harm()})), no),
        "compressed": (adapters(weights=compressed(zeros)), "it is compressed"),
        "missing_key": (adapters({first: ADAPTERS[first]}), "lora_B is missing"),
        "extra_key": (adapters({**ADAPTERS, "x": torch.zeros(1)}),
                      "1 of 3 tensors belong to nothing"),
        "key_of_the_backbone": (adapters({**ADAPTERS, "linear.weight": torch.zeros(8, 8)}),
                                "1 of 3 tensors belong to nothing"),
        "key_of_no_module": (adapters({"no.loras.task.lora_A": TENSORS[A]}), "no module 'no'"),
        "wrong_shape": (adapters({**ADAPTERS, first: torch.zeros(2, 9)}), "1 of another shape"),
        "int8_for_float": (adapters({**ADAPTERS, first: torch.zeros(2, 8, dtype=torch.int8)}),
                           "1 not floating"),
        "nan": (adapters({**ADAPTERS, second: torch.full((8, 2), float("nan"))}), "not finite"),
        "rank_2_000_000": (adapters(r=2_000_000), "must be a whole number from 1"),
        "alpha_1e30": (adapters(alpha=1e30), "must be a number between"),
        "unknown_method": (adapters(architecture="lroa"), "there is no such method here"),
        "unknown_option": (adapters(magic=True), "no such option is known"),
        "name_of_an_expression": (adapters(name="(t+)+k"), "2 of 2 tensors belong to nothing"),
        "long_option": (adapters(composition_mode="x" * 9999), "it must be 'add' or 'scale'"),
        "json_deeply_nested": (adapters(text='{"config":' * 2000), "cannot be read as JSON"),
    }  # fmt: skip


def attacks():
    """{"library/name": ({file: content}, the error)}."""
    kinds = {
        "opendelta": own_attacks(),
        "peft": peft_attacks(),
        "opendelta-0.3": old_attacks(),
        "adapters": adapters_attacks(),
    }
    return {f"{kind}/{name}": each for kind, part in kinds.items() for name, each in part.items()}


MAKE = {"opendelta": ours, "peft": peft, "opendelta-0.3": old, "adapters": adapters}


def write(root):
    """Write all folders and the index into `root`."""
    for kind in MAKE:
        shutil.rmtree(root / kind, ignore_errors=True)
    for name, (files, _) in attacks().items():
        (root / name).mkdir(parents=True)
        for file, content in files.items():
            (root / name / file).write_bytes(content)
    index = {name: error for name, (_, error) in attacks().items()}
    (root / "index.json").write_text(json.dumps(index, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(write(HERE))
