"""OpenAI's published dVAE as a model folder: `tessera import-dvae openai ENCODER DECODER --trust-pickle --out DIR`.

The files are pickles of whole modules of the package `dall_e` (https://github.com/openai/DALL-E), and unpickling means
to run what a pickle names. The reader here knows the few names that such files hold. A module of whatever class becomes
an object without code, tensors become tensors, any other name ends the import, and `dall_e` need not be installed.
`torch.load(weights_only=True)` does the same for files of today's format, but takes no modules from files of the format
before PyTorch 1.6; this reader takes both.
"""

import hashlib
import io
import pickle
import re
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple

import torch
from torch import Tensor

from dvae.model import DiscreteVAE, DiscreteVAEConfig
from tessera.config import to_plain
from tessera.errors import UserError
from tessera.model_folder import write_part
from tessera.one_line_parser import OneLineParser

# K codebook size, C embedding channels.

_IMAGE_SIZE = (256, 256)  # pixels, what the dVAE was trained on

_MODULE_CLASSES = {
    "dall_e.encoder.Encoder",
    "dall_e.encoder.EncoderBlock",
    "dall_e.decoder.Decoder",
    "dall_e.decoder.DecoderBlock",
    "dall_e.utils.Conv2d",
    "torch.nn.modules.activation.ReLU",
    "torch.nn.modules.container.Sequential",
    "torch.nn.modules.linear.Identity",
    "torch.nn.modules.pooling.MaxPool2d",
    "torch.nn.modules.upsampling.Upsample",
}
_STORAGE_CLASSES = {
    "torch.FloatStorage": torch.float32,
    "torch.HalfStorage": torch.float16,
    "torch.BFloat16Storage": torch.bfloat16,
}
_KINDS = {"w": "weight", "b": "bias"}
_ENDS = {"blocks.input.w", "blocks.input.b", "blocks.output.conv.w", "blocks.output.conv.b"}
_ZIP_START = b"PK\x03\x04"
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C


class InertModule:
    """Stands for a pickled module of any class: keeps its attributes and has no other code."""

    def __init__(self) -> None:
        self.attributes: dict[str, Any] = {}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.attributes = state


class TensorReader(pickle.Unpickler):
    """Reads a pickled module into `InertModule` objects and tensors.

    Args:
        stream: at the start of the pickle.
        path: the file that errors name.

    Attributes:
        storages: by key, the flat tensors that the module's tensors are views of; to be filled after `load`.
    """

    def __init__(self, stream: BinaryIO, path: Path) -> None:
        super().__init__(stream)
        self._path = path
        self.storages: dict[str, Tensor] = {}

    def find_class(self, module: str, name: str) -> Any:
        """What a name in the pickle stands for; nothing is imported.

        Raises:
            UserError: for a name that the published files do not hold.
        """
        full_name = f"{module}.{name}"
        if full_name in _MODULE_CLASSES:
            return InertModule
        if full_name in _STORAGE_CLASSES:
            return _STORAGE_CLASSES[full_name]
        known = {
            "torch._utils._rebuild_tensor_v2": _view,
            "torch._utils._rebuild_parameter": _first,
            "torch.device": _nothing,
            "collections.OrderedDict": OrderedDict,
            "__builtin__.set": set,
        }
        if full_name not in known:
            raise UserError(
                f"{self._path} names {full_name}, which no file of OpenAI's dVAE does; it was not read further, and "
                "nothing in it was run"
            )
        return known[full_name]

    def persistent_load(self, pid: Any) -> Any:
        """What is stored outside the pickle: a storage, or in the older format a class with its source code."""
        if pid[0] == "module":
            return pid[1]
        _, dtype, key, _, num_elements, *_ = pid
        if key not in self.storages:
            self.storages[key] = torch.empty(num_elements, dtype=dtype)
        return self.storages[key]


def _view(storage: Tensor, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: Any) -> Tensor:
    return storage.as_strided(size, stride, offset)


def _first(tensor: Tensor, *_: Any) -> Tensor:
    return tensor


def _nothing(*_: Any) -> None:
    return None


def _read_zip(stream: BinaryIO, path: Path) -> InertModule:
    with zipfile.ZipFile(stream) as archive:
        (record,) = (name for name in archive.namelist() if name.endswith("/data.pkl"))
        reader = TensorReader(io.BytesIO(archive.read(record)), path)
        module = reader.load()
        for key, storage in reader.storages.items():
            _fill(storage, archive.read(f"{record.removesuffix('.pkl')}/{key}"))
    return module


