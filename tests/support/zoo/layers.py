"""Modules of torch.nn, each small, in all the ways they can be set."""

import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize
from torch.utils.checkpoint import checkpoint

from zoo.case import case, make, register, regression, regression_dim1, to_ramp


def _add(name, build, *shape, **options):
    register(name, lambda: make(build(), regression, torch.randn(*shape), **options))


def _then(layer, channels, dims):
    """The layer, a nonlinearity and a pointwise convolution, so that the layer's output gradient is not trivial."""
    conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
    return nn.Sequential(layer, nn.Tanh(), conv(channels, 3, 1))


def _mlp():
    return nn.Sequential(nn.Linear(8, 10), nn.Tanh(), nn.Linear(10, 6))


_add("mlp", _mlp, 5, 8)
_add("mlp_n_equals_d", lambda: nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6)), 6, 6)
_add("mlp_one_sample", _mlp, 1, 8)
_add("mlp_more_samples_than_parameters", lambda: nn.Sequential(nn.Linear(3, 2), nn.Tanh(), nn.Linear(2, 1)), 14, 3)
_add("mlp_no_bias", lambda: nn.Sequential(nn.Linear(8, 10, bias=False), nn.GELU(), nn.Linear(10, 6, bias=False)), 5, 8)
_add("mlp_frozen_weight", _mlp, 5, 8, frozen="weight")
_add("mlp_frozen_bias", _mlp, 5, 8, frozen="bias")
_add("mlp_frozen_first", _mlp, 5, 8, frozen="0.")
_add("mlp_frozen_last", _mlp, 5, 8, frozen="2.")
_add(
    "mlp_in_place_relu",
    lambda: nn.Sequential(
        nn.Linear(8, 10), nn.ReLU(inplace=True), nn.Linear(10, 6), nn.LeakyReLU(inplace=True), nn.Linear(6, 4)
    ),
    *(5, 8),
)
_add("linear_3d", _mlp, 5, 4, 8)
_add("linear_3d_n_equals_t", _mlp, 4, 4, 8)
_add("linear_4d", _mlp, 3, 2, 4, 8)
_add("linear_4d_all_equal", lambda: nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)), 4, 4, 4, 4)
_add("linear_from_one_feature", lambda: nn.Sequential(nn.Linear(1, 6), nn.Tanh(), nn.Linear(6, 1)), 5, 3, 1)

