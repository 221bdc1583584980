"""A contrastive dual encoder with a captioning head (CLIP, Radford et al. 2021; CoCa, Yu et al. 2022).

The two encoders give one unit vector per image and per caption. That is good for search, and poor at telling who has
which attribute: "a red star left of a blue ring" lies close to "a blue star left of a red ring". What ranks is
therefore the matching head, which predicts a caption word by word while it looks at the image. Its score is

    log p(caption | image) - log p(caption)

in nats: what the image tells about the caption. Each word is judged in the light of the words before it, so that "star"
after "a red" asks whether the red thing is a star. And every word is a lesson in itself, where telling the right one of
a few captions teaches a few bits at a time.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tessera.config import from_plain
from tessera.errors import UserError
from tessera.model_folder import ModelFolder
from tessera.text_tokenizer import END_ID, TextTokenizer

# N images, M captions, G captions per image, H W pixels, T text positions, S = T + 1 text states, P patches, C width,
# E embedding width; inside attention B batch, A heads, D head width, n queries, m keys.

IGNORED = -100  # target of a state after which nothing is expected
_AT_ONCE = 64  # pairs scored together: bounds memory, whatever the number of candidates
_STEM_STRIDE = 4
_LARGEST_SCALE = 100.0  # Radford et al. 2021, section 2.5


@dataclass(frozen=True, kw_only=True)
class ClipScorerConfig:
    """Sizes of a `ClipScorer`."""

    image_size: tuple[int, int] = (64, 64)
    """height and width in pixels of the images that it reads; in training taken from the data"""
    patch_size: int = 8
    """side in pixels of one patch, a multiple of 4"""
    text_len: int = 32
    """T, text positions; longer captions are cut; in training taken from the captions"""
    text_vocab_size: int = 512
    """pieces of the text tokenizer, without the pad ids; in training taken from the tokenizer"""
    stem_width: int = 64
    """channels of the convolutions before the patches"""
    dim: int = 128
    """C, channels of patches and text states"""
    heads: int = 4
    """attention heads; dim / heads channels each"""
    image_layers: int = 1
    """transformer layers over the patches"""
    text_layers: int = 1
    """transformer layers over the caption alone"""
    matcher_layers: int = 1
    """layers of the matching head, over caption and image; 0 leaves it out, and the embeddings' cosine ranks"""
    embedding_dim: int = 128
    """E, width of the embeddings"""

    def __post_init__(self) -> None:
        if self.dim < 1 or self.heads < 1 or self.dim % self.heads:
            raise UserError(f"scorer dim must be a multiple of heads; got dim={self.dim}, heads={self.heads}")
        if self.patch_size < _STEM_STRIDE or self.patch_size % _STEM_STRIDE:
            raise UserError(f"scorer patch_size must be a multiple of {_STEM_STRIDE}; got {self.patch_size}")
        if min(self.image_size) < 1 or self.text_len < 1 or self.text_vocab_size < 1:
            raise UserError(
                f"scorer image_size, text_len and text_vocab_size must be positive; "
                f"got {self.image_size}, {self.text_len}, {self.text_vocab_size}"
            )

    @property
    def num_patches(self) -> int:
        """P; a patch at the right or lower edge may reach beyond the image."""
        height, width = self.image_size
        return math.ceil(height / self.patch_size) * math.ceil(width / self.patch_size)


