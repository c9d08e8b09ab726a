"""Trains the scorer `learned`: it predicts from a row how much attention the row gets from a repetition of its text.

There is one small network for each layer and KV head. Its inputs are the features of `vllm_l2kv.scorers.learned`, its
target is the largest attention that a row gets from the repetition. Source of this target: Kim et al., "KVzip:
Query-Agnostic KV Cache Compression with Context Reconstruction", arXiv 2505.23416, section 3.

Features include the elements of slow pairs, which depend a little on the position. So each row is moved to a random
position for training; its target is unchanged, since attention depends only on distances. Then positions tell nothing
about the target, and positions beyond the length of the texts occur too.

Shapes: L layers, H KV heads, T rows of a text, F features.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch.nn.functional import gelu

from vllm_l2kv.cli_types import counted
from vllm_l2kv.profile import Rope
from vllm_l2kv.scorers.learned import HIDDEN, features, scores_of, slow_pairs_of
from vllm_l2kv.tools.progress import Progress

PROTECTED = 4
"""First rows of a text, which are not used for training, since every compaction keeps them."""
HELD_OUT = 8
"""One of this many texts is held out."""
KEEP_RATIOS = (0.5, 0.25, 0.1)
"""Keep ratios at which `Trained.overlap` is computed."""
MAX_GROUP_BYTES = 4 << 30
"""Bytes of features on a GPU at once, which limit how many layers are trained together."""
CPU_LAYERS = 4
"""Bytes of features in use at once on a CPU."""
GPU_STEPS, CPU_STEPS = (800, 4096), (300, 512)
"""Steps of gradient descent, and rows per step."""
LEARNING_RATE = 3e-3
WEIGHT_DECAY = 1e-3


@dataclass
class Examples:
    """Training examples: features and targets of rows, on the host; 17 GB for an 8B model and 112 texts.

    Attributes:
        rope: How the model rotates keys.
        frequencies: Frequencies of the slow pairs, `[rope.slow_pairs]` in radians per position.
        context: Number of positions to which rows may be moved.
        features: For each layer and text, `[H, T, F]` bf16.
        targets: For each layer and text, `[H, T]` fp32: ranks of the attention that rows get, as normal quantiles.
    """

    rope: Rope
    frequencies: torch.Tensor
    context: int
    features: dict[int, list[torch.Tensor]] = field(default_factory=dict)
    targets: dict[int, list[torch.Tensor]] = field(default_factory=dict)

    def add(self, layer: int, keys: torch.Tensor, values: torch.Tensor, attention: torch.Tensor) -> None:
        """Adds the rows of a text in one layer; texts must come in the same order in every layer.

        Args:
            layer: Index of a layer of full attention.
            keys: `[H, T, head_size]`, as in the cache.
            values: `[H, T, head_size_v]`.
            attention: `[H, T]`, the largest attention that each row gets from the repetition.
        """
        texts, num_tokens = self.features.setdefault(layer, []), keys.shape[1]
        # The same positions in every layer.
        positions = self.context * torch.rand(num_tokens, generator=torch.Generator().manual_seed(len(texts)))
        keys = moved(keys, self.rope, self.frequencies, positions - torch.arange(num_tokens))
        texts.append(features(keys, values, self.rope)[:, PROTECTED:].bfloat16().cpu())
        ranks = attention[:, PROTECTED:].argsort(-1).argsort(-1)
        # Quantiles of ranks, since attention spans orders of magnitude, and only its order within a text matters.
        quantiles = torch.special.ndtri((ranks + 0.5) / ranks.shape[-1])
        self.targets.setdefault(layer, []).append(quantiles.cpu())


def moved(keys: torch.Tensor, rope: Rope, frequencies: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """Keys whose slow pairs are rotated as if they were at later positions.

    Args:
        keys: `[..., T, head_size]` after RoPE.
        rope: How the keys are rotated.
        frequencies: See `Examples`.
        offsets: `[T]`, in positions.

    Returns:
        `[..., T, head_size]` fp32; elements of other pairs are unchanged.
    """
    keys = keys.float().clone()
    first, second = slow_pairs_of(keys, rope)
    angles = (offsets[:, None] * frequencies).to(keys.device)
    cos, sin = angles.cos(), angles.sin()
    turned = first * cos - second * sin, first * sin + second * cos
    for part, values in zip((first, second), turned, strict=True):
        part.copy_(values)
    return keys


class Trained(NamedTuple):
    """The result of training.

    Attributes:
        weights: Tensors by their names in the profile; zeros for layers that never compress.
        overlap: For each keep ratio, the share of the rows with the most attention that the scorer also keeps, averaged
            over layers, heads and held-out texts. For a random choice it equals the ratio.
    """

    weights: dict[str, torch.Tensor]
    overlap: dict[float, float]


def train(
    examples: Examples,
    num_layers: int,
    device: torch.device | str = "cpu",
    num_steps: int | None = None,
    batch: int | None = None,
    progress: Progress | None = None,
) -> Trained:
    """Trains a network for each layer and head of `examples`; reproducible on the same device.

    Args:
        examples: Examples of two or more texts.
        num_layers: Number of all layers of the model.
        device: Where to train.
        num_steps: Steps of gradient descent; `None` for the default of the device.
        batch: Rows per step; `None` for the default of the device.
        progress: Counts steps.

    Raises:
        ValueError: There are fewer than two texts.
    """
    on_gpu = torch.device(device).type == "cuda"
    default = GPU_STEPS if on_gpu else CPU_STEPS
    num_steps, batch = num_steps or default[0], batch or default[1]
    progress = progress or Progress()
    layers = sorted(examples.features)
    num_texts = len(examples.features[layers[0]]) if layers else 0
    if num_texts < 2:
        raise ValueError(f"Training the scorer learned needs at least 2 texts, got {num_texts}; raise --samples.")
    # The last texts are held out; they include all kinds.
    num_held_out = max(1, num_texts // HELD_OUT)
    size = sum(text.nbytes for text in examples.features[layers[0]])
    at_once = max(1, MAX_GROUP_BYTES // size) if on_gpu else CPU_LAYERS
    groups = [layers[first : first + at_once] for first in range(0, len(layers), at_once)]
    progress.begin(f"training the scorer learned on {counted(num_texts - num_held_out, 'text')}")
    weights: dict[str, torch.Tensor] = {}
    overlaps: list[torch.Tensor] = []
    for number, group in enumerate(groups, start=1):
        progress.part(f"training the scorer learned, part {number} of {len(groups)}", num_steps, "steps")
        networks = _fit(examples, group, num_texts - num_held_out, device, num_steps, batch, progress)
        overlaps += [_overlap(examples, layer, networks, i, num_held_out) for i, layer in enumerate(group)]
        for name, tensor in networks.items():
            whole = weights.setdefault(name, tensor.new_zeros(num_layers, *tensor.shape[1:], device="cpu"))
            whole[group] = tensor.cpu()
        progress.reached(number / len(groups))
    means = torch.stack(overlaps).mean(0).tolist()
    return Trained(weights, {ratio: round(mean, 3) for ratio, mean in zip(KEEP_RATIOS, means, strict=True)})


def _fit(
    examples: Examples,
    layers: Sequence[int],
    num_texts: int,
    device: torch.device | str,
    num_steps: int,
    batch: int,
    progress: Progress,
) -> dict[str, torch.Tensor]:
    """Trains the networks of some layers; returns tensors as in a profile, `[len(layers), H, ...]`."""
    x = torch.cat([torch.cat(examples.features[layer][:num_texts], 1).to(device) for layer in layers])
    y = torch.cat([torch.cat(examples.targets[layer][:num_texts], 1).to(device) for layer in layers])
    mean, deviation = _moments(x)
    num_networks, num_rows, num_features = x.shape
    chance = torch.Generator(device).manual_seed(0)

    def drawn(*shape: int) -> torch.Tensor:
        weights: torch.Tensor = torch.randn(shape, generator=chance, device=device) * shape[1] ** -0.5
        return weights

    w1, w2 = drawn(num_networks, num_features, HIDDEN), drawn(num_networks, HIDDEN, 1)
    shapes = (num_features, 1), (1, HIDDEN), (1, 1)
    wl, b1, b = (torch.zeros(num_networks, *shape, device=device) for shape in shapes)
    parameters = [each.requires_grad_() for each in (w1, w2, wl, b1, b)]
    optimizer = torch.optim.AdamW(parameters, LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=num_steps, pct_start=0.1)
    for _ in range(num_steps):
        some = torch.randint(num_rows, (batch,), generator=chance, device=device)
        inputs = (x[:, some].float() - mean) / deviation
        hidden = gelu(torch.baddbmm(b1, inputs, w1), approximate="tanh")
        found = torch.baddbmm(torch.baddbmm(b, inputs, wl), hidden, w2)[..., 0]
        # A sum over networks, so that each one is trained independently.
        loss = (found - y[:, some]).square().mean(-1).sum()
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
        progress.advance(1)
    with torch.no_grad():
        folded = _folded(w1, b1, w2, wl, b, mean, deviation)
    return {name: tensor.view(len(layers), -1, *tensor.shape[1:]) for name, tensor in folded.items()}


def _moments(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation of `[N, rows, F]`: `[N, 1, F]` each, fp32."""
    # One network at a time, so that few rows are converted to fp32 at once.
    moments = [torch.std_mean(each.float(), 0, keepdim=True) for each in x]
    deviations, means = zip(*moments, strict=True)
    return torch.stack(means), torch.stack(deviations).clamp_min(1e-3)