CONVOLUTIONS = {
    "conv1d": (1, lambda: nn.Conv1d(4, 6, 3)),
    "conv1d_stride": (1, lambda: nn.Conv1d(4, 6, 3, stride=2, padding=1)),
    "conv1d_same": (1, lambda: nn.Conv1d(4, 6, 4, padding="same", dilation=2)),
    "conv1d_valid": (1, lambda: nn.Conv1d(4, 6, 3, padding="valid", dilation=2)),
    "conv1d_depthwise": (1, lambda: nn.Conv1d(4, 4, 3, padding=2, groups=4)),
    "conv1d_reflect": (1, lambda: nn.Conv1d(4, 6, 3, padding=2, padding_mode="reflect")),
    "conv2d": (2, lambda: nn.Conv2d(4, 6, 3, padding=1)),
    "conv2d_no_bias": (2, lambda: nn.Conv2d(4, 6, 3, bias=False)),
    "conv2d_stride_dilation": (2, lambda: nn.Conv2d(4, 6, (3, 2), stride=(2, 3), padding=(2, 1), dilation=(2, 1))),
    "conv2d_patches": (2, lambda: nn.Conv2d(4, 6, 3, stride=3)),
    "conv2d_pointwise": (2, lambda: nn.Conv2d(4, 6, 1)),
    "conv2d_groups": (2, lambda: nn.Conv2d(4, 6, 3, padding=1, groups=2)),
    "conv2d_depthwise": (2, lambda: nn.Conv2d(4, 8, 3, padding=1, groups=4)),
    "conv2d_same": (2, lambda: nn.Conv2d(4, 6, (3, 2), padding="same")),
    "conv2d_circular": (2, lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular")),
    "conv3d": (3, lambda: nn.Conv3d(4, 6, 2, stride=(1, 2, 1), padding=1)),
    "conv3d_depthwise": (3, lambda: nn.Conv3d(4, 4, 3, padding="same", groups=4)),
    "conv_transpose1d": (1, lambda: nn.ConvTranspose1d(4, 6, 3, stride=2, padding=1, output_padding=1)),
    "conv_transpose1d_groups": (1, lambda: nn.ConvTranspose1d(4, 6, 3, groups=2, dilation=2)),
    "conv_transpose2d": (2, lambda: nn.ConvTranspose2d(4, 6, 3, stride=(2, 1), padding=1, output_padding=(1, 0))),
    "conv_transpose2d_depthwise": (2, lambda: nn.ConvTranspose2d(4, 4, 2, stride=2, groups=4, bias=False)),
    "conv_transpose3d": (3, lambda: nn.ConvTranspose3d(4, 6, 2, groups=2, dilation=(1, 2, 1))),
}
LENGTHS = {1: (9,), 2: (7, 6), 3: (5, 4, 3)}
for _name, (_dims, _build) in CONVOLUTIONS.items():
    _out = _build().out_channels
    _add(_name, lambda build=_build, out=_out, dims=_dims: _then(build(), out, dims), 3, 4, *LENGTHS[_dims])
_add("conv2d_n_equals_channels", lambda: _then(nn.Conv2d(4, 4, 3, padding=1), 4, 2), 4, 4, 4, 4)

NORMS = {
    "layer_norm": (lambda: nn.LayerNorm(8), (5, 3, 8)),
    "layer_norm_2d": (lambda: nn.LayerNorm((3, 8)), (5, 3, 8)),
    "layer_norm_no_bias": (lambda: nn.LayerNorm(8, bias=False), (5, 8)),
    "layer_norm_n_equals_t": (lambda: nn.LayerNorm(4), (4, 4, 4)),
    "rms_norm": (lambda: nn.RMSNorm(8, eps=1e-6), (5, 3, 8)),
    "group_norm": (lambda: nn.GroupNorm(2, 6), (5, 6, 4)),
    "instance_norm1d": (lambda: nn.InstanceNorm1d(6, affine=True), (5, 6, 4)),
    "instance_norm2d": (lambda: nn.InstanceNorm2d(6, affine=True), (5, 6, 4, 3)),
    "instance_norm_running": (lambda: nn.InstanceNorm1d(6, affine=True, track_running_stats=True), (5, 6, 4)),
    "batch_norm1d": (lambda: nn.BatchNorm1d(8), (5, 8)),
    "batch_norm1d_3d": (lambda: nn.BatchNorm1d(6), (5, 6, 4)),
    "batch_norm2d": (lambda: nn.BatchNorm2d(6), (5, 6, 4, 3)),
}
for _name, (_build, _shape) in NORMS.items():
    _add(_name, lambda build=_build, last=_shape[-1]: nn.Sequential(build(), nn.Linear(last, 6)), *_shape)

_add("prelu", lambda: nn.Sequential(nn.Linear(8, 6), nn.PReLU(), nn.Linear(6, 4)), 5, 8)
_add("prelu_channels", lambda: _then(nn.Sequential(nn.Conv2d(4, 6, 2), nn.PReLU(6)), 6, 2), 3, 4, 5, 4)
_add("weight_norm", lambda: nn.Sequential(parametrizations.weight_norm(nn.Linear(8, 6)), nn.Linear(6, 4)), 5, 8)
_add("weight_norm_conv", lambda: parametrizations.weight_norm(nn.Conv1d(4, 6, 3, groups=2), dim=2), 5, 4, 9)
_add("spectral_norm", lambda: nn.Sequential(parametrizations.spectral_norm(nn.Linear(8, 6)), nn.Linear(6, 4)), 5, 8)
_add("orthogonal", lambda: nn.Sequential(parametrizations.orthogonal(nn.Linear(6, 6)), nn.Linear(6, 4)), 5, 6)


class Exp(nn.Module):
    def forward(self, w):
        return w.exp()


@case
def exp_parametrization():
    layer = nn.Linear(8, 6)
    parametrize.register_parametrization(layer, "weight", Exp())
    return make(nn.Sequential(layer, nn.Tanh(), nn.Linear(6, 4)), regression, torch.randn(5, 8))


@case
def bilinear():
    return make(nn.Bilinear(4, 6, 3), regression, torch.randn(5, 4), torch.randn(5, 6))


@case
def bilinear_3d():
    return make(nn.Bilinear(4, 6, 3, bias=False), regression, torch.randn(5, 2, 4), torch.randn(5, 2, 6))


def _tokens(*shape, vocabulary=11):
    return torch.randint(vocabulary, shape)


@case
def embedding():
    return make(nn.Sequential(nn.Embedding(11, 8), nn.Linear(8, 6)), regression, _tokens(5, 4))


@case
def embedding_repeated_tokens():
    return make(nn.Sequential(nn.Embedding(3, 8), nn.Linear(8, 6)), regression, _tokens(5, 7, vocabulary=3))


@case
def embedding_padding_idx():
    return make(nn.Sequential(nn.Embedding(4, 8, padding_idx=0), nn.Tanh()), regression, _tokens(5, 7, vocabulary=4))


@case
def embedding_one_token():
    return make(nn.Sequential(nn.Embedding(11, 8), nn.Linear(8, 6)), regression, _tokens(5))


def _bag(mode, padding_idx=None):
    bag = nn.EmbeddingBag(5, 8, mode=mode, padding_idx=padding_idx)
    return make(nn.Sequential(bag, nn.Linear(8, 6)), regression, _tokens(4, 6, vocabulary=5))


register("embedding_bag_sum", lambda: _bag("sum"))
register("embedding_bag_mean", lambda: _bag("mean"))
register("embedding_bag_max", lambda: _bag("max"))
register("embedding_bag_padding_idx", lambda: _bag("mean", 0))


@case
def embedding_bag_weighted():
    bag = nn.EmbeddingBag(5, 8, mode="sum")
    loss = lambda model, ids, weights: to_ramp(model(ids, per_sample_weights=weights))  # noqa: E731
    return make(bag, loss, _tokens(4, 6, vocabulary=5), torch.rand(4, 6))


@case
def embedding_bag_offsets():
    """Bags of 1, 2, 3, ... tokens of a padded row, given as one flat list."""
    bag = nn.EmbeddingBag(5, 8, mode="sum")

    def loss(model, ids, lengths):
        flat = torch.cat([row[:length] for row, length in zip(ids, lengths.tolist(), strict=True)])
        return to_ramp(model(flat, lengths.cumsum(0) - lengths))

    return make(bag, loss, _tokens(4, 6, vocabulary=5), torch.tensor([1, 3, 2, 5]))


RECURRENT = {
    "lstm": (lambda **kw: nn.LSTM(6, 4, num_layers=2, bidirectional=True, **kw)),
    "lstm_projected": (lambda **kw: nn.LSTM(6, 4, proj_size=3, **kw)),
    "gru": (lambda **kw: nn.GRU(6, 4, num_layers=2, **kw)),
    "rnn": (lambda **kw: nn.RNN(6, 4, bidirectional=True, bias=False, **kw)),
}


for _name, _build in RECURRENT.items():
    register(
        _name,
        lambda build=_build: make(build(), lambda m, x: to_ramp(m(x)[0], 1), torch.randn(3, 5, 6), dims=1),
    )
    register(
        f"{_name}_batch_first",
        lambda build=_build: make(build(batch_first=True), lambda m, x: to_ramp(m(x)[0]), torch.randn(5, 3, 6)),
    )


@case
def lstm_n_equals_t():
    return make(nn.LSTM(6, 4), lambda m, x: to_ramp(m(x)[0], 1), torch.randn(4, 4, 6), dims=1)


class Cells(nn.Module):
    """Recurrence written out: every weight is used once a step."""

    def __init__(self):
        super().__init__()
        self.gru, self.lstm = nn.GRUCell(6, 4), nn.LSTMCell(4, 3)

    def forward(self, x):
        h, state = x.new_zeros(len(x), 4), None
        for x_t in x.unbind(1):
            h = self.gru(x_t, h)
            state = self.lstm(h, state)
        return state[0]


register("recurrent_cells", lambda: make(Cells(), regression, torch.randn(5, 3, 6)))


def _attention(dim, n=5, t=3, s=4, **options):
    """Queries (n, t, 8) look at keys and values (n, s, ·); the other way round for dim 1."""
    attention = nn.MultiheadAttention(8, 2, batch_first=dim == 0, **options)
    k, v = options.get("kdim", 8), options.get("vdim", 8)
    query, key, value = torch.randn(n, t, 8), torch.randn(n, s, k), torch.randn(n, s, v)
    inputs = (query, key, value) if dim == 0 else (x.transpose(0, 1) for x in (query, key, value))
    return make(attention, lambda m, *x: to_ramp(m(*x, need_weights=False)[0], dim), *inputs, dims=dim)


register("attention", lambda: _attention(1))
register("attention_batch_first", lambda: _attention(0))
register("attention_kdim_vdim", lambda: _attention(0, kdim=6, vdim=7))
register("attention_bias_k", lambda: _attention(0, add_bias_kv=True, add_zero_attn=True))
register("attention_n_equals_t", lambda: _attention(1, n=4, t=4, s=4))


@case
def attention_self_with_weights():
    """Packed projections, the slow path that returns the attention, and a padding mask."""
    attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def loss(model, x, padded):
        y, weights = model(x, x, x, key_padding_mask=padded)
        return to_ramp(torch.cat([y, weights], 2))

    return make(attention, loss, torch.randn(3, 4, 8), torch.arange(4) >= torch.tensor([4, 2, 3])[:, None])


def _encoder(**options):
    layer = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, **options)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


