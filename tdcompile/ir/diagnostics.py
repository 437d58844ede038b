"""``Reason`` for a dense layer or a refusal, ``Diagnostic`` for a message in the history, and their codes."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Literal, Self

Level = Literal["info", "warning"]


class _Code(StrEnum):
    """A text for machines with a ``meaning`` for people."""

    meaning: str

    def __new__(cls, value: str, meaning: str) -> Self:
        """Store the meaning beside the text."""
        code = str.__new__(cls, value)
        code._value_ = value
        code.meaning = meaning
        return code


class ReasonCode(_Code):
    """Codes of reasons: why a form refuses a layer, or why a layer stays dense."""

    # The layer's kind: another form may fit.
    KIND = "kind", "the form takes the other kind of layer: convolution or linear"
    KERNEL = "kernel", "the kernel has too many or too few taps for the form"
    POINTWISE = "pointwise", "the kernel has one tap, and the form needs more"
    TRANSPOSED = "transposed", "the form does not take transposed convolutions"
    GROUPED = "grouped", "the layer has groups, and the form takes one group"
    UNGROUPED = "ungrouped", "the layer has one group, and the form takes groups"
    # The layer's size.
    DEPTHWISE = "depthwise", "each group has one input channel: there is nothing to decompose"
    SHAPE = "shape", "the numbers of features have no product of the length that the form needs"
    SMALL = "small", "even rank 1 costs as much as the layer"
    NO_FORM = "no_form", "no decomposition takes this kind of layer"
    NO_RANKS = "no_ranks", "all ranks are below the grain"
    # The network or the user.
    EXCLUDED_BY_USER = "excluded_by_user", "`--keep-dense` names the layer"
    HOOKED = "hooked", "the layer has a forward hook or its own forward method, which factors would lose"
    TIED_PARAMETER = "tied_parameter", "another module or operator uses the same weight"
    NO_FLOAT_WEIGHT = "no_float_weight", "the weight has no floating-point values"
    # The choice.
    NOT_CHEAPER = "not_cheaper", "no candidate costs less than the dense layer"
    DENSE_IS_BEST = "dense_is_best", "cheaper candidates exist; the budget holds without them, at a lower loss"
    SLOWER_IN_GRAPH = "slower_in_graph", "the replacement was measured in the whole graph and was not faster"
    NARROW = "narrow", "the full rank is not above the selector's floor"
    NO_SPECTRUM = "no_spectrum", "the selector needs singular values, and `propose` did not compute them"
    OTHER_FORM = "other_form", "the selector was asked for one form, which does not fit the layer"
    REFUSED = "refused", "none of the forms that the method uses fits the layer"
    DENSE_IN_PLAN = "dense_in_plan", "the plan that was given leaves the layer dense"
    NOT_IN_PLAN = "not_in_plan", "the plan does not mention the layer"


class DiagnosticCode(_Code):
    """Codes of diagnostics: messages about the network or about what a pass did not do."""

    WEIGHTS = "weights", "where the weights were found in their file, and what was left out"
    NOT_TRACED = "not_traced", "a module could not be traced; it is called as it is, and its layers are still rewritten"
    UNTRIED = "untried", "a size of the inputs takes too much memory to compare the graph with the network"
    PADDING = "padding", "torch's fused attention kernels give 0 for padding, and the compiled model does not"
    HALF_PRECISION = "half_precision", "weights or an autocast region are half precision and are compiled in float32"
    OPEN_AXES = "open_axes", "what was found about the open axes by running the network at other sizes"
    WRAPPED = "wrapped", "the network is compiled without the wrapper around it"
    STATE = "state", "the network changes its buffers at each call, and the compiled model does not"
    NO_LAYER = "no_layer", "a weight belongs to no convolution or linear layer"
    QUANTISED = "quantised", "a layer is quantised already"
    NOT_QUANTIZED = "not_quantized", "int8 was left out, or a layer stays float in an int8 model"
    PRECISION = "precision", "why precision=auto chose int8 or fp32, or that a plan is compiled in another precision"
    NOT_TUNED_INT8 = "not_tuned_int8", "the network was not tuned through the rounding of int8"
    CAUTION = "caution", "a decomposition reports a numerical problem in the factors of a layer"
    DATA = "data", "how samples or labels were read, or what about them limits the result"
    NO_DATA = "no_data", "there are no training samples, and what a pass would do with them"
    SYNTHETIC = "synthetic", "the training samples were made from the statistics of batch norm"
    FEW_SAMPLES = "few_samples", "the moments of some layers are from few samples and were shrunk"
    NO_BATCHNORM = "no_batchnorm", "the network has no batch norm with running statistics"
    NO_ADAPTERS = "no_adapters", "no layer has an adapter"
    IN_PLACE = "in_place", "the network changes values in place, so `refit` cannot follow them layer by layer"
    NOT_REFITTED = "not_refitted", "`refit` cannot fit the layer by one regression"
    NOT_SIMPLIFIED = "not_simplified", "the exported model is not simplified by onnxsim"
    TRANSPOSED_KERNELS = (
        "transposed_kernels",
        "whether k x 1 convolutions became 1 x k, which run faster, in both networks",
    )
    NOT_EXACT = "not_exact", "a rewrite that must keep the outputs did not, and is not used"
    MASKED_ROW = "masked_row", "the model and the network differ where a mask masks a whole row, or nothing of it"
    GOAL = "goal", "the result of the search for a goal"
    OUTPUT_LEFT_OUT = "output_left_out", "an output of the network has no part in the training loss"


@dataclass(frozen=True)
class Reason:
    """The reason for a dense layer or for a refusal by a form.

    Attributes:
        code: a ``ReasonCode``, or a plug-in's own text.
        text: a sentence for people.
    """

    code: str
    text: str

    def about(self, layer: str, level: Level = "info") -> Diagnostic:
        """Return the same code and text as a message about a layer."""
        return Diagnostic(level, self.code, self.text, layer)


@dataclass(frozen=True)
class Diagnostic:
    """A message about a layer or the network, from tracing or from a pass.

    Attributes:
        level: ``warning`` if the result may differ from what the user expects, otherwise ``info``.
        code: a ``DiagnosticCode`` or ``ReasonCode``, or a plug-in's own text.
        text: a sentence for people.
        layer: the layer's name; None if the message is about the network.
    """

    level: Level
    code: str
    text: str
    layer: str | None = None
