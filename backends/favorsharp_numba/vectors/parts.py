"""Compiled functions that are only parts of others: LLVM optimises them there, and nowhere else.

Numba would also optimise each function by itself and translate it to machine code, and once more with every function
between it and a kernel (docs/design/parts-inside-kernels.md).
"""

from typing import Any

import llvmlite.binding
from numba.core import codegen, compiler
from numba.core.registry import cpu_target


class _Part(codegen.JITCodeLibrary):  # type: ignore[misc]
    """The code of a function that other code links. Only the variables that Numba sets are translated."""

    _final_module: Any

    def _optimize_final_module(self) -> None:
        code, variables = self._final_module, self.create_ir_module(self.name)
        for function in code.functions:
            if not function.is_declaration and function.linkage == llvmlite.binding.Linkage.external:
                function.linkage = "linkonce_odr"  # several parts of a kernel may contain it
        for variable in code.global_variables:
            if variable.name.startswith("_ZN08NumbaEnv"):
                cpu_target.target_context.declare_env_global(variables, variable.name)
        self._shared_module, self._final_module = code, llvmlite.binding.parse_assembly(str(variables))


class PartCompiler(compiler.Compiler):  # type: ignore[misc]
    """Numba's compiler, without optimisation and machine code of the function by itself."""

    def _compile_core(self) -> Any:
        state = self.state
        state.library = _Part(state.targetctx.codegen(), state.func_id.func_qualname)
        state.library.enable_object_caching()
        return super()._compile_core()
