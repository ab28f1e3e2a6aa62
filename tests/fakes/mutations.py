"""Damage with a seed: values of JSON and YAML, bytes of headers, and the fields of a GGUF header one by one."""

from __future__ import annotations

import copy
import json
import struct
from random import Random
from typing import Any

EXTREMES: tuple[Any, ...] = (
    0,
    -1,
    1,
    2**31 - 1,
    2**31,
    2**32,
    2**53,
    2**63 - 1,
    2**63,
    2**64,
    10**30,
    -(2**63),
    0.5,
    1e308,
    -0.0,
    float("inf"),
    float("nan"),
    True,
    False,
    None,
    "",
    " ",
    "x" * 5000,
    "../../etc/passwd",
    "/etc/passwd",
    "C:\\x",
    "a\x00b",
    "\ud800",
    "\u202e",
    "(a+)+$",
    r"(\w+\.?)*!",
    "[",
    ".*.*.*.*.*.*.*.*x",
    "F16",
    "I32",
    "gptq",
    "skip",
    "nf4",
    [],
    {},
    [0],
    [[]],
    [-1, 2],
    ["a", "a"],
    {"": ""},
    {"name": "gptq"},
    {"name": []},
    {"weights": {}},
)
"""What a number, a text or a list is replaced by."""


def nested(depth: int) -> Any:
    value: Any = 1
    for level in range(depth):
        value = [value] if level % 2 else {"a": value}
    return value


