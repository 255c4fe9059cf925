"""Where tensors lie in memory: NHWC, one storage type per tensor, views into buffers that may have a halo.

A tensor of at most 8 bits is stored as uint8; signed ones are shifted by 128 (``zero``), because the dot product
instructions multiply unsigned by signed bytes.  Wider tensors are int16 or int32.  The halo is a frame of integer
zeros around the image, wide enough for every convolution that reads the buffer.
"""

from dataclasses import dataclass

from utils.integer_graph.ir import FLOAT_BITS, TensorType, int_range

ITEM_BYTES = {"uint8": 1, "int8": 1, "int16": 2, "int32": 4, "float32": 4}
ALIGNMENT = 64
Shape3 = tuple[int, int, int]
NO_HALO = (0, 0, 0, 0)


@dataclass(frozen=True)
class Storage:
    """How an integer is stored: ``stored = value + zero`` as dtype."""

    dtype: str
    zero: int = 0

    @property
    def bytes(self) -> int:
        return ITEM_BYTES[self.dtype]


def storage_of(tensor: TensorType) -> Storage:
    """The storage of a tensor type.

    >>> storage_of(TensorType((8,), 8, True, -128, 127))
    Storage(dtype='uint8', zero=128)
    """
    if tensor.bits == FLOAT_BITS:
        return Storage("float32")
    if tensor.bits <= 8:
        return Storage("uint8", 128 if tensor.signed else 0)
    lo, hi = int_range(tensor.bits, tensor.signed)
    return Storage("int16" if lo >= -(1 << 15) and hi < 1 << 15 else "int32")


def shape3(tensor: TensorType) -> Shape3:
    """(C, H, W) of a tensor type; a vector is an image of one pixel."""
    c, h, w = (*tensor.shape, 1, 1)[:3]
    return c, h, w


@dataclass(frozen=True)
class Buffer:
    """A block of the workspace: NHWC with a halo (top, bottom, left, right); all strides count elements."""

    name: str
    storage: Storage
    shape: Shape3
    halo: tuple[int, int, int, int] = NO_HALO

    @property
    def pitch(self) -> int:
        """Elements from one pixel to the next."""
        return self.shape[0]

    @property
    def row(self) -> int:
        return (self.shape[2] + self.halo[2] + self.halo[3]) * self.pitch

    @property
    def image(self) -> int:
        return (self.shape[1] + self.halo[0] + self.halo[1]) * self.row

    def bytes(self, batch: int) -> int:
        return batch * self.image * self.storage.bytes


@dataclass(frozen=True)
class View:
    """Channels [first, first + channels) of a buffer: one tensor."""

    buffer: Buffer
    first: int
    channels: int
    still: tuple[bool, bool] = (False, False)  # rows, columns along which the tensor is broadcast

    @property
    def storage(self) -> Storage:
        return self.buffer.storage

    @property
    def is_dense(self) -> bool:
        """Whether all pixels of all images follow each other without gaps."""
        return self.channels == self.buffer.pitch and self.buffer.halo == NO_HALO

    @property
    def origin(self) -> int:
        """Element of channel 0 of the first pixel."""
        top, _, left, _ = self.buffer.halo
        return top * self.buffer.row + left * self.buffer.pitch + self.first

    def at(self, n: str, h: str, w: str) -> str:
        """Expression of the element offset of channel 0 of pixel (h, w) of image n.

        >>> View(Buffer("x", Storage("uint8"), (16, 4, 4)), 0, 16).at("0", "h", "w")
        '(h)*64 + (w)*16'
        """
        steps = [0 if still else k for still, k in zip(self.still, (self.buffer.row, self.buffer.pitch), strict=True)]
        terms = [(n, self.buffer.image), ("1", self.origin), (h, steps[0]), (w, steps[1])]
        parts = [str(k) if e == "1" else f"({e})*{k}" for e, k in terms if k and e != "0"]
        return " + ".join(parts) or "0"
