"""Checkpoints in the safetensors format: readable, without pickle, and a resumed run is equal to the bit."""

from __future__ import annotations

import json
import struct

import optree
import pytest
import torch

import popart_func as pf
from popart_func import checkpoints, optim

OPTIMIZERS = {
    "adamw": lambda: optim.adamw(1e-2),
    "parts": lambda: optim.partition(
        {"head": optim.from_torch(torch.optim.NAdam), "body": pf.sgd(0.1, momentum=0.9)},
        lambda name: "head" if name.startswith("output") else "body",
    ),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_resumed_run_is_equal_to_the_bit(name, tmp_path):
    make = lambda: pf.UnifiedModel(4, 5, 2)  # noqa: E731
    learner = pf.popart_learner(pf.stateless(make()), OPTIMIZERS[name](), pf.popart(2, 0.1))
    batches = [(torch.randn(3, 4), torch.randn(3, 2) * 100) for _ in range(4)]
    start = state = learner.init(pf.init_params(make, 0))
    for number, batch in enumerate(batches):
        if number == 2:
            checkpoints.save(state, tmp_path / "state.safetensors")
            resumed = checkpoints.load(tmp_path / "state.safetensors", like=start)
            assert type(resumed) is pf.LearnerState
        state, _ = learner.update(state, batch)
    for batch in batches[2:]:
        resumed, _ = learner.update(resumed, batch)
    assert all(map(torch.equal, optree.tree_leaves(state), optree.tree_leaves(resumed)))
    found = checkpoints.names(state)
    assert {"params.output_linear.weight", "statistics.residue"} <= set(found)
    assert "opt_state.0.mu.output_linear.bias" in found or "opt_state.head.entries.exp_avg.output_linear.bias" in found
    torch.save(state, tmp_path / "state.pt")
    again = torch.load(tmp_path / "state.pt", weights_only=True)
    assert pf.tree.max_difference(again, state) == 0


EVERY_DTYPE = {
    **{str(dtype).removeprefix("torch."): torch.arange(3).to(dtype) for dtype in checkpoints._CODES},
    "no elements": torch.zeros(3, 0, dtype=torch.int8),
    "no axes": torch.tensor(1),
}


def test_every_dtype_and_shape(tmp_path):
    path = tmp_path / "odd.safetensors"
    checkpoints.save(EVERY_DTYPE, path)
    back = checkpoints.load(path, EVERY_DTYPE)
    assert all(torch.equal(back[name], leaf) and back[name].dtype == leaf.dtype for name, leaf in EVERY_DTYPE.items())


def test_the_bytes_of_a_file(tmp_path):
    """The length of the header, the header in JSON, the data: as at https://github.com/huggingface/safetensors."""
    path = tmp_path / "two.safetensors"
    checkpoints.save({"a": torch.tensor([[1, -2]], dtype=torch.int16), "b": torch.tensor(0.5).double()}, path)
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    assert json.loads(content[8 : 8 + length]) == {
        "a": {"dtype": "I16", "shape": [1, 2], "data_offsets": [0, 4]},
        "b": {"dtype": "F64", "shape": [], "data_offsets": [4, 12]},
    }
    assert content[8 + length :] == struct.pack("<hhd", 1, -2, 0.5)


def test_the_library_safetensors_reads_it(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch", reason="the library itself is no dependency")
    checkpoints.save(EVERY_DTYPE, tmp_path / "odd.safetensors")
    read = safetensors.load_file(tmp_path / "odd.safetensors")
    assert all(torch.equal(read[name], leaf) for name, leaf in EVERY_DTYPE.items())


def test_errors(tmp_path):
    path, tree = tmp_path / "x.safetensors", {"a": torch.ones(2), "b": torch.ones(3)}
    checkpoints.save(tree, path)
    for like, message in (
        ({"a": torch.ones(2)}, r"missing \['b'\], unexpected \[\]"),
        ({**tree, "b": torch.ones(4)}, r"'b' of `like` must be F32 \[3\], got torch.float32 \[4\]"),
        ({**tree, "b": torch.ones(3).int()}, r"'b' of `like` must be F32 \[3\], got torch.int32"),
    ):
        with pytest.raises(ValueError, match=f"checkpoints.load: .*{message}"):
            checkpoints.load(path, like)
    whole = path.read_bytes()
    for damaged, message in (
        (whole[:-1], "is cut off: 19 bytes of 20"),
        (b"nonsense" * 9, "is no file of safetensors"),
        (whole[:20], "is no file of safetensors"),
        (b"", "is no file of safetensors"),
        (b"\0\0\0\1\0\0\0\0{}", "is no file of safetensors: its header ends before"),
    ):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=message):
            checkpoints.load(path, tree)
    with pytest.raises(ValueError, match=r"a name of its own, got \['a.b'\] twice"):
        checkpoints.names({"a.b": torch.ones(1), "a": {"b": torch.ones(1)}})
    with pytest.raises(ValueError, match="must not have a leaf '__metadata__'"):
        checkpoints.save({"__metadata__": torch.ones(1)}, path)
    with pytest.raises(TypeError, match="leaves of `tree` must be tensors, got float at 'a'"):
        checkpoints.save({"a": 1.0}, path)