def _places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every path inside a value, parents before children; long lists by their ends."""
    found = [path]
    if isinstance(value, dict):
        for key in list(value)[:200]:
            found += _places(value[key], (*path, key))
    elif isinstance(value, list):
        for index in range(min(len(value), 8)):
            found += _places(value[index], (*path, index))
    return found


def _at(value: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        value = value[key]
    return value


def mutate_value(random: Random, value: Any, times: int | None = None) -> Any:
    """A copy with one to three places replaced by an extreme, removed, renamed, swapped or spliced from elsewhere."""
    value = copy.deepcopy(value)
    for _ in range(times or random.choice((1, 1, 1, 2, 3))):
        places = [path for path in _places(value) if path]
        if not places:
            return random.choice(EXTREMES)
        path = random.choice(places)
        parent, key = _at(value, path[:-1]), path[-1]
        kind = random.randrange(9)
        if kind <= 3:
            parent[key] = copy.deepcopy(random.choice(EXTREMES))
        elif kind == 4:
            del parent[key]
        elif kind == 5 and isinstance(parent, dict):
            parent[random.choice((f"{key}x", "", str(key).upper(), "name", "__metadata__"))] = parent.pop(key)
        elif kind == 6:
            parent[key] = copy.deepcopy(_at(value, random.choice(places)))
        elif kind == 7:
            held = parent[key]
            parent[key] = random.choice((str(held), [held], {"name": held}, nested(random.choice((3, 60)))))
        elif isinstance(parent[key], int | float) and not isinstance(parent[key], bool):
            parent[key] = parent[key] * random.choice((-1, 2, 1024, 2**20, 0.5)) + random.choice((0, 1))
        else:
            parent[key] = copy.deepcopy(random.choice(EXTREMES))
    return value


def dump_json(random: Random, value: Any) -> bytes:
    """A value as JSON; now and then with a key twice, nested too deep, or cut off."""
    text = json.dumps(value)
    kind = random.randrange(20)
    if kind == 0:
        text = text[: random.randrange(len(text) + 1)]
    elif kind == 1 and text.startswith("{") and len(text) > 2:
        text = "{" + text[1:-1] + ", " + text[1:]
    elif kind == 2:
        text = "[" * random.choice((100, 100_000)) + text
    elif kind == 3:
        at = random.randrange(len(text) + 1)
        text = text[:at] + "9" * random.choice((20, 5000)) + text[at:]
    return text.encode("utf-8", "surrogatepass")


def mutate_bytes(random: Random, data: bytes, end: int | None = None) -> bytes:
    """Bits flipped, words set to extremes, pieces cut, doubled, moved or zeroed, before the byte `end`."""
    made = bytearray(data)
    for _ in range(random.choice((1, 1, 2, 4))):
        limit = max(1, min(end or len(made), len(made)))
        at = random.randrange(limit)
        size = random.choice((1, 4, 8, 8, 32))
        kind = random.randrange(8)
        if kind <= 1 and at < len(made):
            made[at] ^= 1 << random.randrange(8)
        elif kind == 2:
            made[at : at + 4] = random.choice((0, 1, 2**31, 2**32 - 1, 8, 9)).to_bytes(4, "little")
        elif kind == 3:
            word = random.choice((0, 1, 2**31, 2**32, 2**40, 2**62, 2**63, 2**64 - 1))
            made[at : at + 8] = word.to_bytes(8, "little")
        elif kind == 4:
            del made[at : len(made) if random.random() < 0.5 else at + size]
        elif kind == 5:
            made[at:at] = made[at : at + size] * random.choice((1, 2, 1000))
        elif kind == 6:
            other = random.randrange(limit)
            made[at : at + size] = made[other : other + size]
        else:
            made[at : at + size] = bytes(len(made[at : at + size]))
        if not made:
            break
    return bytes(made)


def mutate_safetensors(random: Random, data: bytes) -> bytes:
    """A safetensors file with a damaged header: its JSON changed and written again, or its bytes."""
    length = int.from_bytes(data[:8], "little")
    if random.random() < 0.25:
        return mutate_bytes(random, data, 8 + length)
    header = dump_json(random, mutate_value(random, json.loads(data[8 : 8 + length])))
    stated = len(header)
    if random.random() < 0.15:
        stated = random.choice((0, 1, stated - 1, stated + 1, 2**31, 10**8, 10**8 + 1, 2**63, 2**64 - 1)) % 2**64
    body = data[8 + length :]
    if random.random() < 0.15:
        body = mutate_bytes(random, body) if body else b"x"
    return stated.to_bytes(8, "little") + header + body


GGUF_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
STRING, ARRAY = 8, 9


class GGUFFields:
    """The header of a valid GGUF file as a list of (place, bytes, kind), and where each key and each tensor begins."""

    def __init__(self, data: bytes):
        self.data, self.at = data, 4
        self.fields: list[tuple[int, int, str]] = [(0, 4, "magic")]
        self.keys: list[tuple[int, int]] = []
        self.tensors: list[tuple[int, int]] = []
        self._number(4, "version")
        tensors, keys = self._number(8, "count"), self._number(8, "count")
        for _ in range(keys):
            start = self.at
            self._string("key")
            self._value(self._number(4, "type"))
            self.keys.append((start, self.at))
        for _ in range(tensors):
            start = self.at
            self._string("name")
            for _ in range(self._number(4, "dimensions")):
                self._number(8, "size")
            self._number(4, "type")
            self._number(8, "offset")
            self.tensors.append((start, self.at))
        self.end = self.at

    def _number(self, size: int, kind: str) -> int:
        self.fields.append((self.at, size, kind))
        self.at += size
        if self.at > len(self.data):
            raise IndexError("the header leads beyond the end")
        return int.from_bytes(self.data[self.at - size : self.at], "little")

    def _string(self, kind: str) -> None:
        length = self._number(8, "length")
        if self.at + length > len(self.data):
            raise IndexError("a text leads beyond the end")
        self.fields.append((self.at, length, kind))
        self.at += length

    def _value(self, kind: int) -> None:
        if kind == STRING:
            self._string("text")
        elif kind == ARRAY:
            item, count = self._number(4, "type"), self._number(8, "length")
            if item in GGUF_SIZES:
                self.fields.append((self.at, GGUF_SIZES[item] * count, "array"))
                self.at += GGUF_SIZES[item] * count
            else:
                for _ in range(count):
                    self._value(item)
        else:
            self._number(GGUF_SIZES[kind], "value")


def gguf_key(name: str, kind: int, content: bytes) -> bytes:
    """One key of a header. content: as the file holds it."""
    return struct.pack("<Q", len(name)) + name.encode() + struct.pack("<I", kind) + content


def _odd_value(random: Random) -> tuple[int, bytes]:
    """A value of a kind that a reader may not expect at a key."""
    kinds: list[tuple[int, bytes]] = [
        (STRING, struct.pack("<Q", 3) + b"abc"),
        (6, struct.pack("<f", random.choice((float("nan"), float("inf"), -1.0, 0.0, 1e38)))),
        (12, struct.pack("<d", random.choice((float("nan"), float("inf"), -1.0)))),
        (10, struct.pack("<Q", random.choice((0, 2**32 - 1, 2**63, 2**64 - 1)))),
        (11, struct.pack("<q", random.choice((-1, -(2**63))))),
        (4, struct.pack("<I", random.choice((0, 1, 2**31, 2**32 - 1)))),
        (7, b"\x02"),
        (ARRAY, struct.pack("<IQ", 4, 0)),
        (ARRAY, struct.pack("<IQ", 4, 2) + bytes(8)),
        (ARRAY, struct.pack("<IQ", STRING, 2) + 2 * (struct.pack("<Q", 1) + b"a")),
        (ARRAY, struct.pack("<IQ", STRING, 2**62)),
        (ARRAY, struct.pack("<IQ", 0, 2**63)),
        (ARRAY, struct.pack("<IQ", ARRAY, 1) * random.choice((2, 200, 5000)) + struct.pack("<IQ", 4, 0)),
        (ARRAY, struct.pack("<IQ", 99, 1)),
        (99, b""),
    ]
    return random.choice(kinds)


def mutate_gguf(random: Random, data: bytes) -> bytes:
    """A GGUF file with a damaged header: fields set to extremes, keys and tensors dropped, doubled or retyped."""
    if random.random() < 0.15:
        return mutate_bytes(random, data, GGUFFields(data).end)
    for _ in range(random.choice((1, 1, 2, 3))):
        try:
            found = GGUFFields(data)
        except (IndexError, KeyError, RecursionError):
            return data
        data = _mutate_field(random, data, found)
    return data


def _one_less_or_more(random: Random, made: bytearray, entries: list[tuple[int, int]], count_at: int) -> None:
    """Drop one of the entries, or double it, and let the count at this place of the header say so."""
    start, end = random.choice(entries)
    if random.random() < 0.5:
        del made[start:end]
        change = -1
    else:
        made[start:start] = made[start:end]
        change = 1
    made[count_at : count_at + 8] = (int.from_bytes(made[count_at : count_at + 8], "little") + change).to_bytes(
        8, "little"
    )


def _mutate_field(random: Random, data: bytes, found: GGUFFields) -> bytes:
    made = bytearray(data)
    kind = random.randrange(10)
    # every field is as likely as its kind is: a file has thousands of token texts and three counts
    wanted = random.choice(sorted({field[2] for field in found.fields}))
    place, size, name = random.choice([field for field in found.fields if field[2] == wanted])
    if kind <= 3 and name not in ("key", "name", "text", "array"):
        value = random.choice((0, 1, 2, 3, 8, 9, 31, 2**16, 2**31, 2**32 - 1, 2**33, 2**62, 2**63, 2**64 - 1))
        made[place : place + size] = (value % 256**size).to_bytes(size, "little")
    elif kind <= 3:
        made[place : place + size] = mutate_bytes(random, bytes(made[place : place + size] or b"\x00"))[:size].ljust(
            size, random.choice((b"\x00", b"\xff", b"a"))
        )
    elif kind <= 5 and found.keys:
        start, end = random.choice(found.keys)
        length = int.from_bytes(data[start : start + 8], "little")
        type_name, content = _odd_value(random)
        made[start + 8 + length : end] = struct.pack("<I", type_name) + content
    elif kind == 6 and found.keys:
        _one_less_or_more(random, made, found.keys, 16)
    elif kind == 7 and found.tensors:
        _one_less_or_more(random, made, found.tensors, 8)
    elif kind == 8:
        del made[random.choice((place, place + size, found.end, len(made) - 1)) :]
    else:
        other, other_size, _ = random.choice(found.fields)
        made[place : place + size] = data[other : other + other_size]
    return bytes(made)


YAML_LINES = (
    "a: &x [1, 2]\nb: *x\n",
    "<<: {name: gptq}\n",
    "x: !!python/object/apply:os.system ['true']\n",
    "!!python/name:os.system : 1\n",
    "? [a, b]\n: c\n",
    "? {a: b}\n: c\n",
    "method:\n  name: gptq\n",
    "schema_version: 999999999999999999999999999999\n",
    "seed: 1e999\n",
    "\tkey: 1\n",
    "skip: ['(a+)+$']\n",
    'overrides: {"(\\\\w+\\\\.?)*!": skip}\n',
    'overrides: {".*.*.*.*.*.*.*.*x": {bits: 8}}\n',
    "overrides: {'(?P<a>x)(?P=a)': 5}\n",
    "model: {id: ../../etc/passwd}\n",
    "calibration: {set: /etc/passwd}\n",
    "recipes: [{recipe: ../../../etc/passwd}]\n",
    "recipes: [{recipe: x, set: {a.b.c: 1}}]\n",
    "---\na: 1\n",
    "%YAML 9.9\n---\n",
    "a: !!binary aGVsbG8=\n",
    "a: !!set {b}\n",
    "a: !!timestamp 2001-01-01\n",
    "a: |\n  text\n",
    "a: 'unclosed\n",
    "[" * 3000 + "\n",
    "{a: " * 3000 + "\n",
    "- " * 3000 + "\n",
    "\x00\n",
    "\ufeff\n",
    "a: \ud800\n",
    "null: 1\n1: 2\ntrue: 3\n",
    "bench: [{name: accuracy, tasks: [], limit: -1}]\n",
)


def mutate_yaml(random: Random, text: str) -> bytes:
    """A recipe whose value is changed and written as flow YAML, or whose lines are dropped, moved or spliced."""
    import yaml

    kind = random.randrange(10)
    if kind <= 4:
        value = mutate_value(random, yaml.safe_load(text))
        return (
            dump_json(random, value)
            if random.random() < 0.5
            else yaml.safe_dump(value, allow_unicode=True).encode("utf-8", "surrogatepass")
        )
    if kind == 5:
        return mutate_bytes(random, text.encode())
    lines = text.splitlines(keepends=True)
    for _ in range(random.choice((1, 2, 3))):
        at = random.randrange(len(lines) + 1)
        change = random.randrange(6)
        if change == 0 and lines:
            del lines[min(at, len(lines) - 1)]
        elif change == 1 and lines:
            lines.insert(at, random.choice(lines))
        elif change == 2 and lines:
            at = min(at, len(lines) - 1)
            lines[at] = random.choice((" ", "  ", "\t", "- ")) + lines[at]
        elif change == 3 and lines:
            at = min(at, len(lines) - 1)
            lines[at] = lines[at].rstrip("\n") + random.choice((": x", " #", " {", "]", " 9" * 50, ": " * 9)) + "\n"
        else:
            lines.insert(at, random.choice(YAML_LINES))
    return "".join(lines).encode("utf-8", "surrogatepass")