class Norm(nn.Module):
    """Layer normalization with a gain and no bias."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, (self.dim,), self.weight.to(x.dtype))


class Attention(nn.Module):
    """Multi-head attention from one sequence to another, with normalized queries and keys."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(dim, dim, bias=False)
        self.key = nn.Linear(dim, dim, bias=False)
        self.value = nn.Linear(dim, dim, bias=False)
        self.norm_query = Norm(dim // heads)
        self.norm_key = Norm(dim // heads)
        self.project = nn.Linear(dim, dim, bias=False)

    def forward(self, x: Tensor, context: Tensor, *, causal: bool = False) -> Tensor:
        """x [B, n, C] asks context [B, m, C]; causal: position p sees up to p. Returns [B, n, C]."""
        query = self.norm_query(self._split(self.query(x)))  # [B, A, n, D]
        key = self.norm_key(self._split(self.key(context)))
        scores = (query * query.shape[-1] ** -0.5) @ key.transpose(-1, -2)  # [B, A, n, m]
        if causal:
            future = torch.ones(scores.shape[2:], dtype=torch.bool, device=scores.device).triu(1)
            scores = scores.masked_fill(future, torch.finfo(scores.dtype).min)
        value = self._split(self.value(context))
        attended = scores.softmax(dim=-1, dtype=torch.float32).to(value.dtype) @ value  # [B, A, n, D]
        return self.project(attended.transpose(1, 2).flatten(2))

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)


class MLP(nn.Module):
    """Two-layer feed-forward network."""

    def __init__(self, dim: int, ratio: int) -> None:
        super().__init__()
        self.up = nn.Linear(dim, ratio * dim, bias=False)
        self.down = nn.Linear(ratio * dim, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x)))


class Block(nn.Module):
    """Self-attention and MLP, each behind a norm and beside a skip connection."""

    def __init__(self, dim: int, heads: int, mlp_ratio: int) -> None:
        super().__init__()
        self.norm_attention = Norm(dim)
        self.attention = Attention(dim, heads)
        self.norm_mlp = Norm(dim)
        self.mlp = MLP(dim, mlp_ratio)

    def forward(self, x: Tensor, *, causal: bool = False) -> Tensor:
        y = self.norm_attention(x)
        x = x + self.attention(y, y, causal=causal)
        return x + self.mlp(self.norm_mlp(x))


class MatcherBlock(nn.Module):
    """Words look at the patches of an image, then at the words before them."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.norm_cross = Norm(dim)
        self.cross = Attention(dim, heads)
        self.block = Block(dim, heads, mlp_ratio=2)

    def forward(self, x: Tensor, patches: Tensor) -> Tensor:
        """x [N, G, S, C], patches [N, P, C] to [N, G, S, C]."""
        # The G captions of an image are one long query, so that its keys and values are made once.
        looked = self.cross(self.norm_cross(x).flatten(1, 2), patches)  # [N, G S, C]
        x = x + looked.view_as(x)
        return self.block(x.flatten(0, 1), causal=True).view_as(x)


class ConvBlock(nn.Module):
    """Two 3x3 convolutions behind a norm over channels and beside a skip connection."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = Norm(channels)
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:  # [N, channels, h, w]
        # In channels_last memory the permuted view is contiguous: this normalizes without a copy.
        y = self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return x + self.conv2(F.gelu(self.conv1(y)))


class ImageStem(nn.Module):
    """Images to patches [N, P, C]: convolutions tell shapes apart sooner than attention learns to.

    They begin at a quarter of the resolution, because at the full one they would cost more than all the rest.
    """

    def __init__(self, config: ClipScorerConfig) -> None:
        super().__init__()
        width, side = config.stem_width, config.patch_size // _STEM_STRIDE
        self.patch_size = config.patch_size
        # Muon trains this one too: with AdamW at the same rate the head was a nat behind after 300 steps of 32.
        self.from_pixels = nn.Conv2d(3, width, _STEM_STRIDE + 2, stride=_STEM_STRIDE, padding=1)
        self.fine = ConvBlock(width)
        self.to_patches = nn.Conv2d(width, config.dim, side, stride=side)
        self.coarse = ConvBlock(config.dim)

    def forward(self, images: Tensor) -> Tensor:
        height, width = images.shape[2:]
        missing = (0, -width % self.patch_size, 0, -height % self.patch_size)
        images = F.pad(4 * images - 2, missing).contiguous(memory_format=torch.channels_last)
        x = self.to_patches(F.gelu(self.fine(self.from_pixels(images))))
        return self.coarse(x).flatten(2).transpose(1, 2)


class TextStates(NamedTuple):
    """Encoded captions: state p has seen the first p tokens.

    Attributes:
        states: float [M, S, C].
        targets: int64 [M, S], the token that follows each state: END_ID after the last one, and IGNORED further on.
    """

    states: Tensor
    targets: Tensor


