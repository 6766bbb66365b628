"""Frames of video files, network streams and cameras, and an annotated video of them. Needs PyAV: the extra `video`."""

from __future__ import annotations

import io
import logging
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, ImageOps

from detector.errors import InputError, require
from detector.files import replacing
from detector.inference.remote import without_credentials

if TYPE_CHECKING:
    import av

log = logging.getLogger(__name__)

VIDEO_SUFFIXES = frozenset(
    {".avi", ".flv", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".mts", ".ts", ".webm", ".wmv"}
)
STREAM_SCHEMES = ("rtsp", "rtsps", "rtmp", "rtmps")
CAMERA = "webcam:"

# A playlist (HLS, DASH, concat) in a file that calls itself a video would make FFmpeg open other files and addresses.
_FORMATS = "asf,avi,flv,matroska,mov,mp4,mpeg,mpegts,mpegvideo,ogg,webm"
# Seconds for a stream to open, and to send its next bytes.
_TIMEOUT = (15.0, 15.0)
# Damaged packets in a row after which a live stream counts as broken.
_PATIENCE = 250
# FFmpeg's name of cameras on each system.
_DEVICES = {"linux": "v4l2", "darwin": "avfoundation", "win32": "dshow"}


@dataclass(frozen=True, eq=False)
class Frame:
    """One image of a video.

    Attributes:
        image: uint8 RGB (h, w, 3), turned as the file says.
        index: its number in the video, from 0.
        time: seconds since the first frame.
        rate: frames per second, of those that are given; 25 where the video does not say.
    """

    image: np.ndarray
    index: int
    time: float
    rate: float


def read_video(
    source: str | os.PathLike[str] | io.BytesIO, *, every: int = 1, name: str | None = None
) -> Iterator[Frame]:
    """The frames of a video file, one in memory at a time.

    Args:
        source: a file, or its bytes.
        every: gives frames 0, every, 2 * every ...; all are decoded, because most depend on those before them.
        name: what messages call the source.

    Raises:
        InputError: PyAV is not installed; the file is missing, not a video, or has no image track; and, after the
            frames before it, at the first damage, or where the file ends early.
    """
    name = name or str(source)
    if not isinstance(source, io.BytesIO):
        source = str(source)
        if not os.path.isfile(source):  # unlike pathlib's, no error for a name that no file can have
            what = "is a folder" if os.path.isdir(source) else "no such file"
            raise InputError(f"{name}: {what}; check the path.")
    with _opened_video(source, name) as container:
        yield from _frames(container, name, every, live=False)


def read_stream(url: str, *, every: int = 1) -> Iterator[Frame]:
    """The frames of a network stream (RTSP, RTMP) until it ends. Addresses of the local network are taken: cameras are
    there. Messages name the stream without its user name and password.

    Raises:
        InputError: PyAV is not installed; the stream cannot be opened, or breaks; it is not opened again.
    """
    scheme, _, rest = url.partition("://")
    scheme, name = scheme.lower(), without_credentials(url)  # FFmpeg knows schemes in small letters only
    transport = {"rtsp_transport": "tcp"} if scheme.startswith("rtsp") else {}  # UDP loses packets
    with _opened(f"{scheme}://{rest}", name, "no stream there", options=transport, timeout=_TIMEOUT) as container:
        yield from _frames(container, name, every, live=True)


def read_camera(camera: str, *, every: int = 1) -> Iterator[Frame]:
    """The frames of a camera of this machine, without end.

    Args:
        camera: its number, from 0, or its name as the system knows it: /dev/video0, "FaceTime HD Camera".

    Raises:
        InputError: PyAV is not installed, there is no such camera, it is in use, or it was unplugged.
    """
    _import_av()
    device, system = _camera_device(camera)
    name = f"{CAMERA}{camera}"
    options = {"framerate": "30"} if system == "avfoundation" else {}  # its default is one that no camera has
    with _opened(device, name, "no such camera, or it is in use", format=system, options=options) as container:
        yield from _frames(container, name, every, live=True)