def _folded(
    w1: torch.Tensor,
    b1: torch.Tensor,
    w2: torch.Tensor,
    wl: torch.Tensor,
    b: torch.Tensor,
    mean: torch.Tensor,
    deviation: torch.Tensor,
) -> dict[str, torch.Tensor]:
    """Weights for features that are not normalized. Biases compensate for the rounding of weights to bf16."""
    w1, wl = ((each / deviation.mT).bfloat16() for each in (w1, wl))
    b1, b = b1 - mean @ w1.float(), b - mean @ wl.float()
    return {"w1": w1, "b1": b1[:, 0], "w2": w2[..., 0], "wl": wl[..., 0], "b": b[:, 0, 0]}


def _overlap(
    examples: Examples, layer: int, networks: Mapping[str, torch.Tensor], place: int, num_held_out: int
) -> torch.Tensor:
    """`Trained.overlap` of one layer on the held-out texts, with the stored weights: `[len(KEEP_RATIOS)]`."""
    of_layer = {name: tensor[place] for name, tensor in networks.items()}
    texts = zip(examples.features[layer][-num_held_out:], examples.targets[layer][-num_held_out:], strict=True)
    found = []
    for text, targets in texts:
        scores = scores_of(text.to(of_layer["w1"].device), of_layer).cpu()
        for ratio in KEEP_RATIOS:
            num_keep = round(ratio * targets.shape[-1])
            kept, looked_at = (
                torch.zeros_like(each, dtype=torch.bool).scatter_(-1, each.topk(num_keep, -1).indices, True)
                for each in (scores, targets)
            )
            found.append((kept & looked_at).sum(-1).float().mean() / num_keep)
    return torch.stack(found).view(num_held_out, -1).mean(0)