class ClipScorer(nn.Module):
    """Embeds images and captions, and says how much an image tells about a caption.

    Args:
        config: sizes; see `ClipScorerConfig`.

    Example:
        >>> scorer = ClipScorer(ClipScorerConfig(image_size=(32, 48), text_len=8))
        >>> images, text_ids = torch.rand(2, 3, 32, 48), torch.randint(512, (2, 8))
        >>> scorer(images, text_ids).shape
        torch.Size([2])
        >>> (scorer.embed_images(images) @ scorer.embed_texts(text_ids).T).shape
        torch.Size([2, 2])
    """

    def __init__(self, config: ClipScorerConfig) -> None:
        super().__init__()
        self.config = config
        dim, heads = config.dim, config.heads
        self.image_stem = ImageStem(config)
        self.patch_positions = nn.Parameter(torch.empty(config.num_patches, dim))
        self.image_blocks = nn.ModuleList(Block(dim, heads, mlp_ratio=4) for _ in range(config.image_layers))
        self.image_norm = Norm(dim)
        self.text_embedding = nn.Embedding(config.text_vocab_size, dim)
        self.begin_embedding = nn.Parameter(torch.empty(dim))
        self.text_positions = nn.Parameter(torch.empty(config.text_len + 1, dim))
        self.text_blocks = nn.ModuleList(Block(dim, heads, mlp_ratio=4) for _ in range(config.text_layers))
        self.text_norm = Norm(dim)
        self.image_projection = nn.Linear(dim, config.embedding_dim, bias=False)
        self.text_projection = nn.Linear(dim, config.embedding_dim, bias=False)
        self.log_scale = nn.Parameter(torch.empty(()))
        self.matcher_blocks = nn.ModuleList(MatcherBlock(dim, heads) for _ in range(config.matcher_layers))
        if config.matcher_layers:
            self.no_image = nn.Parameter(torch.empty(dim))
            self.matcher_norm = Norm(dim)
            self.word_head = nn.Linear(dim, config.text_vocab_size, bias=False)
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.init_weights()

    def init_weights(self) -> None:
        """Initializes every weight.

        ==========================================  =======================================
        linear layers reading the residual stream   N(0, 1/sqrt(inputs))
        linear layers writing to it                 zero, so that every block starts as identity
        convolutions                                PyTorch's default; zero where they write to a skip connection
        embeddings of words, begin and no image     N(0, 1)
        positions                                   N(0, 0.5)
        head of the matcher                         zero, so that the loss starts at the logarithm of the vocabulary
        scale                                       1 / 0.07 (Radford et al. 2021, section 2.5)
        norm gains                                  one
        ==========================================  =======================================
        """
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=module.in_features**-0.5)
        for module in self.modules():
            if isinstance(module, Attention):
                nn.init.zeros_(module.project.weight)
            elif isinstance(module, MLP):
                nn.init.zeros_(module.down.weight)
            elif isinstance(module, ConvBlock):
                nn.init.zeros_(module.conv2.weight)
                nn.init.zeros_(module.conv2.bias)  # type: ignore[arg-type]
        nn.init.normal_(self.text_embedding.weight)
        nn.init.normal_(self.begin_embedding)
        nn.init.normal_(self.patch_positions, std=0.5)
        nn.init.normal_(self.text_positions, std=0.5)
        nn.init.constant_(self.log_scale, math.log(1 / 0.07))
        if self.config.matcher_layers:
            nn.init.normal_(self.no_image)
            nn.init.zeros_(self.word_head.weight)

    @property
    def scale(self) -> Tensor:
        """The learned inverse temperature of the embeddings' cosine, at most 100."""
        return self.log_scale.exp().clamp(max=_LARGEST_SCALE)

    def encode_images(self, images: Tensor) -> Tensor:
        """Images float [N, 3, H, W] in [0, 1] to patches [N, P, C].

        Raises:
            ValueError: if the shape is not that of the config's image_size.
        """
        if images.shape[1:] != (3, *self.config.image_size):
            expected = ("batch", 3, *self.config.image_size)
            raise ValueError(f"images must have shape {expected}; got {tuple(images.shape)}")
        x = self.image_stem(images) + self.patch_positions
        for block in self.image_blocks:
            x = block(x)
        return self.image_norm(x)

    def encode_texts(self, text_ids: Tensor) -> TextStates:
        """Text ids int64 [M, T] to states, where T may be shorter than text_len if only pads are cut off.

        Raises:
            ValueError: if the shape is not [M, T] with T <= text_len.
        """
        if text_ids.dim() != 2 or text_ids.shape[1] > self.config.text_len:
            raise ValueError(
                f"text_ids must have shape [batch, at most {self.config.text_len}]; got {tuple(text_ids.shape)}"
            )
        vocab_size = self.config.text_vocab_size
        is_word = text_ids < vocab_size
        words = self.text_embedding(text_ids.where(is_word, 0))
        begin = self.begin_embedding.expand(len(text_ids), 1, -1)
        x = torch.cat([begin, words], dim=1) + self.text_positions[: text_ids.shape[1] + 1]  # [M, S, C]
        for block in self.text_blocks:
            x = block(x, causal=True)
        length = is_word.sum(dim=1, keepdim=True)  # [M, 1]
        place = torch.arange(x.shape[1], device=x.device)
        following = F.pad(text_ids, (0, 1), value=END_ID).where(place < length, END_ID)
        return TextStates(self.text_norm(x), following.where(place <= length, IGNORED))

    def project_images(self, patches: Tensor) -> Tensor:
        """Patches [N, P, C] to unit vectors float32 [N, E]."""
        return F.normalize(self.image_projection(patches.mean(dim=1)).float(), dim=1)

    def project_texts(self, texts: TextStates) -> Tensor:
        """Encoded captions to unit vectors float32 [M, E]."""
        last = (texts.targets == END_ID).float().argmax(dim=1)  # [M] the state that has seen the whole caption
        state = texts.states[torch.arange(len(last), device=last.device), last]
        return F.normalize(self.text_projection(state).float(), dim=1)

    def embed_images(self, images: Tensor) -> Tensor:
        """Images float [N, 3, H, W] in [0, 1] to unit vectors float32 [N, E]."""
        return self.project_images(self.encode_images(images))

    def embed_texts(self, text_ids: Tensor) -> Tensor:
        """Text ids int64 [M, T] to unit vectors float32 [M, E]."""
        return self.project_texts(self.encode_texts(text_ids))

    def word_losses(self, patches: Tensor, texts: TextStates) -> Tensor:
        """How unexpected each token of G captions is to one who sees the image and the tokens before.

        Args:
            patches: [N, P, C], from `encode_images`; or [N, 1, C], `no_image` for one who sees none.
            texts: states [N, G, S, C] and targets [N, G, S], from `encode_texts`.

        Returns:
            float32 [N, G, S], nats; zero where there is nothing to expect.
        """
        x = texts.states
        for block in self.matcher_blocks:
            x = block(x, patches)
        logits = self.word_head(self.matcher_norm(x)).float()
        losses = F.cross_entropy(logits.flatten(0, 2), texts.targets.flatten(), ignore_index=IGNORED, reduction="none")
        return losses.view(texts.targets.shape)

    def forward(self, images: Tensor, text_ids: Tensor) -> Tensor:
        """The ranking score of N pairs: images float [N, 3, H, W] in [0, 1], text ids int64 [N, T] to float32 [N]."""
        patches, (states, targets) = self.encode_images(images), self.encode_texts(text_ids)
        if not self.config.matcher_layers:
            return self.scale * (self.project_images(patches) * self.project_texts(TextStates(states, targets))).sum(
                dim=1
            )
        texts = TextStates(states[:, None], targets[:, None])
        seen = self.word_losses(patches, texts).sum(dim=(1, 2))
        unseen = self.word_losses(self.no_image.expand(len(images), 1, -1), texts).sum(dim=(1, 2))
        return unseen - seen