def _read_legacy(stream: BinaryIO, path: Path) -> InertModule:
    """Five pickles in a row: magic number, format version, machine, module, keys of storages; then the storages."""
    if TensorReader(stream, path).load() != _LEGACY_MAGIC:
        raise ValueError("not a PyTorch file")
    for _ in range(2):
        TensorReader(stream, path).load()
    reader = TensorReader(stream, path)
    module = reader.load()
    for key in TensorReader(stream, path).load():
        storage = reader.storages[key]
        stream.read(8)  # the number of elements once more
        _fill(storage, stream.read(storage.nbytes))
    return module


def _fill(storage: Tensor, content: bytes) -> None:
    # a view of the same shape: a copy would broadcast the one number of a truncated file
    storage.copy_(torch.frombuffer(bytearray(content), dtype=storage.dtype).view_as(storage))


def _named_tensors(module: InertModule, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    for name, tensor in module.attributes["_parameters"].items():
        yield prefix + name, tensor.float()
    for name, child in module.attributes["_modules"].items():
        yield from _named_tensors(child, f"{prefix}{name}.")


class Network(NamedTuple):
    """One of the two published networks.

    Attributes:
        tensors: float32, by their names in the package `dall_e`.
        widths: channels per resolution, in the order in which the data meets them.
        blocks: residual blocks per resolution, likewise.
    """

    tensors: dict[str, Tensor]
    widths: tuple[int, ...]
    blocks: tuple[int, ...]


def read_network(path: Path, role: Literal["encoder", "decoder"]) -> Network:
    """Reads the tensors of a published file without running any of its code.

    Args:
        path: the file, in PyTorch's zip format or in that before PyTorch 1.6; half precision becomes float32.
        role: which network it has to hold.

    Raises:
        UserError: if the file is absent, damaged or another one, or names anything but the modules of such a network.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file; expected {role}.pkl as OpenAI published it")
    with open(path, "rb") as stream:
        try:
            is_zip = stream.read(len(_ZIP_START)) == _ZIP_START
            stream.seek(0)
            module = _read_zip(stream, path) if is_zip else _read_legacy(stream, path)
            tensors = dict(_named_tensors(module))
            if missing := _ENDS - tensors.keys():
                raise ValueError(f"a network without {', '.join(sorted(missing))}")
            # the encoder begins with a 7x7 convolution, the decoder with a 1x1 convolution
            found = "encoder" if tensors["blocks.input.w"].shape[3] > 1 else "decoder"
        except UserError:
            raise
        except Exception as error:  # a file that is no such pickle can fail at any place and in any way
            raise UserError(
                f"{path} is damaged or not a published dVAE ({type(error).__name__}: {error}); "
                f"expected {role}.pkl as OpenAI published it"
            ) from error
    if found != role:
        raise UserError(f"{path} holds the {found}, expected the {role}: the order is ENCODER DECODER")
    groups: dict[str, list[int]] = {}
    for name, tensor in tensors.items():
        if match := re.fullmatch(r"blocks\.group_(\d+)\.block_\d+\.res_path\.conv_4\.b", name):
            groups.setdefault(match[1], []).append(tensor.numel())
    widths, blocks = tuple(sizes[0] for sizes in groups.values()), tuple(len(sizes) for sizes in groups.values())
    return Network(tensors, widths, blocks)


def import_openai(encoder: Path, decoder: Path) -> DiscreteVAE:
    """The dVAE of two published files, in evaluation mode.

    Args:
        encoder: OpenAI's encoder.pkl.
        decoder: OpenAI's decoder.pkl.

    Raises:
        UserError: if a file cannot be read (see `read_network`), or the two do not belong together.
    """
    first, second = read_network(encoder, "encoder"), read_network(decoder, "decoder")
    num_codes = first.tensors["blocks.output.conv.b"].numel()
    codebook = second.tensors.pop("blocks.input.w").flatten(1)  # [C, K], a 1x1 convolution over one-hot codes
    codebook_bias = second.tensors.pop("blocks.input.b")  # [C]
    for what, one, other in (
        ("codes", num_codes, codebook.shape[1]),
        ("widths", first.widths, second.widths[::-1]),
        ("blocks", first.blocks, second.blocks[::-1]),
    ):
        if one != other:
            raise UserError(
                f"{encoder} and {decoder} do not belong together: {one} {what} in the encoder, {other} in the decoder"
            )
    vae = DiscreteVAE(
        DiscreteVAEConfig(
            quantizer="gumbel",
            network="paper",
            pixels="logit_laplace",
            patch_size=1,
            widths=first.widths,
            blocks=first.blocks,
            codebook_size=num_codes,
            embedding_dim=codebook.shape[0],
            tied=False,
        )
    )
    tensors = {
        "quantizer.codebook": codebook.T.contiguous(),
        "decoder.codebook_bias": codebook_bias,
        **{f"encoder.{name}": tensor for name, tensor in _renamed(first, head="vocabulary_head")},
        **{f"decoder.{name}": tensor for name, tensor in _renamed(second, head="pixel_head")},
    }
    expected = {name: tuple(tensor.shape) for name, tensor in vae.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    for name in sorted(expected.keys() | found.keys()):
        if expected.get(name) != found.get(name):
            raise UserError(
                f"{encoder} and {decoder} do not hold the published network: expected shape "
                f"{expected.get(name, 'none')} for {name}, found {found.get(name, 'none')}"
            )
    vae.load_state_dict(tensors)
    return vae.eval()


def _renamed(network: Network, *, head: str) -> Iterator[tuple[str, Tensor]]:
    """The tensors by the names that they have in `PaperEncoder` and `PaperDecoder`."""
    layers = {"blocks.input": "stem", "blocks.output.conv": head}
    for group, count in enumerate(network.blocks):
        for block in range(count):
            theirs, ours = f"blocks.group_{group + 1}.block_{block + 1}", f"groups.{group}.{block}"
            layers[f"{theirs}.id_path"] = f"{ours}.skip"
            for place in (1, 2, 3, 4):
                layers[f"{theirs}.res_path.conv_{place}"] = f"{ours}.conv{place}"
    for name, tensor in network.tensors.items():
        layer, _, kind = name.rpartition(".")
        yield f"{layers.get(layer, layer)}.{_KINDS.get(kind, kind)}", tensor


def _parser() -> OneLineParser:
    parser = OneLineParser(
        prog="tessera import-dvae",
        description="Turns a published dVAE into a model folder. openai: the two files of the DALL-E paper's dVAE, "
        "encoder.pkl and decoder.pkl.",
    )
    parser.add_argument("family", choices=["openai"], help="whose dVAE it is")
    parser.add_argument("encoder", type=Path, help="file with the encoder")
    parser.add_argument("decoder", type=Path, help="file with the decoder")
    parser.add_argument(
        "--trust-pickle",
        action="store_true",
        help="needed: you trust the source of the files, though nothing but tensors is read of them",
    )
    parser.add_argument("--out", type=Path, required=True, help="model folder that receives the dvae part")
    return parser


def main(argv: Sequence[str]) -> int:
    """The command."""
    arguments = _parser().parse_args(argv)
    if not arguments.trust_pickle:
        raise UserError(
            f"{arguments.encoder} and {arguments.decoder} are pickles, which can run code when they are loaded "
            "naively; tessera reads nothing but tensors from them: add --trust-pickle if they come from a source that "
            "you trust"
        )
    if (arguments.out / "dvae" / "model.safetensors").exists():
        raise UserError(f"{arguments.out} has a dvae already: choose another folder with --out")
    vae = import_openai(arguments.encoder, arguments.decoder)
    write_part(
        arguments.out,
        "dvae",
        config=to_plain(vae.config),
        tensors=vae.state_dict(),
        metadata={
            "image_size": list(_IMAGE_SIZE),
            "imported": {
                "family": arguments.family,
                "encoder": _source(arguments.encoder),
                "decoder": _source(arguments.decoder),
            },
        },
    )
    height, width = _IMAGE_SIZE
    rows, columns = vae.grid(height, width)
    print(
        f"dvae in {arguments.out}: {sum(parameter.numel() for parameter in vae.parameters()):,} parameters, "
        f"{vae.codebook_size:,} codes, {rows}x{columns} of them for {height}x{width} px\n"
        f"see what it keeps of an image: tessera reconstruct {arguments.out} photo.jpg"
    )
    return 0


def _source(path: Path) -> dict[str, str]:
    with open(path, "rb") as stream:
        return {"file": path.name, "sha256": hashlib.file_digest(stream, "sha256").hexdigest()}


if __name__ == "__main__":
    from tessera.errors import run_command

    sys.exit(run_command(main, sys.argv[1:]))
