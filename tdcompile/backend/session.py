"""onnxruntime sessions that run on the requested provider only, and the timing of models against each other."""

from __future__ import annotations

import ctypes
import functools
import io
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tdcompile.backend.clock import Clock, Interval, Lap, undisturbed
from tdcompile.backend.environment import distributions

# isort: split
# torch comes first: it loads the CUDA libraries, and on Windows it cannot be imported after onnxruntime's own
import onnxruntime as ort

from tdcompile.backend.onnx_nodes import IR_VERSION, OPSET, probe_model
from tdcompile.errors import InputError, UnavailableError, first_line
from tdcompile.ir.onnx_format import OnnxFormat
from tdcompile.ir.target import Target

Model = Path | bytes

_ERRORS_ONLY, _WARNING, _FATAL = 3, 2, 4  # onnxruntime's severities: errors only, its default, none
WARM_UP = {"cpu": 3, "cuda": 20}  # runs; the first ones on CUDA search for convolution algorithms
_NARROW = 0.01  # rounds end if half of each interval's width is at most this share of its ratio
_PATIENCE = 3  # times the duration asked for: after it, rounds end whatever the intervals are
_BETWEEN_CHECKS = 1.2  # the intervals are computed again when the duration has grown by this factor


@dataclass(frozen=True)
class Timing:
    """Seconds of one run: median, tenth and ninetieth percentile of ``runs`` runs.

    On a CPU with one thread they are processor seconds of this thread, which other processes do not change.

    Attributes:
        speedup: the first model's seconds over this one's, paired by rounds: median and 95 % interval.
        share: median share of the processor that the runs got; a smaller share tells of other processes.
    """

    median: float
    p10: float
    p90: float
    runs: int
    speedup: Interval
    share: float = 1.0

    @classmethod
    def of(cls, seconds: Sequence[float], first: Sequence[float] | None = None, share: float = 1.0) -> Timing:
        """Return the quantiles of the seconds of single runs, beside those of the first model in the same rounds."""
        p10, median, p90 = np.quantile(seconds, (0.1, 0.5, 0.9))
        speedup = _speedup(seconds if first is None else first, seconds)
        return cls(float(median), float(p10), float(p90), len(seconds), speedup, share)


def _speedup(first: Sequence[float], seconds: Sequence[float]) -> Interval:
    return Interval.of_median([a / max(b, 1e-12) for a, b in zip(first, seconds, strict=True)])


def open_session(
    model: Model, target: Target, *, profile: Path | None = None, tf32: bool = True, optimised: bool = True
) -> ort.InferenceSession:
    """Open a session on the target's provider, deterministic and without spinning threads.

    Args:
        model: a file, or a serialized model.
        target: provider and number of threads.
        profile: prefix of the path of onnxruntime's profile.
        tf32: let CUDA round fp32 products to TF32, as deployment does; the parity check does not.
        optimised: let onnxruntime rewrite the model, as deployment does.

    Raises:
        InputError: the file does not exist, or onnxruntime cannot load the model.
        UnavailableError: two onnxruntimes are installed, or the provider did not load.
    """
    wheels = distributions()
    if len(wheels) > 1:
        raise UnavailableError(
            f"{' and '.join(wheels)} are installed together and overwrite each other: "
            "uninstall them all, then install one"
        )
    if isinstance(model, Path) and not model.is_file():
        raise InputError(f"there is no model {model}")
    options = ort.SessionOptions()
    options.intra_op_num_threads = target.threads
    options.inter_op_num_threads = 1
    level = ort.GraphOptimizationLevel
    options.graph_optimization_level = level.ORT_ENABLE_ALL if optimised else level.ORT_DISABLE_ALL
    options.use_deterministic_compute = True
    options.log_severity_level = _ERRORS_ONLY
    # spinning threads of one session slow down another in this process tenfold
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if profile is not None:
        options.enable_profiling = True
        options.profile_file_prefix = str(profile)
    said = _preload_cuda() if target.device == "cuda" else ""
    source = str(model) if isinstance(model, Path) else model
    # a provider that fails to load raises below, with the reason; onnxruntime's line on stderr is suppressed
    ort.set_default_logger_severity(_FATAL)
    try:
        session = ort.InferenceSession(source, options, providers=_providers(target, tf32), enable_fallback=0)
    except Exception as error:  # onnxruntime's errors share no root of their own
        if _TENSORRT_LACKS in str(error):
            raise UnavailableError(_explain_missing_provider(target.provider, said)) from error
        what = model.name if isinstance(model, Path) else "the model"
        raise InputError(f"onnxruntime cannot load {what}: {error}") from error
    finally:
        ort.set_default_logger_severity(_WARNING)
    if session.get_providers()[0] != target.provider:
        raise UnavailableError(_explain_missing_provider(target.provider, said))
    return session