def without_common_pads(text_ids: Tensor, vocab_size: int) -> Tensor:
    """Cuts [M, T] to the longest caption in it: pads are masked, and leaving them out only saves time."""
    longest = int((text_ids < vocab_size).sum(dim=1).max()) if len(text_ids) else 0
    return text_ids[:, :longest]


class TrainedScorer:
    """A `ClipScorer` with its tokenizer: takes pixels and texts (`Scorer` and `Embedder` of `scorer.api`).

    Args:
        model: the network; it is put into evaluation mode.
        tokenizer: the one it was trained with.
    """

    name = "clip"

    def __init__(self, model: ClipScorer, tokenizer: TextTokenizer) -> None:
        if tokenizer.vocab_size != model.config.text_vocab_size:
            raise ValueError(
                f"the scorer knows {model.config.text_vocab_size} pieces, the tokenizer {tokenizer.vocab_size}"
            )
        self.model = model.eval()
        self.tokenizer = tokenizer

    @torch.no_grad()
    def score(self, images: Tensor, texts: Sequence[str]) -> Tensor:
        """How well images fit texts; a pair's score does not depend on the others.

        Args:
            images: uint8 [N, 3, H, W] of the model's image_size.
            texts: N texts.

        Returns:
            float32 [N] on the model's device, in nats: log p(text | image) - log p(text); higher is better. Comparable
            between images, and between texts.

        Raises:
            ValueError: if images are not uint8 of that shape, or not as many as texts.
        """
        self._check(images)
        if len(images) != len(texts):
            raise ValueError(f"one text per image: got {len(images)} images and {len(texts)} texts")
        parts = [
            self.model(self._pixels(images[start : start + _AT_ONCE]), self._ids(texts[start : start + _AT_ONCE]))
            for start in range(0, len(images), _AT_ONCE)
        ]
        return torch.cat(parts).float() if parts else torch.zeros(0, device=self._device)

    @torch.no_grad()
    def embed_images(self, images: Tensor) -> Tensor:
        """Images uint8 [N, 3, H, W] to unit vectors float32 [N, E]."""
        self._check(images)
        parts = [
            self.model.embed_images(self._pixels(images[start : start + _AT_ONCE]))
            for start in range(0, len(images), _AT_ONCE)
        ]
        return torch.cat(parts) if parts else torch.zeros(0, self.model.config.embedding_dim, device=self._device)

    @torch.no_grad()
    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """Texts to unit vectors float32 [M, E]."""
        parts = [
            self.model.embed_texts(self._ids(texts[start : start + _AT_ONCE]))
            for start in range(0, len(texts), _AT_ONCE)
        ]
        return torch.cat(parts) if parts else torch.zeros(0, self.model.config.embedding_dim, device=self._device)

    @property
    def _device(self) -> torch.device:
        return self.model.log_scale.device

    def _check(self, images: Tensor) -> None:
        if images.dtype != torch.uint8:
            raise ValueError(f"images must be uint8; got {images.dtype}")

    def _pixels(self, images: Tensor) -> Tensor:
        return images.to(self._device).float() / 255

    def _ids(self, texts: Sequence[str]) -> Tensor:
        ids = self.tokenizer.encode_batch(texts, text_len=self.model.config.text_len)
        return without_common_pads(ids, self.tokenizer.vocab_size).to(self._device)