register("encoder", lambda: make(_encoder(), regression_dim1, torch.randn(4, 3, 8), dims=1))
register("encoder_n_equals_t", lambda: make(_encoder(), regression_dim1, torch.randn(4, 4, 8), dims=1))
register("encoder_batch_first", lambda: make(_encoder(batch_first=True), regression, torch.randn(3, 4, 8)))
register(
    "encoder_norm_first",
    lambda: make(_encoder(batch_first=True, norm_first=True, activation="gelu"), regression, torch.randn(3, 4, 8)),
)


@case
def transformer():
    model = nn.Transformer(8, 2, 1, 1, 12, dropout=0.0)
    return make(model, regression_dim1, torch.randn(4, 3, 8), torch.randn(5, 3, 8), dims=1)


@case
def decoder_causal():
    layer = nn.TransformerDecoderLayer(8, 2, 12, dropout=0.0, batch_first=True, norm_first=True)
    mask = nn.Transformer.generate_square_subsequent_mask(5)
    loss = lambda m, x, memory: to_ramp(m(x, memory, tgt_mask=mask, tgt_is_causal=True))  # noqa: E731
    return make(nn.TransformerDecoder(layer, 1), loss, torch.randn(3, 5, 8), torch.randn(3, 4, 8))


class Residual(nn.Module):
    """In-place residuals, checkpointed blocks."""

    def __init__(self, checkpointed):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.LayerNorm(8), nn.Tanh(), nn.Linear(8, 8)) for _ in range(2))
        self.head, self.checkpointed = nn.Linear(8, 4), checkpointed

    def forward(self, x):
        for block in self.blocks:
            y = checkpoint(block, x, use_reentrant=False) if self.checkpointed else block(x)
            y += x
            x = y
        return self.head(x)


register("residual_in_place", lambda: make(Residual(False), regression, torch.randn(5, 3, 8)))
register("checkpoint", lambda: make(Residual(True), regression, torch.randn(5, 3, 8)))
