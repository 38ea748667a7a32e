"""SparseLinear: a projection that is dense in prefill and skips dropped channels in decode."""

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from teal.errors import TealError
from teal.ops.layouts import LAYOUTS, restore
from teal.ops.packed import PackedWeight
from teal.ops.reference import KEEP_ALL, first_sparse_token
from teal.ops.sparse_gemv import pack, sparse_gemv, sparse_linear


class SparseLinear(nn.Module):
    """Replaces an `nn.Linear` of weight [N, K].

    Buffers, none of them in the state dict (a plan brings them): `threshold` [] or [K] in float32, which
    casts of the module leave in float32, and `sparse_bias` [N] or None, a compensation added on sparse
    tokens only. The state dict is that of the `nn.Linear`: `weight` [N, K] and `bias` [N].
    `dense_tokens` is -1 for the run-time rule (one token is sparse, more are dense) or, in evaluation, the
    position from which every token is sparse.
    """

    threshold: Tensor
    sparse_bias: Tensor | None

    @torch.inference_mode(False)  # buffers made in inference mode could not be changed outside of it
    def __init__(self, weight: Tensor | PackedWeight, bias: Tensor | None = None) -> None:
        super().__init__()
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
        self.register_buffer("threshold", torch.full((), KEEP_ALL, dtype=torch.float32), persistent=False)
        self.register_buffer("sparse_bias", None, persistent=False)
        self.dense_tokens = -1
        self.observer: Callable[[Tensor], None] | None = None  # called with the inputs of sparse tokens
        self.always_dense = False  # decode through the dense product, to measure against it
        self.revision = 0  # counts the casts and moves, after which addresses of tensors are others
        self._set_weight(weight if isinstance(weight, PackedWeight) else pack(weight.detach()))
        self.threshold = self.threshold.to(self.packed.storage[0].device)

    @property
    def packed(self) -> PackedWeight:
        return restore([getattr(self, name) for name in self._storage_names], self._layout)

    @property
    def weight(self) -> Tensor:
        """The weight as [N, K]."""
        return self.packed.unpack()

    def rows(self, count: int) -> Tensor:
        """The first `count` rows of the weight."""
        return self.packed.rows(count)

    @torch.inference_mode(False)
    @torch.no_grad()
    def set_threshold(self, threshold: float | Tensor, sparse_bias: Tensor | None = None) -> None:
        """Drop inputs with |x| <= threshold (a number, or one per channel [K]) on sparse tokens.

        In place where shapes allow it, so that compiled and captured graphs see the new level.
        Raises TealError for a threshold that is NaN or has neither 1 nor K values.
        """
        new = torch.as_tensor(threshold, dtype=torch.float32)
        if new.shape not in ((), (self.in_features,)):
            raise TealError(f"threshold must have 1 or {self.in_features} values, got {tuple(new.shape)}")
        if torch.isnan(new).any():
            raise TealError("threshold is NaN")
        if sparse_bias is not None and sparse_bias.shape != (self.out_features,):
            raise TealError(f"compensation must have {self.out_features} values, got {tuple(sparse_bias.shape)}")
        self.threshold = _replace(self.threshold, new.to(self.threshold.device))
        if sparse_bias is None:
            self.sparse_bias = None
        else:
            self.sparse_bias = _replace(self.sparse_bias, sparse_bias.to(self.threshold.device, self.packed.dtype))

    def forward(self, x: Tensor) -> Tensor:
        """x [..., T, K] -> [..., T, N]: one token is sparse, more are dense, unless `dense_tokens` says otherwise."""
        return self._product(x, self.dense_tokens)

    def prefill(self, x: Tensor) -> Tensor:
        """x [..., T, K] -> [..., T, N]: dense, also one token, unless `dense_tokens` says otherwise."""
        return self._product(x, x.shape[-2] if self.dense_tokens < 0 else self.dense_tokens)

    def _product(self, x: Tensor, dense_tokens: int) -> Tensor:
        if self.observer is not None:
            sparse = x[..., first_sparse_token(x.shape[-2], dense_tokens) :, :]
            if sparse.numel():
                self.observer(sparse)
        return sparse_linear(x, self.packed, self.threshold, self.bias, self.sparse_bias, dense_tokens)

    def decode(self, x: Tensor) -> Tensor:
        """x [B, K], one sparse token for each of B sequences -> [B, N]."""
        if self.observer is not None:
            self.observer(x)
        if self.always_dense:
            return self.packed.dense_gemm(x, self.bias)
        bias = self.bias
        if self.sparse_bias is not None:
            bias = self.sparse_bias if bias is None else bias + self.sparse_bias
        return sparse_gemv(x, self.packed, self.threshold, bias)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"layout={self._layout}"
        )

    def _set_weight(self, weight: PackedWeight) -> None:
        self._layout = weight.layout
        self.out_features, self.in_features = weight.shape
        self._storage_names = [f"storage_{index}" for index in range(len(weight.storage))]
        for name, tensor in zip(self._storage_names, weight.storage, strict=True):
            setattr(self, name, nn.Parameter(tensor, requires_grad=False))

    @torch.inference_mode(False)
    def _apply(self, fn: Any, recurse: bool = True) -> "SparseLinear":
        threshold, sparse_bias = self.threshold, self.sparse_bias
        fixed = {self._storage_names[index]: dtype for index, dtype in LAYOUTS[self._layout].fixed_dtypes.items()}
        before = {name: getattr(self, name).data for name in fixed}
        super()._apply(fn, recurse)
        self.revision += 1
        for name, dtype in fixed.items():  # a cast is of the activations: it would take the scales' precision
            stored = getattr(self, name)
            if stored.dtype != dtype:
                stored.data = before[name].to(stored.device)
        for name, tensor in zip(self._storage_names, self.packed.after_cast().storage, strict=True):
            getattr(self, name).data = tensor.data
        # By value: a cast would move thresholds across activations, `to_empty` would leave garbage.
        self.threshold = _moved(threshold, self.threshold.device, torch.float32, KEEP_ALL)
        if sparse_bias is not None and self.sparse_bias is not None:
            self.sparse_bias = _moved(sparse_bias, self.sparse_bias.device, self.sparse_bias.dtype, 0.0)
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        destination[prefix + "weight"] = self.weight if keep_vars else self.weight.detach()
        if self.bias is not None:
            destination[prefix + "bias"] = self.bias if keep_vars else self.bias.detach()

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """In place, so that compiled and captured graphs see the new weight."""
        _, strict, missing, unexpected, errors = args
        own = {prefix + "weight": self.weight} | ({} if self.bias is None else {prefix + "bias": self.bias})
        for name, current in own.items():
            new = state_dict.get(name)
            if new is None:
                missing.extend([name] if strict else [])
            elif new.shape != current.shape:
                errors.append(f"{name}: {tuple(new.shape)} does not fit {tuple(current.shape)}")
            elif name.endswith("bias"):
                current.data.copy_(new)
            else:
                new = type(self.packed).pack(new.to(current.device, current.dtype))
                for stored, replacement in zip(self.packed.storage, new.storage, strict=True):
                    stored.data.copy_(replacement)
        if strict:
            unexpected.extend(name for name in state_dict if name.startswith(prefix) and name not in own)