def open_probe(target: Target, form: OnnxFormat | None = None) -> ort.InferenceSession:
    """Open a session on the smallest model, which proves that the target's provider and the model's versions load.

    Raises:
        InputError: onnxruntime does not load models of these versions.
        UnavailableError: two onnxruntimes are installed, or the provider did not load.
    """
    form = form or OnnxFormat()
    if not str(form):
        return open_session(probe_model(), target)
    try:
        return open_session(probe_model(form.opset or OPSET, form.ir or IR_VERSION), target)
    except InputError as error:
        raise InputError(f"onnxruntime {ort.__version__} does not load models of {form}: give lower numbers") from error


def _providers(target: Target, tf32: bool) -> list[str | tuple[str, dict[str, str]]]:
    if target.device == "cpu":
        return [target.provider]
    cuda = ("CUDAExecutionProvider", {"cudnn_conv_algo_search": "EXHAUSTIVE", "use_tf32": str(int(tf32))})
    if target.precision == "int8":
        return [(target.provider, {"trt_int8_enable": "1"}), cuda]
    return [cuda]


@functools.cache
def _preload_cuda() -> str:
    """Load the CUDA libraries of the installed packages once; return what onnxruntime prints about missing ones."""
    said = io.StringIO()
    with redirect_stdout(said):
        ort.preload_dlls()
    return said.getvalue()


def _explain_missing_provider(provider: str, said: str) -> str:
    """Return why a provider did not load, with the installed versions and what to do."""
    lost = [line.partition(": ")[2] or line for line in said.splitlines() if line.startswith("Failed to load")]
    if not lost and (reason := _load_error(provider)):
        lost = [reason]
    found = (
        ", ".join(f"{name} {version}" for name, version in distributions().items()) or f"onnxruntime {ort.__version__}"
    )
    wants = f" for CUDA {ort.cuda_version}" if ort.cuda_version else " without CUDA"
    cuda = f"for CUDA {torch.version.cuda}" if torch.version.cuda else "without CUDA"
    return (
        f"onnxruntime did not load {provider}: {'; '.join(lost) or _SILENT.get(provider, 'no CUDA device answers')} "
        f"(found {found} built{wants}, torch {torch.__version__} built {cuda}); "
        f"{_ADVICE[provider]}"
    )


# Why a provider did not load if its library loads.
_SILENT = {"TensorrtExecutionProvider": "its library loads, and the libraries of TensorRT do not"}
# onnxruntime raises an error with this text where the libraries of TensorRT do not load; others fall back in silence.
_TENSORRT_LACKS = "Please install TensorRT libraries"
_ADVICE = {
    "CUDAExecutionProvider": "install the CUDA libraries with pip install 'tdcompile[cuda]', "
    "or compile for --target cpu",
    "TensorrtExecutionProvider": "int8 on a GPU needs TensorRT, because the CUDA provider has no int8 convolution: "
    "install the CUDA libraries with pip install 'tdcompile[cuda]', and TensorRT with the folder of libnvinfer in "
    "LD_LIBRARY_PATH, or take --precision fp16",
    "CPUExecutionProvider": "install onnxruntime again",
}


def _load_error(provider: str) -> str:
    """Return the loader's error for the provider's library; empty if it loads or does not exist."""
    kind = provider.removesuffix("ExecutionProvider").lower()
    for library in sorted((Path(ort.__file__).parent / "capi").glob(f"*onnxruntime_providers_{kind}.*")):
        try:
            ctypes.CDLL(str(library))
        except OSError as error:
            return str(error)
    return ""


def infer(session: ort.InferenceSession, inputs: Sequence[Tensor]) -> list[NDArray[np.generic]]:
    """Run a session on inputs in the graph's order and return its outputs.

    Raises:
        InputError: the inputs do not fit the model.
    """
    wanted = session.get_inputs()
    _check_count(wanted, inputs)
    feed = {value.name: x.detach().cpu().numpy() for value, x in zip(wanted, inputs, strict=True)}
    with _blame_inputs(wanted, inputs):
        return list(session.run(None, feed))


