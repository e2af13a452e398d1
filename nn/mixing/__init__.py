"""Mixers that are not attention: the baselines that an attention layer is measured against."""

from nn.mixing.convolution import ConvMixer
from nn.mixing.identity import IdentityMixer
from nn.mixing.long_convolution import LongConvolution
from nn.mixing.random import RandomMixer

MIXING = {
    "identity": IdentityMixer,
    "random": RandomMixer,
    "conv": ConvMixer,
    "longconv": LongConvolution,
}
