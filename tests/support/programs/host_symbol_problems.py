"""What of the table of host symbols, runtime ones included, the installed host lacks."""

from program_io import emit

from moe_plugin.integration import host_checks

emit(host_checks.problems(runtime=True))
