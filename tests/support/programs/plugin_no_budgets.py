"""A plugin beside ours that leaves the budgets out: nothing is filled or checked."""


def register():
    """The same transport and experts remain."""
    from moe_plugin.integration.resolve import hooks

    hooks.fills_of = lambda server_args, plan: {}
    hooks.verify = lambda server_args, plan: plan