class SparseHead(SparseLinear):
    """An LM head. It is dense, or drops each token's smallest inputs: the share `sparsity` of them.

    A head has no threshold from a plan: the share is taken of each token's own magnitudes, ties included.
    """

    sparsity: float = 0.0

    def set_sparsity(self, sparsity: float) -> None:
        """0 is dense. Raises TealError outside 0 <= sparsity < 1."""
        if not 0 <= sparsity < 1:
            raise TealError(f"the sparsity of the LM head must be at least 0 and below 1, got {sparsity}")
        self.sparsity = sparsity
        self.set_threshold(0.0 if sparsity else KEEP_ALL)  # what was set to zero is not read

    @property
    def dropped_inputs(self) -> int:
        """How many of the inputs of a token are dropped, besides those of equal magnitude."""
        return int(self.sparsity * self.in_features)

    def prefill(self, x: Tensor) -> Tensor:
        """x [..., K] -> [..., N], dense"""
        return self.packed.dense_gemm(x, self.bias)

    def decode(self, x: Tensor) -> Tensor:
        return super().decode(_drop_smallest(x, self.dropped_inputs)) if self.dropped_inputs else self.prefill(x)


def _drop_smallest(x: Tensor, count: int) -> Tensor:
    """x [B, K] with the `count` smallest magnitudes in each row set to zero."""
    magnitudes = x.abs().float()
    return torch.where(magnitudes <= magnitudes.kthvalue(count, dim=-1, keepdim=True).values, 0, x)


def _moved(value: Tensor, device: torch.device, dtype: torch.dtype, default: float) -> Tensor:
    """`value` on another device; a value that only existed on the meta device becomes `default`."""
    if value.is_meta and device.type != "meta":
        return torch.full(value.shape, default, device=device, dtype=dtype)
    return value.to(device, dtype)


def _replace(old: Tensor | None, new: Tensor) -> Tensor:
    if old is not None and old.shape == new.shape and old.dtype == new.dtype and old.device == new.device:
        return old.copy_(new)
    return new.clone()  # the caller's tensor is a plan's; the next level is copied over this one


def sparse_layers(model: nn.Module) -> dict[str, SparseLinear]:
    """The SparseLinear projections of a model by name, without its head. Raises TealError if there are none."""
    layers = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, SparseLinear) and not isinstance(module, SparseHead)
    }
    if not layers:
        raise TealError("the model has no sparse projections; call teal.sparsify(model, plan) first")
    return layers


@contextmanager
def always_dense(model: nn.Module) -> Iterator[None]:
    """Within the context the engine decodes through the layouts' dense products: what sparsity must beat."""
    layers = sparse_layers(model).values()
    try:
        for layer in layers:
            layer.always_dense = True
        yield
    finally:
        for layer in layers:
            layer.always_dense = False


@contextmanager
def observing(layers: Mapping[str, SparseLinear], observe: Callable[[str, Tensor], None]) -> Iterator[None]:
    """Within the context `observe(name, x)` is called with the inputs of sparse tokens of each of `layers`."""
    try:
        for name, layer in layers.items():
            layer.observer = functools.partial(observe, name)
        yield
    finally:
        for layer in layers.values():
            layer.observer = None


@contextmanager
def sparse_from(model: nn.Module, dense_tokens: int) -> Iterator[None]:
    """Within the context, tokens from position `dense_tokens` on are sparse in every call, prompts too.

    For evaluation: a call must then carry whole sequences, starting at position 0.
    """
    layers = sparse_layers(model).values()
    before = [layer.dense_tokens for layer in layers]
    try:
        for layer in layers:
            layer.dense_tokens = dense_tokens
        yield
    finally:
        for layer, value in zip(layers, before, strict=True):
            layer.dense_tokens = value
