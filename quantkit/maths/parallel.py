"""Loops for all threads, compiled once where numba's `prange` compiles them four times.

numba turns a `prange` into a function, two wrappers of a generalized ufunc around it and the function that was asked
for; each holds the whole loop and goes through all of LLVM, and a body with helpers is analyzed array by array before.
Here the body is a function over some of the steps, compiled into the library of a small one beside it, which stores the
arguments and hands the body's address to numba's own scheduler.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable
from functools import update_wrapper
from pathlib import Path
from typing import Any

from llvmlite import ir
from numba import njit, types  # type: ignore[import-untyped]
from numba.core import cgutils, compiler, config, targetconfig  # type: ignore[import-untyped]
from numba.extending import intrinsic  # type: ignore[import-untyped]
from numba.np.ufunc import parallel as threads  # type: ignore[import-untyped]

FASTMATH = frozenset({"contract", "nsz"})
"""What loops may do to a sum where they say so: fuse a multiplication with it and lose the sign of a zero, but never
reorder it."""

_LONG, _BYTES = ir.IntType(64), ir.IntType(8).as_pointer()
_WORDS = _LONG.as_pointer()
_WORKER = ir.FunctionType(ir.VoidType(), [_BYTES.as_pointer(), _WORDS, _WORDS, _BYTES])
_SCHEDULER = ir.FunctionType(ir.VoidType(), [_BYTES] * 5 + [_LONG] * 3)

BEGIN, END, FAILED, WORDS = range(4)
"""What is kept of each share: its first step, the one behind its last, whether it had no memory; and how much that is.
"""


def ready_threads() -> None:
    """Name numba's threads to the compiler; code from the cache does so when it is loaded."""
    threads._launch_threads()


def _word(builder: Any, words: Any, at: int) -> Any:
    return builder.gep(words, [ir.Constant(_LONG, at)])


def _share(builder: Any, schedule: Any, number: Any) -> Any:
    return builder.gep(schedule, [builder.mul(number, ir.Constant(_LONG, WORDS))])


def _compiled(context: Any, body: Callable[..., None], given: tuple[Any, ...]) -> Any:
    """The descriptor of a body compiled into the library that is being made, with that one's options."""
    flags = targetconfig.ConfigStack().top().copy()
    flags.noalias = True
    flags.no_compile = flags.no_cpython_wrapper = flags.no_cfunc_wrapper = True
    library = context.active_code_library
    return compiler.compile_internal(
        context.typing_context, context, library, body, given, types.none, flags, {}
    ).fndesc


def _borrowed(context: Any, builder: Any, kind: Any, value: Any) -> Any:
    """An argument whose memory nobody counts references to, which would take longer than a short loop."""
    if not isinstance(kind, types.Array):
        return value
    array = context.make_array(kind)(context, builder, value)
    for owner in ("meminfo", "parent"):
        setattr(array, owner, ir.Constant(getattr(array, owner).type, None))
    return array._getvalue()


def _worker(context: Any, builder: Any, descriptor: Any, given: tuple[Any, ...], memory: Any) -> Any:
    """The function that a thread calls for some shares in a row, as a generalized ufunc: it takes the arguments out of
    memory and calls the body for each share that has steps."""
    function = ir.Function(builder.module, _WORKER, f"{descriptor.mangled_name}.share")
    function.linkage = "internal"
    own = ir.IRBuilder(function.append_basic_block())
    places, sizes, _, there = function.args
    shares, there = own.bitcast(own.load(places), _WORDS), own.bitcast(there, memory.type)
    values = [
        _borrowed(context, own, kind, own.load(cgutils.gep_inbounds(own, there, 0, at)))
        for at, kind in enumerate(given[2:])
    ]
    body = context.declare_function(builder.module, descriptor)
    with cgutils.for_range(own, own.load(sizes)) as loop:
        share = _share(own, shares, loop.index)
        begin, end = (own.load(_word(own, share, at)) for at in (BEGIN, END))
        with own.if_then(own.icmp_signed("<", begin, end)):
            status, _ = context.call_conv.call_function(own, body, types.none, given, [begin, end, *values])
            own.store(own.zext(status.is_error, _LONG), _word(own, share, FAILED))
    own.ret_void()
    return function


