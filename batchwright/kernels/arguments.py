"""Arguments of tasks in memory: stored once, and read by njit code from their address.

Arrays there are borrowed: nobody counts references of them, so they must live as long as what is
stored.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

_I64 = ir.IntType(64)


def argument_reader(*arg_types: Any) -> Any:
    """A function for njit code, of an address: the arguments, of these types, that lie there."""
    tuple_type = types.Tuple(arg_types)

    @intrinsic
    def read(typingctx: Any, address: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            pointer_type = context.get_value_type(tuple_type).as_pointer()
            value = builder.load(builder.inttoptr(args[0], pointer_type))
            value.align = 8
            return value

        return tuple_type(types.int64), codegen

    return read


@njit(cache=True)
def store_arguments(address, room, *args):  # type: ignore[no-untyped-def]
    """Put arguments at an address, for a reader; they must outlive what is there.

    Returns the bytes that they take; if these are more than `room` nothing is written.
    """
    return _store_arguments(address, room, args)


@intrinsic
def _store_arguments(typingctx: Any, address: Any, room: Any, args: Any) -> Any:
    def codegen(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        borrowed = _borrowed(context, builder, signature.args[2], values[2])
        size = _I64(context.get_abi_sizeof(borrowed.type))
        with builder.if_then(builder.icmp_signed("<=", size, values[1])):
            pointer = builder.inttoptr(values[0], borrowed.type.as_pointer())
            builder.store(borrowed, pointer).align = 8
        return size

    return types.int64(types.int64, types.int64, args), codegen


@intrinsic
def arguments_on_stack(typingctx: Any, args: Any) -> Any:
    """Address of a copy that lives as long as the calling function runs."""

    def codegen(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        borrowed = _borrowed(context, builder, signature.args[0], values[0])
        pointer = cgutils.alloca_once(builder, borrowed.type)
        builder.store(borrowed, pointer).align = 8
        return builder.ptrtoint(pointer, _I64)

    return types.int64(args), codegen


def _borrowed(context: Any, builder: Any, tuple_type: Any, value: Any) -> Any:
    """The tuple, with arrays that nobody counts references of: a reader gives none back."""
    for i, element_type in enumerate(tuple_type.types):
        if isinstance(element_type, types.Array):
            element = builder.extract_value(value, i)
            array = context.make_array(element_type)(context, builder, element)
            array.meminfo = cgutils.get_null_value(array.meminfo.type)
            array.parent = cgutils.get_null_value(array.parent.type)
            value = builder.insert_value(value, array._getvalue(), i)
    return value