def count_frames(path: str | os.PathLike[str], *, every: int = 1) -> int | None:
    """How many frames `read_video` will give: what the file says, or its duration times its rate; None: unknown."""
    with _opened_video(str(path), str(path)) as container:
        stream = _video_track(container, str(path))
        count = stream.frames
        if not count and container.duration and stream.average_rate:
            count = round(container.duration / 1e6 * float(stream.average_rate))
        return -(-count // every) if count else None


@contextmanager
def write_video(path: str | os.PathLike[str], rate: float, comment: str = "") -> Iterator[Callable[[np.ndarray], None]]:
    """Write an .mp4, complete or not at all; without a frame, not at all.

        with write_video("out.mp4", rate=25) as add:
            add(image)  # uint8 RGB (h, w, 3); the first sets the size; others are scaled into it, between black bars

    H.264 where this FFmpeg has it (browsers play it), MPEG-4 otherwise. A side of odd length is repeated once: the
    format wants even ones. The comment goes into the file's metadata. A frame that cannot be written, to a full disk or
    of a size that the encoder does not take, raises OSError, and costs the file; frames after it are ignored.
    """
    encode: Callable[[Any], None] | None = None
    size, said = (0, 0), False
    with ExitStack() as stack:

        def add(image: np.ndarray) -> None:
            nonlocal encode, size, said
            image = np.pad(image, [(0, image.shape[0] % 2), (0, image.shape[1] % 2), (0, 0)], mode="edge")
            width, height = image.shape[1], image.shape[0]
            if encode is None:
                encode, size = _ignore, (width, height)
                encode = stack.enter_context(_encoder(Path(path), rate, comment, *size))
            if (width, height) != size:
                if not said:
                    given = f"{width} x {height} are scaled to the {size[0]} x {size[1]}"
                    log.warning("%s: from here frames of %s of the first", path, given)
                said, image = True, np.asarray(ImageOps.pad(Image.fromarray(image), size))
            try:
                encode(_import_av().VideoFrame.from_ndarray(image, format="rgb24"))
            except OSError:
                encode = _ignore
                stack.pop_all().__exit__(*sys.exc_info())
                raise

        yield add


def _ignore(frame: Any) -> None:
    """Takes the frames of a video that cannot be written."""


def read_comment(path: str | os.PathLike[str]) -> str:
    """The comment of a video, "" where there is none.

    Raises:
        InputError: PyAV is not installed, or the file is not a video.
    """
    with _opened_video(str(path), str(path)) as container:
        return container.metadata.get("comment", "")


@contextmanager
def _encoder(path: Path, rate: float, comment: str, width: int, height: int) -> Iterator[Callable[[Any], None]]:
    av = _import_av()
    codec = "libx264" if "libx264" in av.codecs_available else "mpeg4"
    with replacing(path) as partial, av.open(os.path.abspath(partial), "w", format="mp4") as container:
        container.metadata["comment"] = comment
        stream = container.add_stream(codec, rate=Fraction(rate).limit_denominator(1001))
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        if codec == "mpeg4":
            stream.bit_rate = max(1_000_000, 4 * width * height)

        def encode(frame: Any) -> None:
            try:
                container.mux(stream.encode(frame))
            except OSError:
                raise
            except av.FFmpegError as error:  # what the encoder says has no kind
                raise OSError(f"no video of {width} x {height} pixels can be written: {_reason(error)}") from error

        yield encode
        encode(None)


def _import_av() -> Any:
    return require("av", package="[video]", what="what reads and writes videos")


def _opened_video(source: str | io.BytesIO, name: str) -> AbstractContextManager[av.container.InputContainer]:
    options = {"format_whitelist": _FORMATS, "protocol_whitelist": "file" if isinstance(source, str) else "none"}
    if isinstance(source, str):
        source = os.path.abspath(source)  # of 10:30.mp4 FFmpeg would look for the protocol "10"
    return _opened(source, name, "not a video that can be read", options=options)


@contextmanager
def _opened(source: Any, name: str, problem: str, **options: Any) -> Iterator[av.container.InputContainer]:
    av = _import_av()
    try:
        container = av.open(source, **options)
    except (av.FFmpegError, ValueError, OSError) as error:
        # Not `from error`: the text of FFmpeg's errors has the whole address, password included.
        raise InputError(f"{name}: {problem} ({_reason(error)}){_hint(name)}.") from None
    with container:
        yield container


def _frames(container: av.container.InputContainer, name: str, every: int, *, live: bool) -> Iterator[Frame]:
    stream = _video_track(container, name)
    if not live:
        stream.thread_type = "AUTO"  # frame threads would delay a live stream
    rate, first, end = float(stream.average_rate or 25), None, 0.0
    for index, frame in enumerate(_decoded(container, stream, name, live)):
        unit = float(frame.time_base or stream.time_base)
        seconds = index / rate if frame.pts is None else frame.pts * unit
        first = seconds if first is None else first
        end = seconds - first + ((frame.duration or 0) * unit or 1 / rate)
        if index % every == 0:
            yield Frame(_to_rgb(frame), index, seconds - first, rate / every)
    if first is None:
        raise InputError(f"{name}: has no frame that can be decoded; it is damaged or incomplete: fetch it again.")
    # The number of frames in the header would not do: trimmed videos keep frames that are never shown.
    total = float(stream.duration * stream.time_base) if stream.duration else 0.0
    if not live and end < total - max(3 / rate, 0.02 * total):
        raise InputError(f"{name}: ends after {end:.1f} of {total:.1f} s; it is incomplete: fetch it again.")


def _decoded(container: Any, stream: Any, name: str, live: bool) -> Iterator[av.VideoFrame]:
    """Every frame before the first damage of a file; of a live stream, which loses packets, every one that there is."""
    av = _import_av()
    in_a_row, count = 0, 0
    packets = iter(container.demux(stream))
    while True:
        reason = ""
        try:
            packet = next(packets)
            reason = "damaged" if packet.is_corrupt else ""
            # A decoder would paint over the gap, and no frame after it is what was filmed until the next key frame.
            frames = packet.decode() if live or not reason else _rest(stream)
        except StopIteration:
            return
        except (av.InvalidDataError, av.UnknownError) as error:
            frames, reason = [], _reason(error)  # what the decoder still holds may be of after the damage
        except (av.FFmpegError, OSError) as error:
            raise InputError(f"{name}: breaks off after {count} frames ({_reason(error)}); fetch it again.") from None
        for frame in frames:
            count += 1
            yield frame
        in_a_row = in_a_row + 1 if reason else 0
        if in_a_row > (_PATIENCE if live else 0):
            raise InputError(f"{name}: cannot be decoded after {count} frames ({reason}); fetch it again.")


def _rest(stream: Any) -> list[Any]:
    """The frames that the decoder still holds."""
    try:
        return stream.codec_context.decode(None)
    except (_import_av().FFmpegError, OSError):
        return []


def _video_track(container: Any, name: str) -> Any:
    if not container.streams.video:
        raise InputError(f"{name}: has no images, only sound or text; give a video.")
    return container.streams.video[0]


def _to_rgb(frame: Any) -> np.ndarray:
    image = frame.to_ndarray(format="rgb24")
    # FFmpeg says how far to turn counter-clockwise to show the frame; numpy turns the same way.
    turns = round(getattr(frame, "rotation", 0) / 90) % 4
    return np.ascontiguousarray(np.rot90(image, turns)) if turns else image


def _camera_device(camera: str) -> tuple[str, str]:
    """What FFmpeg opens, and the name of its input for cameras on this system."""
    system = next((name for key, name in _DEVICES.items() if sys.platform.startswith(key)), None)
    if system is None:
        raise InputError(f"{CAMERA}{camera}: cameras of {sys.platform} are not known; give a network stream.")
    if system == "v4l2":
        return (f"/dev/video{camera}" if camera.isdigit() else camera), system
    if system == "dshow":  # knows names only
        av, names = _import_av(), []
        with suppress(av.FFmpegError, ValueError, AttributeError):
            names = [device.name for device in av.enumerate_input_devices(system)]
        by_number = {str(number): name for number, name in enumerate(names)}
        return f"video={by_number.get(camera, camera)}", system
    return camera, system


def _hint(name: str) -> str:
    """For a camera that is not there, those that are."""
    if not name.startswith(CAMERA):
        return ""
    there = sorted(map(str, Path("/dev").glob("video*"))) if sys.platform.startswith("linux") else []
    return f"; there is {', '.join(there)}" if there else "; is one connected, and may this user use it?"


def _reason(error: Exception) -> str:
    text = getattr(error, "strerror", None) or str(error)
    return " ".join(str(text).split())[:200] or type(error).__name__