def _share_out(context: Any, builder: Any, worker: Any, count: Any, memory: Any) -> Any:
    """Let every thread call the worker for its share of the steps; how many shares failed. There are as many shares as
    threads, empty ones among them, since that is how numba's schedulers are called otherwise."""
    none, one = ir.Constant(_LONG, 0), ir.Constant(_LONG, 1)
    number = cgutils.get_or_insert_function(builder.module, ir.FunctionType(_LONG, []), "get_num_threads")
    shares = builder.call(number, [])
    schedule = builder.alloca(_LONG, builder.mul(shares, ir.Constant(_LONG, WORDS)))
    with cgutils.for_range(builder, shares) as loop:
        share, behind = _share(builder, schedule, loop.index), builder.add(loop.index, one)
        for at, turn in ((BEGIN, loop.index), (END, behind)):
            builder.store(builder.sdiv(builder.mul(count, turn), shares), _word(builder, share, at))
        builder.store(none, _word(builder, share, FAILED))
    arguments, size, step = (cgutils.alloca_once(builder, kind) for kind in (_BYTES, _LONG, _LONG))
    builder.store(builder.bitcast(schedule, _BYTES), arguments)
    builder.store(shares, size)
    builder.store(ir.Constant(_LONG, WORDS * 8), step)
    scheduler = cgutils.get_or_insert_function(builder.module, _SCHEDULER, "numba_parallel_for")
    given = [builder.bitcast(place, _BYTES) for place in (worker, arguments, size, step, memory)]
    builder.call(scheduler, [*given, none, one, shares])  # no inner dimension, one array
    failed = cgutils.alloca_once_value(builder, none)
    with cgutils.for_range(builder, shares) as loop:
        own = builder.load(_word(builder, _share(builder, schedule, loop.index), FAILED))
        builder.store(builder.add(builder.load(failed), own), failed)
    return builder.load(failed)


def _spread(body: Callable[..., None]) -> Any:
    """The intrinsic (count, source, arguments) that shares `count` steps of a body out, whatever the source; it gives
    the number of shares that failed."""

    def spread(typing_context: Any, count: Any, source: Any, arguments: Any) -> Any:
        given = (types.intp, types.intp, *arguments.types)

        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            ready_threads()
            context.active_code_library._reload_init.add(ready_threads)
            descriptor = _compiled(context, body, given)
            values = cgutils.unpack_tuple(builder, args[2])
            memory = cgutils.alloca_once(builder, ir.LiteralStructType([value.type for value in values]))
            for at, value in enumerate(values):
                builder.store(value, cgutils.gep_inbounds(builder, memory, 0, at))
            return _share_out(context, builder, _worker(context, builder, descriptor, given, memory), args[0], memory)

        return types.intp(types.intp, source, arguments), generate

    return intrinsic(spread)


def _source() -> int:
    """A number of what all loops and their helpers are written like: the modules beside this one that know numba."""
    files = sorted(file for file in Path(__file__).parent.glob("[!.]*.py") if file.is_file())
    texts = [file.read_bytes() for file in files]
    loops = [text for text in texts if b"numba" in text or b"maths.parallel" in text]
    return int.from_bytes(hashlib.sha256(b"\0".join(loops)).digest()[:7])


SOURCE = _source()
"""Code that numba kept is of one file alone, and is taken for new where a helper has changed that it was compiled with:
so each loop carries this number with it."""


def parallel(fastmath: frozenset[str] = frozenset()) -> Callable[[Callable[..., None]], Any]:
    """Compile a body (begin, end, ...), the steps of a loop from one to behind another, into a function (count, ...)
    that shares steps 0 to count out among the threads of numba, while other threads of Python go on.

    Steps have to be independent of each other: in which order they come, and in which thread, is not said. No
    element that is written may be one of another array as well, which loops are vectorized by. Division by zero gives
    infinity. Compiled code is kept beside the body's file, as numba keeps it; with $NUMBA_DISABLE_JIT the body is
    called as it is. Raises MemoryError where a body has no memory, the only error that it may have, and TypeError for a
    body inside a function whose variables it uses.
    """

    def made(body: Callable[..., None]) -> Any:
        if body.__closure__:
            raise TypeError(f"{body.__qualname__}: what is kept of a loop cannot tell the variables around it apart")
        if config.DISABLE_JIT:  # type: ignore[attr-defined]
            return lambda count, *given, **named: body(0, count, *given, **named)
        names = ", ".join(list(inspect.signature(body).parameters)[2:])
        text = (
            f"def outer(source):\n    def share_out(count, {names}):\n"
            f"        if spread(count, source, ({names},)):\n            raise MemoryError\n    return share_out"
        )
        code, scope = body.__code__, {"spread": _spread(body)}
        exec(text, scope)  # noqa: S102 # it is the line above
        function = scope["outer"](SOURCE)
        # numba finds what it kept by file, line and name
        function.__code__ = function.__code__.replace(
            co_filename=code.co_filename, co_firstlineno=code.co_firstlineno, co_name=code.co_name
        )
        update_wrapper(function, body)
        del function.__wrapped__  # which has another signature
        return _alone(njit(cache=True, nogil=True, fastmath=set(fastmath), error_model="numpy")(function))

    return made


def _alone(loop: Any) -> Any:
    """A loop that only Python calls. What numba kept of it comes with the form that other compiled functions would link
    it in, a tenth of a megabyte or two for each loop; that is let go. (A process that compiles a loop holds it.)"""
    add = loop.add_overload

    def add_overload(compiled: Any) -> None:
        compiled.library._shared_module = None  # numba makes it anew where it has compiled the loop and now keeps it
        add(compiled)

    loop.add_overload = add_overload
    return loop


@njit(inline="always")  # type: ignore[untyped-decorator]
def long_and_short(at: int, count: int) -> int:
    """Rows of a triangle, long ones and short ones in turns, so that threads that get a piece each have alike."""
    return count - 1 - at // 2 if at % 2 else at // 2
