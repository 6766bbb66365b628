"""Any JSON file, in any of JSON's encodings."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from pydantic import ConfigDict, TypeAdapter

from detector.errors import InputError

_ANYTHING: TypeAdapter[Any] = TypeAdapter(Any, config=ConfigDict(cache_strings="keys"))


def read_json(path: str | Path, what: str, object_hook: Callable[[dict[str, Any]], Any] | None = None) -> Any:
    """The content of a JSON file in UTF-8, UTF-16 or UTF-32, with a byte order mark or without.

    Args:
        path: the file.
        what: what a message calls it: "annotation file".
        object_hook: given each object as soon as it is parsed, as in `json.loads`.

    Raises:
        InputError: the file cannot be read, or is not JSON.
    """
    collecting = gc.isenabled()
    # Millions of new objects and no garbage: the collector would look at all of them again and again.
    gc.disable()
    try:
        content = Path(path).read_bytes()
        if object_hook is None:
            # In two thirds of the time. pydantic knows UTF-8 alone, without a mark: json has the last word.
            with suppress(ValueError):
                return _ANYTHING.validate_json(content)
        return json.loads(content, object_hook=object_hook)  # bytes: json finds out the encoding
    except (FileNotFoundError, IsADirectoryError) as error:
        raise InputError(f"{path}: no such {what}; check the path.") from error
    except OSError as error:
        raise InputError(f"{path}: this {what} cannot be read ({error.strerror}); check the path.") from error
    except RecursionError:
        raise InputError(f"{path}: lists or objects too deep inside each other for JSON of any use here.") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: byte {error.start} of this {what} is no UTF-8; save the file as UTF-8.") from error
    except ValueError as error:
        raise InputError(
            f"{path}: not valid JSON ({error}); the file is damaged or incomplete, fetch it again."
        ) from error
    finally:
        if collecting:
            gc.enable()
