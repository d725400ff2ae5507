"""Triton's interpreter, more than twice as fast: imported before kernels run in it, in tests only.

It leaves out what changes no result. For every call of a device function, the interpreter replaces
the functions of `triton.language`, which it has done for that function before; and for every
operation on integers it works out whether it overflows, and drops the answer.
"""

from typing import Any

from triton.runtime import interpreter

_prepared: set[Any] = set()


def _call(function: Any, *args: Any, **kwargs: Any) -> Any:
    """Call a device function."""
    if function.fn not in _prepared:
        interpreter._patch_lang(function.fn)
        _prepared.add(function.fn)
    return function.rewrite()(*args, **kwargs)


assert not interpreter.interpreter_builder.options.debug, "overflows are reported"
interpreter.interpreter_builder.options = interpreter.InterpreterOptions(sanitize_overflow=False)
interpreter.InterpretedFunction.__call__ = _call
