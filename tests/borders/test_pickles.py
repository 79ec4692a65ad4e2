"""A state dict that `torch.save` wrote is read by an allow-list of steps, names and sizes."""

import io
import json
import pickle
import pickletools
import tracemalloc
import zipfile
from collections import OrderedDict

import pytest
import torch
from torch import nn

import opendelta
from opendelta import DeltaLoadError
from opendelta.interop._files import read_pickle

GIGABYTES = 1_500_000_000


def saved(what, **options):
    content = io.BytesIO()
    torch.save(what, content, **options)
    return content.getvalue()


def changed(content, **parts):
    """A file of torch's with other parts: `data_pkl=` for data.pkl, `byteorder=`."""
    source, out = zipfile.ZipFile(io.BytesIO(content)), io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for part in source.infolist():
            name = part.filename.rpartition("/")[2].replace(".", "_")
            archive.writestr(part.filename, parts.get(name, source.read(part)))
    return out.getvalue()


def program_of(content):
    archive = zipfile.ZipFile(io.BytesIO(content))
    return archive.read(next(n for n in archive.namelist() if n.endswith("data.pkl")))


def same(given, tensors):
    assert given.keys() == tensors.keys()
    for key, tensor in tensors.items():
        assert given[key].dtype == tensor.dtype
        assert torch.equal(given[key], tensor), key


DTYPES = [
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32,
    torch.int16, torch.int8, torch.uint8, torch.bool,
]  # fmt: skip


def test_what_torch_reads_is_read_bit_for_bit(tmp_path):
    torch.manual_seed(0)
    path = tmp_path / "weights.bin"
    whole = torch.randn(6, 5)
    tensors = {str(dtype): (3 * torch.randn(2, 3)).to(dtype) for dtype in DTYPES}
    tensors |= {
        "transposed": whole.t(), "part": whole[1:4, ::2], "scalar": torch.tensor(3.0),
        "empty": torch.empty(0, 4), "tied": whole, "again": whole,
        "ids": torch.arange(4).expand(1, -1),
    }  # fmt: skip
    for what in (tensors, OrderedDict(tensors), {"p": nn.Parameter(whole)}):
        torch.save(what, path)
        same(read_pickle(path), {key: tensor.detach() for key, tensor in what.items()})
    read = read_pickle(path)
    torch.save({}, path)
    assert read_pickle(path) == {}
    read["p"][0, 0] = 7  # its own memory, that can be written to


def test_a_module_with_versions_and_buffers_is_read(tmp_path):
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Embedding(5, 4))
    torch.save(model.state_dict(), tmp_path / "weights.bin")
    same(read_pickle(tmp_path / "weights.bin"), model.state_dict())


GOOD = saved({"a": torch.zeros(2)})
PROGRAM = program_of(GOOD)


def made_of(module, name, *arguments):
    """A program that calls a name."""
    call = b"c" + module.encode() + b"\n" + name.encode() + b"\n"
    return b"\x80\x02" + call + pickle.dumps(arguments, 2)[2:-1] + b"R."


# ((((), ()), ((), ())), ...), 60 deep: to hash or to print it would take for ever
DEEP = b")q\0" + b"h\0\x86q\0" * 60


def text(value):
    return b"X" + len(value).to_bytes(4, "little") + value


