"""What of the table of host symbols, runtime ones included, the installed host lacks."""

from program_io import emit

from moe_plugin.integration import host_symbols

emit(host_symbols.problems(runtime=True))
