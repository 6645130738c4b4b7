"""Hints to the processor: fetch a cache line of an array before it is needed, where it cannot guess which is next."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic


def _hint(builder: Any, context: Any, signature: Any, args: Any, *, write: int) -> Any:
    """Emit the hint for ``array[position]``; it never fails, whatever the position."""
    data = context.make_array(signature.args[0])(context, builder, args[0]).data
    byte = ir.IntType(8).as_pointer()
    whole = ir.IntType(32)
    kind = ir.FunctionType(ir.VoidType(), [byte, whole, whole, whole])
    function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0i8")
    for_write, keep, data_cache = (ir.Constant(whole, value) for value in (write, 3, 1))
    address = builder.bitcast(builder.gep(data, [args[1]]), byte)
    builder.call(function, [address, for_write, keep, data_cache])
    return context.get_dummy_value()


def _for_reading(typingctx: Any, array: Any, position: Any) -> Any:
    """Ask for the cache line that holds ``array[position]``, to read it."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return _hint(builder, context, signature, args, write=0)

    return types.void(array, position), codegen


def _for_writing(typingctx: Any, array: Any, position: Any) -> Any:
    """Ask for the cache line that holds ``array[position]``, to write it."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return _hint(builder, context, signature, args, write=1)

    return types.void(array, position), codegen


prefetch: Any = intrinsic(_for_reading)
prefetch_to_write: Any = intrinsic(_for_writing)