STORAGE = b"(" + text(b"storage") + b"ctorch\nFloatStorage\n%s" + text(b"cpu") + b"K\x02tQ"
SHAPE = b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n(" + STORAGE % text(b"0") + b"K\0"
VIEW = SHAPE + b"K\x02\x85K\x01\x85\x89N"
# {"a": d, "b": d}, where d is such a dict again, 60 deep: it would take for ever to print
TWICE = b"}q\1" + (b"}" + text(b"a") + b"h\1s" + text(b"b") + b"h\1sq\1") * 60
NEGATIVE = VIEW[2:] + b"}" + text(b"neg") + b"\x88stR"
ATTACKS = {
    "bytearray": (made_of("builtins", "bytearray", GIGABYTES), "GLOBAL builtins bytearray"),
    "system": (made_of("os", "system", "true"), "GLOBAL os system"),
    "storage_of_gigabytes": (made_of("torch", "FloatStorage", GIGABYTES), "calls torch Float"),
    "dict_of_values": (made_of("collections", "OrderedDict", ()), "calls collections Ordered"),
    "parameter_of_a_text": (made_of("torch._utils", "_rebuild_parameter", "a"), "calls torch._uti"),
    "longer_storage": (PROGRAM.replace(b"K\x02", b"J\0\0\0\x7f", 1), "are not of the size|claims"),
    "memo_of_gigabytes": (PROGRAM.replace(b"q\0", b"r\xff\xff\xff\x7f", 1), None),
    "huge_shape": (PROGRAM.replace(b"K\x02\x85", b"J\xff\xff\xff\x7f\x85", 1), "claims more"),
    "beyond_the_end": (PROGRAM.replace(b"K\x01\x85", b"K\x07\x85", 1), "RuntimeError"),
    "negative": (PROGRAM.replace(b"K\x02\x85", b"J\xff\xff\xff\xff\x85", 1), "no list of sizes"),
    "a_list": (pickle.dumps([1, 2], 2), "it holds EMPTY_LIST"),
    "keys_that_are_tuples": (b"\x80\x02})K\x01s.", "a key in it is no text"),
    "a_text": (pickle.dumps("a", 2), "must hold named tensors"),
    "texts": (pickle.dumps({"a": "b"}, 2), "must hold named tensors"),
    "from_nothing": (b"\x80\x02\x86.", "a value that it has not made"),
    "two_values": (b"\x80\x02}}.", "ValueError|too many|unpack"),
    "no_end": (b"\x80\x02}", "no state dict"),
    "steps": (b"\x80\x02" + b"}" * 300_000 + b".", "more than 200,000 steps"),
    "deep_name": (b"\x80\x02" + STORAGE % DEEP + b".", "something else than numbers"),
    "deep_key": (b"\x80\x02}" + DEEP + b"K\x01s.", "a key in it is no text"),
    "deep_call": (b"\x80\x02" + DEEP + b")R.", "no state dict"),
    "many_axes": (SHAPE + b"(" + b"J\xff\xff\xff\x7f" * 60_000 + b"t)tR.", "no list of sizes"),
    "deep_flags": (VIEW[:-1] + b"(" + TWICE + b"th\1tR.", "another way than by its values"),
    "many_arguments": (VIEW + b"N" * 60_000 + b"tR.", "other arguments than a state dict's"),
    "other_protocol": (pickle.dumps({"a": "b"}, 4), "it holds"),
}


@pytest.mark.parametrize("name", ATTACKS)
def test_no_program_calls_anything_or_takes_more_than_its_file(name, tmp_path):
    program, error = ATTACKS[name]
    path = tmp_path / "weights.bin"
    assert program != PROGRAM
    path.write_bytes(changed(GOOD, data_pkl=program))
    tracemalloc.start()
    try:
        if error is None:
            same(read_pickle(path), {"a": torch.zeros(2)})
        else:
            with pytest.raises(DeltaLoadError, match=error) as caught:
                read_pickle(path)
            assert len(str(caught.value)) < 600
        assert tracemalloc.get_traced_memory()[1] < 30e6 + 20 * path.stat().st_size
    finally:
        tracemalloc.stop()


def test_tensors_that_are_turned_in_sign_take_no_more_than_the_file(tmp_path):
    count = 2**16
    one = NEGATIVE.replace(b"K\x02", b"J" + count.to_bytes(4, "little"))
    program = b"".join(text(b"%d" % i) + one + b"s" for i in range(9))
    path = tmp_path / "weights.bin"
    program = b"\x80\x02}" + program + b"."
    path.write_bytes(changed(saved({"a": torch.zeros(count)}), data_pkl=program))
    with pytest.raises(DeltaLoadError, match="claim more values than the file holds"):
        read_pickle(path)


def test_many_views_of_a_few_bytes_are_no_state_dict(tmp_path):
    row = torch.zeros(100_000)
    torch.save({str(i): row for i in range(20)}, tmp_path / "tied.bin")
    assert len(read_pickle(tmp_path / "tied.bin")) == 20
    torch.save({str(i): row for i in range(60)}, tmp_path / "many.bin")
    with pytest.raises(DeltaLoadError, match="claim more values"):
        read_pickle(tmp_path / "many.bin")


def test_bytes_that_are_turned_round_compressed_or_changed(tmp_path):
    path = tmp_path / "weights.bin"
    path.write_bytes(changed(GOOD, byteorder=b"big"))
    with pytest.raises(DeltaLoadError, match="not little-endian"):
        read_pickle(path)
    path.write_bytes(saved({"a": torch.ones(2)}, _use_new_zipfile_serialization=False))
    with pytest.raises(DeltaLoadError, match="no state dict"):
        read_pickle(path)
    numbers = saved({"a": torch.full((8,), 1.5)})
    at = numbers.index(b"\0\0\xc0\x3f" * 8)
    path.write_bytes(numbers[:at] + b"\1" + numbers[at + 1 :])
    with pytest.raises(DeltaLoadError, match="Bad CRC"):
        read_pickle(path)


def test_every_byte_of_a_program_may_be_wrong(tmp_path):
    path = tmp_path / "weights.bin"
    for at in range(len(PROGRAM)):
        for byte in (0x2E, 0x7F, PROGRAM[at] ^ 1):
            program = PROGRAM[:at] + bytes([byte]) + PROGRAM[at + 1 :]
            path.write_bytes(changed(GOOD, data_pkl=program))
            try:
                assert all(isinstance(key, str) for key in read_pickle(path))
            except DeltaLoadError:
                continue


def test_a_folder_of_900_bytes_takes_no_gigabytes(tmp_path):
    (tmp_path / "config.json").write_text(
        json.dumps({"delta_type": "lora", "modified_modules": ["0"], "lora_r": 2})
    )
    bomb = made_of("builtins", "bytearray", GIGABYTES)
    pickletools.dis(bomb, out=io.StringIO())  # a program that `pickle` would run
    (tmp_path / "pytorch_model.bin").write_bytes(changed(GOOD, data_pkl=bomb))
    with pytest.raises(DeltaLoadError, match="nothing else is unpickled: it holds GLOBAL builtins"):
        opendelta.load(tmp_path, nn.Sequential(nn.Linear(6, 6)))


def test_a_negative_view_has_its_sign(tmp_path):
    path, numbers = tmp_path / "views.bin", torch.tensor([1 + 2j, 3 - 4j])
    torch.save({"a": numbers.conj().imag}, path)
    assert torch.equal(read_pickle(path)["a"], torch.load(path, weights_only=True)["a"])
    torch.save({"a": numbers.conj()}, path)
    with pytest.raises(DeltaLoadError):
        read_pickle(path)