@contextmanager
def _blame_inputs(wanted: Sequence[ort.NodeArg], inputs: Sequence[Tensor]) -> Iterator[None]:
    """Raise a failure of the run as an error about its inputs.

    Raises:
        InputError: the inputs do not fit the model.
    """
    try:
        yield
    except Exception as error:  # onnxruntime's errors share no root of their own
        given = ", ".join(f"{tuple(x.shape)} {x.dtype}" for x in inputs)
        expected = ", ".join(f"{value.shape} {value.type}" for value in wanted)
        raise InputError(f"the model takes {expected} and cannot run on {given}: {first_line(error)}") from error


def _check_count(wanted: Sequence[ort.NodeArg], inputs: Sequence[Tensor]) -> None:
    if len(wanted) != len(inputs):
        raise InputError(
            f"the model takes {len(wanted)} inputs ({', '.join(v.name for v in wanted)}), not {len(inputs)}"
        )


def time_models(
    models: Sequence[Model],
    inputs: Sequence[Tensor],
    target: Target,
    *,
    seconds: float = 3.0,
    min_runs: int = 20,
    clock: Clock | None = None,
) -> list[Timing]:
    """Time models in rounds of one run each, so that a drift of the clock affects all equally.

    All sessions are open at once. Inputs and outputs stay on the device; a run ends when the device has finished.
    Rounds go on until the ratios to the first model are known to 1 %, but no longer than three times ``seconds``.
    Rounds in which other processes disturbed a run of several threads do not count.

    Args:
        models: files or serialized models that take the same inputs.
        inputs: one run's inputs, the target's batch already in them.
        target: provider and number of threads.
        seconds: shortest duration of all rounds together.
        min_runs: lower bound on the number of rounds.
        clock: times the runs; by default the clock of the target.

    Raises:
        InputError: the inputs do not fit a model, or see ``open_session``.
    """
    runs = [bind_inputs(open_session(model, target), inputs, target) for model in models]
    for _ in range(WARM_UP[target.device] - 1):  # ``bind_inputs`` has made the first run
        for run in runs:
            run()
    return time_rounds(runs, clock or Clock.of(target), seconds, min_runs)


def time_rounds(runs: Sequence[Callable[[], None]], clock: Clock, seconds: float, min_runs: int) -> list[Timing]:
    """Call all functions in rounds and return their times; see ``time_models``."""
    rounds: list[list[Lap]] = []
    began, due, limit = clock.wall(), seconds, _PATIENCE * seconds
    while True:
        rounds.append([clock.time(run) for run in runs])
        spent = clock.wall() - began
        if len(rounds) < min_runs or spent < due:
            continue
        kept: Sequence[Sequence[Lap]] = undisturbed(rounds, clock)
        enough = len(kept) >= min_runs
        if spent >= limit or (enough and _known(kept)):
            break
        due = min(spent * _BETWEEN_CHECKS, limit)
    if not enough:  # the machine was never free: the least disturbed rounds
        kept = sorted(rounds, key=lambda laps: -min(lap.share for lap in laps))[:min_runs]
    times = [[lap.seconds for lap in laps] for laps in zip(*kept, strict=True)]
    shares = [float(np.median([lap.share for lap in laps])) for laps in zip(*rounds, strict=True)]
    return [Timing.of(own, times[0], share) for own, share in zip(times, shares, strict=True)]


def _known(rounds: Sequence[Sequence[Lap]]) -> bool:
    """Return whether the ratios to the first model, or the seconds of a single model, have narrow intervals."""
    first, *others = ([lap.seconds for lap in laps] for laps in zip(*rounds, strict=True))
    if not others:
        return Interval.of_median(first).narrow(_NARROW)
    return all(_speedup(first, own).narrow(_NARROW) for own in others)


def bind_inputs(session: ort.InferenceSession, inputs: Sequence[Tensor], target: Target) -> Callable[[], None]:
    """Copy inputs to the device, run once, and return a function that makes another synchronised run.

    Raises:
        InputError: the inputs do not fit the model.
    """
    _check_count(session.get_inputs(), inputs)
    binding = session.io_binding()
    for value, x in zip(session.get_inputs(), inputs, strict=True):
        there = ort.OrtValue.ortvalue_from_numpy(x.detach().cpu().numpy(), target.device, 0)
        binding.bind_ortvalue_input(value.name, there)
    for value in session.get_outputs():
        binding.bind_output(value.name, target.device)

    def run() -> None:
        session.run_with_iobinding(binding)
        binding.synchronize_outputs()

    with _blame_inputs(session.get_inputs(), inputs):
        run()
    return run