def load(
    folder: ModelFolder, *, device: torch.device | str = "cpu", image_size: tuple[int, int] | None = None
) -> TrainedScorer:
    """The frozen scorer of a model folder, in evaluation mode.

    Args:
        folder: with a part "scorer".
        device: where it will compute.
        image_size: (height, width) in pixels of the images that the folder's prior draws, where they are what it will
            read; None for images that are made to fit it.

    Raises:
        UserError: if the folder has no scorer, or one for images of another size.
    """
    if not folder.has("scorer"):
        raise UserError(f"{folder.path} has no scorer part: train one with `tessera train-scorer` or `tessera fit`")
    config = from_plain(ClipScorerConfig, folder.config("scorer"), source=f"{folder.path}/scorer/config.yaml")
    if image_size is not None and config.image_size != image_size:
        expected, got = ("x".join(map(str, size)) for size in (image_size, config.image_size))
        raise UserError(
            f"{folder.path}: the scorer must read images of {expected} pixels, as the prior draws them, "
            f"but was trained on {got}: train it again with `tessera train-scorer`, data.image_size of {expected}"
        )
    model = ClipScorer(config)
    model.load_state_dict(folder.tensors("scorer"))
    return TrainedScorer(model.requires_grad_(False).to(device), TextTokenizer(folder.tokenizer_proto()))
